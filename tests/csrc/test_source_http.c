/* sources: source/source.c source/source_http.c source/http_fields.c source/tls_files.c base/status.c */
/* libs: libcurl libssl libcrypto */
/* The HTTP source over plain HTTP from a few lines of server, with a clock of our own: what the time-outs count. All other
 * behaviour is tested from Python (tests/core/test_source_http.py), where a server is easier to script. */
#include "check.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "source/source.h"

/* ---- The clock: stands still unless a test moves it ---- */

static atomic_ullong fake_now = 1000000;
static atomic_ullong tick_ms; /* it moves so far each time it is read */
static pthread_mutex_t looks_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t looks_changed = PTHREAD_COND_INITIALIZER;
static int looks; /* how often it was read */

static uint64_t look(void *user) {
    (void)user;
    pthread_mutex_lock(&looks_lock);
    looks++;
    pthread_cond_broadcast(&looks_changed);
    pthread_mutex_unlock(&looks_lock);
    return atomic_fetch_add(&fake_now, tick_ms) + tick_ms;
}

const ota_clock ota_port_clock = {.now_ms = look, .user = NULL};

static void reset_looks(void) {
    pthread_mutex_lock(&looks_lock);
    looks = 0;
    pthread_mutex_unlock(&looks_lock);
}

static void wait_for_looks(int count) {
    pthread_mutex_lock(&looks_lock);
    while (looks < count) {
        pthread_cond_wait(&looks_changed, &looks_lock);
    }
    pthread_mutex_unlock(&looks_lock);
}

/* ---- What the client asks the socket for: this takes the place of the C library's `recv`; the server reads by `read` ---- */

static atomic_size_t most_received;

ssize_t recv(int fd, void *buf, size_t len, int flags) {
    size_t most = most_received;
    while (len > most && !atomic_compare_exchange_weak(&most_received, &most, len)) {
    }
    return recvfrom(fd, buf, len, flags, NULL, NULL);
}

/* ---- The server: one connection, one answer in two parts ---- */

typedef struct server {
    int listener;
    char url[64];
    pthread_t thread;
    const char *first;
    int looks; /* the second part is sent once the clock was read so often since reset_looks */
    const char *second;
} server;

static void send_all(int fd, const char *text) {
    size_t len = strlen(text);
    while (len > 0) {
        ssize_t n = send(fd, text, len, MSG_NOSIGNAL);
        if (n <= 0) {
            return;
        }
        text += n;
        len -= (size_t)n;
    }
}

static void *serve(void *user) {
    server *self = user;
    char request[4096];
    int fd = accept(self->listener, NULL, NULL);
    if (fd >= 0 && read(fd, request, sizeof request) > 0) {
        send_all(fd, self->first);
        if (self->second != NULL) {
            wait_for_looks(self->looks);
            send_all(fd, self->second);
        }
        while (read(fd, request, sizeof request) > 0) { /* until the client is gone */
        }
    }
    close(fd);
    return NULL;
}

static void server_start(server *self) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    self->listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(bind(self->listener, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQ(listen(self->listener, 1), 0);
    CHECK_EQ(getsockname(self->listener, (struct sockaddr *)&address, &len), 0);
    snprintf(self->url, sizeof self->url, "http://127.0.0.1:%d/x?secret", ntohs(address.sin_port));
    CHECK_EQ(pthread_create(&self->thread, NULL, serve, self), 0);
}

static void server_stop(server *self, ota_source **source) {
    ota_source_free(source);
    pthread_join(self->thread, NULL);
    close(self->listener);
}

#define HEAD "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"

TEST(a_slow_reader_is_no_stall) {
    /* Looks of a read that finds nothing: its deadline, its bandwidth limit, and the one at the begin of a wait. Bytes come
     * only after that one: had it counted the hour before the read, it would have given up. */
    server it = {.first = HEAD "01234", .second = "56789", .looks = 3};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t buf[16];
    size_t len;
    reset_looks();
    pthread_mutex_lock(&looks_lock);
    looks = -1000000; /* not before we say so */
    pthread_mutex_unlock(&looks_lock);
    server_start(&it);
    const ota_http_options options = {.url = it.url, .allow_http = true, .proxy = "", .stall_timeout_ms = 60000};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(info.size, 10);
    for (size_t got = 0; got < 5; got += len) {
        CHECK_EQ(source->ops->read(source, buf + got, 5 - got, &len, &error), OTA_OK);
    }
    CHECK_MEM(buf, "01234", 5);
    fake_now += 3600000;
    reset_looks();
    CHECK_EQ(source->ops->read(source, buf, sizeof buf, &len, &error), OTA_OK);
    CHECK(len > 0 && buf[0] == '5');
    CHECK(strcmp(error.text, "") == 0);
    server_stop(&it, &source);
}

TEST(a_stall_is_a_wait_of_its_whole_length) {
    /* The clock moves a second with each look: the reader gives up once it saw 60 pass, however little it waited. */
    server it = {.first = HEAD "01234"};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t buf[16];
    size_t len;
    server_start(&it);
    const ota_http_options options = {.url = it.url, .allow_http = true, .proxy = "", .stall_timeout_ms = 1};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    tick_ms = 0;
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    for (size_t got = 0; got < 5; got += len) {
        CHECK_EQ(source->ops->read(source, buf + got, 5 - got, &len, &error), OTA_OK);
    }
    tick_ms = 1000;
    CHECK_EQ(source->ops->read(source, buf, sizeof buf, &len, &error), OTA_ERR_STALLED);
    CHECK_EQ(len, 0);
    CHECK_EQ(error.offset, 5);
    CHECK(strstr(error.text, "secret") == NULL);
    CHECK(strstr(error.text, "http://127.0.0.1:") == error.text);
    tick_ms = 0;
    server_stop(&it, &source);
}

TEST(the_deadline_counts_from_open_even_when_bytes_are_there) {
    server it = {.first = HEAD "0123456789"};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, again = {0};
    uint8_t buf[16];
    size_t len;
    server_start(&it);
    const ota_http_options options = {.url = it.url, .allow_http = true, .proxy = "", .deadline_ms = 5000};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    fake_now += 100000; /* before open nothing counts */
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    fake_now += 4999;
    CHECK_EQ(source->ops->read(source, buf, 1, &len, &error), OTA_OK);
    fake_now += 1;
    CHECK_EQ(source->ops->read(source, buf, 1, &len, &error), OTA_ERR_DEADLINE);
    CHECK_EQ(error.offset, 1);
    CHECK_EQ(source->ops->read(source, buf, 1, &len, &again), OTA_ERR_DEADLINE);
    CHECK_EQ(again.offset, 1);
    server_stop(&it, &source);
}

TEST(a_limited_reader_gets_what_the_clock_allows) {
    server it = {.first = HEAD "0123456789"};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t buf[16];
    size_t len, total = 0;
    ota_status status;
    server_start(&it);
    const ota_http_options options = {.url = it.url, .allow_http = true, .proxy = "", .max_bytes_per_s = 100};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    const uint64_t begin = fake_now;
    tick_ms = 1;
    while ((status = source->ops->read(source, buf, sizeof buf, &len, &error)) == OTA_OK) {
        total += len;
        CHECK(total * 1000 <= 100 * (fake_now - begin));
    }
    tick_ms = 0;
    CHECK_EQ(status, OTA_DONE);
    CHECK_EQ(total, 10);
    server_stop(&it, &source);
}

static void *cancel_it(void *source) {
    ota_source *it = source;
    it->ops->cancel(it);
    return NULL;
}

TEST(cancel_from_another_thread_ends_a_wait) {
    server it = {.first = HEAD "01234"};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t buf[16];
    size_t len;
    pthread_t thread;
    ota_status status;
    server_start(&it);
    const ota_http_options options = {.url = it.url, .allow_http = true, .proxy = ""};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, cancel_it, source), 0);
    while ((status = source->ops->read(source, buf, sizeof buf, &len, &error)) == OTA_OK) {
    }
    CHECK_EQ(status, OTA_ERR_CANCELLED);
    pthread_join(thread, NULL);
    CHECK_EQ(source->ops->read(source, buf, sizeof buf, &len, NULL), OTA_ERR_CANCELLED);
    source->ops->close(source);
    CHECK_EQ(source->ops->open(source, 0, &info, NULL), OTA_ERR_CANCELLED);
    server_stop(&it, &source);
}

TEST(options_that_cannot_be_are_refused_when_it_is_made) {
    const struct {
        ota_http_options options;
        ota_status status;
    } cases[] = {
        {{.url = NULL}, OTA_ERR_ARGUMENT},
        {{.url = "https://h/?secret", .ca_pem = "x"}, OTA_ERR_HTTP_TLS_FILE},
        {{.url = "https://h/", .client_key_file = "k"}, OTA_ERR_ARGUMENT},
        {{.url = "http://h/?secret"}, OTA_ERR_HTTP_INSECURE},
        {{.url = "ftp://h/?secret", .allow_http = true}, OTA_ERR_HTTP_URL},
        {{.url = "h/?secret"}, OTA_ERR_HTTP_URL},
        {{.url = ""}, OTA_ERR_HTTP_URL},
        {{.url = "https://u:secret@h:port/"}, OTA_ERR_HTTP_URL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_source *source = NULL;
        ota_error error = {0};
        CHECK_EQ(ota_source_http_new(&cases[i].options, &source, &error), cases[i].status);
        CHECK(source == NULL);
        CHECK_EQ(error.stage, OTA_STAGE_SOURCE);
        CHECK(strstr(error.text, "secret") == NULL);
    }
}

TEST(no_more_is_taken_at_once_than_the_receive_buffer_holds) {
    static const struct {
        uint32_t option;
        size_t most;
    } cases[] = {{1024, 1024}, {1, 1024}, {5000, 5000}, {0, 256 * 1024}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        server peer = {.first = HEAD "0123456789"};
        ota_source_info info;
        ota_error error = {0};
        ota_source *source = NULL;
        uint8_t buf[65536];
        size_t len = 0;
        server_start(&peer);
        most_received = 0;
        ota_http_options options = {
            .url = peer.url, .allow_http = true, .proxy = "", .receive_buffer = cases[i].option};
        CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
        CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
        CHECK_EQ(source->ops->read(source, buf, sizeof buf, &len, &error), OTA_OK);
        CHECK_EQ(len, 10);
        CHECK_EQ(most_received, cases[i].most);
        server_stop(&peer, &source);
    }
}

TEST(nothing_is_read_from_a_closed_source) {
    ota_source *source = NULL;
    ota_error error = {0};
    uint8_t byte;
    size_t len = 5;
    const ota_http_options options = {.url = "https://user:secret@localhost/", .connect_to = "a:1:b:2"};
    CHECK_EQ(ota_source_http_new(&options, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_ERR_STATE);
    CHECK_EQ(len, 0);
    source->ops->close(source);
    ota_source_free(&source);
}

int main(void) {
    RUN(a_slow_reader_is_no_stall);
    RUN(a_stall_is_a_wait_of_its_whole_length);
    RUN(the_deadline_counts_from_open_even_when_bytes_are_there);
    RUN(a_limited_reader_gets_what_the_clock_allows);
    RUN(cancel_from_another_thread_ends_a_wait);
    RUN(options_that_cannot_be_are_refused_when_it_is_made);
    RUN(no_more_is_taken_at_once_than_the_receive_buffer_holds);
    RUN(nothing_is_read_from_a_closed_source);
    return DONE();
}
