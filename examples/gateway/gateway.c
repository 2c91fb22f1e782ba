/* A gateway that updates itself over MQTT, in C: what an application of ESP RainMaker OTA looks like on Linux.
 *
 *     ./gateway node.toml
 *
 * Its own callbacks look at each job before the built-in handler does the work, and at each new image before it is
 * kept: an image whose version ends in "-broken" fails its diagnostics, and is rolled back. What happens is told on
 * standard output, one line each; the log goes to standard error. SIGTERM and SIGINT end it in order. */
#include <esp_rmaker_ota.h>
#include <rmaker_ota_host.h>

#include <signal.h>
#include <stdio.h>
#include <string.h>

static volatile sig_atomic_t stop_wanted;
static volatile sig_atomic_t restart_wanted;

static void on_signal(int number) {
    (void)number;
    stop_wanted = 1;
    rmaker_ota_wake();
}

static void on_log(void *arg, rmaker_ota_log_level_t level, const char *tag, const char *text) {
    static const char letters[] = " EWID";
    (void)arg;
    fprintf(stderr, "%c %s: %s\n", letters[level], tag, text);
}

/* On the event thread, also while on_job() waits for a download. */
static void on_event(void *arg, esp_event_base_t base, int32_t id, void *data, size_t size) {
    (void)arg;
    if (base == RMAKER_OTA_EVENT) {
        printf("event %d %.*s\n", (int)id, (int)size, data == NULL ? "" : (const char *)data);
        if (id == RMAKER_OTA_EVENT_REQ_FOR_REBOOT) { /* [ota] ota_disable_auto_reboot: when suits us */
            restart_wanted = 1;
            rmaker_ota_wake();
        }
    } else if (base == RMAKER_COMMON_EVENT && id == RMAKER_EVENT_REBOOT) {
        printf("restart in %d s\n", *(const int8_t *)data);
    } else if (base == RMAKER_COMMON_EVENT && id == RMAKER_MQTT_EVENT_CONNECTED) {
        printf("connected\n");
    }
}

/* On the worker thread. */
static esp_err_t on_job(esp_rmaker_ota_handle_t handle, esp_rmaker_ota_data_t *job) {
    printf("job %s: version %s, %d bytes, for %s\n", job->ota_job_id, job->fw_version != NULL ? job->fw_version : "?",
           job->filesize, job->priv);
    /* A real gateway would look at its battery, its mains supply, its links. */
    esp_err_t err = esp_rmaker_ota_report_status(handle, OTA_STATUS_IN_PROGRESS, "Battery is charged");
    if (err != ESP_OK) {
        fprintf(stderr, "not reported: %s\n", rmaker_ota_last_error());
    }
    return esp_rmaker_ota_default_cb(handle, job);
}

/* On the worker thread: does this image work? */
static esp_rmaker_ota_diag_status_t on_diagnostics(esp_rmaker_ota_diag_priv_t *about, void *priv) {
    static const char broken[] = "-broken";
    rmaker_ota_info_t info;
    (void)priv;
    if (rmaker_ota_info(&info) != ESP_OK) {
        return OTA_DIAG_STATUS_FAIL;
    }
    size_t len = strlen(info.version), tail = sizeof(broken) - 1;
    bool works = len < tail || strcmp(info.version + len - tail, broken) != 0;
    printf("diagnostics %s of %s: %s\n", about->state == OTA_DIAG_STATE_INIT ? "at the start" : "with MQTT",
           info.version, works ? "works" : "does not work");
    if (!works && about->state == OTA_DIAG_STATE_INIT) {
        return OTA_DIAG_STATUS_PENDING; /* give it a chance to reach the cloud */
    }
    return works ? OTA_DIAG_STATUS_SUCCESS : OTA_DIAG_STATUS_FAIL;
}

static int fail(const char *what) {
    fprintf(stderr, "gateway: %s: %s\n", what, rmaker_ota_last_error());
    rmaker_ota_stop();
    return 1;
}

/* Returns the exit status of the program. */
static int run(void) {
    for (;;) {
        rmaker_ota_end_t end;
        if (rmaker_ota_wait(-1, &end) != ESP_OK) {
            return fail("cannot wait");
        }
        if (stop_wanted || end == RMAKER_OTA_END_STOPPED) {
            printf("stopping\n");
            return rmaker_ota_stop() == ESP_OK ? 0 : 1;
        }
        if (end == RMAKER_OTA_END_FAILED) {
            return fail("the node ended");
        }
        if (restart_wanted || end == RMAKER_OTA_END_RESTART) {
            printf("restarting\n");
            rmaker_ota_restart(); /* does not return */
            return fail("cannot restart");
        }
    }
}

int main(int argc, char **argv) {
    static char name[] = "the hall"; /* `priv` must outlive the node */
    const esp_rmaker_ota_config_t callbacks = {.ota_cb = on_job, .ota_diag = on_diagnostics, .priv = name};
    const struct sigaction action = {.sa_handler = on_signal};
    rmaker_ota_info_t info;

    if (argc != 2) {
        fprintf(stderr, "usage: %s NODE.toml\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (rmaker_ota_set_log(RMAKER_OTA_LOG_INFO, on_log, NULL) != ESP_OK) {
        return fail("cannot start");
    }
    if (rmaker_ota_open(argv[1]) != ESP_OK) {
        return fail("cannot open the node");
    }
    if (rmaker_ota_info(&info) == ESP_OK) {
        printf("node %s runs %s %s from %s\n", info.node_id, info.project, info.version, info.slot);
    }
    rmaker_ota_event_handler_register(NULL, RMAKER_OTA_ANY_EVENT, on_event, NULL);
    if (esp_rmaker_ota_enable(&callbacks, OTA_USING_TOPICS) != ESP_OK) {
        return fail("cannot switch OTA on");
    }
    if (rmaker_ota_start() != ESP_OK) {
        return fail("cannot start the node");
    }
    return run();
}
