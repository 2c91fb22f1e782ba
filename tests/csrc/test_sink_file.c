/* sources: sink/sink_file.c sink/sink.c port/port_posix_file.c port/fault.c base/status.c
 * libs: */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "sink/sink.h"

enum {
    CHUNK = 64 * 1024
};

static char path[] = "/tmp/test_sink_file_XXXXXX";
static uint8_t *buffer;
static ota_error error;

static uint8_t byte_at(uint64_t offset) {
    return (uint8_t)(offset * 2654435761u >> 13);
}

static ota_sink *make(const ota_sink_file_options *given) {
    ota_sink_file_options options = *given;
    options.path = options.path != NULL ? options.path : path;
    ota_sink *sink = NULL;
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_sink_file_new(&options, &sink, &error), OTA_OK);
    return sink;
}

/* Writes the image bytes [from, to) in chunks; the status of the first failing write. */
static ota_status write_range(ota_sink *sink, uint64_t from, uint64_t to) {
    while (from < to) {
        size_t len = to - from < CHUNK ? (size_t)(to - from) : CHUNK;
        for (size_t i = 0; i < len; i++) {
            buffer[i] = byte_at(from + i);
        }
        ota_status status = sink->ops->write(sink, buffer, len, &error);
        if (status < 0) {
            return status;
        }
        from += len;
    }
    return OTA_OK;
}

static ota_status install(ota_sink *sink, uint64_t size, uint64_t offset) {
    ota_status status = sink->ops->open(sink, size, offset, &error);
    status = status < 0 ? status : write_range(sink, offset, size);
    status = status < 0 ? status : sink->ops->finish(sink, &error);
    status = status < 0 ? status : sink->ops->commit(sink, &error);
    if (status < 0) {
        sink->ops->abort(sink);
    }
    return status;
}

static void check_content(uint64_t size) {
    int fd = open(path, O_RDONLY);
    struct stat st;
    CHECK(fd >= 0 && fstat(fd, &st) == 0);
    CHECK_EQ(st.st_size, size);
    uint8_t *content = malloc(size + 1);
    CHECK_EQ(read(fd, content, size), size);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < size; i++) {
        wrong += content[i] != byte_at(i);
    }
    CHECK_EQ(wrong, 0);
    free(content);
    close(fd);
}

static void check_sizes(bool buffered) {
    static const uint64_t sizes[] = {1, 511, 512, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 12345};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        ota_sink *sink = make(&(ota_sink_file_options){.buffered = buffered});
        CHECK_EQ(install(sink, sizes[i], 0), OTA_OK);
        CHECK_EQ(sink->counts.syncs, 1);
        CHECK_EQ(sink->counts.copies, 0);
        CHECK_EQ(sink->counts.writes, (sizes[i] + CHUNK - 1) / CHUNK);
        ota_sink_free(&sink);
        check_content(sizes[i]);
    }
}

TEST(every_size_ends_up_exactly_in_the_file) {
    check_sizes(false);
    check_sizes(true);
}

TEST(a_larger_old_file_is_cut_to_the_image) {
    ota_sink *sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(install(sink, 3 * CHUNK, 0), OTA_OK);
    ota_sink_free(&sink);
    sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(install(sink, 5000, 0), OTA_OK);
    ota_sink_free(&sink);
    check_content(5000);
}

TEST(a_resume_keeps_what_is_there) {
    ota_sink *sink = make(&(ota_sink_file_options){0});
    uint64_t durable = 0;
    CHECK_EQ(sink->ops->open(sink, 200000, 0, &error), OTA_OK);
    CHECK_EQ(write_range(sink, 0, CHUNK), OTA_OK);
    CHECK_EQ(sink->ops->sync(sink, &durable, &error), OTA_OK);
    CHECK_EQ(durable, CHUNK);
    sink->ops->abort(sink);
    ota_sink_free(&sink);
    sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(sink->ops->read(sink, 100, buffer, 1000, &error), OTA_OK);
    CHECK_EQ(buffer[999], byte_at(1099));
    CHECK_EQ(install(sink, 200000, durable), OTA_OK);
    ota_sink_free(&sink);
    check_content(200000);
}

TEST(a_resume_beyond_the_file_is_refused) {
    ota_sink *sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(install(sink, 4096, 0), OTA_OK);
    ota_sink_free(&sink);
    sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(sink->ops->open(sink, 200000, 8192, &error), OTA_ERR_NOT_RESUMABLE);
    ota_sink_free(&sink);
    check_content(4096);
}

TEST(too_large_an_image_changes_nothing) {
    ota_sink *sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(install(sink, 4096, 0), OTA_OK);
    ota_sink_free(&sink);
    sink = make(&(ota_sink_file_options){.max_size = 10000});
    CHECK_EQ(install(sink, 10001, 0), OTA_ERR_TOO_LARGE);
    ota_sink_free(&sink);
    check_content(4096);
}

TEST(an_image_that_grows_beyond_the_slot_is_stopped) {
    ota_sink *sink = make(&(ota_sink_file_options){.max_size = CHUNK});
    CHECK_EQ(sink->ops->open(sink, UINT64_MAX, 0, &error), OTA_OK);
    CHECK_EQ(write_range(sink, 0, CHUNK), OTA_OK);
    CHECK_EQ(write_range(sink, CHUNK, CHUNK + 1), OTA_ERR_TOO_LARGE);
    CHECK_EQ(error.offset, CHUNK);
    sink->ops->abort(sink);
    ota_sink_free(&sink);
}

TEST(two_installations_into_one_file_do_not_mix) {
    ota_sink *first = make(&(ota_sink_file_options){0}), *second = make(&(ota_sink_file_options){0});
    CHECK_EQ(first->ops->open(first, 4096, 0, &error), OTA_OK);
    CHECK_EQ(second->ops->open(second, 4096, 0, &error), OTA_ERR_BUSY);
    CHECK_EQ(error.device_code, EBUSY);
    first->ops->abort(first);
    ota_sink_free(&first);
    ota_sink_free(&second);
}

TEST(what_the_system_says_is_what_is_reported) {
    static const struct {
        int errnum;
        ota_status status;
    } rows[] = {{ENOSPC, OTA_ERR_NO_SPACE}, {EIO, OTA_ERR_SYSTEM}, {EROFS, OTA_ERR_READ_ONLY}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        ota_fault fault = {.ops = OTA_FAULT_WRITE, .after = 1, .count = 1, .errnum = rows[i].errnum, .torn_len = 8192};
        ota_sink *sink = make(&(ota_sink_file_options){.fault = &fault});
        unlink(path);
        CHECK_EQ(install(sink, 3 * CHUNK, 0), rows[i].status);
        CHECK_EQ(error.device_code, rows[i].errnum);
        CHECK_EQ(error.offset, CHUNK + 8192);
        CHECK_EQ(error.stage, OTA_STAGE_SINK);
        ota_sink_free(&sink);
    }
}

TEST(every_failing_call_is_reported_and_nothing_leaks) {
    uint64_t n = 0;
    for (;; n++) {
        ota_fault fault = {.after = n, .count = 1};
        ota_sink *sink = make(&(ota_sink_file_options){.fault = &fault});
        ota_status status = install(sink, 3 * CHUNK + 77, 0);
        ota_sink_free(&sink);
        if (fault.seen <= n) {
            CHECK_EQ(status, OTA_OK);
            break;
        }
        CHECK(status < 0 && error.status == status && error.device_code == EIO);
    }
    CHECK(n >= 6); /* open, writes, cut, sync */
    check_content(3 * CHUNK + 77);
}

TEST(a_directory_is_no_slot) {
    ota_sink *sink = make(&(ota_sink_file_options){.path = "/tmp"});
    CHECK(sink->ops->open(sink, 10, 0, &error) < 0);
    CHECK_EQ(error.device_code, EISDIR);
    ota_sink_free(&sink);
}

TEST(commit_needs_finish) {
    ota_sink *sink = make(&(ota_sink_file_options){0});
    CHECK_EQ(sink->ops->open(sink, 4096, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_ERR_STATE);
    ota_sink_free(&sink);
}

int main(void) {
    int fd = mkstemp(path);
    close(fd);
    if (posix_memalign((void **)&buffer, 4096, CHUNK) != 0) {
        return 1;
    }
    RUN(every_size_ends_up_exactly_in_the_file);
    RUN(a_larger_old_file_is_cut_to_the_image);
    RUN(a_resume_keeps_what_is_there);
    RUN(a_resume_beyond_the_file_is_refused);
    RUN(too_large_an_image_changes_nothing);
    RUN(an_image_that_grows_beyond_the_slot_is_stopped);
    RUN(two_installations_into_one_file_do_not_mix);
    RUN(what_the_system_says_is_what_is_reported);
    RUN(every_failing_call_is_reported_and_nothing_leaks);
    RUN(a_directory_is_no_slot);
    RUN(commit_needs_finish);
    free(buffer);
    unlink(path);
    return DONE();
}
