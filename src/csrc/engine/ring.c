/* One mutex for the ring and one condition for each stage, so that a stage that lets go of a chunk wakes the one stage that waits
 * for it: a wake-up that finds nothing to do costs two context switches.
 *
 * The memory asks for huge pages: direct writes pin every page they write from, and 512 pins of a huge page are cheap
 * (measured over 512 MiB: 0.05 of 1.0 CPU seconds). */
#include "engine/ring.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define READER OTA_RING_STAGES /* index of the reader's condition and counter */

ota_status ota_ring_init(ota_ring *ring, uint32_t count, size_t chunk_size, ota_error *error) {
    memset(ring, 0, sizeof *ring);
    if (count < 2 || count > 4096 || chunk_size == 0 || chunk_size % 4096 != 0 || chunk_size > (1u << 30)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, 0, 0,
                             "a ring needs 2 to 4096 chunks of a multiple of 4096 bytes, got %u of %zu", count,
                             chunk_size);
    }
    void *memory = mmap(NULL, count * chunk_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ota_chunk *chunks = calloc(count, sizeof *chunks);
    if (memory != MAP_FAILED) {
        madvise(memory, count * chunk_size, MADV_HUGEPAGE); /* where the kernel has none, small ones do */
    }
    if (memory == MAP_FAILED || chunks == NULL) {
        if (memory != MAP_FAILED) {
            munmap(memory, count * chunk_size);
        }
        free(chunks);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_NONE, 0, 0, "no memory for a ring of %u x %zu bytes",
                             count, chunk_size);
    }
    ring->memory = memory;
    ring->chunks = chunks;
    ring->count = count;
    ring->chunk_size = chunk_size;
    for (uint32_t i = 0; i < count; i++) {
        chunks[i].data = ring->memory + i * chunk_size;
    }
    pthread_mutex_init(&ring->lock, NULL);
    for (int i = 0; i <= OTA_RING_STAGES; i++) {
        pthread_cond_init(&ring->turn[i], NULL);
    }
    return OTA_OK;
}

void ota_ring_destroy(ota_ring *ring) {
    if (ring->memory == NULL) {
        return;
    }
    for (int i = 0; i <= OTA_RING_STAGES; i++) {
        pthread_cond_destroy(&ring->turn[i]);
    }
    pthread_mutex_destroy(&ring->lock);
    munmap(ring->memory, ring->count * ring->chunk_size);
    free(ring->chunks);
    memset(ring, 0, sizeof *ring);
}

ota_chunk *ota_ring_reserve(ota_ring *ring) {
    pthread_mutex_lock(&ring->lock);
    while (!ring->stopped && ring->published - ring->passed[OTA_RING_WRITER] == ring->count) {
        ring->waits[READER]++;
        pthread_cond_wait(&ring->turn[READER], &ring->lock);
    }
    ota_chunk *chunk = ring->stopped ? NULL : &ring->chunks[ring->published % ring->count];
    pthread_mutex_unlock(&ring->lock);
    return chunk;
}

void ota_ring_publish(ota_ring *ring) {
    pthread_mutex_lock(&ring->lock);
    ring->published++;
    pthread_cond_signal(&ring->turn[OTA_RING_VERIFIER]);
    pthread_mutex_unlock(&ring->lock);
}

void ota_ring_release(ota_ring *ring, ota_ring_stage stage) {
    pthread_mutex_lock(&ring->lock);
    ring->passed[stage]++;
    pthread_cond_signal(&ring->turn[stage + 1]); /* the next stage; behind the writer that is the reader */
    pthread_mutex_unlock(&ring->lock);
}

/* Sets one of the ring's flags, which every stage has to see. */
static void raise_flag(ota_ring *ring, bool *flag) {
    pthread_mutex_lock(&ring->lock);
    *flag = true;
    for (int i = 0; i <= OTA_RING_STAGES; i++) {
        pthread_cond_signal(&ring->turn[i]);
    }
    pthread_mutex_unlock(&ring->lock);
}

void ota_ring_end(ota_ring *ring) {
    raise_flag(ring, &ring->ended);
}

void ota_ring_open(ota_ring *ring) {
    raise_flag(ring, &ring->open);
}

void ota_ring_stop(ota_ring *ring) {
    raise_flag(ring, &ring->stopped);
}

ota_chunk *ota_ring_peek(ota_ring *ring, ota_ring_stage stage) {
    ota_chunk *chunk = NULL;
    pthread_mutex_lock(&ring->lock);
    while (!ring->stopped) {
        uint64_t ready = stage == OTA_RING_VERIFIER ? ring->published : ring->passed[OTA_RING_VERIFIER];
        if (ring->open && ring->passed[stage] < ready) {
            chunk = &ring->chunks[ring->passed[stage] % ring->count];
            break;
        }
        if (ring->open && ring->ended && ring->passed[stage] == ring->published) {
            break;
        }
        ring->waits[stage]++;
        pthread_cond_wait(&ring->turn[stage], &ring->lock);
    }
    pthread_mutex_unlock(&ring->lock);
    return chunk;
}
