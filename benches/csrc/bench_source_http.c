/* sources: source/source.c source/source_http.c source/http_fields.c source/tls_files.c base/status.c port/port_posix_clock.c */
/* libs: libcurl libssl libcrypto */
/* How fast the HTTPS source alone brings bytes in: drains one URL into a buffer and forgets it.
 *
 *     bench_source_http URL CA-FILE [BUFFER-KIB [EXPECTED-BYTES]]
 *
 * Prints one JSON object: bytes, seconds of wall, user and system time, reads, requests, milliseconds until the answer's header,
 * peak RSS. The peer to compare with is `curl -o /dev/null` of the same URL, same machine, same minute: bench_source_http.py does that. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

#include "source/source.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double seconds(struct timeval t) {
    return (double)t.tv_sec + (double)t.tv_usec * 1e-6;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s URL CA-FILE [BUFFER-KIB [EXPECTED-BYTES]]\n", argv[0]);
        return 2;
    }
    size_t capacity = (argc > 3 ? strtoul(argv[3], NULL, 10) : 1024) * 1024;
    if (capacity == 0 || capacity % 4096 != 0) {
        fprintf(stderr, "BUFFER-KIB must be a multiple of 4\n");
        return 2;
    }
    uint64_t expected = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
    uint8_t *buf = aligned_alloc(4096, capacity);
    const ota_http_options options = {.url = argv[1], .ca_file = argv[2], .proxy = ""};
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint64_t reads = 0;
    size_t len;
    double begin = now(), answered = begin;
    ota_status status = ota_source_http_new(&options, &source, &error);
    if (status == OTA_OK) {
        status = source->ops->open(source, 0, &info, &error);
        answered = now();
    }
    while (status == OTA_OK) {
        status = source->ops->read(source, buf, capacity, &len, &error);
        reads++;
    }
    double wall = now() - begin;
    uint64_t bytes = source != NULL ? source->bytes_read : 0;
    if (status != OTA_DONE || (expected != 0 && bytes != expected)) {
        fprintf(stderr, "%s after %" PRIu64 " bytes: %s\n", ota_status_name(status), bytes, error.text);
        ota_source_free(&source);
        free(buf);
        return 1;
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"bytes\": %" PRIu64 ", \"wall_s\": %.3f, \"user_s\": %.3f, \"system_s\": %.3f, \"reads\": %" PRIu64
           ", \"requests\": %" PRIu64 ", \"answer_ms\": %.1f, \"rss_mib\": %.1f}\n",
           bytes, wall, seconds(used.ru_utime), seconds(used.ru_stime), reads, (uint64_t)source->requests,
           (answered - begin) * 1e3, (double)used.ru_maxrss / 1024);
    ota_source_free(&source);
    free(buf);
    return 0;
}
