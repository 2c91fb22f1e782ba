/* A bandwidth limit as a token bucket. Reads no clock: the caller says what time it is. */
#ifndef OTA_SOURCE_RATE_H
#define OTA_SOURCE_RATE_H

#include <stdint.h>

typedef struct ota_rate {
    uint64_t bytes_per_s; /* 0: no limit */
    uint64_t credit;      /* thousandths of a byte; at most a quarter of a second's worth is saved up */
    uint64_t then_ms;     /* when it was last filled */
} ota_rate;

/* Starts empty: by time t never more than bytes_per_s * (t - now) bytes were granted. */
static inline void ota_rate_start(ota_rate *rate, uint64_t bytes_per_s, uint64_t now_ms) {
    rate->bytes_per_s = bytes_per_s < UINT64_C(1) << 50 ? bytes_per_s : 0;
    rate->credit = 0;
    rate->then_ms = now_ms;
}

/* How many of `want` > 0 bytes may be taken now. 0: none before *wait_ms passed, which is set so that a twentieth of a
 * second's worth comes at once rather than byte by byte. */
static inline uint64_t ota_rate_grant(ota_rate *rate, uint64_t want, uint64_t now_ms, uint64_t *wait_ms) {
    *wait_ms = 0;
    if (rate->bytes_per_s == 0) {
        return want;
    }
    uint64_t elapsed = now_ms - rate->then_ms;
    uint64_t most = rate->bytes_per_s >= 4 ? rate->bytes_per_s * 250 : 1000;
    rate->then_ms = now_ms;
    if (elapsed >= 1000 || elapsed * rate->bytes_per_s >= most - rate->credit) {
        rate->credit = most;
    } else {
        rate->credit += elapsed * rate->bytes_per_s;
    }
    uint64_t portion = rate->bytes_per_s / 20 > 0 ? rate->bytes_per_s / 20 : 1;
    if (portion > want) {
        portion = want;
    }
    uint64_t granted = rate->credit / 1000;
    if (granted < portion) {
        *wait_ms = (portion * 1000 - rate->credit + rate->bytes_per_s - 1) / rate->bytes_per_s;
        return 0;
    }
    return granted < want ? granted : want;
}

/* Takes `len` granted bytes out. */
static inline void ota_rate_spend(ota_rate *rate, uint64_t len) {
    uint64_t cost = len * 1000;
    rate->credit = rate->bytes_per_s != 0 && rate->credit > cost ? rate->credit - cost : 0;
}

#endif
