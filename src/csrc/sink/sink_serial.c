/* See sink_serial.h. One thread for each device runs
 *
 *     begin -> [compare] -> [pre-erase] -> write -> verify -> WRITTEN, waits for the verdict -> commit -> end
 *
 * Comparing asks the chip for MD5s of 64 KiB blocks as the image arrives. Equal ones are left alone; of up to three different
 * ones in a row the sectors are compared and the runs that differ are written; with the fourth the rest is written as a whole,
 * from the first of the four on: it is another image. An erase comes before the write only while there is something to wait for.
 *
 * When the link is lost: connect again, begin hook again, and the MD5s of the blocks written so far say where to go on, with a
 * stream of its own that begins there.
 *
 *     device    RUNNING -> WRITTEN -> ENDED   or RUNNING -> ENDED; moved by its thread, under the lock
 *     verdict   NONE -> COMMIT or ABORT; set once by commit, abort or free, under the lock
 *     sink      CLOSED -> OPEN -> DONE -> CLOSED; one thread, as sinks are used
 *
 * Boot entries are touched by the hooks alone, so a link lost anywhere else leaves a chip that boots what it booted before. */
#include "sink/sink_serial.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "flasher/flash_serial.h"

#define BLOCK OTA_STORE_BLOCK
#define SECTOR OTA_STORE_SECTOR
#define BLOCK_SECTORS (BLOCK / SECTOR)
#define WHOLE_BLOCK_FROM                                                                                               \
    8 /* sectors of a block that differ: writing all of it takes no longer (esp-serial-protocol 12.5) */
#define GIVE_UP_AFTER 4       /* blocks that differ in a row */
#define PRE_ERASE (2 * BLOCK) /* at a time: how long bytes that have arrived may wait, 0.3 s as a rule */
#define REPAIRS 2             /* of an image whose MD5 is wrong after it was written */
#define READ_ALL ((size_t)1 << 30)

typedef enum device_state {
    DEVICE_RUNNING,
    DEVICE_WRITTEN,
    DEVICE_ENDED,
} device_state;

typedef enum sink_verdict {
    VERDICT_NONE,
    VERDICT_COMMIT,
    VERDICT_ABORT,
} sink_verdict;

typedef enum sink_serial_state {
    SINK_CLOSED,
    SINK_OPEN,
    SINK_DONE,
} sink_serial_state;

struct sink_serial;

typedef struct device {
    struct sink_serial *sink;
    ota_sink_serial_device how;
    char name[128];
    pthread_t thread;
    bool started;
    ota_error excluded;            /* status OTA_OK: it is not */
    device_state state;            /* under the sink's lock */
    ota_sink_serial_result result; /* under the sink's lock */
    /* The thread's own. */
    bool begun;
    bool comparing;                /* how the next try begins */
    uint64_t from;                 /* ... and where: a block boundary, everything before is right */
    uint64_t sent_to;              /* the try has changed nothing behind this */
    uint64_t blank_from, blank_to; /* erased, and not written since */
    uint64_t reconnects;
    bool clean; /* all of the image was found there, block by block, without a write */
    uint8_t mac[6];
    bool has_mac;
    uint16_t chip_id;
    uint64_t phase_began;
    ota_serial_phase phase;
    ota_flasher_counts before; /* the flasher's, when the thread began */
} device;

typedef struct sink_serial {
    ota_sink sink;
    ota_sink_serial_options options;
    uint8_t sha256[32], md5[OTA_STORE_MD5];
    char *cache_dir;
    sink_serial_state state;
    uint64_t announced;
    device *devices;
    size_t device_count;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    sink_verdict verdict;   /* under the lock */
    bool cancelled;         /* under the lock */
    size_t active;          /* devices that are being written, under the lock */
    ota_image_store *store; /* set and freed under the lock; the threads need none to use it */
} sink_serial;

const char *ota_serial_phase_name(ota_serial_phase phase) {
#define PHASE_NAME(name, text) text,
    static const char *const names[] = {OTA_SERIAL_PHASE_LIST(PHASE_NAME)};
#undef PHASE_NAME
    return phase < OTA_SERIAL_PHASES ? names[phase] : "?";
}

/* ---- What a device tells ---------------------------------------------------------------------------------------------- */

static uint64_t now_ms(const device *self) {
    return self->how.serial != NULL ? self->how.serial->ops->now_ms(self->how.serial)
                                    : ota_port_clock.now_ms(ota_port_clock.user);
}

static void add(device *self, uint64_t *count, uint64_t value) {
    pthread_mutex_lock(&self->sink->lock);
    *count += value;
    pthread_mutex_unlock(&self->sink->lock);
}

/* Under the lock. */
static void tell_locked(device *self) {
    ota_flasher_counts now = ota_flasher_get_counts(self->how.flasher);
    ota_sink_serial_result *result = &self->result;
    result->wire_out = now.bytes_out - self->before.bytes_out;
    result->wire_in = now.bytes_in - self->before.bytes_in;
    result->commands = now.commands - self->before.commands;
    result->retries = now.retries - self->before.retries;
    uint64_t at = now_ms(self);
    result->phase_ms[self->phase] += at - self->phase_began;
    self->phase_began = at;
}

static void enter(device *self, ota_serial_phase phase) {
    if (phase == self->phase) {
        return;
    }
    pthread_mutex_lock(&self->sink->lock);
    tell_locked(self);
    self->phase = phase;
    self->result.phase = phase;
    pthread_mutex_unlock(&self->sink->lock);
}

static void set_done(device *self, uint64_t done) {
    pthread_mutex_lock(&self->sink->lock);
    self->result.done = done;
    tell_locked(self);
    pthread_mutex_unlock(&self->sink->lock);
}

/* ---- Operations on one device ------------------------------------------------------------------------------------------ */

static const ota_flasher_info *info_of(const device *self) {
    return ota_flasher_get_info(self->how.flasher);
}

/* Waits for image bytes; the time is idle. */
static ota_status wait_image(device *self, uint64_t want, uint64_t *available, ota_error *error) {
    bool complete;
    *available = ota_image_store_available(self->sink->store, &complete);
    if (*available >= want || complete) {
        return complete ? OTA_DONE : OTA_OK;
    }
    ota_serial_phase phase = self->phase;
    enter(self, OTA_SERIAL_IDLE);
    ota_status status = ota_image_store_wait(self->sink->store, want, available, error);
    enter(self, phase);
    return status;
}

static ota_status wait_complete(device *self, uint64_t *size, ota_error *error) {
    ota_status status = wait_image(self, OTA_SIZE_UNKNOWN, size, error);
    if (status >= 0 && *size > self->how.size) {
        status =
            ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0, "the image has %llu bytes, the slot %llu",
                          (unsigned long long)*size, (unsigned long long)self->how.size);
    }
    return status < 0 ? status : OTA_OK;
}

/* Whether the chip holds the image's bytes [start, end), which are there. */
static ota_status compare(device *self, uint64_t start, uint64_t end, bool *same, ota_error *error) {
    uint8_t here[OTA_STORE_MD5] = {0}, there[OTA_STORE_MD5] = {0};
    ota_status status = ota_image_store_md5(self->sink->store, start, end, here, error);
    if (status >= 0) {
        add(self, &self->result.probes, 1);
        status = ota_flasher_md5(self->how.flasher, self->how.offset + start, end - start, there, error);
    }
    *same = status >= 0 && memcmp(here, there, sizeof here) == 0;
    return status < 0 ? status : OTA_OK;
}

/* Erases slot bytes [start, end), whole sectors, but what is erased already. */
static ota_status erase(device *self, uint64_t start, uint64_t end, ota_error *error) {
    if (start >= self->blank_from && start < self->blank_to) {
        start = self->blank_to < end ? self->blank_to : end;
    }
    if (start >= end) {
        return OTA_OK;
    }
    ota_serial_phase phase = self->phase;
    enter(self, OTA_SERIAL_ERASING);
    ota_status status = ota_flasher_erase(self->how.flasher, self->how.offset + start, end - start, error);
    if (status >= 0) {
        add(self, &self->result.erased, end - start);
    }
    enter(self, phase);
    return status;
}

/* What a write will change is blank no more; writes go upwards. */
static void touch(device *self, uint64_t end) {
    if (end > self->blank_from) {
        self->blank_from = end < self->blank_to ? end : self->blank_to;
    }
}

static void reach(device *self, uint64_t end) {
    self->sent_to = end > self->sent_to ? end : self->sent_to;
}

/* Image bytes up to `at` were handed over, `len` of them just now. */
static void sent(device *self, uint64_t at, uint64_t len) {
    pthread_mutex_lock(&self->sink->lock);
    self->result.programmed += len;
    self->result.done = at;
    tell_locked(self);
    pthread_mutex_unlock(&self->sink->lock);
}

static ota_status write_plain(device *self, uint64_t start, uint64_t end, ota_error *error) {
    const uint8_t *bytes = ota_image_store_bytes(self->sink->store);
    size_t block = info_of(self)->block_size;
    ota_flasher_write write = {.offset = self->how.offset + start, .size = end - start};
    ota_status status = ota_flasher_write_begin(self->how.flasher, &write, error);
    for (uint64_t at = start; status >= 0 && at < end;) {
        size_t len = end - at < block ? (size_t)(end - at) : block;
        uint64_t available;
        status = wait_image(self, at + len, &available, error);
        if (status >= 0 && available < at + len) {
            status =
                ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_SINK, available, 0, "the image is not complete");
        }
        if (status >= 0) {
            reach(self, at + len);
            status = ota_flasher_write_data(self->how.flasher, bytes + at, len, len, error);
        }
        if (status >= 0) {
            at += len;
            sent(self, at, len);
        }
    }
    return status < 0 ? status : ota_flasher_write_end(self->how.flasher, error);
}

static ota_status write_deflated(device *self, uint64_t start, uint64_t end, ota_image_stream *stream,
                                 ota_error *error) {
    const ota_flasher_info *info = info_of(self);
    size_t block = info->block_size;
    ota_flasher_write write = {.offset = self->how.offset + start, .size = end - start, .deflated = true};
    const uint8_t *data;
    size_t len;
    uint64_t position = 0, inflated = 0, before = 0;
    ota_status status = OTA_OK;
    if (!info->is_stub) { /* the boot ROM wants to know how long the stream is */
        enter(self, OTA_SERIAL_IDLE);
        status = ota_image_stream_read(stream, 0, READ_ALL, &data, &len, &inflated, error);
        write.wire_bound = status >= 0 ? len : 0;
        enter(self, OTA_SERIAL_WRITING);
    }
    status = status < 0 ? status : ota_flasher_write_begin(self->how.flasher, &write, error);
    while (status == OTA_OK) {
        if (!ota_image_stream_ready(stream, position, block)) {
            enter(self, OTA_SERIAL_IDLE);
        }
        ota_status more = ota_image_stream_read(stream, position, block, &data, &len, &inflated, error);
        enter(self, OTA_SERIAL_WRITING);
        status = more;
        if (more >= 0) {
            reach(self, start + inflated);
            status = ota_flasher_write_data(self->how.flasher, data, len, inflated - before, error);
            status = status < 0 ? status : more;
        }
        if (status >= 0) {
            position += len;
            sent(self, start + inflated, inflated - before);
            before = inflated;
        }
    }
    return status < 0 ? status : ota_flasher_write_end(self->how.flasher, error);
}

/* Image bytes [start, end) from a sector boundary on; they may still be arriving when `end` is the image's. */
static ota_status write_run(device *self, uint64_t start, uint64_t end, ota_error *error) {
    sink_serial *sink = self->sink;
    enter(self, OTA_SERIAL_WRITING);
    touch(self, ota_round_up(end, SECTOR));
    reach(self, ota_round_up(start + 1, BLOCK)); /* which the begin of a write may erase */
    ota_status status;
    if (sink->options.level < 0 || !info_of(self)->can_deflate) {
        status = write_plain(self, start, end, error);
    } else {
        ota_image_stream *stream;
        uint64_t size = ota_image_store_size(sink->store);
        status = ota_image_store_stream(sink->store, start, end == size ? OTA_SIZE_UNKNOWN : end, &stream, error);
        if (status >= 0) {
            status = write_deflated(self, start, end, stream, error);
            ota_image_stream_release(&stream);
        }
    }
    if (status < 0) {
        ota_flasher_write_abort(self->how.flasher);
        return status;
    }
    return OTA_OK;
}

/* The same, leaving out what is blank where all of it is there to look at. */
static ota_status write_range(device *self, uint64_t start, uint64_t end, ota_error *error) {
    bool complete;
    const ota_image_store *store = self->sink->store;
    if (start >= end) {
        return OTA_OK;
    }
    if (!self->sink->options.skip_blank || info_of(self)->secure_download ||
        ota_image_store_available(self->sink->store, &complete) < end) {
        return write_run(self, start, end, error);
    }
    ota_status status = OTA_OK;
    while (status >= 0 && start < end) {
        uint64_t run_end, run = ota_image_store_next_run(store, start, end, SECTOR, &run_end);
        if (run > start) {
            reach(self, run);
            status = erase(self, start, ota_round_up(run, SECTOR), error);
            if (status >= 0) {
                add(self, &self->result.blank, run - start);
            }
        }
        if (status >= 0 && run < run_end) {
            status = write_run(self, run, run_end, error);
        }
        start = run_end;
    }
    return status < 0 ? status : OTA_OK;
}

/* ---- Less than everything ---------------------------------------------------------------------------------------------- */

/* Blocks [start, end) are not what they should be: finds the sectors that differ and writes those. */
static ota_status patch(device *self, uint64_t start, uint64_t end, ota_error *error) {
    uint64_t run = 0; /* where what has to be written begins */
    bool in_run = false;
    ota_status status = OTA_OK;
    for (uint64_t block = start; status >= 0 && block < end; block += BLOCK) {
        uint64_t block_end = block + BLOCK < end ? block + BLOCK : end;
        bool differs[BLOCK_SECTORS] = {false};
        uint32_t count = 0, sectors = 0;
        enter(self, OTA_SERIAL_COMPARING);
        for (uint64_t at = block; status >= 0 && at < block_end && count < WHOLE_BLOCK_FROM; at += SECTOR) {
            bool same;
            status = compare(self, at, at + SECTOR < block_end ? at + SECTOR : block_end, &same, error);
            differs[sectors++] = !same;
            count += same ? 0 : 1;
        }
        for (uint64_t at = block; status >= 0 && at < block_end; at += SECTOR) {
            bool write = count >= WHOLE_BLOCK_FROM || differs[(at - block) / SECTOR];
            if (write && !in_run) {
                run = at;
            } else if (!write) {
                uint64_t sector_end = at + SECTOR < block_end ? at + SECTOR : block_end;
                add(self, &self->result.skipped, sector_end - at);
                status = in_run ? write_range(self, run, at, error) : status;
            }
            in_run = write;
        }
    }
    return status >= 0 && in_run ? write_range(self, run, end, error) : status;
}

/* Goes through the blocks from self->from on. OTA_DONE: all is as it should be, or written. OTA_OK: the rest from self->from on
 * is too different and has to be written. */
static ota_status compare_and_patch(device *self, ota_error *error) {
    uint64_t pending = self->from; /* blocks from here on are known to differ */
    uint64_t at = self->from, available;
    bool clean = self->from == 0;
    for (;;) {
        enter(self, OTA_SERIAL_COMPARING);
        ota_status status = wait_image(self, at + BLOCK, &available, error);
        if (status < 0) {
            return status;
        }
        uint64_t end = at + BLOCK < available ? at + BLOCK : available;
        if (end > self->how.size) {
            return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0,
                                 "the image is larger than the slot of %llu bytes", (unsigned long long)self->how.size);
        }
        bool same = true, last = at >= end;
        if (!last) {
            status = compare(self, at, end, &same, error);
        }
        if (status >= 0 && (same || last) && pending < at) {
            clean = false;
            status = patch(self, pending, at, error);
        }
        if (status < 0) {
            return status;
        }
        if (last) {
            self->clean = clean;
            return OTA_DONE;
        }
        if (same) {
            add(self, &self->result.skipped, end - at);
            pending = end;
            set_done(self, end);
        }
        at = end;
        if (at - pending > (GIVE_UP_AFTER - 1) * BLOCK) {
            self->from = pending;
            return OTA_OK;
        }
    }
}

/* One MD5 of the whole slot range, when the digest was announced or the first block is right. OTA_DONE: it is the image. */
static ota_status look_for_identical(device *self, ota_error *error) {
    sink_serial *sink = self->sink;
    uint8_t md5[OTA_STORE_MD5];
    uint64_t size = sink->announced;
    bool same = false;
    enter(self, OTA_SERIAL_COMPARING);
    if (sink->options.md5 != NULL && size != OTA_SIZE_UNKNOWN) {
        add(self, &self->result.probes, 1);
        ota_status status = ota_flasher_md5(self->how.flasher, self->how.offset, size, md5, error);
        if (status < 0 || memcmp(md5, sink->md5, sizeof md5) != 0) {
            return status < 0 ? status : OTA_OK;
        }
        status = wait_complete(self, &size, error);
        status = status < 0 ? status : ota_image_store_md5(sink->store, 0, size, md5, error);
        if (status >= 0 && memcmp(md5, sink->md5, sizeof md5) == 0) {
            add(self, &self->result.skipped, size);
            return OTA_DONE;
        }
        return status < 0 ? status : OTA_OK;
    }
    if (sink->options.sector_diff) {
        return OTA_OK; /* which finds it on the way */
    }
    uint64_t available;
    ota_status status = wait_image(self, BLOCK, &available, error);
    if (status >= 0 && available > 0) {
        status = compare(self, 0, available < BLOCK ? available : BLOCK, &same, error);
    }
    if (status < 0 || !same) {
        return status < 0 ? status : OTA_OK;
    }
    status = wait_complete(self, &size, error);
    status = status < 0 ? status : compare(self, 0, size, &same, error);
    if (status >= 0 && same) {
        add(self, &self->result.skipped, size);
        return OTA_DONE;
    }
    return status < 0 ? status : OTA_OK;
}

/* Erases ahead while there is nothing better to do: the image still arrives. */
static ota_status pre_erase(device *self, ota_error *error) {
    sink_serial *sink = self->sink;
    ota_image_store_counts counts;
    ota_image_store_get_counts(sink->store, &counts);
    if (!sink->options.pre_erase || !info_of(self)->is_stub || counts.cached) {
        return OTA_OK;
    }
    uint64_t at = self->from;
    if (self->blank_to <= self->blank_from) {
        self->blank_from = self->blank_to = at;
    } else if (self->blank_to > at) {
        at = self->blank_to;
    }
    for (;;) {
        bool complete;
        uint64_t available = ota_image_store_available(sink->store, &complete);
        uint64_t goal = sink->announced != OTA_SIZE_UNKNOWN ? sink->announced : available;
        goal = ota_round_up(goal, BLOCK);
        goal = goal < self->how.size ? goal : self->how.size;
        if (complete || (at >= goal && sink->announced != OTA_SIZE_UNKNOWN) || at >= self->how.size) {
            return OTA_OK;
        }
        ota_status status;
        if (at < goal) {
            uint64_t end = at + PRE_ERASE < goal ? at + PRE_ERASE : goal;
            status = erase(self, at, end, error);
            if (status >= 0 && self->blank_to == at) {
                self->blank_to = end;
            }
            at = end;
        } else {
            status = wait_image(self, at + 1, &available, error);
        }
        if (status < 0) {
            return status;
        }
    }
}

/* Everything from self->from on. */
static ota_status write_rest(device *self, ota_error *error) {
    ota_status status = pre_erase(self, error);
    uint64_t size = self->sink->announced;
    if (status >= 0 && size == OTA_SIZE_UNKNOWN) {
        status = wait_complete(self, &size, error);
    }
    return status < 0 ? status : write_range(self, self->from, size, error);
}

/* ---- A device from begin to end ----------------------------------------------------------------------------------------- */

static void end_hook(device *self) {
    if (self->begun) {
        self->begun = false;
        if (self->how.end != NULL) {
            self->how.end(self->how.user);
        }
    }
}

static ota_status begin_hook(device *self, ota_error *error) {
    enter(self, OTA_SERIAL_PREPARING);
    ota_status status = self->how.begin != NULL ? self->how.begin(self->how.user, error) : OTA_OK;
    self->begun = status >= 0;
    return status;
}

static bool is_worth_another_try(device *self, ota_status status) {
    bool complete;
    ota_error ignored = {0};
    uint64_t available = ota_image_store_available(self->sink->store, &complete);
    if (ota_image_store_wait(self->sink->store, available, &available, &ignored) < 0) {
        return false; /* there will be no image */
    }
    switch (status) {
    case OTA_ERR_ARGUMENT:
    case OTA_ERR_UNSUPPORTED:
    case OTA_ERR_NO_MEMORY:
    case OTA_ERR_TOO_LARGE:
    case OTA_ERR_CANCELLED:
    case OTA_ERR_CHIP_OTHER:
        return false;
    default:
        return ota_flasher_get_state(self->how.flasher) != OTA_FLASHER_STOPPED;
    }
}

/* Connects, to the same chip as before. */
static ota_status connect(device *self, ota_error *error) {
    ota_status status = OTA_OK;
    if (ota_flasher_get_state(self->how.flasher) == OTA_FLASHER_READY) {
        return OTA_OK;
    }
    enter(self, OTA_SERIAL_CONNECTING);
    if (ota_flasher_get_state(self->how.flasher) == OTA_FLASHER_GONE) {
        uint32_t timeout = self->sink->options.reopen_ms;
        status = ota_flasher_reopen(self->how.flasher, timeout != 0 ? timeout : 30000, error);
    }
    status = status < 0 ? status : ota_flasher_connect(self->how.flasher, error);
    if (self->how.flash != NULL) {
        ota_flash_serial_forget(self->how.flash);
    }
    const ota_flasher_info *info = info_of(self);
    if (status >= 0 && self->has_mac &&
        (info->chip_id != self->chip_id || (info->has_mac && memcmp(info->mac, self->mac, sizeof self->mac) != 0))) {
        status = ota_error_set(error, OTA_ERR_CHIP_OTHER, OTA_STAGE_TARGET, 0, 0,
                               "another chip is on the line than before the link was lost");
    }
    return status;
}

/* After an error (but of the begin hook, which does not want): connects again as often as allowed, the begin hook too; false: that was that, `error` says why. */
static bool recover(device *self, ota_error *error) {
    const uint64_t allowed = self->sink->options.reconnects != 0 ? self->sink->options.reconnects : 5;
    for (;;) {
        bool refused = !self->begun && ota_flasher_get_state(self->how.flasher) == OTA_FLASHER_READY;
        if (refused || !is_worth_another_try(self, error->status) || self->reconnects >= allowed) {
            return false;
        }
        self->reconnects++;
        add(self, &self->result.reconnects, 1);
        ota_error cause = {0};
        if (connect(self, &cause) >= 0) {
            if (self->state != DEVICE_RUNNING) {
                return true; /* on its way through the commit, which looks at the entries itself */
            }
            end_hook(self);
            if (begin_hook(self, &cause) >= 0) {
                return true;
            }
        }
        *error = cause;
    }
}

/* Finds where a write that was cut short goes on. */
static ota_status find_boundary(device *self, ota_error *error) {
    bool complete, same = true;
    uint64_t available = ota_image_store_available(self->sink->store, &complete);
    uint64_t sent = self->sent_to < available ? self->sent_to : available;
    uint64_t touched = ota_round_up(self->sent_to, BLOCK);
    if (!info_of(self)->can_verify) {
        self->from = 0;
        return OTA_OK;
    }
    enter(self, OTA_SERIAL_COMPARING);
    while (same && self->from < sent) {
        uint64_t end = self->from + BLOCK < sent ? self->from + BLOCK : sent;
        if (end % BLOCK != 0 && !(complete && end == available)) {
            break; /* half a block cannot be told */
        }
        ota_status status = compare(self, self->from, end, &same, error);
        if (status < 0) {
            return status;
        }
        if (same && end % BLOCK != 0) {
            break; /* all of it is there; the end is written again, for want of a boundary */
        }
        self->from += same ? BLOCK : 0;
    }
    pthread_mutex_lock(&self->sink->lock);
    self->result.resumed_at = self->from;
    self->result.done = self->from;
    pthread_mutex_unlock(&self->sink->lock);
    /* The stub leaves out erasing as long as all is blank: so make it blank again up to where it still is. */
    if (info_of(self)->is_stub && self->blank_to > touched && self->from < touched) {
        self->blank_from = touched;
        ota_status status = erase(self, self->from, touched, error);
        self->blank_from = status < 0 ? self->blank_from : self->from;
        return status;
    }
    self->blank_from = self->blank_to = 0;
    return OTA_OK;
}

/* One try, from wherever the last one came to. */
static ota_status write_image(device *self, ota_error *error) {
    if (self->comparing) {
        ota_status status = compare_and_patch(self, error);
        if (status != OTA_OK) {
            return status;
        }
        self->comparing = false;
        self->sent_to = self->from;
    }
    return write_rest(self, error);
}

static ota_status verify(device *self, bool *same, ota_error *error) {
    uint64_t size;
    *same = true;
    ota_status status = wait_complete(self, &size, error);
    if (status >= 0 && info_of(self)->can_verify && !self->clean) {
        enter(self, OTA_SERIAL_VERIFYING);
        status = compare(self, 0, size, same, error);
    }
    if (status >= 0 && *same) {
        pthread_mutex_lock(&self->sink->lock);
        self->result.verified = info_of(self)->can_verify;
        self->result.identical = self->clean && self->result.programmed == 0 && self->result.erased == 0;
        self->result.done = self->result.size = size;
        pthread_mutex_unlock(&self->sink->lock);
    }
    return status;
}

/* Up to the image's last byte verified. */
static ota_status install(device *self, ota_error *error) {
    const ota_sink_serial_options *options = &self->sink->options;
    uint32_t repairs = 0;
    bool looked = false, cut = false;
    ota_status status = connect(self, error);
    if (status < 0) {
        return status;
    }
    const ota_flasher_info *info = info_of(self);
    self->has_mac = info->has_mac;
    self->chip_id = info->chip_id;
    memcpy(self->mac, info->mac, sizeof self->mac);
    if (!ota_range_inside(self->how.offset, self->how.size, info->flash_size)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, self->how.offset, 0,
                             "the slot of %llu bytes is not inside the flash of %llu bytes",
                             (unsigned long long)self->how.size, (unsigned long long)info->flash_size);
    }
    if (self->sink->announced != OTA_SIZE_UNKNOWN && self->sink->announced > self->how.size) {
        return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0, "the image has %llu bytes, the slot %llu",
                             (unsigned long long)self->sink->announced, (unsigned long long)self->how.size);
    }
    self->comparing = options->sector_diff && info->can_verify;
    status = begin_hook(self, error);
    for (;;) {
        bool same = false;
        if (status >= 0 && cut && !self->comparing) {
            status = find_boundary(self, error);
        }
        if (status >= 0) {
            cut = true;
            if (!looked && options->skip_identical && info_of(self)->can_verify) {
                status = look_for_identical(self, error);
                looked = status >= 0;
                self->clean = status == OTA_DONE;
            }
        }
        if (status >= 0 && !self->clean) {
            status = write_image(self, error);
        }
        status = status < 0 ? status : verify(self, &same, error);
        if (status >= 0 && same) {
            return OTA_OK;
        }
        if (status >= 0) {
            status = ota_error_set(error, OTA_ERR_MD5, OTA_STAGE_TARGET, self->how.offset, 0,
                                   "the MD5 the chip computes over the slot is not the image's");
            self->comparing = true; /* finds what is wrong, and writes only that */
            self->from = 0;
            if (repairs++ >= REPAIRS) {
                return status;
            }
        } else if (!recover(self, error)) {
            return error->status;
        }
        if (self->comparing) {
            self->from = 0;
            self->blank_from = self->blank_to = 0;
            pthread_mutex_lock(&self->sink->lock);
            self->result.skipped = self->result.blank = 0; /* counted again */
            pthread_mutex_unlock(&self->sink->lock);
        }
        memset(error, 0, sizeof *error);
        self->clean = false;
        status = OTA_OK;
    }
}

static ota_status commit(device *self, ota_error *error) {
    const uint8_t *image = self->result.verified ? ota_image_store_bytes(self->sink->store) : NULL;
    uint64_t size = ota_image_store_size(self->sink->store);
    for (;;) {
        enter(self, OTA_SERIAL_COMMITTING);
        ota_status status =
            self->how.commit != NULL ? self->how.commit(self->how.user, image, (size_t)size, error) : OTA_OK;
        if (status >= 0 || ota_flasher_get_state(self->how.flasher) == OTA_FLASHER_READY || !recover(self, error)) {
            return status < 0 ? error->status : OTA_OK;
        }
        /* The chip was away: is it still the image? */
        bool same = true;
        memset(error, 0, sizeof *error);
        status = self->result.verified ? compare(self, 0, size, &same, error) : OTA_OK;
        if (status >= 0 && !same) {
            return ota_error_set(error, OTA_ERR_MD5, OTA_STAGE_COMMIT, self->how.offset, 0,
                                 "the slot does not hold the image any more");
        }
    }
}

static void end_device(device *self, const ota_error *error, bool committed) {
    end_hook(self);
    enter(self, error->status != OTA_OK ? OTA_SERIAL_FAILED : committed ? OTA_SERIAL_DONE : OTA_SERIAL_WRITTEN);
    pthread_mutex_lock(&self->sink->lock);
    tell_locked(self);
    self->result.error = *error;
    self->result.committed = committed;
    self->state = DEVICE_ENDED;
    pthread_cond_broadcast(&self->sink->changed);
    pthread_mutex_unlock(&self->sink->lock);
}

/* Waits for one of the places of options.jobs; cancelled devices find out where they go on. */
static void take_place(device *self) {
    sink_serial *sink = self->sink;
    pthread_mutex_lock(&sink->lock);
    while (sink->options.jobs != 0 && sink->active >= sink->options.jobs && sink->verdict == VERDICT_NONE &&
           !sink->cancelled) {
        pthread_cond_wait(&sink->changed, &sink->lock);
    }
    sink->active++;
    pthread_mutex_unlock(&sink->lock);
}

static void give_place(device *self) {
    pthread_mutex_lock(&self->sink->lock);
    self->sink->active--;
    pthread_cond_broadcast(&self->sink->changed);
    pthread_mutex_unlock(&self->sink->lock);
}

static void *run_device(void *user) {
    device *self = user;
    sink_serial *sink = self->sink;
    ota_error error = {0};
    self->phase_began = now_ms(self);
    take_place(self);
    ota_status status = install(self, &error);
    if (self->how.flash != NULL) {
        ota_flash_serial_forget(self->how.flash); /* what was written went past it */
    }
    give_place(self);
    if (status < 0) {
        end_device(self, &error, false);
        return NULL;
    }
    enter(self, OTA_SERIAL_WRITTEN);
    pthread_mutex_lock(&sink->lock);
    self->state = DEVICE_WRITTEN;
    pthread_cond_broadcast(&sink->changed);
    while (sink->verdict == VERDICT_NONE) {
        pthread_cond_wait(&sink->changed, &sink->lock);
    }
    bool go = sink->verdict == VERDICT_COMMIT;
    pthread_mutex_unlock(&sink->lock);
    bool committed = go && commit(self, &error) >= 0;
    end_device(self, &error, committed);
    return NULL;
}

/* ---- The sink ----------------------------------------------------------------------------------------------------------- */

static ota_status wrong_state(ota_error *error, const char *call) {
    return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_SINK, 0, 0, "%s is not possible now", call);
}

static ota_status cancelled(ota_error *error) {
    return ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_SINK, 0, 0, "cancelled");
}

/* Whatever waits for the image or a chip stops. Under the lock. */
static void stop_devices(sink_serial *self) {
    ota_error error = {0};
    cancelled(&error);
    if (self->store != NULL) {
        ota_image_store_fail(self->store, &error);
    }
    pthread_cond_broadcast(&self->changed); /* whoever waits for a place */
    for (size_t i = 0; i < self->device_count; i++) {
        if (self->devices[i].started && self->devices[i].state == DEVICE_RUNNING) {
            ota_flasher_cancel(self->devices[i].how.flasher);
        }
    }
}

static void join_devices(sink_serial *self) {
    for (size_t i = 0; i < self->device_count; i++) {
        if (self->devices[i].started) {
            pthread_join(self->devices[i].thread, NULL);
            self->devices[i].started = false;
        }
    }
}

static void close_sink(sink_serial *self) {
    pthread_mutex_lock(&self->lock);
    if (self->verdict == VERDICT_NONE) {
        self->verdict = VERDICT_ABORT;
        stop_devices(self);
    }
    pthread_mutex_unlock(&self->lock);
    join_devices(self);
    self->state = SINK_CLOSED;
}

static void sum_counts(sink_serial *self) {
    ota_sink_counts *counts = &self->sink.counts;
    memset(counts, 0, sizeof *counts);
    pthread_mutex_lock(&self->lock);
    for (size_t i = 0; i < self->device_count; i++) {
        const ota_sink_serial_result *result = &self->devices[i].result;
        counts->bytes_written += result->programmed;
        counts->bytes_skipped += result->skipped + result->blank;
        counts->reads += result->probes;
        counts->writes += result->commands;
        counts->sectors_erased += result->erased / SECTOR;
    }
    counts->copies = self->store != NULL ? ota_image_store_available(self->store, &(bool){false}) : 0;
    pthread_mutex_unlock(&self->lock);
}

/* The error when no device is left; OTA_OK otherwise. */
static ota_status judge(sink_serial *self, ota_error *error) {
    size_t failed = 0;
    const device *first = NULL;
    pthread_mutex_lock(&self->lock);
    for (size_t i = 0; i < self->device_count; i++) {
        if (self->devices[i].result.error.status != OTA_OK) {
            failed++;
            first = first != NULL ? first : &self->devices[i];
        }
    }
    ota_status status = OTA_OK;
    if (first != NULL && failed == self->device_count) {
        const ota_error *cause = &first->result.error;
        status = self->device_count == 1
                     ? ota_error_set(error, cause->status, cause->stage, cause->offset, cause->device_code, "%s",
                                     cause->text)
                     : ota_error_set(error, cause->status, cause->stage, cause->offset, cause->device_code,
                                     "all %zu devices failed, %s: %s", failed, first->name, cause->text);
    }
    pthread_mutex_unlock(&self->lock);
    return status;
}

static ota_status sink_serial_open(ota_sink *sink, uint64_t size, uint64_t offset, ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    if (self->state != SINK_CLOSED) {
        return wrong_state(error, "open");
    }
    if (offset != 0) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, offset, 0, "cannot start inside the image");
    }
    ota_image_store *store = NULL;
    const ota_image_store_options options = {
        .capacity = sink->capacity,
        .size = size,
        .level = self->options.level > 0 ? self->options.level : 0,
        .cache_dir = self->options.level >= 0 ? self->cache_dir : NULL,
        .sha256 = self->options.sha256,
    };
    ota_status status = ota_image_store_new(&options, &store, error);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&self->lock);
    if (self->cancelled) {
        pthread_mutex_unlock(&self->lock);
        ota_image_store_free(&store);
        return cancelled(error);
    }
    ota_image_store_free(&self->store);
    self->store = store;
    self->announced = size;
    self->verdict = VERDICT_NONE;
    self->active = 0;
    self->state = SINK_OPEN;
    for (size_t i = 0; i < self->device_count; i++) {
        device *one = &self->devices[i];
        const ota_sink_serial_device how = one->how;
        const ota_error excluded = one->excluded;
        char name[sizeof one->name];
        memcpy(name, one->name, sizeof name);
        memset(one, 0, sizeof *one);
        memcpy(one->name, name, sizeof name);
        one->how = how;
        one->sink = self;
        one->result.size = size;
        if (excluded.status != OTA_OK) {
            one->excluded = one->result.error = excluded;
            one->result.phase = OTA_SERIAL_FAILED;
            one->state = DEVICE_ENDED;
            continue;
        }
        one->before = ota_flasher_get_counts(how.flasher);
        int errnum = pthread_create(&one->thread, NULL, run_device, one);
        one->started = errnum == 0;
        if (errnum != 0) {
            one->state = DEVICE_ENDED;
            one->result.phase = OTA_SERIAL_FAILED;
            ota_error_set_errno(&one->result.error, OTA_STAGE_SINK, 0, errnum, "starting a thread");
        }
    }
    pthread_mutex_unlock(&self->lock);
    return OTA_OK;
}

static ota_status sink_serial_write(ota_sink *sink, uint8_t *data, size_t len, ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    if (self->state != SINK_OPEN) {
        return wrong_state(error, "write");
    }
    ota_status status = ota_image_store_append(self->store, data, len, error);
    status = status < 0 ? status : judge(self, error); /* for nobody the download need not go on */
    if (status >= 0) {
        (void)ota_image_store_advance(self->store, (uint32_t)(len / BLOCK + 1));
    }
    return status;
}

static ota_status sink_serial_sync(ota_sink *sink, uint64_t *durable, ota_error *error) {
    (void)sink;
    (void)error;
    *durable = 0; /* nothing an installation could be resumed from but by comparing, which always happens */
    return OTA_OK;
}

/* The image bytes; the chips' MD5s said that theirs are the same. */
static ota_status sink_serial_read(ota_sink *sink, uint64_t offset, void *buf, size_t len, ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    bool complete = false;
    uint64_t available = self->store != NULL ? ota_image_store_available(self->store, &complete) : 0;
    if (self->state != SINK_DONE || !ota_range_inside(offset, len, available)) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_SINK, offset, 0,
                             "only an image that was written can be read back");
    }
    for (size_t i = 0; i < self->device_count; i++) {
        if (self->devices[i].result.error.status == OTA_OK && !self->devices[i].result.verified) {
            return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_SINK, offset, 0,
                                 "%s is in secure download mode: what it holds cannot be read", self->devices[i].name);
        }
    }
    memcpy(buf, ota_image_store_bytes(self->store) + offset, len);
    return OTA_OK;
}

static ota_status sink_serial_finish(ota_sink *sink, ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    if (self->state != SINK_OPEN) {
        return wrong_state(error, "finish");
    }
    ota_status status = ota_image_store_finish(self->store, error);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&self->lock);
    for (size_t i = 0; i < self->device_count; i++) {
        while (self->devices[i].state == DEVICE_RUNNING) {
            pthread_cond_wait(&self->changed, &self->lock);
        }
    }
    bool stopped = self->cancelled;
    pthread_mutex_unlock(&self->lock);
    sum_counts(self);
    status = stopped ? cancelled(error) : judge(self, error);
    if (status >= 0) {
        self->state = SINK_DONE;
        (void)ota_image_store_keep(self->store, NULL); /* a cache that cannot be written hurts nobody */
    }
    return status;
}

static ota_status sink_serial_commit(ota_sink *sink, ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    if (self->state != SINK_DONE) {
        return wrong_state(error, "commit");
    }
    pthread_mutex_lock(&self->lock);
    bool stopped = self->cancelled;
    self->verdict = stopped ? VERDICT_ABORT : VERDICT_COMMIT;
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->lock);
    join_devices(self);
    self->state = SINK_CLOSED;
    sum_counts(self);
    return stopped ? cancelled(error) : judge(self, error);
}

static void sink_serial_abort(ota_sink *sink) {
    close_sink((sink_serial *)sink);
}

static void sink_serial_cancel(ota_sink *sink) {
    sink_serial *self = (sink_serial *)sink;
    pthread_mutex_lock(&self->lock);
    if (self->verdict != VERDICT_COMMIT) {
        self->cancelled = true;
        stop_devices(self);
    }
    pthread_mutex_unlock(&self->lock);
}

static void sink_serial_free(ota_sink *sink) {
    sink_serial *self = (sink_serial *)sink;
    close_sink(self);
    ota_image_store_free(&self->store);
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->lock);
    free(self->cache_dir);
    free(self->devices);
    free(self);
}

static const ota_sink_ops sink_serial_ops = {
    .open = sink_serial_open,
    .write = sink_serial_write,
    .sync = sink_serial_sync,
    .read = sink_serial_read,
    .finish = sink_serial_finish,
    .commit = sink_serial_commit,
    .abort = sink_serial_abort,
    .cancel = sink_serial_cancel,
    .free = sink_serial_free,
};

ota_status ota_sink_serial_new(const ota_sink_serial_options *options, ota_sink **out, ota_error *error) {
    *out = NULL;
    if (options->device_count == 0 || options->device_count > OTA_SINK_SERIAL_MAX || options->level < -1 ||
        options->level > 9) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, 0, 0, "%zu devices at deflate level %d",
                             options->device_count, options->level);
    }
    uint64_t capacity = 0;
    for (size_t i = 0; i < options->device_count; i++) {
        const ota_sink_serial_device *one = &options->devices[i];
        if (one->offset % SECTOR != 0 || one->size % SECTOR != 0 || one->size == 0 || one->size > UINT32_MAX) {
            return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, one->offset, 0,
                                 "a slot of %llu bytes at 0x%llx: not whole sectors", (unsigned long long)one->size,
                                 (unsigned long long)one->offset);
        }
        for (size_t j = 0; j < i; j++) {
            if (options->devices[j].flasher == one->flasher) {
                return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, 0, 0, "the same chip twice");
            }
        }
        capacity = one->size > capacity ? one->size : capacity;
    }
    sink_serial *self = calloc(1, sizeof *self);
    device *devices = calloc(options->device_count, sizeof *devices);
    char *cache_dir = options->cache_dir != NULL ? strdup(options->cache_dir) : NULL;
    if (self == NULL || devices == NULL || (options->cache_dir != NULL && cache_dir == NULL)) {
        free(cache_dir);
        free(devices);
        free(self);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_SINK, 0, 0, "no memory for a sink");
    }
    self->sink.ops = &sink_serial_ops;
    self->sink.write_size = SECTOR;
    self->sink.resume_size = 1u << 31; /* no offset but 0 */
    self->sink.capacity = capacity;
    self->options = *options;
    self->options.devices = NULL;
    self->cache_dir = cache_dir;
    ota_sink_serial_announce(&self->sink, options->sha256, options->md5);
    self->verdict = VERDICT_ABORT; /* not open: there is nothing to stop */
    self->devices = devices;
    self->device_count = options->device_count;
    for (size_t i = 0; i < self->device_count; i++) {
        const char *name = options->devices[i].name != NULL ? options->devices[i].name : "device";
        devices[i].sink = self;
        devices[i].how = options->devices[i];
        devices[i].state = DEVICE_ENDED;
        strncpy(devices[i].name, name, sizeof devices[i].name - 1);
        devices[i].how.name = devices[i].name;
    }
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->changed, NULL);
    *out = &self->sink;
    return OTA_OK;
}

bool ota_sink_serial_exclude(ota_sink *sink, size_t index, const ota_error *error) {
    sink_serial *self = (sink_serial *)sink;
    if (index >= self->device_count || self->state != SINK_CLOSED) {
        return false;
    }
    pthread_mutex_lock(&self->lock);
    self->devices[index].excluded = self->devices[index].result.error = *error;
    self->devices[index].result.phase = OTA_SERIAL_FAILED;
    pthread_mutex_unlock(&self->lock);
    return true;
}

void ota_sink_serial_announce(ota_sink *sink, const uint8_t *sha256, const uint8_t *md5) {
    sink_serial *self = (sink_serial *)sink;
    if (sha256 != NULL) {
        memcpy(self->sha256, sha256, sizeof self->sha256);
    }
    if (md5 != NULL) {
        memcpy(self->md5, md5, sizeof self->md5);
    }
    self->options.sha256 = sha256 != NULL ? self->sha256 : NULL;
    self->options.md5 = md5 != NULL ? self->md5 : NULL;
}

bool ota_sink_serial_get_result(ota_sink *sink, size_t index, ota_sink_serial_result *result) {
    sink_serial *self = (sink_serial *)sink;
    if (index >= self->device_count) {
        return false;
    }
    pthread_mutex_lock(&self->lock);
    *result = self->devices[index].result;
    pthread_mutex_unlock(&self->lock);
    return true;
}

void ota_sink_serial_get_store_counts(ota_sink *sink, ota_image_store_counts *counts) {
    sink_serial *self = (sink_serial *)sink;
    memset(counts, 0, sizeof *counts);
    pthread_mutex_lock(&self->lock);
    if (self->store != NULL) {
        ota_image_store_get_counts(self->store, counts);
    }
    pthread_mutex_unlock(&self->lock);
}
