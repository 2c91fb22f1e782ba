/* The corridor of the engine: a bounded ring of aligned chunks, filled by one stage and passed from stage to stage in order.
 *
 *     reader  --reserve/publish-->  verifier  --peek/release-->  writer  --peek/release-->  free again
 *
 * Invariants: passed[WRITER] <= passed[VERIFIER] <= published <= passed[WRITER] + count. A stage sees a chunk only when the
 * stage before it has let go of it, so nothing is written that the verifier has not seen. Whoever waits is woken by a
 * signal; `stop` wakes everybody for good. */
#ifndef OTA_ENGINE_RING_H
#define OTA_ENGINE_RING_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct ota_chunk {
    uint8_t *data;      /* aligned to 4096; the capacity is the ring's chunk_size */
    size_t len;         /* valid bytes */
    uint64_t offset;    /* of data[0] in the image */
    uint8_t digest[32]; /* SHA-256 of the image up to the end of this chunk, when checkpoints are on */
} ota_chunk;

typedef enum ota_ring_stage {
    OTA_RING_VERIFIER = 0,
    OTA_RING_WRITER = 1,
    OTA_RING_STAGES = 2,
} ota_ring_stage;

typedef struct ota_ring {
    pthread_mutex_t lock;
    pthread_cond_t turn[OTA_RING_STAGES + 1]; /* one for each stage that may wait; the reader's is the last */
    uint8_t *memory;
    ota_chunk *chunks;
    uint32_t count;
    size_t chunk_size;
    uint64_t published;               /* chunks handed on by the reader */
    uint64_t passed[OTA_RING_STAGES]; /* chunks each stage has let go of */
    bool open;                        /* stages behind the reader may begin */
    bool ended;                       /* the reader publishes nothing more */
    bool stopped;
    uint64_t waits[OTA_RING_STAGES + 1]; /* times a stage had to wait; the reader's is the last */
} ota_ring;

/* `chunk_size` is a multiple of 4096. */
ota_status ota_ring_init(ota_ring *ring, uint32_t count, size_t chunk_size, ota_error *error);
void ota_ring_destroy(ota_ring *ring);

/* Reader: waits for a free chunk, the same one until it is published; NULL when stopped. */
ota_chunk *ota_ring_reserve(ota_ring *ring);
void ota_ring_publish(ota_ring *ring);
/* Reader: that was all. */
void ota_ring_end(ota_ring *ring);

/* Lets the stages behind the reader begin. */
void ota_ring_open(ota_ring *ring);
/* A stage: waits for its next chunk; NULL at the end, or when stopped. */
ota_chunk *ota_ring_peek(ota_ring *ring, ota_ring_stage stage);
void ota_ring_release(ota_ring *ring, ota_ring_stage stage);

/* Wakes every stage with NULL, now and for ever. */
void ota_ring_stop(ota_ring *ring);

#endif
