/* sources: sink/image_store.c base/status.c base/bytes.c port/port_posix_file.c port/fault.c
 *
 * libs: libcrypto zlib
 */
#include "sink/image_store.h"

#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <zlib.h>

#include "check.h"

#define SECTOR OTA_STORE_SECTOR
#define BLOCK OTA_STORE_BLOCK

enum {
    SIZE = 300001,
    CAPACITY = 1 << 20,
};

static uint8_t image[SIZE];
static ota_error error;

/* Half of it compresses, and there are two blank sectors, of which one is at the end. */
static void make_image(void) {
    uint32_t state = 12345;
    for (size_t i = 0; i < SIZE; i++) {
        state = state * 1103515245u + 12345u;
        image[i] = (uint8_t)(state >> ((i & 1) != 0 ? 16 : 28));
    }
    memset(image + 10 * SECTOR, 0xFF, SECTOR);
    memset(image + 73 * SECTOR, 0xFF, SIZE - 73 * SECTOR);
}

static ota_image_store *new_store(uint64_t size, const char *cache, const uint8_t *sha256) {
    ota_image_store *store = NULL;
    ota_image_store_options options = {.capacity = CAPACITY, .size = size, .cache_dir = cache, .sha256 = sha256};
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_image_store_new(&options, &store, &error), OTA_OK);
    return store;
}

/* Appends [from, to) in pieces of `piece` bytes. */
static void append(ota_image_store *store, size_t from, size_t to, size_t piece) {
    while (from < to) {
        size_t len = to - from < piece ? to - from : piece;
        CHECK_EQ(ota_image_store_append(store, image + from, len, &error), OTA_OK);
        from += len;
    }
}

/* Reads a whole stream in pieces of `want`, inflates it and compares; checks what is said of the inflated bytes on the way. */
static bool stream_gives(ota_image_stream *stream, size_t start, size_t end, size_t want) {
    uint8_t *out = malloc(end - start + 1);
    z_stream zlib = {0};
    bool right = inflateInit(&zlib) == Z_OK;
    zlib.next_out = out;
    zlib.avail_out = (uInt)(end - start + 1);
    uint64_t position = 0, inflated = 0, before = 0;
    ota_status status = OTA_OK;
    ota_error local = {0};
    int result = Z_OK;
    while (status == OTA_OK && right) {
        const uint8_t *data;
        size_t len;
        status = ota_image_stream_read(stream, position, want, &data, &len, &inflated, &local);
        right = status >= 0 && inflated >= before && inflated <= end - start && (status == OTA_DONE || len == want);
        before = inflated;
        if (right) {
            zlib.next_in = (uint8_t *)data;
            zlib.avail_in = (uInt)len;
            result = inflate(&zlib, Z_NO_FLUSH);
            right = (result == Z_OK || result == Z_STREAM_END) && zlib.total_out <= inflated;
            position += len;
        }
    }
    right = right && result == Z_STREAM_END && zlib.total_out == end - start && inflated == end - start &&
            memcmp(out, image + start, end - start) == 0 && position == ota_image_stream_size(stream);
    inflateEnd(&zlib);
    free(out);
    return right;
}

TEST(a_stream_inflates_to_its_run_however_it_is_read) {
    ota_image_store *store = new_store(SIZE, NULL, NULL);
    append(store, 0, SIZE, 7777);
    CHECK_EQ(ota_image_store_finish(store, &error), OTA_OK);
    static const size_t wants[] = {1, 1000, 16384, 1 << 20};
    for (size_t i = 0; i < sizeof wants / sizeof *wants; i++) {
        ota_image_stream *stream;
        CHECK_EQ(ota_image_store_stream(store, 0, OTA_SIZE_UNKNOWN, &stream, &error), OTA_OK);
        CHECK(stream_gives(stream, 0, SIZE, wants[i]));
        ota_image_stream_release(&stream);
        CHECK_EQ(ota_image_store_stream(store, 2 * BLOCK, 3 * BLOCK + 5, &stream, &error), OTA_OK);
        CHECK(stream_gives(stream, 2 * BLOCK, 3 * BLOCK + 5, wants[i]));
        ota_image_stream_release(&stream);
    }
    ota_image_store_counts counts;
    ota_image_store_get_counts(store, &counts);
    CHECK_EQ(counts.streams, 2); /* each compressed once, for all four readers */
    CHECK_EQ(counts.shared, 6);
    CHECK_EQ(counts.compressed, SIZE + BLOCK + 5);
    CHECK_EQ(ota_image_store_append(store, image, 1, &error), OTA_ERR_STATE);
    ota_image_store_free(&store);
}

TEST(what_does_not_fit_or_is_cut_short_fails_the_store) {
    uint64_t available;
    ota_image_store *store = new_store(1000, NULL, NULL);
    append(store, 0, 1000, 999);
    CHECK_EQ(ota_image_store_append(store, image, 1, &error), OTA_ERR_SIZE);
    ota_image_store_free(&store);
    store = new_store(OTA_SIZE_UNKNOWN, NULL, NULL);
    append(store, 0, SIZE, SIZE);
    append(store, 0, SIZE, SIZE);
    append(store, 0, SIZE, SIZE);
    CHECK_EQ(ota_image_store_append(store, image, SIZE, &error), OTA_ERR_TOO_LARGE);
    ota_image_store_free(&store);
    store = new_store(1000, NULL, NULL);
    append(store, 0, 999, 999);
    CHECK_EQ(ota_image_store_finish(store, &error), OTA_ERR_INCOMPLETE);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_image_store_wait(store, 1, &available, &error), OTA_ERR_INCOMPLETE); /* and readers hear of it */
    ota_image_store_free(&store);
    ota_image_store_options options = {.capacity = 100, .size = 101};
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_image_store_new(&options, &store, &error), OTA_ERR_TOO_LARGE);
    store = new_store(OTA_SIZE_UNKNOWN, NULL, NULL);
    CHECK_EQ(ota_image_store_finish(store, &error), OTA_ERR_INCOMPLETE);
    ota_image_store_free(&store);
}

TEST(digests_are_those_of_the_bytes_and_made_once) {
    uint8_t md5[16], expected[16];
    static const uint64_t runs[][2] = {{0, SECTOR}, {BLOCK, 2 * BLOCK}, {0, SIZE}, {SECTOR, SIZE}, {7, 7}};
    ota_image_store *store = new_store(OTA_SIZE_UNKNOWN, NULL, NULL);
    append(store, 0, SECTOR, SECTOR);
    CHECK_EQ(ota_image_store_md5(store, 0, SECTOR + 1, md5, &error), OTA_ERR_ARGUMENT);
    append(store, SECTOR, SIZE, SIZE);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_image_store_finish(store, &error), OTA_OK);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
            CHECK_EQ(ota_image_store_md5(store, runs[i][0], runs[i][1], md5, &error), OTA_OK);
            EVP_Digest(image + runs[i][0], (size_t)(runs[i][1] - runs[i][0]), expected, NULL, EVP_md5(), NULL);
            CHECK_MEM(md5, expected, 16);
        }
    }
    ota_image_store_counts counts;
    ota_image_store_get_counts(store, &counts);
    CHECK_EQ(counts.digested, SECTOR + BLOCK + SIZE + 2 * (SIZE - SECTOR));
    ota_image_store_free(&store);
}

TEST(runs_end_at_blank_sectors_that_are_worth_it) {
    ota_image_store *store = new_store(SIZE, NULL, NULL);
    append(store, 0, SIZE, SIZE);
    uint64_t end;
    CHECK_EQ(ota_image_store_next_run(store, 0, SIZE, SECTOR, &end), 0);
    CHECK_EQ(end, 10 * SECTOR);
    CHECK_EQ(ota_image_store_next_run(store, end, SIZE, SECTOR, &end), 11 * SECTOR);
    CHECK_EQ(end, 73 * SECTOR);
    CHECK_EQ(ota_image_store_next_run(store, end, SIZE, SECTOR, &end), SIZE);
    CHECK_EQ(ota_image_store_next_run(store, 0, SIZE, 2 * SECTOR, &end), 0);
    CHECK_EQ(end, 73 * SECTOR); /* blank to the end is always worth it */
    ota_image_store_free(&store);
}

/* ---- Threads ----------------------------------------------------------------------------------------------------------- */

typedef struct reader {
    ota_image_store *store;
    size_t start, want;
    bool right;
    ota_status status;
} reader;

static void *read_all(void *user) {
    reader *self = user;
    ota_error local = {0};
    ota_image_stream *stream = NULL;
    self->status = ota_image_store_stream(self->store, self->start, OTA_SIZE_UNKNOWN, &stream, &local);
    self->right = self->status == OTA_OK && stream_gives(stream, self->start, SIZE, self->want);
    ota_image_stream_release(&stream);
    return NULL;
}

TEST(readers_share_a_stream_while_the_image_arrives) {
    enum {
        READERS = 4
    };
    for (int known = 0; known < 2; known++) {
        ota_image_store *store = new_store(known != 0 ? SIZE : OTA_SIZE_UNKNOWN, NULL, NULL);
        reader readers[READERS];
        pthread_t threads[READERS];
        for (int i = 0; i < READERS; i++) {
            readers[i] = (reader){.store = store, .start = i == 3 ? BLOCK : 0, .want = 1000u + 7000u * (unsigned)i};
            CHECK_EQ(pthread_create(&threads[i], NULL, read_all, &readers[i]), 0);
        }
        for (size_t at = 0; at < SIZE; at += 5000) {
            append(store, at, at + 5000 < SIZE ? at + 5000 : SIZE, 5000);
            ota_image_store_advance(store, 1);
        }
        CHECK_EQ(ota_image_store_finish(store, &error), OTA_OK);
        for (int i = 0; i < READERS; i++) {
            pthread_join(threads[i], NULL);
            CHECK(readers[i].right);
        }
        ota_image_store_counts counts;
        ota_image_store_get_counts(store, &counts);
        CHECK_EQ(counts.streams, 2);
        CHECK_EQ(counts.compressed, SIZE + SIZE - BLOCK);
        ota_image_store_free(&store);
    }
}

static void *wait_for_more(void *user) {
    reader *self = user;
    ota_error local = {0};
    uint64_t available;
    self->status = ota_image_store_wait(self->store, SIZE, &available, &local);
    return NULL;
}

TEST(a_failure_reaches_whoever_waits_and_whoever_comes_later) {
    ota_image_store *store = new_store(SIZE, NULL, NULL);
    reader waiting = {.store = store}, reading = {.store = store, .want = SIZE};
    pthread_t threads[2];
    append(store, 0, 1000, 1000);
    CHECK_EQ(pthread_create(&threads[0], NULL, wait_for_more, &waiting), 0);
    CHECK_EQ(pthread_create(&threads[1], NULL, read_all, &reading), 0);
    ota_error cause = {0};
    ota_error_set(&cause, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled");
    ota_image_store_fail(store, &cause);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    CHECK_EQ(waiting.status, OTA_ERR_CANCELLED);
    CHECK(!reading.right);
    CHECK_EQ(ota_image_store_append(store, image, 1, &error), OTA_ERR_CANCELLED);
    ota_image_store_free(&store);
}

/* ---- Cache ------------------------------------------------------------------------------------------------------------- */

TEST(a_compressed_image_is_kept_and_trusted_only_when_it_inflates_to_the_image) {
    uint8_t sha256[32];
    char path[80], *to = path + sprintf(path, "./");
    EVP_Digest(image, SIZE, sha256, NULL, EVP_sha256(), NULL);
    for (size_t i = 0; i < sizeof sha256; i++) {
        to += sprintf(to, "%02x", sha256[i]);
    }
    sprintf(to, ".zlib");
    for (int round = 0; round < 4; round++) {
        ota_image_store *store = new_store(SIZE, ".", sha256);
        ota_image_stream *stream;
        ota_image_store_counts counts;
        CHECK_EQ(ota_image_store_stream(store, 0, OTA_SIZE_UNKNOWN, &stream, &error), OTA_OK);
        if (round == 1) {
            CHECK(stream_gives(stream, 0, SIZE, 4096)); /* before the first byte has arrived */
        }
        append(store, 0, SIZE, SIZE);
        CHECK_EQ(ota_image_store_finish(store, &error), OTA_OK);
        CHECK(stream_gives(stream, 0, SIZE, 4096));
        ota_image_store_get_counts(store, &counts);
        CHECK_EQ(counts.cached, round == 1);
        CHECK_EQ(counts.compressed, round == 1 ? 0 : SIZE);
        CHECK_EQ(ota_image_store_keep(store, &error), round == 1 ? OTA_DONE : OTA_OK);
        ota_image_stream_release(&stream);
        ota_image_store_free(&store);
        FILE *file = fopen(path, "r+b");
        CHECK(file != NULL);
        if (round == 1) { /* a bit is flipped */
            fseek(file, 1000, SEEK_SET);
            int byte = fgetc(file);
            fseek(file, 1000, SEEK_SET);
            fputc(byte ^ 4, file);
        } else if (round == 2) { /* a byte is added */
            fseek(file, 0, SEEK_END);
            fputc(0, file);
        }
        fclose(file);
    }
    /* Another image arrives under that digest. */
    ota_image_store *store = new_store(SIZE, ".", sha256);
    image[5] ^= 1;
    append(store, 0, SIZE, SIZE);
    image[5] ^= 1;
    CHECK_EQ(ota_image_store_finish(store, &error), OTA_ERR_SHA256);
    ota_image_store_free(&store);
}

int main(void) {
    make_image();
    RUN(a_stream_inflates_to_its_run_however_it_is_read);
    RUN(what_does_not_fit_or_is_cut_short_fails_the_store);
    RUN(digests_are_those_of_the_bytes_and_made_once);
    RUN(runs_end_at_blank_sectors_that_are_worth_it);
    RUN(readers_share_a_stream_while_the_image_arrives);
    RUN(a_failure_reaches_whoever_waits_and_whoever_comes_later);
    RUN(a_compressed_image_is_kept_and_trusted_only_when_it_inflates_to_the_image);
    return DONE();
}
