/* sources: engine/pipeline.c engine/ring.c sink/sink.c verify/verify.c verify/verify_digest.c verify/verify_size.c
 *          transform/transform.c transform/transform_inflate.c transform/transform_zstd.c transform/transform_xz.c
 *          port/port_posix_clock.c base/status.c base/bytes.c
 * libs: libcrypto zlib libzstd liblzma */
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <zlib.h>

#include "check.h"
#include "engine/pipeline.h"

enum {
    SIZE = 300000,
    CHUNK = 16384
};

static uint8_t content[SIZE];
static ota_error error;

/* ---- A source that does as it is told ---- */

typedef struct fake_source {
    ota_source base;
    const uint8_t *data;
    size_t size;
    bool size_unknown;
    bool restarts;  /* begins at 0 whatever is asked */
    size_t piece;   /* bytes a read hands out at most */
    size_t fail_at; /* 0: never */
    ota_status fail_with;
    size_t block_at; /* waits there until cancelled; 0: never */
    size_t position;
    bool open_fails;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool cancelled, blocked;
} fake_source;

static ota_status fake_open(ota_source *base, uint64_t offset, ota_source_info *info, ota_error *err) {
    fake_source *s = (fake_source *)base;
    if (s->open_fails) {
        return ota_error_set(err, OTA_ERR_HTTP_CONNECT, OTA_STAGE_SOURCE, 0, 111, "refused");
    }
    s->position = s->restarts ? 0 : (size_t)offset;
    info->offset = s->position;
    info->size = s->size_unknown ? OTA_SIZE_UNKNOWN : s->size;
    strcpy(info->entity_tag, "\"tag\"");
    return OTA_OK;
}

static ota_status fake_read(ota_source *base, void *buf, size_t capacity, size_t *len, ota_error *err) {
    fake_source *s = (fake_source *)base;
    *len = 0;
    pthread_mutex_lock(&s->lock);
    if (s->block_at != 0 && s->position >= s->block_at) {
        s->blocked = true;
        pthread_cond_broadcast(&s->wake);
        while (!s->cancelled) {
            pthread_cond_wait(&s->wake, &s->lock);
        }
    }
    bool cancelled = s->cancelled;
    pthread_mutex_unlock(&s->lock);
    if (cancelled) {
        return ota_error_set(err, OTA_ERR_CANCELLED, OTA_STAGE_SOURCE, s->position, 0, "cancelled");
    }
    size_t end = s->fail_at != 0 && s->fail_at < s->size ? s->fail_at : s->size;
    if (s->position >= end) {
        if (s->fail_at != 0) {
            return ota_error_set(err, s->fail_with, OTA_STAGE_SOURCE, s->position, 0, "as planned");
        }
        return OTA_DONE;
    }
    size_t n = end - s->position < capacity ? end - s->position : capacity;
    n = s->piece != 0 && s->piece < n ? s->piece : n;
    memcpy(buf, s->data + s->position, n);
    s->position += n;
    s->base.bytes_read += n;
    *len = n;
    return OTA_OK;
}

static void fake_cancel(ota_source *base) {
    fake_source *s = (fake_source *)base;
    pthread_mutex_lock(&s->lock);
    s->cancelled = true;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

static void fake_close(ota_source *base) {
    (void)base;
}

static const ota_source_ops fake_source_ops = {
    .open = fake_open, .read = fake_read, .cancel = fake_cancel, .close = fake_close, .free = fake_close};

/* ---- A sink in memory ---- */

typedef struct fake_sink {
    ota_sink base;
    uint8_t data[SIZE * 2];
    uint64_t size, position;
    uint64_t fail_write_at; /* offset; 0: never */
    bool forgets;           /* what is read back differs */
    int opens, writes, syncs, finishes, commits, aborts;
    pthread_mutex_t *wait_for; /* NULL, or held by the test while writes have to wait */
} fake_sink;

static ota_status sink_open(ota_sink *base, uint64_t size, uint64_t offset, ota_error *err) {
    fake_sink *s = (fake_sink *)base;
    (void)size, (void)err;
    s->opens++;
    s->position = offset;
    return OTA_OK;
}

static ota_status sink_write(ota_sink *base, uint8_t *data, size_t len, ota_error *err) {
    fake_sink *s = (fake_sink *)base;
    if (s->wait_for != NULL) {
        pthread_mutex_lock(s->wait_for);
        pthread_mutex_unlock(s->wait_for);
    }
    if (s->fail_write_at != 0 && s->position + len > s->fail_write_at) {
        return ota_error_set(err, OTA_ERR_NO_SPACE, OTA_STAGE_SINK, s->position, 28, "full");
    }
    memcpy(s->data + s->position, data, len);
    s->position += len;
    s->size = s->position;
    s->writes++;
    return OTA_OK;
}

static ota_status sink_sync(ota_sink *base, uint64_t *durable, ota_error *err) {
    fake_sink *s = (fake_sink *)base;
    (void)err;
    s->syncs++;
    *durable = s->position;
    return OTA_OK;
}

static ota_status sink_read(ota_sink *base, uint64_t offset, void *buf, size_t len, ota_error *err) {
    fake_sink *s = (fake_sink *)base;
    (void)err;
    memcpy(buf, s->data + offset, len);
    if (s->forgets) {
        ((uint8_t *)buf)[len - 1] ^= 1;
    }
    return OTA_OK;
}

static ota_status sink_finish(ota_sink *base, ota_error *err) {
    (void)err;
    ((fake_sink *)base)->finishes++;
    return OTA_OK;
}

static ota_status sink_commit(ota_sink *base, ota_error *err) {
    (void)err;
    ((fake_sink *)base)->commits++;
    return OTA_OK;
}

static void sink_abort(ota_sink *base) {
    ((fake_sink *)base)->aborts++;
}

static const ota_sink_ops fake_sink_ops = {.open = sink_open,
                                           .write = sink_write,
                                           .sync = sink_sync,
                                           .read = sink_read,
                                           .finish = sink_finish,
                                           .commit = sink_commit,
                                           .abort = sink_abort,
                                           .free = sink_abort};

/* ---- A run with everything around it ---- */

typedef struct fixture {
    fake_source source;
    fake_sink sink;
    ota_pipeline_options options;
    ota_pipeline_callbacks callbacks;
    ota_pipeline *pipeline;
    ota_verify *sha256, *image_sha256;
    uint8_t header[64];
    size_t header_len;
    uint64_t header_offset;
    ota_status gate;      /* what the gate answers */
    ota_phase fail_phase; /* the phase callback that fails; -1: none */
    char phases[16];
    ota_checkpoint checkpoint;
    int checkpoints, ticks;
} fixture;

static fixture *f;

static ota_status on_header(void *user, const ota_header *header) {
    (void)user;
    f->header_len = header->len;
    f->header_offset = header->offset;
    memcpy(f->header, header->data, header->len < sizeof f->header ? header->len : sizeof f->header);
    CHECK_EQ(f->sink.writes, 0);
    CHECK_EQ(f->sink.opens, 0);
    return f->gate;
}

static ota_status on_phase(void *user, ota_phase phase) {
    (void)user;
    f->phases[strlen(f->phases)] = (char)('0' + (int)phase);
    return phase == f->fail_phase ? OTA_ERR_CALLBACK : OTA_OK;
}

static ota_status on_checkpoint(void *user, const ota_checkpoint *checkpoint) {
    (void)user;
    f->checkpoint = *checkpoint;
    f->checkpoints++;
    return OTA_OK;
}

static void setup(bool single_thread) {
    f = calloc(1, sizeof *f);
    memset(&error, 0, sizeof error);
    pthread_mutex_init(&f->source.lock, NULL);
    pthread_cond_init(&f->source.wake, NULL);
    f->source.base.ops = &fake_source_ops;
    f->source.data = content;
    f->source.size = SIZE;
    f->sink.base.ops = &fake_sink_ops;
    f->sink.base.write_size = f->sink.base.resume_size = 4096;
    f->sink.base.capacity = sizeof f->sink.data;
    f->fail_phase = (ota_phase)-1;
    CHECK_EQ(ota_verify_digest_new(OTA_DIGEST_SHA256, NULL, &f->sha256, &error), OTA_OK);
    CHECK_EQ(ota_verify_digest_new(OTA_DIGEST_SHA256, NULL, &f->image_sha256, &error), OTA_OK);
    f->options = (ota_pipeline_options){.source = &f->source.base,
                                        .sink = &f->sink.base,
                                        .file_sha256 = f->sha256,
                                        .image_sha256 = f->image_sha256,
                                        .file_size = OTA_SIZE_UNKNOWN,
                                        .chunk_size = CHUNK,
                                        .chunk_count = 3,
                                        .tick_ms = 1,
                                        .single_thread = single_thread};
    f->callbacks = (ota_pipeline_callbacks){.header = on_header, .phase = on_phase, .checkpoint = on_checkpoint};
}

static ota_status run(void) {
    ota_status status = ota_pipeline_new(&f->options, &f->pipeline, &error);
    return status < 0 ? status : ota_pipeline_run(f->pipeline, &f->callbacks, &error);
}

static void teardown(void) {
    ota_pipeline_free(&f->pipeline);
    ota_verify_free(&f->sha256);
    ota_verify_free(&f->image_sha256);
    pthread_mutex_destroy(&f->source.lock);
    pthread_cond_destroy(&f->source.wake);
    free(f);
}

static void sha256_of(const uint8_t *data, size_t len, uint8_t out[32]) {
    EVP_Digest(data, len, out, NULL, EVP_sha256(), NULL);
}

#define BOTH_MODES for (int single = 0; single < 2; single++)

TEST(every_byte_arrives_and_commit_comes_last) {
    static const size_t pieces[] = {0, 1000, 4096, 16384};
    for (size_t i = 0; i < 4; i++) {
        BOTH_MODES {
            setup(single);
            f->source.piece = pieces[i];
            f->source.size_unknown = i == 1;
            CHECK_EQ(run(), OTA_OK);
            CHECK_EQ(f->sink.size, SIZE);
            CHECK_MEM(f->sink.data, content, SIZE);
            CHECK_EQ(f->sink.commits, 1);
            CHECK_EQ(f->sink.aborts, 0);
            CHECK(strcmp(f->phases, "0123456") == 0);
            CHECK_EQ(f->header_len, 288);
            CHECK_MEM(f->header, content, sizeof f->header);
            uint8_t expected[32], found[32];
            size_t len = 0;
            sha256_of(content, SIZE, expected);
            CHECK_EQ(ota_verify_digest_value(f->sha256, found, &len), OTA_OK);
            CHECK_MEM(found, expected, 32);
            ota_run_counts counts;
            ota_pipeline_counts(f->pipeline, &counts);
            CHECK_EQ(counts.image_size, SIZE);
            CHECK_EQ(counts.copies, 0);
            teardown();
        }
    }
}

TEST(a_refused_header_changes_nothing) {
    BOTH_MODES {
        setup(single);
        f->gate = OTA_ERR_REJECTED;
        CHECK_EQ(run(), OTA_ERR_REJECTED);
        CHECK_EQ(error.stage, OTA_STAGE_HEADER);
        CHECK_EQ(f->sink.opens, 0);
        CHECK_EQ(f->sink.writes, 0);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(a_wrong_digest_is_never_committed) {
    BOTH_MODES {
        setup(single);
        ota_verify *md5 = NULL;
        uint8_t wrong[16] = {1};
        CHECK_EQ(ota_verify_digest_new(OTA_DIGEST_MD5, wrong, &md5, &error), OTA_OK);
        f->options.file[0] = md5;
        CHECK_EQ(run(), OTA_ERR_MD5);
        CHECK_EQ(f->sink.commits, 0);
        CHECK_EQ(f->sink.finishes, 0);
        CHECK_EQ(f->sink.aborts, 1);
        teardown();
        ota_verify_free(&md5);
    }
}

TEST(a_full_disk_is_the_result_of_the_run) {
    BOTH_MODES {
        setup(single);
        f->sink.fail_write_at = 100000;
        CHECK_EQ(run(), OTA_ERR_NO_SPACE);
        CHECK_EQ(error.device_code, 28);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(a_source_that_cannot_begin_says_so) {
    BOTH_MODES {
        setup(single);
        f->source.open_fails = true;
        CHECK_EQ(run(), OTA_ERR_HTTP_CONNECT);
        CHECK_EQ(error.stage, OTA_STAGE_SOURCE);
        CHECK(strcmp(f->phases, "0") == 0);
        CHECK_EQ(f->sink.opens, 0);
        teardown();
    }
}

TEST(a_source_that_fails_in_the_header_is_told_apart) {
    BOTH_MODES {
        setup(single);
        f->source.fail_at = 100;
        f->source.fail_with = OTA_ERR_HTTP_CLOSED;
        CHECK_EQ(run(), OTA_ERR_HTTP_CLOSED);
        CHECK_EQ(error.stage, OTA_STAGE_HEADER);
        CHECK(strcmp(f->phases, "01") == 0);
        teardown();
    }
}

TEST(an_image_shorter_than_its_header_is_refused_where_it_needs_one) {
    BOTH_MODES {
        setup(single);
        f->source.size = 287;
        f->options.header_required = true;
        CHECK_EQ(run(), OTA_ERR_INCOMPLETE);
        CHECK_EQ(error.stage, OTA_STAGE_HEADER);
        CHECK_EQ(f->sink.opens, 0);
        teardown();
        setup(single);
        f->source.size = 287;
        CHECK_EQ(run(), OTA_OK);
        CHECK_EQ(f->header_len, 287);
        CHECK_EQ(f->sink.size, 287);
        teardown();
        setup(single);
        f->source.size = 0;
        CHECK_EQ(run(), OTA_ERR_INCOMPLETE);
        CHECK_EQ(f->sink.opens, 0);
        teardown();
    }
}

TEST(a_source_that_fails_midway_leaves_a_checkpoint_at_the_last_block) {
    BOTH_MODES {
        setup(single);
        f->source.fail_at = 100000;
        f->source.fail_with = OTA_ERR_HTTP_CLOSED;
        f->options.checkpoint_bytes = 1 << 30;
        CHECK_EQ(run(), OTA_ERR_HTTP_CLOSED);
        CHECK_EQ(error.stage, OTA_STAGE_SOURCE);
        CHECK_EQ(f->checkpoints, 1);
        CHECK_EQ(f->checkpoint.offset, 100000 / 4096 * 4096);
        CHECK(strcmp(f->checkpoint.entity_tag, "\"tag\"") == 0);
        CHECK_MEM(f->sink.data, content, f->checkpoint.offset);
        uint8_t expected[32];
        sha256_of(content, f->checkpoint.offset, expected);
        CHECK_MEM(f->checkpoint.sha256, expected, 32);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(checkpoints_come_as_often_as_asked) {
    BOTH_MODES {
        setup(single);
        f->options.checkpoint_bytes = 2 * CHUNK;
        CHECK_EQ(run(), OTA_OK);
        ota_run_counts counts;
        ota_pipeline_counts(f->pipeline, &counts);
        CHECK_EQ(counts.checkpoints, SIZE / (2 * CHUNK));
        CHECK_EQ(f->sink.syncs, SIZE / (2 * CHUNK));
        CHECK(f->checkpoints >= 1); /* one that was not fetched in time is replaced by the next */
        teardown();
    }
}

static void setup_resume(bool single, uint64_t offset) {
    setup(single);
    memcpy(f->sink.data, content, offset);
    f->options.resume_offset = offset;
    sha256_of(content, offset, f->options.resume_sha256);
}

TEST(a_resume_takes_over_what_is_there) {
    BOTH_MODES {
        setup_resume(single, 40960);
        CHECK_EQ(run(), OTA_OK);
        CHECK_EQ(f->source.base.bytes_read, SIZE - 40960);
        CHECK_MEM(f->sink.data, content, SIZE);
        CHECK_EQ(f->header_offset, 40960);
        CHECK_MEM(f->header, content, sizeof f->header);
        uint8_t expected[32], found[32];
        size_t len = 0;
        sha256_of(content, SIZE, expected);
        CHECK_EQ(ota_verify_digest_value(f->sha256, found, &len), OTA_OK);
        CHECK_MEM(found, expected, 32);
        teardown();
    }
}

TEST(a_resume_onto_something_else_is_refused_before_a_write) {
    BOTH_MODES {
        setup_resume(single, 40960);
        f->sink.data[20000] ^= 1;
        CHECK_EQ(run(), OTA_ERR_NOT_RESUMABLE);
        CHECK_EQ(f->sink.writes, 0);
        CHECK_EQ(f->sink.opens, 0);
        teardown();
    }
}

TEST(a_resume_of_a_complete_slot_is_verified_too) {
    BOTH_MODES {
        setup_resume(single, 40960);
        f->source.size = 40960;
        CHECK_EQ(run(), OTA_OK);
        CHECK_EQ(f->sink.commits, 1);
        teardown();
        setup_resume(single, 40960);
        f->source.size = 40960;
        f->sink.data[4] ^= 1;
        CHECK_EQ(run(), OTA_ERR_NOT_RESUMABLE);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(a_source_that_starts_over_is_followed) {
    BOTH_MODES {
        setup_resume(single, 40960);
        memset(f->sink.data, 0xAA, 40960);
        f->source.restarts = true;
        CHECK_EQ(run(), OTA_OK);
        CHECK_EQ(f->header_offset, 0);
        CHECK_MEM(f->sink.data, content, SIZE);
        teardown();
    }
}

TEST(an_announced_size_that_differs_stops_before_a_write) {
    BOTH_MODES {
        setup(single);
        f->options.file_size = SIZE + 1;
        CHECK_EQ(run(), OTA_ERR_SIZE);
        CHECK_EQ(f->sink.opens, 0);
        CHECK(strcmp(f->phases, "012") == 0);
        teardown();
        setup(single);
        f->options.file_size = SIZE - 1;
        f->source.size_unknown = true; /* found out on the way, or at the end */
        CHECK_EQ(run(), OTA_ERR_SIZE);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
        setup(single);
        f->options.file_size = SIZE + 1;
        f->source.size_unknown = true;
        CHECK_EQ(run(), OTA_ERR_SIZE);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(an_image_too_large_for_the_slot_stops_before_a_write) {
    BOTH_MODES {
        setup(single);
        f->sink.base.capacity = SIZE - 1;
        CHECK_EQ(run(), OTA_ERR_TOO_LARGE);
        CHECK_EQ(f->sink.opens, 0);
        teardown();
    }
}

TEST(read_back_finds_a_slot_that_forgets) {
    BOTH_MODES {
        setup(single);
        f->options.read_back = true;
        CHECK_EQ(run(), OTA_OK);
        teardown();
        setup(single);
        f->options.read_back = true;
        f->sink.forgets = true;
        CHECK_EQ(run(), OTA_ERR_READ_BACK);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(a_failing_callback_ends_the_run_in_every_phase) {
    for (int phase = 0; phase <= OTA_PHASE_COMMITTING; phase++) {
        BOTH_MODES {
            setup(single);
            f->fail_phase = (ota_phase)phase;
            CHECK_EQ(run(), OTA_ERR_CALLBACK);
            CHECK_EQ(f->sink.commits, 0);
            teardown();
        }
    }
}

static void *cancel_when_blocked(void *user) {
    (void)user;
    pthread_mutex_lock(&f->source.lock);
    while (!f->source.blocked) {
        pthread_cond_wait(&f->source.wake, &f->source.lock);
    }
    pthread_mutex_unlock(&f->source.lock);
    ota_pipeline_cancel(f->pipeline);
    return NULL;
}

TEST(cancel_wakes_a_source_that_waits) {
    static const size_t places[] = {10, 100000};
    for (size_t i = 0; i < 2; i++) {
        BOTH_MODES {
            setup(single);
            f->source.block_at = places[i];
            f->source.piece = 10;
            CHECK_EQ(ota_pipeline_new(&f->options, &f->pipeline, &error), OTA_OK);
            pthread_t thread;
            pthread_create(&thread, NULL, cancel_when_blocked, NULL);
            CHECK_EQ(ota_pipeline_run(f->pipeline, &f->callbacks, &error), OTA_ERR_CANCELLED);
            pthread_join(thread, NULL);
            CHECK_EQ(f->sink.commits, 0);
            teardown();
        }
    }
}

TEST(cancel_before_run_and_twice_is_fine) {
    BOTH_MODES {
        setup(single);
        CHECK_EQ(ota_pipeline_new(&f->options, &f->pipeline, &error), OTA_OK);
        ota_pipeline_cancel(f->pipeline);
        ota_pipeline_cancel(f->pipeline);
        CHECK_EQ(ota_pipeline_run(f->pipeline, &f->callbacks, &error), OTA_ERR_CANCELLED);
        CHECK_EQ(f->sink.opens, 0);
        memset(&error, 0, sizeof error);
        CHECK_EQ(ota_pipeline_run(f->pipeline, &f->callbacks, &error), OTA_ERR_STATE);
        teardown();
    }
}

static ota_status cancel_in_phase(void *user, ota_phase phase) {
    (void)user;
    if (phase == OTA_PHASE_VERIFYING) {
        ota_pipeline_cancel(f->pipeline);
    }
    return OTA_OK;
}

TEST(cancel_while_verifying_prevents_the_commit) {
    BOTH_MODES {
        setup(single);
        f->callbacks.phase = cancel_in_phase;
        CHECK_EQ(run(), OTA_ERR_CANCELLED);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(a_compressed_file_is_unpacked_and_both_digests_are_right) {
    static uint8_t packed[SIZE * 2];
    z_stream z = {.next_in = content, .avail_in = SIZE, .next_out = packed, .avail_out = sizeof packed};
    CHECK_EQ(deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
    CHECK_EQ(deflate(&z, Z_FINISH), Z_STREAM_END);
    size_t size = z.total_out;
    deflateEnd(&z);
    BOTH_MODES {
        setup(single);
        f->source.data = packed;
        f->source.size = size;
        f->source.piece = 777;
        f->options.read_back = true;
        CHECK_EQ(run(), OTA_OK);
        CHECK_EQ(f->sink.size, SIZE);
        CHECK_MEM(f->sink.data, content, SIZE);
        uint8_t expected[32], found[32];
        size_t len = 0;
        sha256_of(packed, size, expected);
        CHECK_EQ(ota_verify_digest_value(f->sha256, found, &len), OTA_OK);
        CHECK_MEM(found, expected, 32);
        ota_run_counts counts;
        ota_pipeline_counts(f->pipeline, &counts);
        CHECK_EQ(counts.transform, OTA_TRANSFORM_GZIP);
        teardown();
        setup(single);
        f->source.data = packed;
        f->source.size = size / 2;
        CHECK_EQ(run(), OTA_ERR_INCOMPLETE);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
        setup(single);
        f->source.data = packed;
        f->source.size = size;
        f->options.max_image_size = SIZE - 1;
        CHECK_EQ(run(), OTA_ERR_EXPANSION);
        CHECK_EQ(f->sink.commits, 0);
        teardown();
    }
}

TEST(wrong_options_are_refused) {
    setup(true);
    f->options.resume_offset = 4097;
    CHECK_EQ(run(), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    f->options.resume_offset = 4096;
    f->options.transform = OTA_TRANSFORM_GZIP;
    CHECK_EQ(run(), OTA_ERR_UNSUPPORTED);
    memset(&error, 0, sizeof error);
    f->options.resume_offset = 0;
    f->options.header_size = OTA_HEADER_MAX + 1;
    CHECK_EQ(run(), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    f->options.header_size = 0;
    f->options.chunk_size = 100;
    CHECK_EQ(run(), OTA_ERR_ARGUMENT);
    teardown();
}

static ota_status count_tick(void *user) {
    (void)user;
    if (++f->ticks == 3) {
        ota_pipeline_cancel(f->pipeline);
    }
    return OTA_OK;
}

TEST(ticks_come_while_the_source_waits) {
    setup(false);
    f->source.block_at = 5000;
    f->source.piece = 5000;
    f->callbacks.tick = count_tick;
    CHECK_EQ(run(), OTA_ERR_CANCELLED);
    CHECK_EQ(f->ticks, 3);
    teardown();
}

/* A sink whose finish takes until the third tick of it, or a cancel. */
static pthread_mutex_t slow_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t slow_wake = PTHREAD_COND_INITIALIZER;
static int slow_ticks;
static bool slow_finishing, slow_cancelled;

static ota_status slow_finish(ota_sink *base, ota_error *err) {
    pthread_mutex_lock(&slow_lock);
    slow_finishing = true;
    while (slow_ticks < 3 && !slow_cancelled) {
        pthread_cond_wait(&slow_wake, &slow_lock);
    }
    bool stopped = slow_cancelled;
    pthread_mutex_unlock(&slow_lock);
    return stopped ? ota_error_set(err, OTA_ERR_CANCELLED, OTA_STAGE_SINK, 0, 0, "cancelled") : sink_finish(base, err);
}

static void slow_cancel(ota_sink *base) {
    (void)base;
    pthread_mutex_lock(&slow_lock);
    slow_cancelled = true;
    pthread_cond_signal(&slow_wake);
    pthread_mutex_unlock(&slow_lock);
}

static ota_status slow_tick(void *user) {
    const char *wish = user;
    ota_status status = OTA_OK;
    pthread_mutex_lock(&slow_lock);
    if (slow_finishing) {
        slow_ticks += wish == NULL;
        pthread_cond_signal(&slow_wake);
        status = wish != NULL && strcmp(wish, "fail") == 0 ? OTA_ERR_CALLBACK : OTA_OK;
    }
    bool cancel = slow_finishing && wish != NULL && strcmp(wish, "cancel") == 0;
    pthread_mutex_unlock(&slow_lock);
    if (cancel) {
        ota_pipeline_cancel(f->pipeline);
    }
    return status;
}

TEST(a_sink_that_finishes_slowly_can_be_watched_and_cancelled) {
    static const char *const wishes[] = {NULL, "fail", "cancel"};
    static const ota_status ends[] = {OTA_OK, OTA_ERR_CALLBACK, OTA_ERR_CANCELLED};
    ota_sink_ops ops = fake_sink_ops;
    ops.finish = slow_finish;
    ops.cancel = slow_cancel;
    for (size_t i = 0; i < 3; i++) {
        BOTH_MODES {
            slow_ticks = 0;
            slow_finishing = slow_cancelled = false;
            setup(single);
            f->sink.base.ops = &ops;
            f->callbacks.tick = slow_tick;
            f->callbacks.phase = NULL;
            f->callbacks.header = NULL;
            f->callbacks.checkpoint = NULL;
            f->callbacks.user = (void *)wishes[i];
            CHECK_EQ(run(), ends[i]);
            CHECK_EQ(f->sink.commits, i == 0 ? 1 : 0);
            CHECK_EQ(f->sink.aborts, i == 0 ? 0 : 1);
            CHECK_EQ(slow_cancelled, i != 0);
            teardown();
        }
    }
}

int main(void) {
    uint32_t state = 12345;
    for (size_t i = 0; i < SIZE; i++) {
        state = state * 1664525u + 1013904223u;
        content[i] = (uint8_t)(state >> 24);
    }
    RUN(every_byte_arrives_and_commit_comes_last);
    RUN(a_refused_header_changes_nothing);
    RUN(a_wrong_digest_is_never_committed);
    RUN(a_full_disk_is_the_result_of_the_run);
    RUN(a_source_that_cannot_begin_says_so);
    RUN(a_source_that_fails_in_the_header_is_told_apart);
    RUN(an_image_shorter_than_its_header_is_refused_where_it_needs_one);
    RUN(a_source_that_fails_midway_leaves_a_checkpoint_at_the_last_block);
    RUN(checkpoints_come_as_often_as_asked);
    RUN(a_resume_takes_over_what_is_there);
    RUN(a_resume_onto_something_else_is_refused_before_a_write);
    RUN(a_resume_of_a_complete_slot_is_verified_too);
    RUN(a_source_that_starts_over_is_followed);
    RUN(an_announced_size_that_differs_stops_before_a_write);
    RUN(an_image_too_large_for_the_slot_stops_before_a_write);
    RUN(read_back_finds_a_slot_that_forgets);
    RUN(a_failing_callback_ends_the_run_in_every_phase);
    RUN(cancel_wakes_a_source_that_waits);
    RUN(cancel_before_run_and_twice_is_fine);
    RUN(cancel_while_verifying_prevents_the_commit);
    RUN(a_compressed_file_is_unpacked_and_both_digests_are_right);
    RUN(wrong_options_are_refused);
    RUN(ticks_come_while_the_source_waits);
    RUN(a_sink_that_finishes_slowly_can_be_watched_and_cancelled);
    return DONE();
}
