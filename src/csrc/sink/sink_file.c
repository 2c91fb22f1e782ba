/* A raw slot: a regular file, which ends up exactly as long as the image, or a block device, whose bytes behind the image stay
 * as they are. Writes go around the page cache in whole blocks; the tail is padded to one: with zeros that are cut off again in a
 * file, with what the device holds there in a device. One sync at the end, and one for each checkpoint. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "sink/sink.h"

#define BLOCK 4096u

typedef struct sink_file {
    ota_sink base;
    char *path;
    uint32_t flags;
    ota_fault *fault;
    ota_file *file;    /* NULL: not open */
    uint64_t position; /* bytes of the image so far */
    bool cut;          /* the tail was padded: the file is longer than the image */
    bool finished;
} sink_file;

static ota_status fail_errno(sink_file *sink, uint64_t offset, int errnum, const char *what, ota_error *error) {
    char text[160];
    snprintf(text, sizeof text, "%s %s", sink->path, what);
    return ota_error_set_errno(error, OTA_STAGE_SINK, offset, errnum, text);
}

/* The calls a file counts itself are taken over into the sink's counters. */
static void take_counts(sink_file *sink) {
    if (sink->file != NULL) {
        sink->base.counts.reads = sink->file->reads;
        sink->base.counts.writes = sink->file->writes;
        sink->base.counts.syncs = sink->file->syncs;
        sink->base.counts.bytes_written = sink->file->bytes_written;
        sink->base.counts.direct = sink->file->is_direct;
    }
}

static void close_file(sink_file *sink) {
    take_counts(sink);
    if (sink->file != NULL) {
        sink->file->ops->close(sink->file);
        sink->file = NULL;
    }
}

static ota_status open_file(sink_file *sink, bool create, ota_error *error) {
    if (sink->file != NULL) {
        return OTA_OK;
    }
    uint32_t flags = sink->flags | (create ? OTA_FILE_CREATE : 0);
    int errnum = ota_port_file_open(sink->path, flags, sink->fault, &sink->file);
    return errnum != 0 ? fail_errno(sink, 0, errnum, "cannot be opened for writing", error) : OTA_OK;
}

static ota_status file_open(ota_sink *base, uint64_t size, uint64_t offset, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    ota_status status = open_file(sink, true, error);
    if (status < 0) {
        return status;
    }
    if (sink->file->is_block && sink->file->size < base->capacity) {
        base->capacity = sink->file->size;
    }
    if (size != UINT64_MAX && size > base->capacity) {
        return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0, "the image has %llu bytes, %s holds %llu",
                             (unsigned long long)size, sink->path, (unsigned long long)base->capacity);
    }
    if (offset > sink->file->size) {
        return ota_error_set(error, OTA_ERR_NOT_RESUMABLE, OTA_STAGE_SINK, offset, 0,
                             "%s has %llu bytes, the resume begins at %llu", sink->path,
                             (unsigned long long)sink->file->size, (unsigned long long)offset);
    }
    int errnum = size != UINT64_MAX ? sink->file->ops->reserve(sink->file, size) : 0;
    if (errnum == 0 && !sink->file->is_block && sink->file->size > offset) {
        errnum = sink->file->ops->resize(sink->file, offset);
        /* what lay behind an older image is gone, and the room with it */
        errnum = errnum == 0 && size != UINT64_MAX ? sink->file->ops->reserve(sink->file, size) : errnum;
    }
    if (errnum != 0) {
        return fail_errno(sink, 0, errnum, "has no room for the image", error);
    }
    sink->position = offset;
    return OTA_OK;
}

/* Pads a tail to whole blocks behind `len`, where the buffer has room. */
static ota_status pad_tail(sink_file *sink, uint8_t *data, size_t len, size_t *padded, ota_error *error) {
    ota_file *file = sink->file;
    size_t unit = file->is_direct ? file->align : 1;
    *padded = (len + unit - 1) / unit * unit;
    if (*padded == len) {
        return OTA_OK;
    }
    memset(data + len, 0, *padded - len);
    sink->cut = !file->is_block;
    if (!file->is_block) {
        return OTA_OK;
    }
    uint8_t block[BLOCK];
    size_t got = 0, start = len / unit * unit;
    int errnum = file->ops->read_at(file, block, unit, sink->position + start, &got);
    if (errnum != 0 || got != unit) {
        return fail_errno(sink, sink->position + start, errnum != 0 ? errnum : EIO, "cannot be read", error);
    }
    memcpy(data + len, block + (len - start), unit - (len - start));
    return OTA_OK;
}

static ota_status file_write(ota_sink *base, uint8_t *data, size_t len, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    if (!ota_range_inside(sink->position, len, base->capacity)) {
        return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, sink->position, 0,
                             "%s holds %llu bytes, the image has more", sink->path, (unsigned long long)base->capacity);
    }
    size_t padded = 0, written = 0;
    ota_status status = pad_tail(sink, data, len, &padded, error);
    if (status < 0) {
        return status;
    }
    int errnum = sink->file->ops->write_at(sink->file, data, padded, sink->position, &written);
    take_counts(sink);
    if (errnum != 0) {
        return fail_errno(sink, sink->position + written, errnum, "cannot be written", error);
    }
    if (written != padded) {
        return ota_error_set(error, OTA_ERR_SHORT_WRITE, OTA_STAGE_SINK, sink->position + written, 0,
                             "%s took %zu of %zu bytes", sink->path, written, padded);
    }
    sink->position += len;
    return OTA_OK;
}

static ota_status sync_file(sink_file *sink, ota_error *error) {
    int errnum = sink->file->ops->sync(sink->file);
    take_counts(sink);
    return errnum != 0 ? fail_errno(sink, sink->position, errnum, "cannot be synced", error) : OTA_OK;
}

static ota_status file_sync(ota_sink *base, uint64_t *durable, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    ota_status status = sync_file(sink, error);
    *durable = status < 0 ? 0 : sink->position;
    return status;
}

static ota_status file_read(ota_sink *base, uint64_t offset, void *buf, size_t len, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    size_t got = 0;
    ota_status status = open_file(sink, false, error);
    if (status < 0) {
        return status;
    }
    int errnum = sink->file->ops->read_at(sink->file, buf, len, offset, &got);
    take_counts(sink);
    if (errnum != 0) {
        return fail_errno(sink, offset, errnum, "cannot be read", error);
    }
    if (got != len) {
        return ota_error_set(error, OTA_ERR_NOT_RESUMABLE, OTA_STAGE_SINK, offset + got, 0,
                             "%s ends after %llu bytes, more were expected", sink->path,
                             (unsigned long long)(offset + got));
    }
    return OTA_OK;
}

static ota_status file_finish(ota_sink *base, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    if (sink->cut) {
        int errnum = sink->file->ops->resize(sink->file, sink->position);
        if (errnum != 0) {
            return fail_errno(sink, sink->position, errnum, "cannot be cut to the image", error);
        }
        sink->cut = false;
    }
    ota_status status = sync_file(sink, error);
    sink->finished = status >= 0;
    return status;
}

static ota_status file_commit(ota_sink *base, ota_error *error) {
    sink_file *sink = (sink_file *)base;
    if (!sink->finished) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_COMMIT, 0, 0, "commit before finish");
    }
    close_file(sink);
    return OTA_OK;
}

static void file_abort(ota_sink *base) {
    close_file((sink_file *)base);
}

static void file_free(ota_sink *base) {
    sink_file *sink = (sink_file *)base;
    close_file(sink);
    free(sink->path);
    free(sink);
}

static const ota_sink_ops ops = {
    .open = file_open,
    .write = file_write,
    .sync = file_sync,
    .read = file_read,
    .finish = file_finish,
    .commit = file_commit,
    .abort = file_abort,
    .free = file_free,
};

ota_status ota_sink_file_new(const ota_sink_file_options *options, ota_sink **out, ota_error *error) {
    *out = NULL;
    sink_file *sink = calloc(1, sizeof *sink);
    char *path = options->path != NULL ? strdup(options->path) : NULL;
    if (sink == NULL || path == NULL) {
        free(sink);
        free(path);
        return options->path == NULL
                   ? ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, 0, 0, "a raw slot needs a path")
                   : ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_SINK, 0, 0, "no memory for a sink");
    }
    sink->base.ops = &ops;
    sink->base.write_size = BLOCK;
    sink->base.resume_size = BLOCK;
    sink->base.capacity = options->max_size != 0 ? options->max_size : UINT64_MAX;
    sink->path = path;
    sink->flags = OTA_FILE_WRITE | OTA_FILE_EXCLUSIVE | (options->buffered ? 0 : OTA_FILE_DIRECT);
    sink->fault = options->fault;
    *out = &sink->base;
    return OTA_OK;
}
