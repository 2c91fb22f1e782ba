/* sources: source/source.c source/source_file.c source/source_push.c port/port_posix_stream.c base/status.c */
/* Files, descriptors, pipes and memory as sources: offsets, ends, sticky errors, cancel. */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "source/source.h"

enum {
    SIZE = 10007
};

static char dir[] = "/tmp/test_source_file_XXXXXX";
static char path[256];
static uint8_t content[SIZE];

static void write_file(const char *name, const void *data, size_t len) {
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, data, len) == (ssize_t)len);
    close(fd);
}

/* Reads in pieces of `piece` bytes to the end; returns the last status. */
static ota_status read_all(ota_source *source, uint8_t *buf, size_t size, size_t piece, size_t *total,
                           ota_error *error) {
    *total = 0;
    for (;;) {
        size_t len = 99, room = size - *total < piece ? size - *total : piece;
        ota_status status = source->ops->read(source, buf + *total, room, &len, error);
        CHECK(status == OTA_OK ? len > 0 && len <= room : len == 0);
        if (status != OTA_OK) {
            return status;
        }
        *total += len;
    }
}

TEST(a_file_is_read_whole_from_any_offset_in_any_pieces) {
    static uint8_t buf[SIZE + 1];
    const uint64_t offsets[] = {0, 1, 4096, SIZE - 1, SIZE};
    const size_t pieces[] = {1, 7, 4096, SIZE + 1};
    for (size_t i = 0; i < 5; i++) {
        for (size_t j = 0; j < 4; j++) {
            ota_source *source = NULL;
            ota_source_info info;
            ota_error error = {0};
            size_t total = 0;
            CHECK_EQ(ota_source_file_new(path, &source, &error), OTA_OK);
            CHECK_EQ(source->ops->open(source, offsets[i], &info, &error), OTA_OK);
            CHECK_EQ(info.size, SIZE);
            CHECK_EQ(info.offset, offsets[i]);
            CHECK_EQ(info.entity_tag[0], 0);
            CHECK_EQ(read_all(source, buf, sizeof buf, pieces[j], &total, &error), OTA_DONE);
            CHECK_EQ(total, SIZE - offsets[i]);
            CHECK_EQ(source->bytes_read, total);
            CHECK_EQ(source->requests, 1);
            CHECK_MEM(buf, content + offsets[i], total);
            source->ops->close(source);
            ota_source_free(&source);
            CHECK(source == NULL);
        }
    }
}

TEST(an_offset_behind_the_end_starts_over) {
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t byte;
    size_t len;
    CHECK_EQ(ota_source_file_new(path, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, SIZE + 1, &info, &error), OTA_OK);
    CHECK_EQ(info.offset, 0);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_OK);
    CHECK_EQ(byte, content[0]);
    ota_source_free(&source);
}

TEST(a_file_can_be_opened_again_but_not_twice_at_once) {
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t byte;
    size_t len;
    CHECK_EQ(ota_source_file_new(path, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, NULL), OTA_ERR_STATE);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, NULL), OTA_ERR_STATE);
    CHECK_EQ(source->ops->read(source, &byte, 0, &len, NULL), OTA_ERR_ARGUMENT);
    source->ops->close(source);
    CHECK_EQ(source->ops->open(source, 5, &info, &error), OTA_OK);
    CHECK_EQ(info.offset, 5);
    CHECK_EQ(source->requests, 2);
    ota_source_free(&source); /* frees what is open too */
}

TEST(a_missing_file_a_directory_and_an_empty_path_are_named) {
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    CHECK_EQ(ota_source_file_new("", &source, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_source_file_new("/nonexistent/image.bin", &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_ERR_NOT_FOUND);
    CHECK_EQ(error.device_code, ENOENT);
    CHECK_EQ(error.stage, OTA_STAGE_SOURCE);
    CHECK(strstr(error.text, "/nonexistent/image.bin") != NULL);
    ota_source_free(&source);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_source_file_new(dir, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EISDIR);
    ota_source_free(&source);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_source_fd_new(-1, &source, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EBADF);
}

TEST(a_file_that_shrinks_is_an_error_that_sticks_until_close) {
    char other[300];
    static uint8_t buf[SIZE + 1];
    snprintf(other, sizeof other, "%s/shrinks", dir);
    write_file(other, content, SIZE);
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0}, again = {0};
    size_t total, len;
    CHECK_EQ(ota_source_file_new(other, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(truncate(other, 5000), 0);
    CHECK_EQ(read_all(source, buf, sizeof buf, 1024, &total, &error), OTA_ERR_INCOMPLETE);
    CHECK_EQ(total, 5000);
    CHECK_EQ(error.offset, 5000);
    CHECK_EQ(truncate(other, SIZE), 0); /* more bytes do not heal it */
    CHECK_EQ(source->ops->read(source, buf, 10, &len, &again), OTA_ERR_INCOMPLETE);
    CHECK_EQ(again.offset, 5000);
    source->ops->close(source);
    memset(&error, 0, sizeof error);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(read_all(source, buf, sizeof buf, 4096, &total, &error), OTA_DONE);
    ota_source_free(&source);
}

TEST(a_file_that_grows_yields_the_announced_bytes_only) {
    char other[300];
    static uint8_t buf[2 * SIZE];
    snprintf(other, sizeof other, "%s/grows", dir);
    write_file(other, content, 100);
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    size_t total;
    CHECK_EQ(ota_source_file_new(other, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    write_file(other, content, SIZE);
    CHECK_EQ(read_all(source, buf, sizeof buf, 4096, &total, &error), OTA_DONE);
    CHECK_EQ(total, 100);
    ota_source_free(&source);
}

TEST(an_empty_file_is_done_at_once) {
    char other[300];
    snprintf(other, sizeof other, "%s/empty", dir);
    write_file(other, content, 0);
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    uint8_t byte;
    size_t len;
    CHECK_EQ(ota_source_file_new(other, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK(info.size == OTA_SIZE_UNKNOWN);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_DONE);
    ota_source_free(&source);
}

TEST(a_seekable_descriptor_is_read_from_where_it_stands_and_stays_there) {
    static uint8_t buf[SIZE + 1];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    size_t total;
    int fd = open(path, O_RDONLY);
    CHECK_EQ(lseek(fd, 7, SEEK_SET), 7);
    CHECK_EQ(ota_source_fd_new(fd, &source, &error), OTA_OK);
    for (int round = 0; round < 2; round++) {
        CHECK_EQ(source->ops->open(source, 3, &info, &error), OTA_OK);
        CHECK_EQ(info.size, SIZE - 7);
        CHECK_EQ(info.offset, 3);
        CHECK_EQ(read_all(source, buf, sizeof buf, 999, &total, &error), OTA_DONE);
        CHECK_EQ(total, SIZE - 10);
        CHECK_MEM(buf, content + 10, total);
        source->ops->close(source);
    }
    CHECK_EQ(lseek(fd, 0, SEEK_CUR), 7);
    ota_source_free(&source);
    CHECK_EQ(close(fd), 0); /* still ours */
}

TEST(a_pipe_starts_over_ends_with_its_writer_and_cannot_be_read_twice) {
    uint8_t buf[16];
    int ends[2];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    size_t total;
    CHECK_EQ(pipe(ends), 0);
    CHECK_EQ(write(ends[1], "hello", 5), 5);
    close(ends[1]);
    CHECK_EQ(ota_source_fd_new(ends[0], &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 4096, &info, &error), OTA_OK);
    CHECK_EQ(info.offset, 0);
    CHECK(info.size == OTA_SIZE_UNKNOWN);
    CHECK_EQ(read_all(source, buf, sizeof buf, 2, &total, &error), OTA_DONE);
    CHECK_EQ(total, 5);
    CHECK_MEM(buf, "hello", 5);
    source->ops->close(source);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_ERR_STATE);
    ota_source_free(&source);
    CHECK_EQ(close(ends[0]), 0);
}

static void *cancel_it(void *source) {
    ota_source *it = source;
    it->ops->cancel(it);
    return NULL;
}

TEST(cancel_wakes_a_reader_that_waits_in_a_pipe_and_sticks) {
    int ends[2];
    uint8_t byte;
    size_t len;
    pthread_t thread;
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    CHECK_EQ(pipe(ends), 0);
    CHECK_EQ(ota_source_fd_new(ends[0], &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, cancel_it, source), 0);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_ERR_CANCELLED); /* nobody ever writes */
    pthread_join(thread, NULL);
    CHECK_EQ(write(ends[1], "x", 1), 1);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, NULL), OTA_ERR_CANCELLED);
    ota_source_free(&source);
    close(ends[0]);
    close(ends[1]);
}

TEST(a_fifo_is_opened_without_its_writer_and_can_be_cancelled) {
    char fifo[300];
    uint8_t byte;
    size_t len;
    pthread_t thread;
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    snprintf(fifo, sizeof fifo, "%s/fifo", dir);
    CHECK_EQ(mkfifo(fifo, 0600), 0);
    CHECK_EQ(ota_source_file_new(fifo, &source, &error), OTA_OK);
    CHECK_EQ(source->ops->open(source, 0, &info, &error), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, cancel_it, source), 0);
    CHECK_EQ(source->ops->read(source, &byte, 1, &len, &error), OTA_ERR_CANCELLED);
    pthread_join(thread, NULL);
    ota_source_free(&source);
}

TEST(a_cancel_before_open_is_not_lost) {
    ota_source *sources[2] = {NULL, NULL};
    ota_source_info info;
    ota_error error = {0};
    CHECK_EQ(ota_source_file_new(path, &sources[0], &error), OTA_OK);
    CHECK_EQ(ota_source_memory_new("x", 1, &sources[1], &error), OTA_OK);
    for (int i = 0; i < 2; i++) {
        sources[i]->ops->cancel(sources[i]);
        CHECK_EQ(sources[i]->ops->open(sources[i], 0, &info, NULL), OTA_ERR_CANCELLED);
        sources[i]->ops->close(sources[i]);
        CHECK_EQ(sources[i]->ops->open(sources[i], 0, &info, NULL), OTA_ERR_CANCELLED);
        ota_source_free(&sources[i]);
    }
}

TEST(memory_is_read_from_any_offset_and_again) {
    static uint8_t buf[SIZE + 1];
    ota_source *source = NULL;
    ota_source_info info;
    ota_error error = {0};
    size_t total;
    const uint64_t offsets[] = {0, 1, SIZE - 1, SIZE, SIZE + 1};
    CHECK_EQ(ota_source_memory_new(content, SIZE, &source, &error), OTA_OK);
    for (int i = 0; i < 5; i++) {
        uint64_t begin = offsets[i] > SIZE ? 0 : offsets[i];
        CHECK_EQ(source->ops->open(source, offsets[i], &info, &error), OTA_OK);
        CHECK_EQ(info.offset, begin);
        CHECK_EQ(info.size, SIZE);
        CHECK_EQ(read_all(source, buf, sizeof buf, 1000, &total, &error), OTA_DONE);
        CHECK_EQ(total, SIZE - begin);
        CHECK_MEM(buf, content + begin, total);
        source->ops->close(source);
    }
    ota_source_free(&source);
}

int main(void) {
    for (size_t i = 0; i < SIZE; i++) {
        content[i] = (uint8_t)(i * 31 + i / 256);
    }
    CHECK(mkdtemp(dir) != NULL);
    snprintf(path, sizeof path, "%s/image", dir);
    write_file(path, content, SIZE);
    RUN(a_file_is_read_whole_from_any_offset_in_any_pieces);
    RUN(an_offset_behind_the_end_starts_over);
    RUN(a_file_can_be_opened_again_but_not_twice_at_once);
    RUN(a_missing_file_a_directory_and_an_empty_path_are_named);
    RUN(a_file_that_shrinks_is_an_error_that_sticks_until_close);
    RUN(a_file_that_grows_yields_the_announced_bytes_only);
    RUN(an_empty_file_is_done_at_once);
    RUN(a_seekable_descriptor_is_read_from_where_it_stands_and_stays_there);
    RUN(a_pipe_starts_over_ends_with_its_writer_and_cannot_be_read_twice);
    RUN(cancel_wakes_a_reader_that_waits_in_a_pipe_and_sticks);
    RUN(a_fifo_is_opened_without_its_writer_and_can_be_cancelled);
    RUN(a_cancel_before_open_is_not_lost);
    RUN(memory_is_read_from_any_offset_and_again);
    const char *names[] = {"image", "shrinks", "grows", "empty", "fifo"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char name[300];
        snprintf(name, sizeof name, "%s/%s", dir, names[i]);
        unlink(name);
    }
    rmdir(dir);
    return DONE();
}
