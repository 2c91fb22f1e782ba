/* One mutex and one condition serve the whole ring: a chunk is about a mebibyte, so both are touched a few thousand times
 * for a gibibyte. */
#include "engine/ring.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

ota_status ota_ring_init(ota_ring *ring, uint32_t count, size_t chunk_size, ota_error *error) {
    memset(ring, 0, sizeof *ring);
    if (count < 2 || count > 4096 || chunk_size == 0 || chunk_size % 4096 != 0 || chunk_size > (1u << 30)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, 0, 0,
                             "a ring needs 2 to 4096 chunks of a multiple of 4096 bytes, got %u of %zu", count,
                             chunk_size);
    }
    void *memory = mmap(NULL, count * chunk_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ota_chunk *chunks = calloc(count, sizeof *chunks);
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
    pthread_cond_init(&ring->changed, NULL);
    return OTA_OK;
}

void ota_ring_destroy(ota_ring *ring) {
    if (ring->memory == NULL) {
        return;
    }
    pthread_cond_destroy(&ring->changed);
    pthread_mutex_destroy(&ring->lock);
    munmap(ring->memory, ring->count * ring->chunk_size);
    free(ring->chunks);
    memset(ring, 0, sizeof *ring);
}

ota_chunk *ota_ring_reserve(ota_ring *ring) {
    pthread_mutex_lock(&ring->lock);
    while (!ring->stopped && ring->published - ring->passed[OTA_RING_WRITER] == ring->count) {
        ring->waits[OTA_RING_STAGES]++;
        pthread_cond_wait(&ring->changed, &ring->lock);
    }
    ota_chunk *chunk = ring->stopped ? NULL : &ring->chunks[ring->published % ring->count];
    pthread_mutex_unlock(&ring->lock);
    return chunk;
}

/* Every change of the counters is a short critical section that ends with waking whoever waits. */
static void change(ota_ring *ring, uint64_t *counter, bool *flag) {
    pthread_mutex_lock(&ring->lock);
    if (counter != NULL) {
        (*counter)++;
    }
    if (flag != NULL) {
        *flag = true;
    }
    pthread_cond_broadcast(&ring->changed);
    pthread_mutex_unlock(&ring->lock);
}

void ota_ring_publish(ota_ring *ring) {
    change(ring, &ring->published, NULL);
}

void ota_ring_end(ota_ring *ring) {
    change(ring, NULL, &ring->ended);
}

void ota_ring_open(ota_ring *ring) {
    change(ring, NULL, &ring->open);
}

void ota_ring_release(ota_ring *ring, ota_ring_stage stage) {
    change(ring, &ring->passed[stage], NULL);
}

void ota_ring_stop(ota_ring *ring) {
    change(ring, NULL, &ring->stopped);
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
        pthread_cond_wait(&ring->changed, &ring->lock);
    }
    pthread_mutex_unlock(&ring->lock);
    return chunk;
}
