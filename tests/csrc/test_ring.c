/* sources: engine/ring.c base/status.c
 * libs: */
#include <pthread.h>
#include <stdlib.h>

#include "check.h"
#include "engine/ring.h"

static ota_ring ring;
static ota_error error;

static void begin(uint32_t count) {
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_ring_init(&ring, count, 4096, &error), OTA_OK);
}

TEST(chunks_pass_the_stages_in_order) {
    begin(3);
    ota_ring_open(&ring);
    for (int i = 0; i < 3; i++) {
        ota_chunk *chunk = ota_ring_reserve(&ring);
        chunk->len = (size_t)i;
        ota_ring_publish(&ring);
    }
    ota_ring_end(&ring);
    for (int i = 0; i < 3; i++) {
        ota_chunk *seen = ota_ring_peek(&ring, OTA_RING_VERIFIER);
        CHECK(seen != NULL && seen->len == (size_t)i);
        ota_ring_release(&ring, OTA_RING_VERIFIER);
        ota_chunk *written = ota_ring_peek(&ring, OTA_RING_WRITER);
        CHECK(written == seen);
        ota_ring_release(&ring, OTA_RING_WRITER);
    }
    CHECK(ota_ring_peek(&ring, OTA_RING_VERIFIER) == NULL);
    CHECK(ota_ring_peek(&ring, OTA_RING_WRITER) == NULL);
    ota_ring_destroy(&ring);
}

TEST(chunks_are_aligned_and_do_not_overlap) {
    begin(4);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_EQ((uintptr_t)ring.chunks[i].data % 4096, 0);
        memset(ring.chunks[i].data, (int)i + 1, 4096);
    }
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_EQ(ring.chunks[i].data[0], i + 1);
        CHECK_EQ(ring.chunks[i].data[4095], i + 1);
    }
    ota_ring_destroy(&ring);
}

TEST(odd_sizes_are_refused) {
    CHECK_EQ(ota_ring_init(&ring, 1, 4096, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_ring_init(&ring, 2, 4095, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_ring_init(&ring, 2, 0, &error), OTA_ERR_ARGUMENT);
}

static void *wait_as_reader(void *user) {
    (void)user;
    return ota_ring_reserve(&ring);
}

static void *wait_as_writer(void *user) {
    (void)user;
    return ota_ring_peek(&ring, OTA_RING_WRITER);
}

TEST(stop_wakes_every_stage) {
    begin(2);
    ota_ring_open(&ring);
    for (int i = 0; i < 2; i++) {
        ota_ring_reserve(&ring);
        ota_ring_publish(&ring);
    }
    pthread_t reader, writer;
    pthread_create(&reader, NULL, wait_as_reader, NULL);
    pthread_create(&writer, NULL, wait_as_writer, NULL);
    ota_ring_stop(&ring);
    void *got = &ring;
    pthread_join(reader, &got);
    CHECK(got == NULL);
    pthread_join(writer, &got);
    CHECK(got == NULL);
    CHECK(ota_ring_peek(&ring, OTA_RING_VERIFIER) == NULL);
    ota_ring_destroy(&ring);
}

TEST(nothing_is_seen_before_the_ring_is_open) {
    begin(2);
    ota_ring_reserve(&ring);
    ota_ring_publish(&ring);
    pthread_t writer;
    pthread_create(&writer, NULL, wait_as_writer, NULL);
    ota_ring_stop(&ring);
    void *got = &ring;
    pthread_join(writer, &got);
    CHECK(got == NULL);
    ota_ring_destroy(&ring);
}

enum {
    MANY = 20000
};

static void *read_many(void *user) {
    (void)user;
    for (size_t i = 0; i < MANY; i++) {
        ota_chunk *chunk = ota_ring_reserve(&ring);
        memcpy(chunk->data, &i, sizeof i);
        ota_ring_publish(&ring);
    }
    ota_ring_end(&ring);
    return NULL;
}

static void *pass_many(void *user) {
    ota_ring_stage stage = *(ota_ring_stage *)user;
    size_t expected = 0, wrong = 0;
    ota_chunk *chunk;
    while ((chunk = ota_ring_peek(&ring, stage)) != NULL) {
        size_t value;
        memcpy(&value, chunk->data, sizeof value);
        wrong += value != expected++;
        ota_ring_release(&ring, stage);
    }
    return (void *)(wrong + (expected != MANY));
}

TEST(three_threads_see_every_chunk_once_and_in_order) {
    begin(3);
    ota_ring_open(&ring);
    pthread_t threads[3];
    ota_ring_stage stages[] = {OTA_RING_VERIFIER, OTA_RING_WRITER};
    pthread_create(&threads[0], NULL, read_many, NULL);
    pthread_create(&threads[1], NULL, pass_many, &stages[0]);
    pthread_create(&threads[2], NULL, pass_many, &stages[1]);
    for (int i = 0; i < 3; i++) {
        void *wrong = NULL;
        pthread_join(threads[i], &wrong);
        CHECK(wrong == NULL);
    }
    ota_ring_destroy(&ring);
}

int main(void) {
    RUN(chunks_pass_the_stages_in_order);
    RUN(chunks_are_aligned_and_do_not_overlap);
    RUN(odd_sizes_are_refused);
    RUN(stop_wakes_every_stage);
    RUN(nothing_is_seen_before_the_ring_is_open);
    RUN(three_threads_see_every_chunk_once_and_in_order);
    return DONE();
}
