/* sources: source/source.c source/source_push.c base/status.c */
/* The push source: order, bounds, ends, errors, and who wakes whom. Clean under the thread sanitizer too. */
#include "check.h"

#include <pthread.h>
#include <stdlib.h>

#include "source/source.h"

enum {
    SIZE = 100003
};

static uint8_t content[SIZE];

typedef struct writer {
    ota_source *source;
    size_t len;
    size_t piece;
    bool drain;
    ota_status status;
    ota_error error;
} writer;

/* Pushes `len` bytes in pieces, drains when asked to, and ends. */
static void *run_writer(void *user) {
    writer *self = user;
    for (size_t at = 0; at < self->len && self->status == OTA_OK; at += self->piece) {
        size_t part = self->len - at < self->piece ? self->len - at : self->piece;
        self->status = ota_source_push_write(self->source, content + at, part, &self->error);
        if (self->status == OTA_OK && self->drain) {
            self->status = ota_source_push_drain(self->source, &self->error);
        }
    }
    if (self->status == OTA_OK) {
        ota_source_push_end(self->source);
    }
    return NULL;
}

static ota_status read_all(ota_source *source, uint8_t *buf, size_t piece, size_t *total, ota_error *error) {
    *total = 0;
    for (;;) {
        size_t len = 99;
        ota_status status = source->ops->read(source, buf + *total, piece, &len, error);
        if (status != OTA_OK) {
            CHECK_EQ(len, 0);
            return status;
        }
        *total += len;
    }
}

static void check_transfer(size_t capacity, size_t write_piece, size_t read_piece, bool drain, bool tell_size) {
    static uint8_t buf[SIZE + 4096];
    writer w = {.len = SIZE, .piece = write_piece, .drain = drain};
    pthread_t thread;
    ota_source_info info;
    ota_error error = {0};
    size_t total;
    CHECK_EQ(ota_source_push_new(capacity, tell_size ? SIZE : OTA_SIZE_UNKNOWN, 0, &w.source, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, run_writer, &w), 0);
    CHECK_EQ(w.source->ops->open(w.source, 0, &info, &error), OTA_OK);
    CHECK(info.size == (tell_size ? SIZE : OTA_SIZE_UNKNOWN));
    CHECK_EQ(read_all(w.source, buf, read_piece, &total, &error), OTA_DONE);
    pthread_join(thread, NULL);
    CHECK_EQ(w.status, OTA_OK);
    CHECK_EQ(total, SIZE);
    CHECK_EQ(w.source->bytes_read, SIZE);
    CHECK_MEM(buf, content, SIZE);
    w.source->ops->close(w.source);
    ota_source_free(&w.source);
}

TEST(bytes_arrive_in_order_through_any_capacity_and_pieces) {
    check_transfer(1, 1000, 4096, false, true);
    check_transfer(7, 3, 5, false, false);
    check_transfer(1000, 4096, 777, false, true);
    check_transfer(1 << 20, SIZE, 4096, false, true);
    check_transfer(1024, 512, 4096, true, true);
}

TEST(drain_returns_only_when_the_reader_asks_for_more) {
    static uint8_t buf[SIZE];
    writer w = {.len = 3, .piece = 1, .drain = true};
    pthread_t thread;
    ota_source_info info;
    ota_error error = {0};
    size_t len;
    CHECK_EQ(ota_source_push_new(64, OTA_SIZE_UNKNOWN, 0, &w.source, &error), OTA_OK);
    CHECK_EQ(w.source->ops->open(w.source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, run_writer, &w), 0);
    for (int i = 0; i < 3; i++) { /* never two pieces in one read: the next is written only after we asked again */
        CHECK_EQ(w.source->ops->read(w.source, buf, sizeof buf, &len, &error), OTA_OK);
        CHECK_EQ(len, 1);
        CHECK_EQ(buf[0], content[i]);
    }
    CHECK_EQ(w.source->ops->read(w.source, buf, sizeof buf, &len, &error), OTA_DONE);
    pthread_join(thread, NULL);
    CHECK_EQ(w.status, OTA_OK);
    ota_source_free(&w.source);
}

TEST(an_end_before_the_announced_size_is_incomplete) {
    uint8_t buf[16];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, again = {0};
    size_t total, len;
    CHECK_EQ(ota_source_push_new(64, 10, 0, &source, &error), OTA_OK);
    CHECK_EQ(ota_source_push_write(source, "123456789", 9, &error), OTA_OK);
    ota_source_push_end(source);
    CHECK_EQ(ota_source_push_write(source, "0", 1, NULL), OTA_ERR_STATE);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(read_all(source, buf, 4, &total, &error), OTA_ERR_INCOMPLETE);
    CHECK_EQ(total, 9);
    CHECK_EQ(error.offset, 9);
    CHECK_EQ(source->ops->read(source, buf, 4, &len, &again), OTA_ERR_INCOMPLETE);
    ota_source_free(&source);
}

TEST(more_bytes_than_announced_fail_both_sides) {
    uint8_t buf[16];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, reader = {0};
    size_t total;
    CHECK_EQ(ota_source_push_new(64, 10, 0, &source, &error), OTA_OK);
    CHECK_EQ(ota_source_push_write(source, "123456789", 9, &error), OTA_OK);
    CHECK_EQ(ota_source_push_write(source, "01", 2, &error), OTA_ERR_SIZE);
    CHECK_EQ(error.offset, 10);
    CHECK_EQ(source->ops->open(source, 0, &info, &reader), OTA_OK);
    CHECK_EQ(read_all(source, buf, 16, &total, &reader), OTA_ERR_SIZE);
    CHECK_EQ(total, 9);
    ota_source_free(&source);
}

TEST(a_failure_comes_after_the_bytes_before_it_and_sticks) {
    uint8_t buf[16];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, failure = {0}, again = {0};
    size_t total, len;
    CHECK_EQ(ota_source_push_new(64, OTA_SIZE_UNKNOWN, 0, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(ota_source_push_write(source, "123", 3, &error), OTA_OK);
    ota_error_set(&failure, OTA_ERR_STALLED, OTA_STAGE_SOURCE, 3, 77, "no block came");
    ota_source_push_fail(source, &failure);
    ota_source_push_end(source); /* the first word counts */
    CHECK_EQ(read_all(source, buf, 16, &total, &error), OTA_ERR_STALLED);
    CHECK_EQ(total, 3);
    CHECK_EQ(error.device_code, 77);
    CHECK(strcmp(error.text, "no block came") == 0);
    CHECK_EQ(source->ops->read(source, buf, 4, &len, &again), OTA_ERR_STALLED);
    ota_source_free(&source);
}

TEST(a_failure_that_is_none_is_still_an_error) {
    uint8_t buf[4];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, nothing = {0};
    size_t len;
    CHECK_EQ(ota_source_push_new(64, OTA_SIZE_UNKNOWN, 0, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    ota_source_push_fail(source, &nothing);
    CHECK_EQ(source->ops->read(source, buf, 4, &len, &error), OTA_ERR_STATE);
    ota_source_free(&source);
}

static void *run_cancel(void *source) {
    ota_source *it = source;
    it->ops->cancel(it);
    return NULL;
}

static void *run_close(void *source) {
    ota_source *it = source;
    it->ops->close(it);
    return NULL;
}

TEST(cancel_wakes_a_waiting_reader_and_stops_the_writer) {
    uint8_t byte;
    size_t len;
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    pthread_t thread;
    CHECK_EQ(ota_source_push_new(64, OTA_SIZE_UNKNOWN, 0, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, run_cancel, source), 0);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_ERR_CANCELLED);
    pthread_join(thread, NULL);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, NULL), OTA_ERR_CANCELLED);
    CHECK_EQ(ota_source_push_write(source, "x", 1, NULL), OTA_ERR_CANCELLED);
    CHECK_EQ(ota_source_push_drain(source, NULL), OTA_ERR_CANCELLED);
    ota_source_free(&source);
}

TEST(a_writer_in_a_full_pipe_hears_of_cancel_and_of_close) {
    for (int round = 0; round < 2; round++) {
        ota_source_info info;
        ota_error error = {0};
        pthread_t thread;
        ota_source *source = NULL;
        CHECK_EQ(ota_source_push_new(8, OTA_SIZE_UNKNOWN, 0, &source, &error), OTA_OK);
        CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
        CHECK_EQ(pthread_create(&thread, NULL, round == 0 ? run_cancel : run_close, source), 0);
        CHECK_EQ(ota_source_push_write(source, content, 9, &error), OTA_ERR_CANCELLED); /* nobody reads */
        pthread_join(thread, NULL);
        ota_source_free(&source);
    }
}

TEST(a_drain_nobody_answers_hears_of_close) {
    ota_source_info info;
    ota_error error = {0};
    pthread_t thread;
    ota_source *source = NULL;
    CHECK_EQ(ota_source_push_new(8, OTA_SIZE_UNKNOWN, 0, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, run_close, source), 0);
    CHECK_EQ(ota_source_push_drain(source, &error), OTA_ERR_CANCELLED);
    pthread_join(thread, NULL);
    ota_source_free(&source);
}

TEST(it_is_opened_once_and_at_its_own_offset) {
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t buf[8];
    size_t len;
    CHECK_EQ(ota_source_push_new(8, 100, 96, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, NULL), OTA_ERR_STATE);
    CHECK_EQ(source->ops->read(source, buf, 8, &len, NULL), OTA_ERR_STATE);
    CHECK_EQ(source->ops->open(source, 96, &info, &error), OTA_OK);
    CHECK_EQ(info.offset, 96);
    CHECK_EQ(info.size, 100);
    CHECK_EQ(source->ops->open(source, 96, &info, NULL), OTA_ERR_STATE);
    CHECK_EQ(ota_source_push_write(source, "1234", 4, &error), OTA_OK);
    ota_source_push_end(source);
    CHECK_EQ(source->ops->read(source, buf, 0, &len, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(source->ops->read(source, buf, 8, &len, &error), OTA_OK);
    CHECK_EQ(len, 4);
    CHECK_EQ(source->ops->read(source, buf, 8, &len, &error), OTA_DONE);
    ota_source_free(&source);

    CHECK_EQ(ota_source_push_new(8, 100, 0, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 50, &info, &error), OTA_OK); /* starts over */
    CHECK_EQ(info.offset, 0);
    ota_source_free(&source);
}

TEST(nonsense_is_refused) {
    ota_source *source = NULL;
    ota_error error = {0};
    CHECK_EQ(ota_source_push_new(0, 1, 0, &source, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_source_push_new(1, 1, 2, &source, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_source_memory_new("x", 1, &source, &error), OTA_OK);
    CHECK_EQ(ota_source_push_write(source, "x", 1, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_source_push_drain(source, NULL), OTA_ERR_ARGUMENT);
    ota_source_push_end(source);
    ota_source_free(&source);
    ota_source_free(&source); /* NULL already */
}

int main(void) {
    for (size_t i = 0; i < SIZE; i++) {
        content[i] = (uint8_t)(i * 31 + i / 256);
    }
    RUN(bytes_arrive_in_order_through_any_capacity_and_pieces);
    RUN(drain_returns_only_when_the_reader_asks_for_more);
    RUN(an_end_before_the_announced_size_is_incomplete);
    RUN(more_bytes_than_announced_fail_both_sides);
    RUN(a_failure_comes_after_the_bytes_before_it_and_sticks);
    RUN(a_failure_that_is_none_is_still_an_error);
    RUN(cancel_wakes_a_waiting_reader_and_stops_the_writer);
    RUN(a_writer_in_a_full_pipe_hears_of_cancel_and_of_close);
    RUN(a_drain_nobody_answers_hears_of_close);
    RUN(it_is_opened_once_and_at_its_own_offset);
    RUN(nonsense_is_refused);
    return DONE();
}
