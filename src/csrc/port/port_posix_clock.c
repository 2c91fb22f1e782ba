/* Monotonic milliseconds. */
#include "port/port.h"

#include <time.h>

static uint64_t now_ms(void *user) {
    (void)user;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000u + (uint64_t)now.tv_nsec / 1000000u;
}

const ota_clock ota_port_clock = {.now_ms = now_ms, .user = NULL};
