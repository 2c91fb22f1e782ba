/* Bytes in memory, and bytes handed in by the caller.
 *
 * The push source is a ring between one writer and one reader under one lock; both sides wait on one condition each. State
 * of the writer's side:
 *
 *     state    write  end      fail      reader, once the ring is empty
 *     OPEN     OPEN   ENDED    FAILED    waits
 *     ENDED    error  ENDED    ENDED     OTA_DONE, or OTA_ERR_INCOMPLETE below the announced size
 *     FAILED   error  FAILED   FAILED    the error
 *
 * `gone` (closed or cancelled) overrides all of them and wakes both sides. */
#include "source/source_common.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

typedef struct memory_source {
    ota_source base;
    const uint8_t *data;
    size_t len;
    size_t position;
    bool is_open;
    atomic_bool cancelled;
} memory_source;

static ota_status memory_open(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error) {
    memory_source *self = (memory_source *)source;
    if (self->is_open) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, 0, 0, "the source is open already");
    }
    if (self->cancelled) {
        return ota_source_cancelled(error, offset);
    }
    self->position = offset <= self->len ? (size_t)offset : 0;
    self->is_open = true;
    source->requests += 1;
    memset(info, 0, sizeof *info);
    info->size = self->len;
    info->offset = self->position;
    return OTA_OK;
}

static ota_status memory_read(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error) {
    memory_source *self = (memory_source *)source;
    *len = 0;
    if (self->cancelled) {
        return ota_source_cancelled(error, self->position);
    }
    if (!self->is_open || capacity == 0) {
        return ota_error_set(error, self->is_open ? OTA_ERR_ARGUMENT : OTA_ERR_STATE, OTA_STAGE_SOURCE, self->position,
                             0, self->is_open ? "no room to read into" : "the source is not open");
    }
    size_t rest = self->len - self->position;
    if (rest == 0) {
        return OTA_DONE;
    }
    *len = rest < capacity ? rest : capacity;
    memcpy(buf, self->data + self->position, *len);
    self->position += *len;
    source->bytes_read += *len;
    return OTA_OK;
}

static void memory_cancel(ota_source *source) {
    ((memory_source *)source)->cancelled = true;
}

static void memory_close(ota_source *source) {
    ((memory_source *)source)->is_open = false;
}

static void memory_free(ota_source *source) {
    free(source);
}

static const ota_source_ops memory_ops = {
    .open = memory_open, .read = memory_read, .cancel = memory_cancel, .close = memory_close, .free = memory_free};

ota_status ota_source_memory_new(const void *data, size_t len, ota_source **out, ota_error *error) {
    memory_source *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "making a memory source");
    }
    self->base.ops = &memory_ops;
    self->data = data;
    self->len = len;
    *out = &self->base;
    return OTA_OK;
}

/* ---- Push -------------------------------------------------------------------------------------------------------- */

typedef enum push_state {
    PUSH_OPEN,
    PUSH_ENDED,
    PUSH_FAILED,
} push_state;

typedef struct push_source {
    ota_source base;
    uint8_t *ring;
    size_t capacity;
    uint64_t size;   /* of the whole object, OTA_SIZE_UNKNOWN: not told */
    uint64_t offset; /* where the pushed bytes begin */

    pthread_mutex_t lock; /* guards everything below */
    pthread_cond_t readable;
    pthread_cond_t writable; /* room, a reader that waits, or nobody there any more */
    size_t head;             /* index in the ring of the oldest byte */
    size_t used;
    uint64_t written; /* position behind the newest byte */
    uint64_t taken;   /* position of the oldest byte */
    push_state state;
    bool hungry; /* the reader waits for bytes */
    bool opened;
    bool closed;
    bool cancelled;
    ota_error kept; /* what fail said, or what we found */
} push_source;

static ota_status push_open(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error) {
    push_source *self = (push_source *)source;
    ota_status status = OTA_OK;
    pthread_mutex_lock(&self->lock);
    if (self->cancelled) {
        status = ota_source_cancelled(error, offset);
    } else if (self->opened) {
        status = ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, 0, 0, "pushed bytes can be read only once");
    } else if (self->offset != 0 && self->offset != offset) {
        status = ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, offset, 0,
                               "the pushed bytes begin at %llu, not at %llu", (unsigned long long)self->offset,
                               (unsigned long long)offset);
    } else {
        self->opened = true;
        source->requests += 1;
        memset(info, 0, sizeof *info);
        info->size = self->size;
        info->offset = self->offset;
    }
    pthread_mutex_unlock(&self->lock);
    return status;
}

/* Copies up to `capacity` bytes out of the ring; under the lock, the ring is not empty. */
static size_t take(push_source *self, uint8_t *buf, size_t capacity) {
    size_t len = self->used < capacity ? self->used : capacity;
    size_t first = self->capacity - self->head < len ? self->capacity - self->head : len;
    memcpy(buf, self->ring + self->head, first);
    memcpy(buf + first, self->ring, len - first);
    self->head = (self->head + len) % self->capacity;
    self->used -= len;
    self->taken += len;
    return len;
}

static ota_status push_read(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error) {
    push_source *self = (push_source *)source;
    ota_status status = OTA_OK;
    *len = 0;
    pthread_mutex_lock(&self->lock);
    if (!self->opened || self->closed) {
        status = ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, self->taken, 0, "the source is not open");
        goto out;
    }
    if (capacity == 0) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SOURCE, self->taken, 0, "no room to read into");
        goto out;
    }
    if (self->used == 0 && self->state == PUSH_OPEN && !self->cancelled) {
        self->hungry = true;
        pthread_cond_signal(&self->writable);
        do {
            pthread_cond_wait(&self->readable, &self->lock);
        } while (self->used == 0 && self->state == PUSH_OPEN && !self->cancelled);
        self->hungry = false;
    }
    if (self->cancelled) {
        status = ota_source_cancelled(error, self->taken);
    } else if (self->used > 0) {
        *len = take(self, buf, capacity);
        source->bytes_read += *len;
        pthread_cond_signal(&self->writable);
    } else if (self->state == PUSH_FAILED) {
        status = ota_source_repeat(&self->kept, error);
    } else if (self->size != OTA_SIZE_UNKNOWN && self->taken < self->size) {
        status = ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_SOURCE, self->taken, 0,
                               "the pushed bytes ended at %llu of %llu", (unsigned long long)self->taken,
                               (unsigned long long)self->size);
    } else {
        status = OTA_DONE;
    }
out:
    pthread_mutex_unlock(&self->lock);
    return status;
}

static void push_leave(push_source *self, bool cancelled) {
    pthread_mutex_lock(&self->lock);
    if (cancelled) {
        self->cancelled = true;
    } else if (self->opened) {
        self->closed = true;
    }
    pthread_cond_broadcast(&self->readable);
    pthread_cond_broadcast(&self->writable);
    pthread_mutex_unlock(&self->lock);
}

static void push_cancel(ota_source *source) {
    push_leave((push_source *)source, true);
}

static void push_close(ota_source *source) {
    push_leave((push_source *)source, false);
}

static void push_free(ota_source *source) {
    push_source *self = (push_source *)source;
    pthread_cond_destroy(&self->writable);
    pthread_cond_destroy(&self->readable);
    pthread_mutex_destroy(&self->lock);
    free(self->ring);
    free(self);
}

static const ota_source_ops push_ops = {
    .open = push_open, .read = push_read, .cancel = push_cancel, .close = push_close, .free = push_free};

ota_status ota_source_push_new(size_t capacity, uint64_t size, uint64_t offset, ota_source **out, ota_error *error) {
    if (capacity == 0 || offset > size) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SOURCE, offset, 0,
                             capacity == 0 ? "the capacity is 0" : "the offset lies behind the end");
    }
    push_source *self = calloc(1, sizeof *self);
    uint8_t *ring = malloc(capacity);
    if (self == NULL || ring == NULL) {
        free(ring);
        free(self);
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "making a push source");
    }
    self->base.ops = &push_ops;
    self->ring = ring;
    self->capacity = capacity;
    self->size = size;
    self->offset = offset;
    self->written = offset;
    self->taken = offset;
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->readable, NULL);
    pthread_cond_init(&self->writable, NULL);
    *out = &self->base;
    return OTA_OK;
}

static push_source *as_push(ota_source *source) {
    return source->ops == &push_ops ? (push_source *)source : NULL;
}

static ota_status not_push(ota_error *error) {
    return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SOURCE, 0, 0, "not a push source");
}

/* What keeps the writer from going on; OTA_OK: nothing. Under the lock. */
static ota_status writer_status(push_source *self, ota_error *error) {
    if (self->cancelled || self->closed) {
        return ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_SOURCE, self->written, 0, "the reader is gone");
    }
    return OTA_OK;
}

static void put(push_source *self, const uint8_t *data, size_t len) {
    size_t tail = (self->head + self->used) % self->capacity;
    size_t first = self->capacity - tail < len ? self->capacity - tail : len;
    memcpy(self->ring + tail, data, first);
    memcpy(self->ring, data + first, len - first);
    self->used += len;
    self->written += len;
}

ota_status ota_source_push_write(ota_source *source, const void *data, size_t len, ota_error *error) {
    push_source *self = as_push(source);
    if (self == NULL) {
        return not_push(error);
    }
    const uint8_t *next = data;
    ota_status status = OTA_OK;
    pthread_mutex_lock(&self->lock);
    status = writer_status(self, error);
    if (status == OTA_OK && self->state != PUSH_OPEN) {
        status = ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, self->written, 0,
                               "no bytes can be pushed after the end");
    }
    if (status == OTA_OK && len > self->size - self->written) { /* holds for an unknown size too: it is the largest */
        ota_error_set(&self->kept, OTA_ERR_SIZE, OTA_STAGE_SOURCE, self->size, 0,
                      "more bytes were pushed than the announced %llu", (unsigned long long)self->size);
        self->state = PUSH_FAILED;
        pthread_cond_signal(&self->readable);
        status = ota_source_repeat(&self->kept, error);
    }
    while (status == OTA_OK && len > 0) {
        size_t room = self->capacity - self->used;
        if (room == 0) {
            pthread_cond_wait(&self->writable, &self->lock);
            status = writer_status(self, error);
            continue;
        }
        size_t part = len < room ? len : room;
        put(self, next, part);
        next += part;
        len -= part;
        pthread_cond_signal(&self->readable);
    }
    pthread_mutex_unlock(&self->lock);
    return status;
}

ota_status ota_source_push_drain(ota_source *source, ota_error *error) {
    push_source *self = as_push(source);
    if (self == NULL) {
        return not_push(error);
    }
    pthread_mutex_lock(&self->lock);
    ota_status status = writer_status(self, error);
    while (status == OTA_OK && (self->used > 0 || (self->state == PUSH_OPEN && !self->hungry))) {
        pthread_cond_wait(&self->writable, &self->lock);
        status = writer_status(self, error);
    }
    pthread_mutex_unlock(&self->lock);
    return status;
}

static void finish(ota_source *source, push_state state, const ota_error *error) {
    push_source *self = as_push(source);
    if (self == NULL) {
        return;
    }
    pthread_mutex_lock(&self->lock);
    if (self->state == PUSH_OPEN) {
        self->state = state;
        if (state == PUSH_FAILED) {
            self->kept = *error;
            if (self->kept.status >= 0) { /* a fault of the caller's, but never a good end */
                self->kept.status = OTA_ERR_STATE;
            }
        }
        pthread_cond_signal(&self->readable);
    }
    pthread_mutex_unlock(&self->lock);
}

void ota_source_push_end(ota_source *source) {
    finish(source, PUSH_ENDED, NULL);
}

void ota_source_push_fail(ota_source *source, const ota_error *error) {
    finish(source, PUSH_FAILED, error);
}
