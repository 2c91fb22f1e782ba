/* How far a C program comes with libesp_rmaker_ota, and what it holds then.
 *
 *     bench_c_abi linked               the library is loaded, nothing is called
 *     bench_c_abi python               the first call that needs Python
 *     bench_c_abi opened NODE.toml     rmaker_ota_open()
 *     bench_c_abi enabled NODE.toml    and esp_rmaker_ota_enable()
 *     bench_c_abi calls NODE.toml      and 20000 calls
 *
 * Prints "NAME VALUE" lines: kB from /proc/self/status, threads, ns for each call. Ends without stopping the node. */
#include <esp_rmaker_ota.h>
#include <rmaker_ota_host.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static void must(esp_err_t err) {
    if (err != ESP_OK) {
        fprintf(stderr, "%s\n", rmaker_ota_last_error());
        exit(1);
    }
}

static esp_err_t on_job(esp_rmaker_ota_handle_t handle, esp_rmaker_ota_data_t *job) {
    return esp_rmaker_ota_default_cb(handle, job);
}

int main(int argc, char **argv) {
    static const char *const steps[] = {"linked", "python", "opened", "enabled", "calls"};
    int last = 0;
    while (argc < 2 || strcmp(steps[last], argv[1]) != 0) {
        if (argc < 2 || ++last == 5) {
            return 2;
        }
    }
    double per_call = 0;
    const esp_rmaker_ota_config_t config = {.ota_cb = on_job};
    if (last >= 1) {
        must(rmaker_ota_set_log(RMAKER_OTA_LOG_WARN, NULL, NULL));
    }
    if (last >= 2) {
        must(rmaker_ota_open(argv[2]));
    }
    if (last >= 3) {
        must(esp_rmaker_ota_enable(&config, OTA_USING_TOPICS));
    }
    if (last >= 4) {
        double began = now_ns();
        for (int i = 0; i < 20000; i++) {
            if (esp_rmaker_ota_mark_valid() != ESP_ERR_INVALID_STATE) {
                return 1;
            }
        }
        per_call = (now_ns() - began) / 20000;
        printf("call_ns %.0f\n", per_call);
    }
    if (last == 0) {
        printf("version %s\n", rmaker_ota_version());
    }
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char name[64];
        long value;
        if (sscanf(line, "%63[A-Za-z]: %ld", name, &value) == 2 &&
            (strcmp(name, "VmRSS") == 0 || strcmp(name, "RssAnon") == 0 || strcmp(name, "Threads") == 0)) {
            printf("%s %ld\n", name, value);
        }
    }
    fflush(stdout);
    _exit(0);
}
