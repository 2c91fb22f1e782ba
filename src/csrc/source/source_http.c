/* One object by HTTP(S) GET with libcurl's multi interface, pulled: bytes move only while somebody waits in `read`, straight
 * from curl's write callback into the reader's buffer. What does not fit there waits in `spill` (at most one callback's worth),
 * what comes after that is left paused in curl and in the socket: a slow sink slows the server down.
 *
 *     state      open                      read                        close
 *     CLOSED     OPEN, or CLOSED + error   error                       CLOSED
 *     OPEN       error                     OPEN, or FAILED + error     CLOSED
 *     FAILED     error                     the same error again        CLOSED
 *
 * `open` runs one request after another (redirects; once more without a range) until an answer can be used. Rules:
 *
 *     asked for  answer                                       result
 *     all        200                                          from 0
 *     from N     206, range N..total-1 of total, and the
 *                same entity tag if If-Range was sent         from N
 *     from N     200                                          from 0, this very answer
 *     from N     416, any other 206                           once more from the first URL, without a range
 *     any        301 302 303 307 308                          the next URL, https never to anything but https
 *     any        anything else                                error
 *
 * Threads: one reader. Only `cancel` comes from elsewhere; it sets a flag and wakes the two places the reader can wait in.
 * What the time-outs measure: connecting and the TLS handshake by curl's own clock; a stall only while the reader waits and
 * the request is out; the deadline from open on, whenever the reader is here. Queries of URLs never get into a text. */
#include "source/http_fields.h"
#include "source/rate.h"
#include "source/source_common.h"
#include "source/tls_files.h"

#include <ctype.h>
#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>

#if LIBCURL_VERSION_NUM < 0x075700
#error "libcurl 7.87 or newer is needed"
#endif

#ifndef OTA_VERSION
#define OTA_VERSION "0"
#endif

enum {
    CONNECT_TIMEOUT_MS = 5000,
    STALL_TIMEOUT_MS = 60000,
    MAX_REDIRECTS = 10,
    KEEP_ALIVE_IDLE_S = 5, /* the ESP client's: 5 s, 5 s, 3 probes */
    KEEP_ALIVE_INTERVAL_S = 5,
    KEEP_ALIVE_PROBES = 3,
    RECEIVE_BUFFER = 256 * 1024,  /* of curl; only plain http gets more than a TLS record at once */
    MAX_HEADER_BYTES = 64 * 1024, /* of one answer */
    MAX_LOCATION = 16 * 1024,
    MAX_DRAINED = 16 * 1024, /* bytes of an unwanted body that are read to keep the connection */
    MAX_WAIT_MS = 60000,
    READ_AHEAD =
        64 * 1024, /* ciphertext OpenSSL takes from the socket at once: four records in place of half a one, which
                               saves a receive call and an acknowledgement each (measured over 512 MiB: 8 % of the CPU
                               seconds, 9 % of the wall time; 128 KiB is no better) */
    UNPROVEN_WAIT_MS = 20, /* until this curl was seen to follow a nudge: slow, but never stuck */
    SHOWN_URL = 120,
};

typedef enum http_state {
    HTTP_CLOSED,
    HTTP_OPEN,
    HTTP_FAILED,
} http_state;

/* What the fields of the answer being received say. */
typedef struct http_answer {
    long code;
    bool complete; /* the empty line came */
    size_t header_bytes;
    bool has_length, bad_length, has_coding; /* Content-Length; Transfer-Encoding, which overrides it */
    uint64_t length;
    bool has_range;
    bool bad_range; /* malformed, or two that differ */
    ota_http_range range;
    size_t entity_tags; /* how many there were */
    char entity_tag[sizeof((ota_source_info *)0)->entity_tag];
    char *location;
    bool bad_header; /* too much of it */
    bool no_memory;
} http_answer;

typedef struct http_source {
    ota_source base;
    /* configuration, constant after new */
    char *url; /* without user and password */
    char *user, *password;
    char *ca_file, *ca_pem;
    char *client_cert_file, *client_key_file;
    char *proxy;
    char *user_agent;
    struct curl_slist *connect_to;
    bool allow_http, skip_common_name_check;
    long connect_timeout_ms;
    long receive_buffer;
    uint64_t stall_timeout_ms, deadline_ms, max_bytes_per_s;
    uint32_t max_redirects;

    CURLM *multi;
    CURL *easy;
    char reason[CURL_ERROR_SIZE];

    http_state state;
    ota_error kept;
    char entity_tag[sizeof((ota_source_info *)0)->entity_tag]; /* last known strong one; "": none */
    uint64_t deadline;                                         /* UINT64_MAX: none */

    /* the request */
    CURLU *target;
    char shown[SHOWN_URL]; /* its URL as far as it may be shown */
    struct curl_slist *fields;
    bool running;  /* the handle is in the multi */
    bool sent;     /* connected, and the request is on its way */
    bool finished; /* curl is done with it: `result` */
    CURLcode result;
    http_answer answer;
    bool wanted;  /* the body is ours, not that of an error page */
    bool secure;  /* https */
    bool goodbye; /* TLS ended as it should */

    /* the body */
    uint64_t position; /* of the next byte handed out, from the start of the object */
    uint64_t end;      /* position behind the last byte; OTA_SIZE_UNKNOWN: where the server ends */
    uint8_t *buf;      /* the reader's buffer, while it is in read */
    size_t capacity, len;
    size_t spill_at, spill_len;
    bool paused;
    uint64_t drained;
    uint64_t arrivals;  /* counts everything that came from the server: proof of life */
    uint64_t nudged_at; /* what had come when curl was nudged last; UINT64_MAX: not since */
    bool just_nudged, nudge_works;
    ota_rate rate;

    /* waiting: a stall is counted from where a wait first found nothing new, so a reader that is elsewhere does not count */
    uint64_t quiet_since_ms;
    uint64_t seen_arrivals; /* what had come by then */
    atomic_bool cancelled;
    pthread_mutex_t lock; /* guards nothing but the condition: a limited reader sleeps on it */
    pthread_cond_t cancel;

    uint8_t spill[CURL_MAX_WRITE_SIZE];
} http_source;

static uint64_t now_ms(void) {
    return ota_port_clock.now_ms(ota_port_clock.user);
}

/* ---- Errors ------------------------------------------------------------------------------------------------------ */

/* Keeps the error, with the URL before it, and hands it out. */
static ota_status __attribute__((format(printf, 5, 6)))
fail(http_source *self, ota_error *error, ota_status status, int64_t device_code, const char *format, ...) {
    if (self->kept.status == OTA_OK) {
        char text[sizeof self->kept.text];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        for (char *c = text; *c != '\0'; c++) {
            if ((unsigned char)*c < 0x20 || *c == 0x7F) {
                *c = '?'; /* some of it may be the server's words */
            }
        }
        ota_error_set(&self->kept, status, OTA_STAGE_SOURCE, self->position, device_code, "%s: %s", self->shown, text);
    }
    return ota_source_repeat(&self->kept, error);
}

static ota_status fail_memory(http_source *self, ota_error *error) {
    return fail(self, error, OTA_ERR_NO_MEMORY, ENOMEM, "out of memory");
}

/* Why curl gave up. The certificate's fault is the server's, whatever stage of the handshake it came up in. */
static ota_status fail_tls(http_source *self, ota_error *error) {
    long verdict = X509_V_OK;
    curl_easy_getinfo(self->easy, CURLINFO_SSL_VERIFYRESULT, &verdict);
    bool judged = verdict != X509_V_OK && verdict != X509_V_ERR_UNSPECIFIED; /* curl begins with the latter */
    if (!judged && self->result == CURLE_PEER_FAILED_VERIFICATION) {
        verdict = X509_V_ERR_HOSTNAME_MISMATCH; /* the one thing curl checks itself */
        judged = true;
    }
    if (!judged) {
        return fail(self, error, OTA_ERR_HTTP_TLS, 0, "TLS: %s",
                    self->reason[0] ? self->reason : curl_easy_strerror(self->result));
    }
    bool about_time = verdict == X509_V_ERR_CERT_HAS_EXPIRED || verdict == X509_V_ERR_CERT_NOT_YET_VALID;
    return fail(self, error, OTA_ERR_HTTP_TLS, verdict, "the server's certificate is not accepted: %s%s",
                X509_verify_cert_error_string(verdict), about_time ? " by this machine's clock" : "");
}

static ota_status fail_curl(http_source *self, ota_error *error) {
    long errnum = 0;
    curl_easy_getinfo(self->easy, CURLINFO_OS_ERRNO, &errnum);
    const char *reason = self->reason[0] ? self->reason : curl_easy_strerror(self->result);
    switch (self->result) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
        return fail(self, error, OTA_ERR_HTTP_RESOLVE, 0, "%s", reason);
    case CURLE_COULDNT_CONNECT:
    case CURLE_INTERFACE_FAILED:
    case CURLE_PROXY:
        return fail(self, error, OTA_ERR_HTTP_CONNECT, errnum, "%s", reason);
    case CURLE_OPERATION_TIMEDOUT:
        return fail(self, error, self->sent ? OTA_ERR_STALLED : OTA_ERR_HTTP_CONNECT_TIMEOUT, 0, "%s", reason);
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_SSL_ENGINE_NOTFOUND:
    case CURLE_SSL_ENGINE_SETFAILED:
    case CURLE_SSL_CIPHER:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_ENGINE_INITFAILED:
    case CURLE_SSL_SHUTDOWN_FAILED:
    case CURLE_SSL_CRL_BADFILE:
    case CURLE_SSL_ISSUER_ERROR:
    case CURLE_SSL_PINNEDPUBKEYNOTMATCH:
    case CURLE_SSL_INVALIDCERTSTATUS:
    case CURLE_SSL_CLIENTCERT:
        return fail_tls(self, error);
    case CURLE_SSL_CERTPROBLEM: /* they were there when the source was made */
    case CURLE_SSL_CACERT_BADFILE:
        return fail(self, error, OTA_ERR_HTTP_TLS_FILE, 0, "%s", reason);
    case CURLE_GOT_NOTHING:
        return fail(self, error, OTA_ERR_HTTP_NO_RESPONSE, 0, "the server closed the connection without an answer");
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
        if (!self->sent) {
            long proxy_code = 0;
            curl_easy_getinfo(self->easy, CURLINFO_HTTP_CONNECTCODE, &proxy_code);
            return fail(self, error, OTA_ERR_HTTP_CONNECT, proxy_code >= 300 ? proxy_code : errnum, "%s", reason);
        }
        return fail(self, error, self->answer.header_bytes == 0 ? OTA_ERR_HTTP_NO_RESPONSE : OTA_ERR_HTTP_CLOSED,
                    errnum, "%s", reason);
    case CURLE_PARTIAL_FILE:
        return fail(self, error, OTA_ERR_HTTP_CLOSED, 0, "%s", reason);
    case CURLE_OUT_OF_MEMORY:
        return fail_memory(self, error);
    case CURLE_URL_MALFORMAT:
        return fail(self, error, OTA_ERR_HTTP_URL, 0, "the URL cannot be used");
    default:
        return fail(self, error, OTA_ERR_HTTP_PROTOCOL, 0, "%s", reason);
    }
}

/* ---- What curl calls --------------------------------------------------------------------------------------------- */

static int on_connected(void *user, char *ip, char *local_ip, int port, int local_port) {
    http_source *self = user;
    (void)ip, (void)local_ip, (void)port, (void)local_port;
    self->sent = true;
    self->arrivals++;
    self->base.requests++;
    return CURL_PREREQFUNC_OK;
}

static int on_socket(void *user, curl_socket_t fd, curlsocktype purpose) {
    (void)user;
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (purpose ==
        CURLSOCKTYPE_IPCXN) { /* best effort: without keep-alive the stall time-out still ends a dead connection */
        const int on = 1, idle = KEEP_ALIVE_IDLE_S, interval = KEEP_ALIVE_INTERVAL_S, probes = KEEP_ALIVE_PROBES;
        (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
        (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    }
    return CURL_SOCKOPT_OK;
}

/* Without length and chunks only TLS's goodbye, close_notify, tells the end of a body from a cut (RFC 9112, 9.8). curl does
 * not look for it, so we listen for the alert. */
static int tls_owner_index;

static void on_tls_event(const SSL *ssl, int where, int value) {
    if ((where & SSL_CB_READ_ALERT) == SSL_CB_READ_ALERT && (value & 0xFF) == SSL_AD_CLOSE_NOTIFY) {
        http_source *self = SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), tls_owner_index);
        self->goodbye = true;
    }
}

/* Not behind an https proxy: the outer TLS would read ahead too, and what it holds back nobody could see. */
static bool may_read_ahead(const http_source *self) {
    static const char *const names[] = {"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"};
    const char *proxy = self->proxy;
    for (size_t i = 0; proxy == NULL && i < sizeof names / sizeof names[0]; i++) {
        proxy = getenv(names[i]);
    }
    return proxy == NULL || strncasecmp(proxy, "https:", 6) != 0;
}

static CURLcode on_tls(CURL *easy, void *context, void *user) {
    (void)easy;
    if (SSL_CTX_set_ex_data(context, tls_owner_index, user) != 1) {
        return CURLE_OUT_OF_MEMORY;
    }
    SSL_CTX_set_info_callback(context, on_tls_event);
    const http_source *self = user;
    if (may_read_ahead(self)) {
        SSL_CTX_set_read_ahead(context, 1);
        SSL_CTX_set_default_read_buffer_len(context, self->receive_buffer < READ_AHEAD ? (size_t)self->receive_buffer
                                                                                       : (size_t)READ_AHEAD);
    }
    return CURLE_OK;
}

static void answer_clear(http_answer *answer) {
    free(answer->location);
    memset(answer, 0, sizeof *answer);
}

static void note_field(http_answer *answer, const char *line, size_t len) {
    const char *value;
    size_t value_len;
    if (ota_http_field(line, len, "Content-Range", &value, &value_len)) {
        ota_http_range range;
        if (!ota_http_parse_content_range(value, value_len, &range) ||
            (answer->has_range && (range.first != answer->range.first || range.last != answer->range.last ||
                                   range.total != answer->range.total))) {
            answer->bad_range = true;
        } else {
            answer->has_range = true;
            answer->range = range;
        }
    } else if (ota_http_field(line, len, "Content-Length", &value, &value_len)) {
        uint64_t length;
        if (!ota_http_parse_length(value, value_len, &length) || (answer->has_length && length != answer->length)) {
            answer->bad_length = true;
        } else {
            answer->has_length = true;
            answer->length = length;
        }
    } else if (ota_http_field(line, len, "Transfer-Encoding", &value, &value_len)) {
        answer->has_coding = true;
    } else if (ota_http_field(line, len, "ETag", &value, &value_len)) {
        if (++answer->entity_tags == 1) {
            ota_http_parse_entity_tag(value, value_len, answer->entity_tag, sizeof answer->entity_tag);
        } else {
            answer->entity_tag[0] = '\0'; /* which one? */
        }
    } else if (ota_http_field(line, len, "Location", &value, &value_len) && answer->location == NULL) {
        if (value_len > MAX_LOCATION) {
            answer->bad_header = true;
        } else if ((answer->location = strndup(value, value_len)) == NULL) {
            answer->no_memory = true;
        }
    }
}

/* Bytes of the body as announced; OTA_SIZE_UNKNOWN: not announced. */
static uint64_t body_length(const http_answer *answer) {
    return answer->has_length && !answer->has_coding ? answer->length : OTA_SIZE_UNKNOWN;
}

/* One line of an answer's header. Returning anything but the length ends the transfer. */
static size_t on_header(char *line, size_t size, size_t count, void *user) {
    http_source *self = user;
    http_answer *answer = &self->answer;
    size_t len = size * count;
    self->arrivals++;
    answer->header_bytes += len;
    if (answer->header_bytes > MAX_HEADER_BYTES) {
        answer->bad_header = true;
    } else if (answer->complete) {
        /* a trailer of a chunked body: nothing in it concerns us */
    } else if (len <= 2 && (line[0] == '\r' || line[0] == '\n')) {
        curl_easy_getinfo(self->easy, CURLINFO_RESPONSE_CODE, &answer->code);
        if (answer->code >= 200) {
            answer->complete = true;
            self->wanted = answer->code == 200 || answer->code == 206;
        } else {
            answer_clear(answer); /* the real one follows */
        }
    } else {
        note_field(answer, line, len);
    }
    return answer->bad_header || answer->no_memory ? 0 : len;
}

static size_t on_body(char *data, size_t size, size_t count, void *user) {
    http_source *self = user;
    size_t len = size * count;
    self->arrivals++;
    if (!self->wanted) {
        self->drained += len;
        return self->drained > MAX_DRAINED ? 0 : len;
    }
    size_t room = self->capacity - self->len;
    size_t direct = self->spill_len > 0 ? 0 : len < room ? len : room;
    size_t rest = len - direct;
    if (rest > 0 && (self->spill_len > 0 || rest > sizeof self->spill)) {
        self->paused = true;
        return CURL_WRITEFUNC_PAUSE;
    }
    if (direct > 0) {
        memcpy(self->buf + self->len, data, direct);
        self->len += direct;
    }
    if (rest > 0) {
        memcpy(self->spill, data + direct, rest);
        self->spill_at = 0;
        self->spill_len = rest;
    }
    return len;
}

/* ---- Moving ------------------------------------------------------------------------------------------------------ */

/* Lets curl do what it can without waiting. */
static ota_status perform(http_source *self, ota_error *error) {
    int running = 0, left = 0;
    uint64_t before = self->arrivals;
    CURLMcode code = curl_multi_perform(self->multi, &running);
    self->nudge_works = self->nudge_works || (self->just_nudged && self->arrivals != before);
    self->just_nudged = false;
    if (code != CURLM_OK) {
        return code == CURLM_OUT_OF_MEMORY
                   ? fail_memory(self, error)
                   : fail(self, error, OTA_ERR_HTTP_PROTOCOL, 0, "%s", curl_multi_strerror(code));
    }
    if (running == 0) {
        for (CURLMsg *message; (message = curl_multi_info_read(self->multi, &left)) != NULL;) {
            if (message->msg == CURLMSG_DONE) {
                self->finished = true;
                self->result = message->data.result;
            }
        }
    }
    return OTA_OK;
}

static ota_status check_deadline(http_source *self, uint64_t now, ota_error *error) {
    if (self->cancelled) {
        return ota_source_cancelled(error, self->position);
    }
    if (now >= self->deadline) {
        return fail(self, error, OTA_ERR_DEADLINE, 0, "not done within %llu ms", (unsigned long long)self->deadline_ms);
    }
    return OTA_OK;
}

/* With read-ahead, records can lie in OpenSSL's buffer while the socket has nothing to say, and curl asks the socket alone. */
static bool holds_back(const http_source *self) {
    struct curl_tlssessioninfo *info = NULL;
    return self->secure && curl_easy_getinfo(self->easy, CURLINFO_TLS_SSL_PTR, &info) == CURLE_OK && info != NULL &&
           info->backend == CURLSSLBACKEND_OPENSSL && info->internals != NULL && SSL_has_pending(info->internals) == 1;
}

/* Makes curl look at such records: a transfer that is resumed is read whatever the socket says. False: nothing is held
 * back, or it was tried since the last arrival, and what lies there is the beginning of a record. */
static bool nudge(http_source *self) {
    if (self->arrivals == self->nudged_at || !holds_back(self)) {
        return false;
    }
    self->nudged_at = self->arrivals;
    self->just_nudged = true;
    curl_easy_pause(self->easy, CURLPAUSE_RECV);
    curl_easy_pause(self->easy, CURLPAUSE_CONT);
    return true;
}

/* Waits until the socket, a timer of curl's, a time-out of ours or `cancel` has something to say. */
static ota_status wait(http_source *self, ota_error *error) {
    if (nudge(self)) {
        return OTA_OK;
    }
    uint64_t now = now_ms();
    if (self->arrivals != self->seen_arrivals) {
        self->seen_arrivals = self->arrivals;
        self->quiet_since_ms = now;
    }
    ota_status status = check_deadline(self, now, error);
    if (status != OTA_OK) {
        return status;
    }
    uint64_t most = MAX_WAIT_MS;
    if (self->sent) {
        uint64_t quiet = now - self->quiet_since_ms;
        if (quiet >= self->stall_timeout_ms) {
            return fail(self, error, OTA_ERR_STALLED, 0, "no byte came for %llu ms",
                        (unsigned long long)self->stall_timeout_ms);
        }
        most = self->stall_timeout_ms - quiet < most ? self->stall_timeout_ms - quiet : most;
    }
    most = self->deadline - now < most ? self->deadline - now : most;
    if (!self->nudge_works && most > UNPROVEN_WAIT_MS && holds_back(self)) {
        most = UNPROVEN_WAIT_MS;
        self->nudged_at = UINT64_MAX;
    }
    CURLMcode code = curl_multi_poll(self->multi, NULL, 0, (int)most, NULL);
    if (code != CURLM_OK && code != CURLM_WAKEUP_FAILURE) {
        return fail(self, error, OTA_ERR_HTTP_PROTOCOL, 0, "%s", curl_multi_strerror(code));
    }
    return self->cancelled ? ota_source_cancelled(error, self->position) : OTA_OK;
}

/* ---- One request ------------------------------------------------------------------------------------------------- */

static void end_request(http_source *self) {
    if (self->running) {
        curl_multi_remove_handle(self->multi, self->easy);
        self->running = false;
    }
    curl_easy_setopt(self->easy, CURLOPT_HTTPHEADER, NULL);
    curl_slist_free_all(self->fields);
    self->fields = NULL;
    answer_clear(&self->answer);
    self->spill_len = 0;
    self->paused = false;
}

static bool add_field(http_source *self, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool add_field(http_source *self, const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    struct curl_slist *longer = curl_slist_append(self->fields, line);
    self->fields = longer != NULL ? longer : self->fields;
    return longer != NULL;
}

static bool has_scheme(CURLU *url, const char *scheme) {
    char *found = NULL;
    bool same = curl_url_get(url, CURLUPART_SCHEME, &found, 0) == CURLUE_OK && strcasecmp(found, scheme) == 0;
    curl_free(found);
    return same;
}

/* Asks self->target for the bytes from `offset` on and returns once the header of an answer is there. */
static ota_status request(http_source *self, uint64_t offset, ota_error *error) {
    end_request(self);
    self->sent = self->finished = self->wanted = self->goodbye = false;
    self->arrivals++;
    self->secure = has_scheme(self->target, "https");
    self->drained = 0;
    self->reason[0] = '\0';
    bool ok = add_field(self, "Accept-Encoding: identity");
    if (offset > 0) {
        ok = ok && add_field(self, "Range: bytes=%llu-", (unsigned long long)offset);
        if (self->entity_tag[0] != '\0') {
            ok = ok && add_field(self, "If-Range: %s", self->entity_tag);
        }
    }
    char *url = NULL;
    if (!ok || curl_url_get(self->target, CURLUPART_URL, &url, 0) != CURLUE_OK) {
        return fail_memory(self, error);
    }
    ota_http_public_url(url, self->shown, sizeof self->shown);
    CURLcode set = curl_easy_setopt(self->easy, CURLOPT_URL, url);
    curl_free(url);
    curl_easy_setopt(self->easy, CURLOPT_HTTPHEADER, self->fields);
    if (set != CURLE_OK || curl_multi_add_handle(self->multi, self->easy) != CURLM_OK) {
        return fail_memory(self, error);
    }
    self->running = true;
    for (;;) {
        ota_status status = perform(self, error);
        if (status != OTA_OK) {
            return status;
        }
        if (self->answer.no_memory) {
            return fail_memory(self, error);
        }
        if (self->answer.bad_header) {
            return fail(self, error, OTA_ERR_HTTP_PROTOCOL, self->answer.code, "the answer's header is too long");
        }
        if (self->answer.bad_length) {
            return fail(self, error, OTA_ERR_HTTP_PROTOCOL, self->answer.code,
                        "the Content-Length cannot be understood");
        }
        if (self->answer.complete) {
            return OTA_OK; /* a body that failed already: what came is handed out, then the reader hears of it */
        }
        if (self->finished) {
            return self->result == CURLE_OK ? fail(self, error, OTA_ERR_HTTP_PROTOCOL, 0, "no answer")
                                            : fail_curl(self, error);
        }
        status = wait(self, error);
        if (status != OTA_OK) {
            return status;
        }
    }
}

/* Reads the rest of a small unwanted body, so that the next request to this server needs no new handshake. */
static ota_status drain(http_source *self, ota_error *error) {
    while (!self->finished && body_length(&self->answer) <= MAX_DRAINED) {
        ota_status status = perform(self, error);
        if (status == OTA_OK && !self->finished) {
            status = wait(self, error);
        }
        if (status != OTA_OK) {
            return status;
        }
    }
    return OTA_OK; /* however it ended: the answer was understood */
}

/* ---- From answer to answer --------------------------------------------------------------------------------------- */

static bool same_part(CURLU *a, CURLU *b, CURLUPart part) {
    char *x = NULL, *y = NULL;
    bool same = curl_url_get(a, part, &x, CURLU_DEFAULT_PORT) == CURLUE_OK &&
                curl_url_get(b, part, &y, CURLU_DEFAULT_PORT) == CURLUE_OK && strcasecmp(x, y) == 0;
    curl_free(x);
    curl_free(y);
    return same;
}

static void set_credentials(http_source *self, bool trusted) {
    curl_easy_setopt(self->easy, CURLOPT_USERNAME, trusted ? self->user : NULL);
    curl_easy_setopt(self->easy, CURLOPT_PASSWORD, trusted ? self->password : NULL);
    curl_easy_setopt(self->easy, CURLOPT_SSLCERT, trusted ? self->client_cert_file : NULL);
    curl_easy_setopt(self->easy, CURLOPT_SSLKEY, trusted ? self->client_key_file : NULL);
}

/* Makes the answer's Location the next target. */
static ota_status follow(http_source *self, ota_error *error) {
    if (self->answer.location == NULL || self->answer.location[0] == '\0') {
        return fail(self, error, OTA_ERR_HTTP_REDIRECT, self->answer.code, "a redirect without a target");
    }
    CURLU *next = curl_url_dup(self->target);
    if (next == NULL) {
        return fail_memory(self, error);
    }
    ota_status status = OTA_OK;
    CURLUcode code = curl_url_set(next, CURLUPART_URL, self->answer.location,
                                  CURLU_URLENCODE | CURLU_ALLOW_SPACE | CURLU_NON_SUPPORT_SCHEME);
    if (code == CURLUE_OUT_OF_MEMORY) {
        status = fail_memory(self, error);
        goto out;
    }
    if (code != CURLUE_OK) {
        status = fail(self, error, OTA_ERR_HTTP_REDIRECT, self->answer.code, "a redirect to what is no URL");
        goto out;
    }
    bool from_https = has_scheme(self->target, "https");
    if (has_scheme(next, "http") ? from_https || !self->allow_http : !has_scheme(next, "https")) {
        char *scheme = NULL;
        curl_url_get(next, CURLUPART_SCHEME, &scheme, 0);
        status =
            fail(self, error, from_https && has_scheme(next, "http") ? OTA_ERR_HTTP_DOWNGRADE : OTA_ERR_HTTP_REDIRECT,
                 self->answer.code, "a redirect from %s to %.20s was refused", from_https ? "https" : "http",
                 scheme ? scheme : "?");
        curl_free(scheme);
        goto out;
    }
    curl_url_set(next, CURLUPART_USER, NULL, 0);
    curl_url_set(next, CURLUPART_PASSWORD, NULL, 0);
    if (!same_part(self->target, next, CURLUPART_HOST) || !same_part(self->target, next, CURLUPART_PORT) ||
        has_scheme(next, "https") != from_https) {
        set_credentials(self, false);
    }
    CURLU *old = self->target;
    self->target = next;
    next = old;
out:
    curl_url_cleanup(next);
    return status;
}

static bool usable_range(const http_source *self, uint64_t offset) {
    const http_answer *answer = &self->answer;
    uint64_t len = body_length(answer);
    return answer->has_range && !answer->bad_range && answer->range.first == offset &&
           answer->range.total != OTA_SIZE_UNKNOWN && answer->range.last == answer->range.total - 1 &&
           (len == OTA_SIZE_UNKNOWN || len == answer->range.total - offset) &&
           (self->entity_tag[0] == '\0' || offset == 0 || strcmp(self->entity_tag, answer->entity_tag) == 0);
}

static bool is_redirect(long code) {
    return code == 301 || code == 302 || code == 303 || code == 307 || code == 308;
}

static ota_status begin_at_first_url(http_source *self, ota_error *error) {
    curl_url_cleanup(self->target);
    self->target = curl_url();
    if (self->target == NULL || curl_url_set(self->target, CURLUPART_URL, self->url, 0) != CURLUE_OK) {
        return fail_memory(self, error);
    }
    set_credentials(self, true);
    return OTA_OK;
}

/* Request after request until an answer's body can be used. *begins: where it does. */
static ota_status find_answer(http_source *self, uint64_t offset, uint64_t *begins, ota_error *error) {
    ota_status status = begin_at_first_url(self, error);
    uint32_t redirects = 0;
    while (status == OTA_OK) {
        status = request(self, offset, error);
        if (status != OTA_OK) {
            break;
        }
        long code = self->answer.code;
        if (code == 200) {
            *begins = 0;
            return OTA_OK;
        }
        if (code == 206 && usable_range(self, offset)) {
            *begins = offset;
            return OTA_OK;
        }
        if (is_redirect(code)) {
            if (++redirects > self->max_redirects) {
                return fail(self, error, OTA_ERR_HTTP_REDIRECT, code, "more than %u redirects", self->max_redirects);
            }
            status = drain(self, error);
            if (status == OTA_OK) {
                status = follow(self, error);
            }
        } else if (offset > 0 && (code == 206 || code == 416)) {
            offset = 0;
            redirects = 0;
            status = code == 416 ? drain(self, error) : OTA_OK;
            if (status == OTA_OK) {
                status = begin_at_first_url(self, error);
            }
        } else if (code == 206) {
            return fail(self, error, OTA_ERR_HTTP_RANGE, code, "a part was sent where the whole was asked for");
        } else if (code == 304) {
            return fail(self, error, OTA_ERR_HTTP_NOT_MODIFIED, code, "the server answered 304 not modified");
        } else {
            return fail(self, error, OTA_ERR_HTTP_STATUS, code, "the server answered with status %ld", code);
        }
    }
    return status;
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

static void http_close(ota_source *source) {
    http_source *self = (http_source *)source;
    end_request(self);
    self->state = HTTP_CLOSED;
    memset(&self->kept, 0, sizeof self->kept);
}

static ota_status http_open(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error) {
    http_source *self = (http_source *)source;
    if (self->state != HTTP_CLOSED) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, 0, 0, "the source is open already");
    }
    if (self->cancelled) {
        return ota_source_cancelled(error, offset);
    }
    uint64_t now = now_ms(), begins = 0;
    self->deadline =
        self->deadline_ms == 0 || self->deadline_ms > UINT64_MAX - now ? UINT64_MAX : now + self->deadline_ms;
    self->position = offset;
    self->buf = NULL;
    self->capacity = self->len = 0;
    ota_status status = find_answer(self, offset, &begins, error);
    if (status != OTA_OK) {
        http_close(source);
        return status;
    }
    memset(info, 0, sizeof *info);
    info->offset = begins;
    info->size = self->answer.code == 206 ? self->answer.range.total : body_length(&self->answer);
    memcpy(info->entity_tag, self->answer.entity_tag, sizeof info->entity_tag);
    memcpy(self->entity_tag, self->answer.entity_tag, sizeof self->entity_tag);
    self->position = begins;
    self->end = info->size;
    self->state = HTTP_OPEN;
    ota_rate_start(&self->rate, self->max_bytes_per_s, now_ms());
    return OTA_OK;
}

/* Waits until the bandwidth limit allows some of `*capacity` bytes, and cuts it down to those. */
static ota_status wait_for_rate(http_source *self, size_t *capacity, ota_error *error) {
    ota_status status = OTA_OK;
    while (status == OTA_OK) {
        uint64_t wait_ms, now = now_ms();
        uint64_t granted = ota_rate_grant(&self->rate, *capacity, now, &wait_ms);
        if (granted > 0) {
            *capacity = (size_t)granted;
            break;
        }
        wait_ms = self->deadline - now < wait_ms ? self->deadline - now : wait_ms;
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        uint64_t ns = (uint64_t)until.tv_nsec + wait_ms % 1000 * 1000000;
        until.tv_sec += (time_t)(wait_ms / 1000 + ns / 1000000000);
        until.tv_nsec = (long)(ns % 1000000000);
        pthread_mutex_lock(&self->lock);
        while (!self->cancelled && pthread_cond_timedwait(&self->cancel, &self->lock, &until) != ETIMEDOUT) {
        }
        pthread_mutex_unlock(&self->lock);
        status = check_deadline(self, now_ms(), error);
    }
    return status;
}

/* The transfer is over and everything that came was handed out: was it all? */
static ota_status conclude(http_source *self, ota_error *error) {
    if (self->result != CURLE_OK) {
        return fail_curl(self, error);
    }
    if (self->end != OTA_SIZE_UNKNOWN && self->position < self->end) {
        return fail(self, error, OTA_ERR_HTTP_CLOSED, 0, "the connection closed at %llu of %llu bytes",
                    (unsigned long long)self->position, (unsigned long long)self->end);
    }
    if (self->end == OTA_SIZE_UNKNOWN && !self->answer.has_coding && self->secure && !self->goodbye) {
        return fail(self, error, OTA_ERR_HTTP_CLOSED, 0, "the connection closed at %llu bytes, and not as TLS demands",
                    (unsigned long long)self->position);
    }
    return OTA_DONE;
}

static void take_spill(http_source *self) {
    size_t len = self->spill_len < self->capacity ? self->spill_len : self->capacity;
    memcpy(self->buf, self->spill + self->spill_at, len);
    self->len = len;
    self->spill_at += len;
    self->spill_len -= len;
}

/* Fills the reader's buffer; returns as soon as there is something and nothing more without waiting. */
static ota_status fill(http_source *self, ota_error *error) {
    take_spill(self);
    while (self->len < self->capacity && !self->finished) {
        uint64_t before = self->arrivals;
        if (self->paused) {
            self->paused = false;
            CURLcode code = curl_easy_pause(self->easy, CURLPAUSE_CONT); /* hands out what it holds, here and now */
            if (code != CURLE_OK) {
                self->finished = true;
                self->result = code;
                break;
            }
        }
        ota_status status = perform(self, error);
        if (status != OTA_OK) {
            return status;
        }
        if (self->arrivals == before && !self->finished && !nudge(self)) {
            if (self->len > 0) {
                return OTA_OK;
            }
            status = wait(self, error);
            if (status != OTA_OK) {
                return status;
            }
        }
    }
    if (self->end != OTA_SIZE_UNKNOWN && self->len > self->end - self->position) {
        return fail(self, error, OTA_ERR_HTTP_PROTOCOL, 0, "more bytes came than the announced %llu",
                    (unsigned long long)self->end);
    }
    return self->len > 0 ? OTA_OK : conclude(self, error);
}

static ota_status http_read(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error) {
    http_source *self = (http_source *)source;
    *len = 0;
    if (self->cancelled) {
        return ota_source_cancelled(error, self->position);
    }
    if (self->state == HTTP_FAILED) {
        return ota_source_repeat(&self->kept, error);
    }
    if (self->state == HTTP_CLOSED || capacity == 0) {
        return ota_error_set(error, capacity == 0 ? OTA_ERR_ARGUMENT : OTA_ERR_STATE, OTA_STAGE_SOURCE, self->position,
                             0, capacity == 0 ? "no room to read into" : "the source is not open");
    }
    ota_status status = check_deadline(self, now_ms(), error);
    if (status == OTA_OK) {
        status = wait_for_rate(self, &capacity, error);
    }
    if (status == OTA_OK) {
        self->buf = buf;
        self->capacity = capacity;
        self->len = 0;
        status = fill(self, error);
        *len = self->len;
        self->buf = NULL;
        self->capacity = self->len = 0;
    }
    if (status < 0) {
        *len = 0;
        self->state = self->kept.status != OTA_OK ? HTTP_FAILED : self->state;
        return status;
    }
    self->position += *len;
    source->bytes_read += *len;
    ota_rate_spend(&self->rate, *len);
    return status;
}

static void http_cancel(ota_source *source) {
    http_source *self = (http_source *)source;
    pthread_mutex_lock(&self->lock);
    self->cancelled = true;
    pthread_cond_broadcast(&self->cancel);
    pthread_mutex_unlock(&self->lock);
    curl_multi_wakeup(self->multi);
}

static void wipe(char *secret) {
    if (secret != NULL) {
        explicit_bzero(secret, strlen(secret));
    }
    free(secret);
}

static void http_free(ota_source *source) {
    http_source *self = (http_source *)source;
    if (self->easy != NULL) {
        end_request(self);
    }
    curl_easy_cleanup(self->easy);
    curl_multi_cleanup(self->multi);
    curl_url_cleanup(self->target);
    curl_slist_free_all(self->connect_to);
    pthread_cond_destroy(&self->cancel);
    pthread_mutex_destroy(&self->lock);
    wipe(self->url);
    wipe(self->user);
    wipe(self->password);
    free(self->ca_file);
    free(self->ca_pem);
    free(self->client_cert_file);
    free(self->client_key_file);
    wipe(self->proxy);
    free(self->user_agent);
    free(self);
}

static const ota_source_ops http_ops = {
    .open = http_open, .read = http_read, .cancel = http_cancel, .close = http_close, .free = http_free};

/* ---- Making one -------------------------------------------------------------------------------------------------- */

static bool global_ready;

static void global_init(void) {
    if (curl_global_init(CURL_GLOBAL_DEFAULT) == CURLE_OK) {
        /* on_tls is handed what belongs to curl's TLS library: it had better be ours */
        const char *tls = curl_version_info(CURLVERSION_NOW)->ssl_version;
        tls_owner_index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, NULL);
        global_ready = tls != NULL && strncmp(tls, "OpenSSL/", 8) == 0 && tls_owner_index >= 0;
    }
}

/* Takes the URL apart: scheme allowed, user and password out of it. */
static ota_status take_url(http_source *self, const char *text, ota_error *error) {
    ota_http_public_url(text, self->shown, sizeof self->shown);
    CURLU *url = curl_url();
    char *clean = NULL, *user = NULL, *password = NULL;
    ota_status status = OTA_OK;
    if (url == NULL) {
        return fail_memory(self, error);
    }
    CURLUcode code = curl_url_set(url, CURLUPART_URL, text, CURLU_NON_SUPPORT_SCHEME);
    if (code != CURLUE_OK) {
        status = fail(self, error, OTA_ERR_HTTP_URL, 0, "the URL cannot be used: %s", curl_url_strerror(code));
        goto out;
    }
    if (has_scheme(url, "http") && !self->allow_http) {
        status = fail(self, error, OTA_ERR_HTTP_INSECURE, 0, "plain http is not allowed");
        goto out;
    }
    if (!has_scheme(url, "http") && !has_scheme(url, "https")) {
        status = fail(self, error, OTA_ERR_HTTP_URL, 0, "the URL must begin with https://");
        goto out;
    }
    curl_url_get(url, CURLUPART_USER, &user, CURLU_URLDECODE);
    curl_url_get(url, CURLUPART_PASSWORD, &password, CURLU_URLDECODE);
    if (curl_url_set(url, CURLUPART_USER, NULL, 0) != CURLUE_OK ||
        curl_url_set(url, CURLUPART_PASSWORD, NULL, 0) != CURLUE_OK ||
        curl_url_get(url, CURLUPART_URL, &clean, 0) != CURLUE_OK || (self->url = strdup(clean)) == NULL ||
        (user != NULL && (self->user = strdup(user)) == NULL) ||
        (password != NULL && (self->password = strdup(password)) == NULL)) {
        status = fail_memory(self, error);
    }
out:
    curl_free(clean);
    curl_free(user);
    curl_free(password);
    curl_url_cleanup(url);
    return status;
}

static bool copy_string(char **to, const char *from) {
    return from == NULL || (*to = strdup(from)) != NULL;
}

/* What OpenSSL offers anyway, AES-128 first as browsers have it: 10 rounds in place of 14 (measured over 512 MiB: 2 % of the
 * CPU seconds). A server that wants AES-256 chooses it. */
#define TLS13_CIPHERS "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

static ota_status set_up(http_source *self) {
    CURL *easy = self->easy;
    CURLcode code = CURLE_OK;
#define SET(option, value) (code = code != CURLE_OK ? code : curl_easy_setopt(easy, (option), (value)))
    SET(CURLOPT_ERRORBUFFER, self->reason);
    SET(CURLOPT_NOSIGNAL, 1L);
    SET(CURLOPT_QUICK_EXIT, 1L); /* cancel does not wait for a name server */
    SET(CURLOPT_PROTOCOLS_STR, self->allow_http ? "http,https" : "https");
    SET(CURLOPT_FOLLOWLOCATION, 0L);
    /* Not HTTP/2: one stream gains nothing by it. 512 MiB from nginx cost 0.43 CPU s by HTTP/2, 0.39 by HTTP/1.1 (2-core x86).
     * Read-ahead in OpenSSL was no better either: 8 times fewer system calls, but copying twice ate what that saved. */
    SET(CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    SET(CURLOPT_USERAGENT, self->user_agent != NULL ? self->user_agent : "rmaker-ota/" OTA_VERSION);
    SET(CURLOPT_HTTPAUTH, CURLAUTH_BASIC);
    SET(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    SET(CURLOPT_CONNECTTIMEOUT_MS, self->connect_timeout_ms);
    SET(CURLOPT_BUFFERSIZE, self->receive_buffer);
    SET(CURLOPT_HEADERFUNCTION, on_header);
    SET(CURLOPT_HEADERDATA, self);
    SET(CURLOPT_WRITEFUNCTION, on_body);
    SET(CURLOPT_WRITEDATA, self);
    SET(CURLOPT_PREREQFUNCTION, on_connected);
    SET(CURLOPT_PREREQDATA, self);
    SET(CURLOPT_SOCKOPTFUNCTION, on_socket);
    SET(CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
    SET(CURLOPT_SSL_CTX_FUNCTION, on_tls);
    SET(CURLOPT_SSL_CTX_DATA, self);
    SET(CURLOPT_TLS13_CIPHERS, TLS13_CIPHERS);
    SET(CURLOPT_SSL_VERIFYPEER, 1L);
    SET(CURLOPT_SSL_VERIFYHOST, self->skip_common_name_check ? 0L : 2L);
    if (self->ca_pem != NULL || self->ca_file != NULL) {
        /* Trust what was named and nothing beside it. It is quicker too: the system's 143 certificates take 25 ms to load
         * for each connection, until the header of the answer is there it is 5 ms without them. */
        SET(CURLOPT_CAPATH, NULL);
        SET(CURLOPT_CAINFO, self->ca_pem != NULL ? NULL : self->ca_file);
    }
    if (self->ca_pem != NULL) {
        struct curl_blob blob = {.data = self->ca_pem, .len = strlen(self->ca_pem), .flags = CURL_BLOB_NOCOPY};
        SET(CURLOPT_CAINFO_BLOB, &blob);
    }
    if (self->proxy != NULL) {
        SET(CURLOPT_PROXY, self->proxy);
    }
    if (self->connect_to != NULL) {
        SET(CURLOPT_CONNECT_TO, self->connect_to);
    }
#undef SET
    return code == CURLE_OK ? OTA_OK : OTA_ERR_NO_MEMORY;
}

ota_status ota_source_http_new(const ota_http_options *options, ota_source **out, ota_error *error) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, global_init);
    if (options->url == NULL || (options->client_key_file != NULL && options->client_cert_file == NULL)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SOURCE, 0, 0,
                             options->url == NULL ? "no URL" : "a client key without a client certificate");
    }
    if (!global_ready) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_SOURCE, 0, 0, "this libcurl does not use OpenSSL");
    }
    ota_status status = ota_tls_files_check(options->ca_file, options->ca_pem, options->client_cert_file,
                                            options->client_key_file, error);
    if (status != OTA_OK) {
        return status;
    }
    http_source *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "making an HTTP source");
    }
    self->base.ops = &http_ops;
    self->nudged_at = UINT64_MAX;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->cancel, &monotonic);
    pthread_condattr_destroy(&monotonic);

    self->allow_http = options->allow_http;
    self->skip_common_name_check = options->skip_common_name_check;
    self->connect_timeout_ms =
        options->connect_timeout_ms != 0 ? (long)options->connect_timeout_ms : CONNECT_TIMEOUT_MS;
    self->stall_timeout_ms = options->stall_timeout_ms != 0 ? options->stall_timeout_ms : STALL_TIMEOUT_MS;
    self->receive_buffer = options->receive_buffer != 0 ? (long)options->receive_buffer : RECEIVE_BUFFER;
    self->deadline_ms = options->deadline_ms;
    self->max_bytes_per_s = options->max_bytes_per_s;
    self->max_redirects = options->max_redirects != 0 ? options->max_redirects : MAX_REDIRECTS;
    if (options->entity_tag != NULL) {
        ota_http_parse_entity_tag(options->entity_tag, strlen(options->entity_tag), self->entity_tag,
                                  sizeof self->entity_tag);
    }
    status = take_url(self, options->url, error);
    if (status == OTA_OK) {
        bool ok = copy_string(&self->ca_file, options->ca_file) && copy_string(&self->ca_pem, options->ca_pem) &&
                  copy_string(&self->client_cert_file, options->client_cert_file) &&
                  copy_string(&self->client_key_file, options->client_key_file) &&
                  copy_string(&self->proxy, options->proxy) && copy_string(&self->user_agent, options->user_agent);
        if (ok && options->connect_to != NULL) {
            self->connect_to = curl_slist_append(NULL, options->connect_to);
            ok = self->connect_to != NULL;
        }
        self->easy = ok ? curl_easy_init() : NULL;
        self->multi = self->easy != NULL ? curl_multi_init() : NULL;
        if (self->multi == NULL || set_up(self) != OTA_OK) {
            status = fail_memory(self, error);
        }
    }
    if (status != OTA_OK) {
        http_free(&self->base);
        return status;
    }
    *out = &self->base;
    return OTA_OK;
}
