/* Joins the stages. Knows only their tables of functions.
 *
 * Who does what with threads:
 *     reader     opens the source, fills chunks, applies the transform
 *     verifier   re-hashes what a resume takes over, then sees every chunk
 *     writer     opens the sink, writes every chunk the verifier passed on, syncs for checkpoints
 *     caller     gate, phases, checkpoints and ticks by callback; then finish, read back and commit
 *
 * What the threads leave for the caller (opened, header ready, a checkpoint, an error) lies in `ota_pipeline` under its lock;
 * the caller is woken by its condition. The first error is kept, stops the ring and cancels the source, which wakes everybody.
 *
 * When the source fails with the header behind it, what has arrived is still verified and written; the source's error is then
 * the result. So the gate is asked and a checkpoint made whichever thread is ahead. */
#include "engine/pipeline.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "engine/ring.h"

#define BLOCK 4096u                 /* what direct writes and resume offsets are multiples of */
#define STAGING_SIZE (256u * 1024u) /* compressed bytes in front of a transform */

struct ota_pipeline {
    ota_pipeline_options options;
    const ota_pipeline_callbacks *callbacks;
    ota_verify *size_verify; /* of the file, when its size was announced */
    ota_ring ring;
    pthread_mutex_t lock;
    pthread_cond_t wake; /* CLOCK_MONOTONIC */

    /* under lock */
    ota_error error;        /* the first one */
    ota_error source_error; /* of a source that failed midway, while the rest is drained */
    bool opened, header_ready, checkpoint_ready;
    uint32_t running; /* threads */
    ota_checkpoint checkpoint;
    ota_source_info info; /* written before opened */

    /* reader only */
    ota_transform *transform;
    ota_transform_kind kind;
    uint8_t *staging;
    ota_bytes_in pending; /* compressed bytes not taken yet */
    bool file_ended, resolved;
    uint8_t carry[BLOCK];
    size_t carry_len;
    uint64_t reader_offset; /* of the next image byte */

    /* gate: the header lies in the first chunk, or in header_copy when resumed */
    const uint8_t *header_data;
    size_t header_len;
    uint8_t *header_copy;

    /* writer only */
    bool sink_open;
    uint64_t written;           /* image bytes the sink took */
    uint8_t written_digest[32]; /* their SHA-256, when checkpoints are on */
    uint64_t checkpoint_made, checkpoint_made_ms;

    bool told_open, passed; /* one thread only: how far the gate is */

    uint64_t start; /* image bytes taken over from an earlier run */
    ota_run_counts counts;
    atomic_int phase;
    atomic_bool cancelled;
    atomic_uint_least64_t position, size, image_bytes;
};

static uint64_t now_ms(const ota_pipeline *p) {
    return p->options.clock->now_ms(p->options.clock->user);
}

static bool checkpoints_on(const ota_pipeline *p) {
    return p->options.file_sha256 != NULL && (p->options.checkpoint_bytes != 0 || p->options.checkpoint_ms != 0);
}

static void wake_caller(ota_pipeline *p) {
    pthread_cond_signal(&p->wake);
}

/* Keeps the first error and wakes everybody. */
static void fail(ota_pipeline *p, const ota_error *error) {
    pthread_mutex_lock(&p->lock);
    if (p->error.status == OTA_OK) {
        p->error = *error;
    }
    wake_caller(p);
    pthread_mutex_unlock(&p->lock);
    ota_ring_stop(&p->ring);
    p->options.source->ops->cancel(p->options.source);
}

static bool failed(ota_pipeline *p) {
    pthread_mutex_lock(&p->lock);
    bool result = p->error.status != OTA_OK;
    pthread_mutex_unlock(&p->lock);
    return result;
}

/* ---- Reader ------------------------------------------------------------------------------------------------------- */

static ota_status open_source(ota_pipeline *p, ota_error *error) {
    const ota_pipeline_options *o = &p->options;
    ota_source_info info = {.size = OTA_SIZE_UNKNOWN};
    ota_status status = o->source->ops->open(o->source, o->resume_offset, &info, error);
    if (status < 0) {
        return status;
    }
    if (info.offset != 0 && info.offset != o->resume_offset) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, info.offset, 0,
                             "the source began at %llu, expected %llu or 0", (unsigned long long)info.offset,
                             (unsigned long long)o->resume_offset);
    }
    atomic_store(&p->position, info.offset);
    atomic_store(&p->size, info.size);
    p->start = p->reader_offset = info.offset;
    p->kind = o->transform;
    if (info.offset != 0) {
        p->kind = OTA_TRANSFORM_NONE; /* checkpoints are only made where there is no transform */
    }
    pthread_mutex_lock(&p->lock);
    p->info = info;
    p->opened = true;
    wake_caller(p);
    pthread_mutex_unlock(&p->lock);
    return OTA_OK;
}

static void header_is_ready(ota_pipeline *p, const uint8_t *data, size_t len) {
    pthread_mutex_lock(&p->lock);
    if (!p->header_ready) {
        p->header_data = data;
        p->header_len = len;
        p->header_ready = true;
        wake_caller(p);
    }
    pthread_mutex_unlock(&p->lock);
}

static bool header_known(ota_pipeline *p) {
    pthread_mutex_lock(&p->lock);
    bool known = p->header_ready;
    pthread_mutex_unlock(&p->lock);
    return known;
}

static ota_status update_all(ota_verify *const *list, const uint8_t *data, size_t len, ota_error *error) {
    for (size_t i = 0; i < OTA_VERIFY_MAX && list[i] != NULL; i++) {
        ota_status status = list[i]->ops->update(list[i], data, len, error);
        if (status < 0) {
            return status;
        }
    }
    return OTA_OK;
}

static ota_status update_one(ota_verify *verify, const uint8_t *data, size_t len, ota_error *error) {
    return verify != NULL ? verify->ops->update(verify, data, len, error) : OTA_OK;
}

static ota_status update_file(ota_pipeline *p, const uint8_t *data, size_t len, ota_error *error) {
    ota_status status = update_one(p->size_verify, data, len, error);
    if (status >= 0) {
        status = update_all(p->options.file, data, len, error);
    }
    return status < 0 ? status : update_one(p->options.file_sha256, data, len, error);
}

/* Looks at the first bytes of the file, which lie in `chunk`, and makes the transform they want. */
static ota_status resolve_transform(ota_pipeline *p, ota_chunk *chunk, ota_error *error) {
    p->resolved = true;
    if (p->kind == OTA_TRANSFORM_AUTO) {
        p->kind = ota_transform_detect(chunk->data, chunk->len);
    }
    p->counts.transform = p->kind;
    if (p->kind == OTA_TRANSFORM_NONE) {
        return OTA_OK;
    }
    uint64_t limit = p->options.max_image_size != 0 ? p->options.max_image_size : p->options.sink->capacity;
    ota_status status = ota_transform_new(p->kind, limit == UINT64_MAX ? 0 : limit, 0, &p->transform, error);
    if (status < 0) {
        return status;
    }
    p->staging = malloc(STAGING_SIZE);
    if (p->staging == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, 0, "no memory for %u bytes",
                             STAGING_SIZE);
    }
    status = update_file(p, chunk->data, chunk->len, error);
    memcpy(p->staging, chunk->data, chunk->len); /* below OTA_TRANSFORM_MAGIC_LEN + one read, see read_some */
    p->counts.copies += chunk->len;
    p->pending = (ota_bytes_in){.data = p->staging, .len = chunk->len};
    chunk->len = 0;
    return status;
}

/* Reads file bytes into the chunk; before the transform is known only as many as the staging buffer can take over. */
static ota_status read_plain(ota_pipeline *p, ota_chunk *chunk, ota_error *error) {
    ota_source *source = p->options.source;
    size_t room = p->ring.chunk_size - chunk->len, got = 0;
    if (!p->resolved && p->kind != OTA_TRANSFORM_NONE && room > STAGING_SIZE - chunk->len) {
        room = STAGING_SIZE - chunk->len;
    }
    ota_status status = source->ops->read(source, chunk->data + chunk->len, room, &got, error);
    if (status < 0) {
        return status;
    }
    chunk->len += got;
    atomic_fetch_add(&p->position, got);
    p->file_ended = status == OTA_DONE;
    if (!p->resolved && (chunk->len >= OTA_TRANSFORM_MAGIC_LEN || p->file_ended)) {
        return resolve_transform(p, chunk, error);
    }
    return OTA_OK;
}

/* Puts transformed bytes into the chunk, reading more of the file when the transform wants it. */
static ota_status read_transformed(ota_pipeline *p, ota_chunk *chunk, bool *ended, ota_error *error) {
    ota_source *source = p->options.source;
    ota_bytes_out out = {.data = chunk->data, .capacity = p->ring.chunk_size, .pos = chunk->len};
    ota_status status = OTA_OK;
    if (p->pending.pos < p->pending.len) {
        status = p->transform->ops->step(p->transform, &p->pending, &out, error);
    } else if (p->file_ended) {
        status = p->transform->ops->finish(p->transform, &out, error);
        *ended = status == OTA_DONE;
    } else {
        size_t got = 0;
        status = source->ops->read(source, p->staging, STAGING_SIZE, &got, error);
        p->file_ended = status == OTA_DONE;
        if (status >= 0) {
            atomic_fetch_add(&p->position, got);
            p->pending = (ota_bytes_in){.data = p->staging, .len = got};
            status = update_file(p, p->staging, got, error);
        }
    }
    chunk->len = out.pos;
    return status < 0 ? status : OTA_OK;
}

/* A source or transform that fails once the header is there: what arrived before is still judged and written, so that the run
 * goes the same way whichever thread is ahead, and a resume begins where the data ends. Only whole blocks are handed on. */
static bool drain_after(ota_pipeline *p, ota_chunk *chunk, const ota_error *error) {
    if (error->status == OTA_ERR_CANCELLED || !header_known(p)) {
        return false;
    }
    chunk->len = (size_t)ota_round_down(chunk->len, BLOCK);
    pthread_mutex_lock(&p->lock);
    p->source_error = *error;
    pthread_mutex_unlock(&p->lock);
    return true;
}

static ota_status step_gate(ota_pipeline *p, bool *told_open, bool *passed, ota_error *error);

/* Fills the chunk. *ended: nothing comes after it. With one thread the gate is asked as soon as the header is there. */
static ota_status fill(ota_pipeline *p, ota_chunk *chunk, bool *ended, ota_error *error) {
    uint64_t began = now_ms(p);
    bool first = p->reader_offset == p->start;
    chunk->offset = p->reader_offset;
    memcpy(chunk->data, p->carry, p->carry_len);
    chunk->len = p->carry_len;
    p->counts.copies += p->carry_len;
    p->carry_len = 0;
    *ended = false;
    while (chunk->len < p->ring.chunk_size && !*ended) {
        ota_status status;
        if (p->transform != NULL) {
            status = read_transformed(p, chunk, ended, error);
        } else {
            status = read_plain(p, chunk, error);
            *ended = p->file_ended && p->transform == NULL;
        }
        if (status < 0) {
            if (!drain_after(p, chunk, error)) {
                if (first && error->stage == OTA_STAGE_SOURCE && !header_known(p)) {
                    error->stage = OTA_STAGE_HEADER;
                }
                return status;
            }
            *ended = true;
            break;
        }
        if (first && p->start == 0 && p->resolved && chunk->len >= p->options.header_size) {
            header_is_ready(p, chunk->data, p->options.header_size);
            if (p->options.single_thread && !p->passed) {
                status = step_gate(p, &p->told_open, &p->passed, error);
                if (status < 0) {
                    return status;
                }
            }
        }
        if (chunk->len >= BLOCK && !*ended && now_ms(p) - began >= p->options.flush_ms) {
            p->carry_len = chunk->len % BLOCK;
            chunk->len -= p->carry_len;
            memcpy(p->carry, chunk->data + chunk->len, p->carry_len);
            p->counts.copies += p->carry_len;
            break;
        }
    }
    p->reader_offset += chunk->len;
    if (first && p->start == 0 && *ended && !header_known(p)) {
        if (chunk->len == 0 || p->options.header_required) {
            return ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_HEADER, chunk->len, 0,
                                 "the image ended after %zu bytes, at least %u are needed", chunk->len,
                                 p->options.header_required ? p->options.header_size : 1);
        }
        header_is_ready(p, chunk->data, chunk->len);
    }
    return OTA_OK;
}

/* ---- Verifier ----------------------------------------------------------------------------------------------------- */

static ota_status verify_bytes(ota_pipeline *p, const uint8_t *data, size_t len, ota_error *error) {
    ota_status status = update_all(p->options.image, data, len, error);
    if (status < 0) {
        return status;
    }
    if (p->kind == OTA_TRANSFORM_NONE) {
        return update_file(p, data, len, error);
    }
    return update_one(p->options.image_sha256, data, len, error);
}

/* Reads image bytes [from, to) back from the slot, piece by piece, for `take`. `buffer` holds BLOCK-aligned `size` bytes. */
static ota_status read_slot(ota_pipeline *p, uint64_t from, uint64_t to, uint8_t *buffer, size_t size,
                            ota_status (*take)(void *user, const uint8_t *data, size_t len, ota_error *error),
                            void *user, ota_error *error) {
    ota_sink *sink = p->options.sink;
    while (from < to) {
        if (atomic_load(&p->cancelled)) {
            return ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_VERIFY, from, 0, "cancelled");
        }
        size_t len = to - from < size ? (size_t)(to - from) : size;
        ota_status status = sink->ops->read(sink, from, buffer, len, error);
        if (status >= 0) {
            status = take(user, buffer, len, error);
        }
        if (status < 0) {
            return status;
        }
        from += len;
    }
    return OTA_OK;
}

static ota_status take_verify(void *user, const uint8_t *data, size_t len, ota_error *error) {
    return verify_bytes(user, data, len, error);
}

static ota_status take_digest(void *user, const uint8_t *data, size_t len, ota_error *error) {
    ota_verify *digest = user;
    return digest->ops->update(digest, data, len, error);
}

/* What a resume takes over is fed to the verifiers as if it had just arrived, and must be what the checkpoint spoke of. */
static ota_status verify_resumed(ota_pipeline *p, ota_error *error) {
    if (p->start == 0) {
        return OTA_OK;
    }
    uint8_t *buffer = NULL;
    if (posix_memalign((void **)&buffer, BLOCK, p->ring.chunk_size) != 0) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_VERIFY, 0, 0, "no memory for %zu bytes",
                             p->ring.chunk_size);
    }
    ota_status status = read_slot(p, 0, p->start, buffer, p->ring.chunk_size, take_verify, p, error);
    free(buffer);
    if (status < 0) {
        return status;
    }
    uint8_t digest[OTA_DIGEST_MAX];
    size_t len = 0;
    status = ota_verify_digest_peek(p->options.file_sha256, digest, &len);
    if (status < 0 || memcmp(digest, p->options.resume_sha256, sizeof p->options.resume_sha256) != 0) {
        return ota_error_set(error, OTA_ERR_NOT_RESUMABLE, OTA_STAGE_VERIFY, p->start, 0,
                             "the first %llu bytes on the slot are not those of the resume record",
                             (unsigned long long)p->start);
    }
    return OTA_OK;
}

static ota_status verify_chunk(ota_pipeline *p, ota_chunk *chunk, ota_error *error) {
    ota_status status = verify_bytes(p, chunk->data, chunk->len, error);
    if (status >= 0 && checkpoints_on(p) && p->kind == OTA_TRANSFORM_NONE) {
        size_t len = 0;
        status = ota_verify_digest_peek(p->options.file_sha256, chunk->digest, &len);
        if (status < 0) {
            ota_error_set(error, status, OTA_STAGE_VERIFY, chunk->offset, 0, "the digest cannot be read");
        }
    }
    return status;
}

/* ---- Writer ------------------------------------------------------------------------------------------------------- */

static ota_status open_sink(ota_pipeline *p, ota_error *error) {
    if (p->sink_open) {
        return OTA_OK;
    }
    ota_sink *sink = p->options.sink;
    uint64_t size = p->kind == OTA_TRANSFORM_NONE ? p->info.size : OTA_SIZE_UNKNOWN;
    ota_status status = sink->ops->open(sink, size, p->start, error);
    p->sink_open = status >= 0;
    p->written = p->checkpoint_made = p->start;
    p->checkpoint_made_ms = now_ms(p);
    return status;
}

/* Syncs, and tells the caller how far the image is on the medium. */
static ota_status make_checkpoint(ota_pipeline *p, ota_error *error) {
    uint64_t durable = 0;
    ota_status status = p->options.sink->ops->sync(p->options.sink, &durable, error);
    if (status < 0) {
        return status;
    }
    p->checkpoint_made_ms = now_ms(p);
    if (durable != p->written) {
        return OTA_OK; /* the sink holds some of it back: the next one will do */
    }
    p->checkpoint_made = durable;
    p->counts.checkpoints++;
    pthread_mutex_lock(&p->lock);
    p->checkpoint.offset = durable;
    p->checkpoint.entity_tag = p->info.entity_tag;
    memcpy(p->checkpoint.sha256, p->written_digest, sizeof p->checkpoint.sha256);
    p->checkpoint_ready = true;
    wake_caller(p);
    pthread_mutex_unlock(&p->lock);
    return OTA_OK;
}

static ota_status write_chunk(ota_pipeline *p, ota_chunk *chunk, ota_error *error) {
    ota_status status = open_sink(p, error);
    if (status >= 0) {
        status = p->options.sink->ops->write(p->options.sink, chunk->data, chunk->len, error);
    }
    if (status < 0) {
        return status;
    }
    p->written = chunk->offset + chunk->len;
    memcpy(p->written_digest, chunk->digest, sizeof p->written_digest);
    atomic_store(&p->image_bytes, p->written);
    p->counts.chunks++;
    const ota_pipeline_options *o = &p->options;
    bool due = (o->checkpoint_bytes != 0 && p->written - p->checkpoint_made >= o->checkpoint_bytes) ||
               (o->checkpoint_ms != 0 && now_ms(p) - p->checkpoint_made_ms >= o->checkpoint_ms);
    if (!due || !checkpoints_on(p) || p->kind != OTA_TRANSFORM_NONE || p->written % o->sink->resume_size != 0) {
        return OTA_OK;
    }
    return make_checkpoint(p, error);
}

/* After a source that failed midway: where the written data ends is where a resume begins. */
static ota_status write_rest(ota_pipeline *p, ota_error *error) {
    pthread_mutex_lock(&p->lock);
    bool source_failed = p->source_error.status < 0;
    pthread_mutex_unlock(&p->lock);
    return source_failed && p->written > p->checkpoint_made ? make_checkpoint(p, error) : OTA_OK;
}

/* ---- Threads ------------------------------------------------------------------------------------------------------ */

static void *finish_thread(ota_pipeline *p, ota_status status, const ota_error *error) {
    if (status < 0) {
        fail(p, error);
    }
    pthread_mutex_lock(&p->lock);
    p->running--;
    wake_caller(p);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void *reader_main(void *user) {
    ota_pipeline *p = user;
    ota_error error = {0};
    bool ended = false;
    ota_status status = open_source(p, &error);
    while (status >= 0 && !ended) {
        ota_chunk *chunk = ota_ring_reserve(&p->ring);
        if (chunk == NULL) {
            break;
        }
        status = fill(p, chunk, &ended, &error);
        if (status >= 0 && chunk->len > 0) {
            ota_ring_publish(&p->ring);
        }
        if (p->source_error.status < 0) {
            status = OTA_OK; /* told by the caller once the rest is written */
        }
    }
    ota_ring_end(&p->ring);
    return finish_thread(p, status, &error);
}

static void *verifier_main(void *user) {
    ota_pipeline *p = user;
    ota_error error = {0};
    ota_status status = OTA_OK;
    bool begun = false;
    ota_chunk *chunk;
    while (status >= 0 && (chunk = ota_ring_peek(&p->ring, OTA_RING_VERIFIER)) != NULL) {
        status = begun ? OTA_OK : verify_resumed(p, &error);
        begun = true;
        if (status >= 0) {
            status = verify_chunk(p, chunk, &error);
        }
        if (status >= 0) {
            ota_ring_release(&p->ring, OTA_RING_VERIFIER);
        }
    }
    if (status >= 0 && !begun && !failed(p)) {
        status = verify_resumed(p, &error); /* nothing new came: all of it was on the slot */
    }
    return finish_thread(p, status, &error);
}

static void *writer_main(void *user) {
    ota_pipeline *p = user;
    ota_error error = {0};
    ota_status status = OTA_OK;
    ota_chunk *chunk;
    while (status >= 0 && (chunk = ota_ring_peek(&p->ring, OTA_RING_WRITER)) != NULL) {
        status = write_chunk(p, chunk, &error);
        if (status >= 0) {
            ota_ring_release(&p->ring, OTA_RING_WRITER);
        }
    }
    if (status >= 0) {
        status = write_rest(p, &error);
    }
    return finish_thread(p, status, &error);
}

/* ---- Caller ------------------------------------------------------------------------------------------------------- */

/* A callback's verdict as an error of its own, for those that keep their reason elsewhere. */
static ota_status from_callback(ota_status status, ota_stage stage, ota_error *error) {
    if (status >= 0) {
        return OTA_OK;
    }
    return ota_error_set(error, status, stage, 0, 0, "%s",
                         status == OTA_ERR_REJECTED ? "the image was refused" : "a callback failed");
}

static ota_status enter_phase(ota_pipeline *p, ota_phase phase, ota_error *error) {
    atomic_store(&p->phase, (int)phase);
    if (p->callbacks->phase == NULL) {
        return OTA_OK;
    }
    return from_callback(p->callbacks->phase(p->callbacks->user, phase), OTA_STAGE_NONE, error);
}

/* Asks the gate, then checks what the source told of the size; nothing has been written yet. */
static ota_status pass_gate(ota_pipeline *p, ota_error *error) {
    const ota_pipeline_options *o = &p->options;
    ota_header header = {.data = p->header_data,
                         .len = p->header_len,
                         .size = p->kind == OTA_TRANSFORM_NONE ? p->info.size : OTA_SIZE_UNKNOWN,
                         .offset = p->start,
                         .entity_tag = p->info.entity_tag};
    ota_status status = OTA_OK;
    if (p->callbacks->header != NULL) {
        status = from_callback(p->callbacks->header(p->callbacks->user, &header), OTA_STAGE_HEADER, error);
    }
    if (status >= 0) {
        status = enter_phase(p, OTA_PHASE_RECEIVING, error);
    }
    if (status >= 0 && o->file_size != OTA_SIZE_UNKNOWN && p->info.size != OTA_SIZE_UNKNOWN &&
        o->file_size != p->info.size) {
        status = ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_VERIFY, 0, 0,
                               "the server's file has %llu bytes, %llu were announced",
                               (unsigned long long)p->info.size, (unsigned long long)o->file_size);
    }
    if (status >= 0 && header.size != OTA_SIZE_UNKNOWN && header.size > o->sink->capacity) {
        status = ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0,
                               "the image has %llu bytes, the slot holds %llu", (unsigned long long)header.size,
                               (unsigned long long)o->sink->capacity);
    }
    return status;
}

static ota_status read_resumed_header(ota_pipeline *p, ota_error *error) {
    size_t len = p->start < p->options.header_size ? (size_t)p->start : p->options.header_size;
    if (posix_memalign((void **)&p->header_copy, BLOCK, OTA_HEADER_MAX) != 0) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_HEADER, 0, 0, "no memory for the header");
    }
    ota_status status = p->options.sink->ops->read(p->options.sink, 0, p->header_copy, len, error);
    p->header_data = p->header_copy;
    p->header_len = len;
    return status;
}

static ota_status deliver_checkpoint(ota_pipeline *p, ota_error *error) {
    pthread_mutex_lock(&p->lock);
    bool ready = p->checkpoint_ready;
    ota_checkpoint checkpoint = p->checkpoint;
    p->checkpoint_ready = false;
    pthread_mutex_unlock(&p->lock);
    if (!ready || p->callbacks->checkpoint == NULL) {
        return OTA_OK;
    }
    return from_callback(p->callbacks->checkpoint(p->callbacks->user, &checkpoint), OTA_STAGE_NONE, error);
}

static ota_status tick(ota_pipeline *p, ota_error *error) {
    if (p->callbacks->tick == NULL) {
        return OTA_OK;
    }
    return from_callback(p->callbacks->tick(p->callbacks->user), OTA_STAGE_NONE, error);
}

/* What the caller does when the source is open, and when the header is there. */
static ota_status step_gate(ota_pipeline *p, bool *told_open, bool *passed, ota_error *error) {
    pthread_mutex_lock(&p->lock);
    bool opened = p->opened, ready = p->header_ready;
    pthread_mutex_unlock(&p->lock);
    ota_status status = OTA_OK;
    if (opened && !*told_open) {
        *told_open = true;
        status = enter_phase(p, OTA_PHASE_HEADER, error);
        if (status >= 0 && p->start != 0) {
            status = read_resumed_header(p, error);
            if (status >= 0) {
                header_is_ready(p, p->header_data, p->header_len);
                ready = true;
            }
        }
    }
    if (status >= 0 && ready && !*passed) {
        status = pass_gate(p, error);
        *passed = status >= 0;
    }
    return status;
}

static struct timespec tick_end(const ota_pipeline *p) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += p->options.tick_ms / 1000;
    until.tv_nsec += (long)(p->options.tick_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return until;
}

static ota_status run_threads(ota_pipeline *p, ota_error *error) {
    static void *(*const mains[])(void *) = {reader_main, verifier_main, writer_main};
    pthread_t threads[3];
    uint32_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's business */
    for (; started < 3; started++) {
        pthread_mutex_lock(&p->lock);
        p->running++;
        pthread_mutex_unlock(&p->lock);
        int errnum = pthread_create(&threads[started], NULL, mains[started], p);
        if (errnum != 0) {
            p->running--;
            ota_error local = {0};
            ota_error_set_errno(&local, OTA_STAGE_NONE, 0, errnum, "a thread cannot be started");
            fail(p, &local);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);

    bool told_open = false, passed = false;
    for (;;) {
        ota_error local = {0};
        ota_status status = OTA_OK;
        bool was_passed = passed;
        if (!failed(p)) {
            status = step_gate(p, &told_open, &passed, &local);
            if (status >= 0 && passed && !was_passed) {
                ota_ring_open(&p->ring);
            }
            if (status >= 0) {
                status = deliver_checkpoint(p, &local);
            }
        }
        if (status < 0) {
            fail(p, &local);
        }
        const struct timespec until = tick_end(p);
        pthread_mutex_lock(&p->lock);
        bool timed_out = false, work = false;
        while (p->running > 0 && !timed_out) {
            bool down = p->error.status != OTA_OK;
            work = !down && ((p->opened && !told_open) || (p->header_ready && !passed) || p->checkpoint_ready);
            if (work) {
                break;
            }
            timed_out = pthread_cond_timedwait(&p->wake, &p->lock, &until) == ETIMEDOUT;
        }
        bool done = p->running == 0;
        pthread_mutex_unlock(&p->lock);
        if (done) {
            break;
        }
        if (timed_out && !failed(p)) {
            status = tick(p, &local);
            if (status < 0) {
                fail(p, &local);
            }
        }
    }
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
    if (p->opened && !told_open && p->error.status != OTA_ERR_CANCELLED) {
        enter_phase(p, OTA_PHASE_HEADER, error); /* it failed in the header, before this thread saw that it was open */
    }
    if (p->error.status != OTA_OK) {
        *error = p->error;
    } else if (error->status == OTA_OK && p->source_error.status != OTA_OK) {
        *error = p->source_error;
    }
    return error->status;
}

static ota_status run_single(ota_pipeline *p, ota_error *error) {
    bool ended = false, begun = false;
    uint64_t ticked = now_ms(p);
    ota_status status = open_source(p, error);
    if (status >= 0) {
        status = step_gate(p, &p->told_open, &p->passed, error);
    }
    while (status >= 0 && !ended) {
        ota_chunk *chunk = &p->ring.chunks[0];
        status = fill(p, chunk, &ended, error);
        bool drained = p->source_error.status < 0;
        if (drained) {
            memset(error, 0, sizeof *error);
            status = OTA_OK;
        }
        if (status >= 0 && !p->passed) {
            status = step_gate(p, &p->told_open, &p->passed, error);
        }
        if (status >= 0 && !begun) {
            begun = true;
            status = verify_resumed(p, error);
        }
        if (status >= 0 && chunk->len > 0) {
            status = verify_chunk(p, chunk, error);
        }
        if (status >= 0 && chunk->len > 0) {
            status = write_chunk(p, chunk, error);
        }
        if (status >= 0 && drained) {
            status = write_rest(p, error);
        }
        if (status >= 0) {
            status = deliver_checkpoint(p, error);
        }
        if (status >= 0 && now_ms(p) - ticked >= p->options.tick_ms) {
            ticked = now_ms(p);
            status = tick(p, error);
        }
        if (status >= 0 && atomic_load(&p->cancelled)) {
            status = ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled");
        }
        if (status >= 0 && drained) {
            *error = p->source_error;
            status = error->status;
        }
    }
    return status;
}

static ota_status finish_all(ota_verify *const *list, ota_error *error) {
    for (size_t i = 0; i < OTA_VERIFY_MAX && list[i] != NULL; i++) {
        ota_status status = list[i]->ops->finish(list[i], error);
        if (status < 0) {
            return status;
        }
    }
    return OTA_OK;
}

static ota_status finish_one(ota_verify *verify, ota_error *error) {
    return verify != NULL ? verify->ops->finish(verify, error) : OTA_OK;
}

static ota_status compare_read_back(ota_pipeline *p, ota_error *error) {
    ota_verify *expected = p->kind == OTA_TRANSFORM_NONE ? p->options.file_sha256 : p->options.image_sha256;
    uint8_t written[OTA_DIGEST_MAX], read[OTA_DIGEST_MAX];
    size_t len = 0;
    ota_verify *digest = NULL;
    ota_status status = ota_verify_digest_value(expected, written, &len);
    if (status < 0) {
        return ota_error_set(error, status, OTA_STAGE_VERIFY, 0, 0, "the digest cannot be read");
    }
    status = ota_verify_digest_new(OTA_DIGEST_SHA256, NULL, &digest, error);
    if (status >= 0) {
        status =
            read_slot(p, 0, p->reader_offset, p->ring.chunks[0].data, p->ring.chunk_size, take_digest, digest, error);
    }
    if (status >= 0) {
        status = digest->ops->finish(digest, error);
    }
    if (status >= 0) {
        status = ota_verify_digest_value(digest, read, &len);
    }
    if (status >= 0 && memcmp(written, read, len) != 0) {
        status = ota_error_set(error, OTA_ERR_READ_BACK, OTA_STAGE_SINK, 0, 0,
                               "the %llu bytes read back from the slot are not those that were written",
                               (unsigned long long)p->reader_offset);
    }
    ota_verify_free(&digest);
    return status;
}

typedef struct finish_job {
    ota_pipeline *p;
    ota_status status;
    ota_error error;
    bool done; /* under the pipeline's lock */
} finish_job;

static void *run_finish(void *user) {
    finish_job *job = user;
    ota_sink *sink = job->p->options.sink;
    job->status = sink->ops->finish(sink, &job->error);
    pthread_mutex_lock(&job->p->lock);
    job->done = true;
    pthread_cond_signal(&job->p->wake);
    pthread_mutex_unlock(&job->p->lock);
    return NULL;
}

/* A sink that can be cancelled may take minutes to finish: the caller goes on hearing ticks. */
static ota_status finish_sink(ota_pipeline *p, ota_error *error) {
    ota_sink *sink = p->options.sink;
    finish_job job = {.p = p};
    pthread_t thread;
    if (sink->ops->cancel == NULL || pthread_create(&thread, NULL, run_finish, &job) != 0) {
        return sink->ops->finish(sink, error);
    }
    ota_status status = OTA_OK;
    for (bool done = false; !done;) {
        const struct timespec until = tick_end(p);
        bool timed_out = false;
        pthread_mutex_lock(&p->lock);
        while (!job.done && !timed_out) {
            timed_out = pthread_cond_timedwait(&p->wake, &p->lock, &until) == ETIMEDOUT;
        }
        done = job.done;
        pthread_mutex_unlock(&p->lock);
        if (!done && status >= 0) {
            status = tick(p, error);
            if (status < 0) {
                sink->ops->cancel(sink);
            }
        }
    }
    pthread_join(thread, NULL);
    if (status >= 0 && job.status < 0) {
        *error = job.error;
        status = job.status;
    }
    return status;
}

/* Everything is written. From here the caller's thread is the only one. */
static ota_status complete(ota_pipeline *p, ota_error *error) {
    ota_sink *sink = p->options.sink;
    ota_status status = open_sink(p, error);
    if (status >= 0) {
        status = enter_phase(p, OTA_PHASE_RECEIVED, error);
    }
    if (status >= 0) {
        status = enter_phase(p, OTA_PHASE_VERIFYING, error);
    }
    if (status >= 0) {
        status = finish_one(p->size_verify, error);
    }
    if (status >= 0) {
        status = finish_all(p->options.image, error);
    }
    if (status >= 0) {
        status = finish_all(p->options.file, error);
    }
    if (status >= 0) {
        status = finish_one(p->options.file_sha256, error);
    }
    if (status >= 0 && p->kind != OTA_TRANSFORM_NONE) {
        status = finish_one(p->options.image_sha256, error);
    }
    if (status >= 0) {
        status = finish_sink(p, error);
    }
    if (status >= 0 && p->options.read_back) {
        status = compare_read_back(p, error);
    }
    if (status >= 0 && atomic_load(&p->cancelled)) {
        status = ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled before the commit");
    }
    if (status >= 0) {
        status = enter_phase(p, OTA_PHASE_COMMITTING, error);
    }
    if (status >= 0) {
        status = sink->ops->commit(sink, error);
    }
    if (status >= 0) {
        status = enter_phase(p, OTA_PHASE_DONE, error);
    }
    return status;
}

/* Whether a run failed over the contents of a body that has arrived as a whole, and not over its first bytes. */
static bool body_is_wrong(const ota_pipeline *p, const ota_error *error) {
    if (error->stage != OTA_STAGE_VERIFY) {
        return false;
    }
    switch (error->status) {
    case OTA_ERR_IMAGE_MAGIC:
    case OTA_ERR_IMAGE_CHIP:
    case OTA_ERR_IMAGE_REVISION:
    case OTA_ERR_IMAGE_FLASH_MODE:
    case OTA_ERR_NOT_RESUMABLE:
    case OTA_ERR_CANCELLED:
        return false;
    default:
        return p->file_ended || atomic_load(&p->position) == atomic_load(&p->size);
    }
}

ota_status ota_pipeline_run(ota_pipeline *p, const ota_pipeline_callbacks *callbacks, ota_error *error) {
    ota_error local = {0};
    if (p->callbacks != NULL) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_NONE, 0, 0, "a pipeline runs once");
    }
    p->callbacks = callbacks;
    ota_status status = enter_phase(p, OTA_PHASE_CONNECTING, &local);
    if (status >= 0 && atomic_load(&p->cancelled)) {
        status = ota_error_set(&local, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled before it began");
    }
    if (status >= 0) {
        status = p->options.single_thread ? run_single(p, &local) : run_threads(p, &local);
    }
    /* A checkpoint speaks of data that is on the medium: it is told even when the run failed after it. */
    ota_error ignored = {0};
    ota_status told = deliver_checkpoint(p, status < 0 ? &ignored : &local);
    status = status < 0 ? status : told;
    if (status >= 0) {
        status = complete(p, &local);
    } else if (body_is_wrong(p, &local)) {
        enter_phase(p, OTA_PHASE_RECEIVED, &ignored); /* the verdict was there before everybody had seen the end */
    }
    p->options.source->ops->close(p->options.source);
    if (status < 0) {
        p->options.sink->ops->abort(p->options.sink);
    }
    p->counts.image_size = p->reader_offset;
    p->counts.file_size = atomic_load(&p->position);
    p->counts.resumed_from = p->start;
    p->counts.waits_reader = p->ring.waits[OTA_RING_STAGES];
    p->counts.waits_verifier = p->ring.waits[OTA_RING_VERIFIER];
    p->counts.waits_writer = p->ring.waits[OTA_RING_WRITER];
    if (status < 0 && atomic_load(&p->cancelled) && local.status != OTA_ERR_CALLBACK &&
        local.status != OTA_ERR_REJECTED) {
        memset(&local, 0, sizeof local); /* whatever the cancel broke first, cancelled is what it was */
        ota_error_set(&local, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled");
        status = OTA_ERR_CANCELLED;
    }
    if (error != NULL) {
        *error = local;
    }
    return status < 0 ? local.status : OTA_OK;
}

void ota_pipeline_cancel(ota_pipeline *p) {
    atomic_store(&p->cancelled, true);
    if (p->options.sink->ops->cancel != NULL) {
        p->options.sink->ops->cancel(p->options.sink);
    }
    ota_error error = {0};
    ota_error_set(&error, OTA_ERR_CANCELLED, OTA_STAGE_NONE, 0, 0, "cancelled");
    if (atomic_load(&p->phase) < OTA_PHASE_RECEIVED) {
        fail(p, &error);
    }
}

void ota_pipeline_progress(const ota_pipeline *p, ota_progress *progress) {
    progress->phase = (ota_phase)atomic_load(&p->phase);
    progress->position = atomic_load(&p->position);
    progress->size = atomic_load(&p->size);
    progress->image_bytes = atomic_load(&p->image_bytes);
}

void ota_pipeline_counts(const ota_pipeline *p, ota_run_counts *counts) {
    *counts = p->counts;
}

ota_status ota_pipeline_new(const ota_pipeline_options *options, ota_pipeline **out, ota_error *error) {
    *out = NULL;
    ota_pipeline *p = calloc(1, sizeof *p);
    if (p == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_NONE, 0, 0, "no memory for a pipeline");
    }
    p->options = *options;
    ota_pipeline_options *o = &p->options;
    o->header_size = o->header_size != 0 ? o->header_size : 288;
    o->chunk_count = o->chunk_count != 0 ? o->chunk_count : 8;
    o->chunk_size = o->chunk_size != 0 ? o->chunk_size : 1u << 20;
    o->tick_ms = o->tick_ms != 0 ? o->tick_ms : 100;
    o->flush_ms = o->flush_ms != 0 ? o->flush_ms : 1000;
    o->clock = o->clock != NULL ? o->clock : &ota_port_clock;
    ota_status status = OTA_OK;
    if (o->source == NULL || o->sink == NULL) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, 0, 0, "a pipeline needs a source and a sink");
    } else if (o->header_size > OTA_HEADER_MAX || o->header_size > o->chunk_size) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, 0, 0,
                               "header_size is %u, at most %u is possible", o->header_size, OTA_HEADER_MAX);
    } else if ((o->read_back || o->resume_offset != 0) && o->file_sha256 == NULL) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, 0, 0, "resume and read back need a SHA-256");
    } else if (o->resume_offset % o->sink->resume_size != 0) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_NONE, o->resume_offset, 0,
                               "resume_offset is no multiple of %u", o->sink->resume_size);
    } else if (o->resume_offset != 0 && o->transform != OTA_TRANSFORM_AUTO && o->transform != OTA_TRANSFORM_NONE) {
        status =
            ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TRANSFORM, 0, 0, "a compressed file cannot be resumed");
    }
    if (status >= 0) {
        status = ota_ring_init(&p->ring, o->chunk_count, o->chunk_size, error);
    }
    if (status >= 0 && o->file_size != OTA_SIZE_UNKNOWN) {
        status = ota_verify_size_new(o->file_size, &p->size_verify, error);
    }
    if (status < 0) {
        ota_ring_destroy(&p->ring);
        free(p);
        return status;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->wake, &attr);
    pthread_condattr_destroy(&attr);
    atomic_init(&p->phase, OTA_PHASE_CONNECTING);
    atomic_init(&p->cancelled, false);
    atomic_init(&p->position, 0);
    atomic_init(&p->size, OTA_SIZE_UNKNOWN);
    atomic_init(&p->image_bytes, 0);
    *out = p;
    return OTA_OK;
}

void ota_pipeline_free(ota_pipeline **pipeline) {
    ota_pipeline *p = *pipeline;
    *pipeline = NULL;
    if (p == NULL) {
        return;
    }
    ota_transform_free(&p->transform);
    ota_verify_free(&p->size_verify);
    free(p->staging);
    free(p->header_copy);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    ota_ring_destroy(&p->ring);
    free(p);
}
