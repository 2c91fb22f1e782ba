/* An app slot inside an ESP32's flash: sectors are erased just before they are programmed.
 *
 * The image is taken in runs that end at the 64 KiB blocks of the flash. Of each run the slot is read first, then every
 * sector is one of
 *
 *     holds the bytes already   -> left alone
 *     erased                    -> programmed
 *     anything else             -> erased, programmed
 *
 * and neighbours go out in one operation. So no byte is programmed and no sector erased twice in one installation, nothing
 * behind the image is touched, and an image that differs little costs little. The bytes of the last sector behind the image
 * are 0xFF, or what they were when the sector was left alone: a chip reads an image by its headers.
 *
 *     state      open      write     sync     finish     commit      abort
 *     CLOSED     -> OPEN   no        no       no         no          CLOSED
 *     OPEN       no        OPEN      OPEN     -> DONE    no          -> CLOSED
 *     DONE       no        no        DONE     no         -> CLOSED   -> CLOSED
 *     FAILED     no        the first error again, whatever is called -> CLOSED
 *
 * Not decided here: which slot, and whether it may be written (the caller's begin), and what boots (its commit). */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "sink/sink.h"

#define RUN_SIZE 65536u /* the block erase of the chips; also the most that is read or programmed at a time */
#define RUN_SECTORS (RUN_SIZE / OTA_FLASH_SECTOR)

typedef enum sink_flash_state {
    SINK_CLOSED,
    SINK_OPEN,
    SINK_DONE,
    SINK_FAILED,
} sink_flash_state;

typedef enum sector_need {
    SECTOR_KEEP,
    SECTOR_PROGRAM,
    SECTOR_ERASE, /* and program */
} sector_need;

typedef struct sink_flash {
    ota_sink sink;
    ota_sink_flash_options options;
    sink_flash_state state;
    bool begun;        /* the caller is to hear of the end */
    ota_error first;   /* why the state is FAILED */
    uint64_t size;     /* of the image as announced, or OTA_SIZE_UNKNOWN */
    uint64_t position; /* image bytes taken, those before a resume included */
    uint8_t *existing; /* RUN_SIZE bytes: what the slot held before this run */
} sink_flash;

/* ---- Errors -------------------------------------------------------------------------------------------------------- */

/* Keeps the first error and hands it out, again and again. */
static ota_status failed(sink_flash *self, ota_error *error) {
    self->state = SINK_FAILED;
    return ota_error_set(error, self->first.status, self->first.stage, self->first.offset, self->first.device_code,
                         "%s", self->first.text);
}

static ota_status fail(sink_flash *self, ota_error *error, ota_status status, ota_stage stage, uint64_t offset,
                       const char *text) {
    ota_error_set(&self->first, status, stage, offset, 0, "%s", text);
    return failed(self, error);
}

/* What the flash or a hook reported, told in terms of the image. */
static ota_status fail_with(sink_flash *self, ota_error *error, const ota_error *cause, ota_stage stage,
                            uint64_t offset) {
    ota_error_set(&self->first, cause->status, stage, offset, cause->device_code, "%s", cause->text);
    return failed(self, error);
}

/* A call that does not fit the state. It is the caller's mistake and does not spoil what was done so far. */
static ota_status wrong_state(sink_flash *self, ota_error *error, const char *call) {
    if (self->state == SINK_FAILED) {
        return failed(self, error);
    }
    return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SINK, self->position, 0, "%s is not possible now", call);
}

/* ---- Flash operations, counted ------------------------------------------------------------------------------------- */

static ota_status flash_read(sink_flash *self, uint64_t offset, void *buf, size_t len, ota_error *error) {
    ota_flash *flash = self->options.flash;
    self->sink.counts.reads++;
    return flash->ops->read(flash, self->options.offset + offset, buf, len, error);
}

static ota_status flash_erase(sink_flash *self, uint64_t offset, uint64_t len, ota_error *error) {
    ota_flash *flash = self->options.flash;
    self->sink.counts.erases++;
    self->sink.counts.sectors_erased += len / OTA_FLASH_SECTOR;
    return flash->ops->erase(flash, self->options.offset + offset, len, error);
}

static ota_status flash_program(sink_flash *self, uint64_t offset, const uint8_t *data, size_t len, ota_error *error) {
    ota_flash *flash = self->options.flash;
    self->sink.counts.writes++;
    ota_status status = flash->ops->program(flash, self->options.offset + offset, data, len, error);
    if (status == OTA_OK) {
        self->sink.counts.bytes_written += len;
    }
    return status;
}

static ota_status flash_sync(sink_flash *self, ota_error *error) {
    ota_flash *flash = self->options.flash;
    self->sink.counts.syncs++;
    return flash->ops->sync(flash, error);
}

/* ---- One run of sectors -------------------------------------------------------------------------------------------- */

static bool is_erased(const uint8_t *bytes, size_t len) {
    return bytes[0] == 0xFF && memcmp(bytes, bytes + 1, len - 1) == 0;
}

static size_t sector_len(size_t sector, size_t len) {
    size_t start = sector * OTA_FLASH_SECTOR;
    return len - start < OTA_FLASH_SECTOR ? len - start : OTA_FLASH_SECTOR;
}

static sector_need need_of(const sink_flash *self, const uint8_t *data, const uint8_t *existing, size_t len) {
    if (self->options.rewrite_same) {
        return SECTOR_ERASE;
    }
    if (memcmp(data, existing, len) == 0) {
        return SECTOR_KEEP;
    }
    return is_erased(existing, OTA_FLASH_SECTOR) ? SECTOR_PROGRAM : SECTOR_ERASE;
}

/* `len` bytes of the image at the sector boundary `offset`, all in one block of RUN_SIZE. */
static ota_status write_run(sink_flash *self, uint64_t offset, const uint8_t *data, size_t len, ota_error *error) {
    size_t sectors = (len + OTA_FLASH_SECTOR - 1) / OTA_FLASH_SECTOR;
    sector_need need[RUN_SECTORS] = {SECTOR_KEEP};
    ota_status status = OTA_OK;
    if (!self->options.rewrite_same) {
        status = flash_read(self, offset, self->existing, sectors * OTA_FLASH_SECTOR, error);
    }
    for (size_t i = 0; status == OTA_OK && i < sectors; i++) {
        size_t start = i * OTA_FLASH_SECTOR;
        need[i] = need_of(self, data + start, self->existing + start, sector_len(i, len));
        if (need[i] == SECTOR_KEEP) {
            self->sink.counts.bytes_skipped += sector_len(i, len);
        }
    }
    for (size_t i = 0; status == OTA_OK && i < sectors; i++) {
        size_t end = i;
        while (end < sectors && need[end] == SECTOR_ERASE) {
            end++;
        }
        if (end > i) {
            status = flash_erase(self, offset + i * OTA_FLASH_SECTOR, (end - i) * OTA_FLASH_SECTOR, error);
            i = end;
        }
    }
    for (size_t i = 0; status == OTA_OK && i < sectors; i++) {
        size_t end = i;
        while (end < sectors && need[end] != SECTOR_KEEP) {
            end++;
        }
        if (end > i) {
            size_t start = i * OTA_FLASH_SECTOR;
            size_t stop = end * OTA_FLASH_SECTOR < len ? end * OTA_FLASH_SECTOR : len;
            status = flash_program(self, offset + start, data + start, stop - start, error);
            i = end;
        }
    }
    return status;
}

/* ---- The sink ------------------------------------------------------------------------------------------------------ */

static void close_sink(sink_flash *self) {
    self->state = SINK_CLOSED;
    if (self->begun) {
        self->begun = false;
        if (self->options.end != NULL) {
            self->options.end(self->options.user);
        }
    }
}

static ota_status sink_flash_open(ota_sink *sink, uint64_t size, uint64_t offset, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (self->state != SINK_CLOSED) {
        return wrong_state(self, error, "open");
    }
    if (size != OTA_SIZE_UNKNOWN && size > sink->capacity) {
        return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0, "the image has %llu bytes, the slot %llu",
                             (unsigned long long)size, (unsigned long long)sink->capacity);
    }
    if (offset % OTA_FLASH_SECTOR != 0 || offset > sink->capacity || offset > size) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, offset, 0,
                             "cannot start at byte %llu: not a sector boundary inside the image",
                             (unsigned long long)offset);
    }
    memset(&self->first, 0, sizeof self->first);
    memset(&sink->counts, 0, sizeof sink->counts);
    self->size = size;
    self->position = offset;
    self->state = SINK_OPEN;
    if (self->options.begin != NULL) {
        ota_error cause = {0};
        if (self->options.begin(self->options.user, &cause) < 0) {
            return fail_with(self, error, &cause, OTA_STAGE_SINK, 0);
        }
    }
    self->begun = true;
    return OTA_OK;
}

static ota_status sink_flash_write(ota_sink *sink, uint8_t *data, size_t len, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (self->state != SINK_OPEN) {
        return wrong_state(self, error, "write");
    }
    if (len > sink->capacity - self->position) {
        return fail(self, error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, sink->capacity,
                    "the image is larger than the slot");
    }
    if (len > 0 && self->position % OTA_FLASH_SECTOR != 0) {
        return fail(self, error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, self->position,
                    "only the last piece of an image may end inside a sector");
    }
    while (len > 0) {
        uint64_t in_block = (self->options.offset + self->position) % RUN_SIZE;
        size_t run = len < RUN_SIZE - in_block ? len : (size_t)(RUN_SIZE - in_block);
        ota_error cause = {0};
        if (write_run(self, self->position, data, run, &cause) < 0) {
            return fail_with(self, error, &cause, OTA_STAGE_SINK, self->position);
        }
        self->position += run;
        data += run;
        len -= run;
    }
    return OTA_OK;
}

static ota_status sink_flash_sync(ota_sink *sink, uint64_t *durable, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (self->state != SINK_OPEN && self->state != SINK_DONE) {
        return wrong_state(self, error, "sync");
    }
    ota_error cause = {0};
    if (flash_sync(self, &cause) < 0) {
        return fail_with(self, error, &cause, OTA_STAGE_SINK, self->position);
    }
    *durable = self->position;
    return OTA_OK;
}

/* Works in any state: a resume reads the header back before it opens the sink. */
static ota_status sink_flash_read(ota_sink *sink, uint64_t offset, void *buf, size_t len, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (!ota_range_inside(offset, len, sink->capacity)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, offset, 0, "the slot ends at byte %llu",
                             (unsigned long long)sink->capacity);
    }
    ota_error cause = {0};
    if (flash_read(self, offset, buf, len, &cause) < 0) {
        return ota_error_set(error, cause.status, OTA_STAGE_SINK, offset, cause.device_code, "%s", cause.text);
    }
    return OTA_OK;
}

static ota_status sink_flash_finish(ota_sink *sink, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (self->state != SINK_OPEN) {
        return wrong_state(self, error, "finish");
    }
    if (self->position == 0 || (self->size != OTA_SIZE_UNKNOWN && self->position < self->size)) {
        return fail(self, error, OTA_ERR_INCOMPLETE, OTA_STAGE_SINK, self->position, "the image is not complete");
    }
    if (self->position > self->size) {
        return fail(self, error, OTA_ERR_SIZE, OTA_STAGE_SINK, self->size, "the image is larger than it was announced");
    }
    ota_error cause = {0};
    if (flash_sync(self, &cause) < 0) {
        return fail_with(self, error, &cause, OTA_STAGE_SINK, self->position);
    }
    self->state = SINK_DONE;
    return OTA_OK;
}

static ota_status sink_flash_commit(ota_sink *sink, ota_error *error) {
    sink_flash *self = (sink_flash *)sink;
    if (self->state != SINK_DONE) {
        return wrong_state(self, error, "commit");
    }
    if (self->options.commit != NULL) {
        ota_error cause = {0};
        if (self->options.commit(self->options.user, &cause) < 0) {
            return fail_with(self, error, &cause, OTA_STAGE_COMMIT, self->position);
        }
    }
    close_sink(self);
    return OTA_OK;
}

static void sink_flash_abort(ota_sink *sink) {
    close_sink((sink_flash *)sink);
}

static void sink_flash_free(ota_sink *sink) {
    sink_flash *self = (sink_flash *)sink;
    close_sink(self);
    free(self->existing);
    free(self);
}

static const ota_sink_ops sink_flash_ops = {
    .open = sink_flash_open,
    .write = sink_flash_write,
    .sync = sink_flash_sync,
    .read = sink_flash_read,
    .finish = sink_flash_finish,
    .commit = sink_flash_commit,
    .abort = sink_flash_abort,
    .free = sink_flash_free,
};

ota_status ota_sink_flash_new(const ota_sink_flash_options *options, ota_sink **out, ota_error *error) {
    *out = NULL;
    if (options->size == 0 || options->offset % OTA_FLASH_SECTOR != 0 || options->size % OTA_FLASH_SECTOR != 0 ||
        !ota_range_inside(options->offset, options->size, options->flash->size)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, options->offset, 0,
                             "a slot of %llu bytes at 0x%llx: not whole sectors inside the flash of %llu bytes",
                             (unsigned long long)options->size, (unsigned long long)options->offset,
                             (unsigned long long)options->flash->size);
    }
    sink_flash *self = calloc(1, sizeof *self);
    uint8_t *existing = malloc(RUN_SIZE);
    if (self == NULL || existing == NULL) {
        free(self);
        free(existing);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_SINK, 0, 0, "no memory for a flash sink");
    }
    self->sink.ops = &sink_flash_ops;
    self->sink.write_size = OTA_FLASH_SECTOR;
    self->sink.resume_size = OTA_FLASH_SECTOR;
    self->sink.capacity = options->size;
    self->options = *options;
    self->existing = existing;
    *out = &self->sink;
    return OTA_OK;
}
