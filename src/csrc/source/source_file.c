/* A local image: a file, a block device, a pipe, standard input.
 *
 * A file with a known size yields exactly that many bytes: one that shrinks under us is an error, what is added behind its
 * end is not read. The stream lives from the first open to free: `cancel` from another thread may touch it at any time. */
#include "source/source_common.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct file_source {
    ota_source base;
    char *path; /* NULL: a borrowed descriptor */
    bool is_open;
    bool consumed; /* bytes of an unseekable stream are gone */
    uint64_t size; /* OTA_SIZE_UNKNOWN: until the end */
    uint64_t position;
    ota_error kept;

    pthread_mutex_t lock; /* guards the two below between cancel and open/close */
    ota_stream *stream;   /* of a path: while open; borrowed: always */
    bool cancelled;
} file_source;

static bool is_cancelled(file_source *self) {
    pthread_mutex_lock(&self->lock);
    bool cancelled = self->cancelled;
    pthread_mutex_unlock(&self->lock);
    return cancelled;
}

static ota_status fail_errno(file_source *self, int errnum, ota_error *error) {
    if (errnum == ECANCELED) {
        return ota_source_cancelled(error, self->position);
    }
    char what[128];
    snprintf(what, sizeof what, "reading %.100s", self->path ? self->path : "the descriptor");
    ota_error_set_errno(&self->kept, OTA_STAGE_SOURCE, self->position, errnum, what);
    return ota_source_repeat(&self->kept, error);
}

static ota_status file_open(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error) {
    file_source *self = (file_source *)source;
    if (self->is_open) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, 0, 0, "the source is open already");
    }
    if (is_cancelled(self)) {
        return ota_source_cancelled(error, offset);
    }
    if (self->consumed) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SOURCE, 0, 0,
                             "a stream that was read cannot be opened again");
    }
    self->position = 0;
    memset(&self->kept, 0, sizeof self->kept);
    if (self->path != NULL) {
        ota_stream *stream = NULL;
        int errnum = ota_port_stream_open(self->path, &stream);
        if (errnum != 0) {
            return fail_errno(self, errnum, error);
        }
        pthread_mutex_lock(&self->lock);
        self->stream = stream;
        if (self->cancelled) {
            ota_port_stream_wake(stream); /* it came while we opened */
        }
        pthread_mutex_unlock(&self->lock);
    }
    self->size = ota_port_stream_size(self->stream);
    if (offset <= self->size && ota_port_stream_seek(self->stream, offset) == 0) {
        self->position = offset;
    } else if (ota_port_stream_seek(self->stream, 0) != 0) {
        self->consumed = true;
    }
    self->is_open = true;
    source->requests += 1;
    memset(info, 0, sizeof *info);
    info->size = self->size;
    info->offset = self->position;
    return OTA_OK;
}

static ota_status file_read(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error) {
    file_source *self = (file_source *)source;
    *len = 0;
    if (self->kept.status != OTA_OK) {
        return ota_source_repeat(&self->kept, error);
    }
    if (is_cancelled(self)) {
        return ota_source_cancelled(error, self->position);
    }
    if (!self->is_open || capacity == 0) {
        return ota_error_set(error, self->is_open ? OTA_ERR_ARGUMENT : OTA_ERR_STATE, OTA_STAGE_SOURCE, self->position,
                             0, self->is_open ? "no room to read into" : "the source is not open");
    }
    if (self->size != OTA_SIZE_UNKNOWN && capacity > self->size - self->position) {
        capacity = (size_t)(self->size - self->position);
        if (capacity == 0) {
            return OTA_DONE;
        }
    }
    int errnum = ota_port_stream_read(self->stream, buf, capacity, len);
    if (errnum != 0) {
        return fail_errno(self, errnum, error);
    }
    if (*len == 0 && self->size != OTA_SIZE_UNKNOWN) {
        ota_error_set(&self->kept, OTA_ERR_INCOMPLETE, OTA_STAGE_SOURCE, self->position, 0,
                      "the file ended at %llu of %llu bytes", (unsigned long long)self->position,
                      (unsigned long long)self->size);
        return ota_source_repeat(&self->kept, error);
    }
    self->position += *len;
    source->bytes_read += *len;
    return *len > 0 ? OTA_OK : OTA_DONE;
}

static void file_cancel(ota_source *source) {
    file_source *self = (file_source *)source;
    pthread_mutex_lock(&self->lock);
    self->cancelled = true;
    if (self->stream != NULL) {
        ota_port_stream_wake(self->stream);
    }
    pthread_mutex_unlock(&self->lock);
}

static void file_close(ota_source *source) {
    file_source *self = (file_source *)source;
    self->is_open = false;
    memset(&self->kept, 0, sizeof self->kept);
    if (self->path != NULL) {
        pthread_mutex_lock(&self->lock);
        ota_port_stream_close(&self->stream);
        pthread_mutex_unlock(&self->lock);
    }
}

static void file_free(ota_source *source) {
    file_source *self = (file_source *)source;
    ota_port_stream_close(&self->stream);
    pthread_mutex_destroy(&self->lock);
    free(self->path);
    free(self);
}

static const ota_source_ops file_ops = {
    .open = file_open, .read = file_read, .cancel = file_cancel, .close = file_close, .free = file_free};

static file_source *file_source_new(void) {
    file_source *self = calloc(1, sizeof *self);
    if (self != NULL) {
        self->base.ops = &file_ops;
        pthread_mutex_init(&self->lock, NULL);
    }
    return self;
}

ota_status ota_source_file_new(const char *path, ota_source **out, ota_error *error) {
    if (path == NULL || path[0] == '\0') {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SOURCE, 0, 0, "the path is empty");
    }
    file_source *self = file_source_new();
    if (self == NULL || (self->path = strdup(path)) == NULL) {
        if (self != NULL) {
            file_free(&self->base);
        }
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "making a file source");
    }
    *out = &self->base;
    return OTA_OK;
}

ota_status ota_source_fd_new(int fd, ota_source **out, ota_error *error) {
    file_source *self = file_source_new();
    if (self == NULL) {
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "making a file source");
    }
    int errnum = ota_port_stream_borrow(fd, &self->stream);
    if (errnum != 0) {
        file_free(&self->base);
        return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, errnum, "using the descriptor");
    }
    *out = &self->base;
    return OTA_OK;
}
