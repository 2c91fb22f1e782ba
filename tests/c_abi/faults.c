/* A program whose callbacks do what they should not.
 *
 *     faults NODE.toml MODE
 *
 * Modes: what the job callback, or main(), does once a job has come. Each line on standard output is a step reached. */
#include <esp_rmaker_ota.h>
#include <rmaker_ota_host.h>

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *mode;
static const char *config_file;
static sem_t downloading; /* posted when the built-in handler reports that it downloads */
static sem_t called;      /* posted when the job callback is about to return */
static const char *kept;  /* what it must not keep */

static bool is(const char *name) {
    return strcmp(mode, name) == 0;
}

static void must(const char *what, esp_err_t found, esp_err_t expected) {
    if (found != expected) {
        printf("%s: %s, expected %s (%s)\n", what, esp_err_to_name(found), esp_err_to_name(expected),
               rmaker_ota_last_error());
        fflush(stdout);
        _exit(99);
    }
}

static void on_signal(int number) {
    (void)number;
    rmaker_ota_wake();
}

static void at_exit(void) {
    printf("exit handler\n");
}

static void on_event(void *arg, esp_event_base_t base, int32_t id, void *data, size_t size) {
    (void)arg, (void)size;
    if (base == RMAKER_OTA_EVENT && data != NULL && strcmp(data, "Downloading Firmware Image") == 0) {
        printf("downloading\n");
        sem_post(&downloading);
        if (is("event-exits")) {
            exit(5);
        }
    }
    (void)id;
}

static void call_everything(esp_rmaker_ota_handle_t handle, esp_rmaker_ota_data_t *job) {
    esp_rmaker_ota_config_t config = {0};
    rmaker_ota_info_t info;
    rmaker_ota_end_t end;
    must("enable", esp_rmaker_ota_enable(&config, OTA_USING_TOPICS), ESP_FAIL);
    must("enable_default", esp_rmaker_ota_enable_default(), ESP_FAIL);
    must("report", esp_rmaker_ota_report_status(handle, OTA_STATUS_IN_PROGRESS, NULL), ESP_OK);
    must("report nonsense", esp_rmaker_ota_report_status(handle, (ota_status_t)77, "?"), ESP_OK);
    must("https without url", esp_rmaker_ota_https_cb(handle, &(esp_rmaker_ota_data_t){0}), ESP_FAIL);
    must("default with a foreign handle", esp_rmaker_ota_default_cb(NULL, job), ESP_FAIL);
    must("default without data", esp_rmaker_ota_default_cb(handle, NULL), ESP_ERR_INVALID_ARG);
    must("fetch", esp_rmaker_ota_fetch(), ESP_OK);
    must("fetch later", esp_rmaker_ota_fetch_with_delay(3600), ESP_OK);
    must("valid", esp_rmaker_ota_mark_valid(), ESP_ERR_INVALID_STATE);
    must("invalid", esp_rmaker_ota_mark_invalid(), ESP_ERR_INVALID_STATE);
    must("open", rmaker_ota_open(config_file), ESP_ERR_INVALID_STATE);
    must("start", rmaker_ota_start(), ESP_ERR_INVALID_STATE);
    must("info", rmaker_ota_info(&info), ESP_OK);
    must("wait", rmaker_ota_wait(0, &end), ESP_ERR_TIMEOUT);
    must("log", rmaker_ota_set_log(RMAKER_OTA_LOG_DEBUG, NULL, NULL), ESP_OK);
    must("unregister", rmaker_ota_event_handler_unregister(NULL, RMAKER_OTA_ANY_EVENT, on_event), ESP_OK);
    must("register", rmaker_ota_event_handler_register(NULL, RMAKER_OTA_ANY_EVENT, on_event, NULL), ESP_OK);
    must("stop", rmaker_ota_stop(), ESP_OK);
    must("stop again", rmaker_ota_stop(), ESP_ERR_INVALID_STATE);
    printf("called everything\n");
    sem_post(&called);
}

static esp_err_t on_job(esp_rmaker_ota_handle_t handle, esp_rmaker_ota_data_t *job) {
    printf("job %s\n", job->ota_job_id);
    if (is("calls-everything")) {
        call_everything(handle, job);
        return (esp_err_t)0xdead;
    }
    if (is("keeps-pointer")) {
        kept = job->url;
        sem_post(&called);
        return ESP_OK;
    }
    if (is("callback-exits")) {
        exit(3);
    }
    if (is("never-returns")) {
        for (;;) {
            pause();
        }
    }
    esp_err_t err = esp_rmaker_ota_default_cb(handle, job);
    printf("built-in handler: %s\n", esp_err_to_name(err));
    return err;
}

static void *other_thread(void *arg) {
    (void)arg;
    must("fetch", esp_rmaker_ota_fetch(), ESP_OK);
    exit(4);
}

static void *first_call(void *arg) {
    (void)arg;
    must("first call", esp_rmaker_ota_fetch(), ESP_ERR_INVALID_STATE);
    return NULL;
}

/* Many threads make the first call. */
static int begin_together(void) {
    pthread_t threads[16];
    for (size_t i = 0; i < 16; i++) {
        pthread_create(&threads[i], NULL, first_call, NULL);
    }
    for (size_t i = 0; i < 16; i++) {
        pthread_join(threads[i], NULL);
    }
    return 0;
}

/* Waits for a line of input, then becomes what lies under its own name. */
static int restart(char **argv) {
    struct sigaction on_pipe;
    sigaction(SIGPIPE, NULL, &on_pipe);
    printf("SIGPIPE %s, %s\n", on_pipe.sa_handler == SIG_DFL ? "default" : "ignored",
           getenv("RESTARTED") != NULL ? "again" : "for the first time");
    for (; *argv != NULL; argv++) {
        printf("<%s>\n", *argv);
    }
    if (getenv("RESTARTED") != NULL) {
        return 8;
    }
    getchar();
    setenv("RESTARTED", "1", 1);
    esp_err_t err = rmaker_ota_restart();
    printf("%s\n", rmaker_ota_last_error());
    return err == ESP_FAIL ? 9 : 10;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    config_file = argv[1];
    mode = argv[2];
    if (is("restarts")) {
        return restart(argv);
    }
    if (is("begins-together")) {
        return begin_together();
    }
    sem_init(&downloading, 0, 0);
    sem_init(&called, 0, 0);
    atexit(at_exit);
    signal(SIGTERM, on_signal);
    esp_rmaker_ota_config_t config = {.ota_cb = on_job};
    must("open", rmaker_ota_open(config_file), ESP_OK);
    must("log", rmaker_ota_set_log(RMAKER_OTA_LOG_DEBUG, NULL, NULL), ESP_OK);
    must("register", rmaker_ota_event_handler_register(NULL, RMAKER_OTA_ANY_EVENT, on_event, NULL), ESP_OK);
    must("enable", esp_rmaker_ota_enable(&config, OTA_USING_TOPICS), ESP_OK);
    must("start", rmaker_ota_start(), ESP_OK);

    if (is("main-returns") || is("thread-exits") || is("main-stops")) {
        while (sem_wait(&downloading) != 0) {
        }
        if (is("thread-exits")) {
            pthread_t thread;
            pthread_create(&thread, NULL, other_thread, NULL);
            pthread_join(thread, NULL);
        }
        if (is("main-stops")) {
            must("stop", rmaker_ota_stop(), ESP_OK);
            printf("stopped\n");
        }
        return 6;
    }
    if (is("keeps-pointer")) {
        while (sem_wait(&called) != 0) {
        }
        must("stop", rmaker_ota_stop(), ESP_OK); /* the callback is over */
        return kept[0] == 'h' ? 0 : 1;
    }
    rmaker_ota_end_t end;
    must("wait", rmaker_ota_wait(-1, &end), ESP_OK);
    printf("ended %d\n", (int)end);
    while (is("calls-everything") && sem_wait(&called) != 0) {
    }
    return 0;
}
