/* Stands in for flasher/flasher.c: the same functions over a flash in memory, with the stub's manners: the begin of a write
 * erases the first block, the rest is erased as bytes come, blank sectors are not erased until the first one that is not,
 * programs only clear bits. Deflated writes inflate, and have to yield exactly what was announced. */
#ifndef OTA_TESTS_FAKE_FLASHER_H
#define OTA_TESTS_FAKE_FLASHER_H

#include <pthread.h>
#include <zlib.h>

#include "flasher/flasher.h"

struct ota_flasher {
    pthread_mutex_t lock; /* of state and hang */
    pthread_cond_t woken;
    ota_flasher_state state;
    bool cancelled;
    ota_flasher_info info;
    ota_flasher_counts counts;
    uint8_t *bytes;
    uint64_t size;
    /* What goes wrong. Commands are counted from 0 by `commands`. */
    uint64_t commands;
    uint64_t fail_at; /* this command and the `fail_count` - 1 after it fail */
    uint64_t fail_count;
    ota_flasher_state fail_state; /* in which they leave the flasher */
    uint64_t hang_at;             /* this command waits for a cancel; UINT64_MAX: none */
    bool hanging;                 /* it does */
    uint64_t flip_at;             /* the data of this command loses a bit on its way; UINT64_MAX: none */
    bool other_after;             /* after a reconnect it is another chip */
    /* The open write. */
    bool writing, deflated, dirty_seen;
    uint64_t begun_at, at, end, erased_to, told; /* told: content bytes as the caller counts them */
    z_stream zlib;
    /* What was done. */
    uint64_t sectors_erased, mistakes; /* mistakes: what would hang or confuse a real chip */
    uint64_t begins, md5s, connects, reopens, wire;
};

void fake_flasher_init(ota_flasher *fake, uint64_t size);
void fake_flasher_end(ota_flasher *fake);
/* Waits until a command hangs. */
void fake_flasher_await_hang(ota_flasher *fake);

#endif
