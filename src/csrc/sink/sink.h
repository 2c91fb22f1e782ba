/* Where bytes go. Begin, write in order, finish, commit; abort at any time. Only commit makes the result bootable, and the
 * engine calls it only after every verifier said yes. Used by one thread at a time. */
#ifndef OTA_SINK_SINK_H
#define OTA_SINK_SINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/status.h"
#include "port/port.h"

typedef struct ota_sink ota_sink;

typedef struct ota_sink_counts {
    uint64_t bytes_written; /* bytes that went to the medium, padding included */
    uint64_t bytes_skipped; /* bytes that were there already and were left alone */
    uint64_t reads, writes, syncs, erases;
    uint64_t sectors_erased;
    uint64_t copies; /* image bytes copied inside the sink */
    bool direct;     /* written around the page cache */
} ota_sink_counts;

typedef struct ota_sink_ops {
    /* Gets ready for an image of `size` bytes (OTA_SIZE_UNKNOWN: not known), whose bytes before `offset` are there already.
     * OTA_ERR_TOO_LARGE before anything is changed when it cannot fit. */
    ota_status (*open)(ota_sink *sink, uint64_t size, uint64_t offset, ota_error *error);
    /* The next `len` bytes. Every call but the last of an image has len % write_size == 0, unless open started elsewhere than
     * at a multiple of it. `data` is aligned to 4096 and has room up to the next multiple of 4096 behind len, which the sink
     * may overwrite. */
    ota_status (*write)(ota_sink *sink, uint8_t *data, size_t len, ota_error *error);
    /* All bytes written so far are on the medium; `*durable` is how many that are, from the start of the image. */
    ota_status (*sync)(ota_sink *sink, uint64_t *durable, ota_error *error);
    /* Reads image bytes back from the medium, around caches where that is possible. */
    ota_status (*read)(ota_sink *sink, uint64_t offset, void *buf, size_t len, ota_error *error);
    /* The image is complete: what is held back is written, everything is synced. Nothing is bootable yet. */
    ota_status (*finish)(ota_sink *sink, ota_error *error);
    ota_status (*commit)(ota_sink *sink, ota_error *error);
    /* Gives up; what was written stays, unbootable, for a resume. Harmless after commit or before open. */
    void (*abort)(ota_sink *sink);
    /* From any thread: a finish that waits, and what is called later, ends with ERR_CANCELLED; a commit that has begun goes on.
     * NULL: nothing here ever waits for long. */
    void (*cancel)(ota_sink *sink);
    void (*free)(ota_sink *sink);
} ota_sink_ops;

struct ota_sink {
    const ota_sink_ops *ops;
    uint32_t write_size;  /* preferred multiple for write, bytes, a power of two */
    uint32_t resume_size; /* offsets handed to open are multiples of this, a power of two; 1: any */
    uint64_t capacity;    /* bytes an image may have at most */
    ota_sink_counts counts;
};

void ota_sink_free(ota_sink **sink);

/* ---- Raw slot: sink_file.c ---------------------------------------------------------------------------------------- */
typedef struct ota_sink_file_options {
    const char *path;  /* regular file (made when missing) or block device (opened exclusively) */
    bool buffered;     /* through the page cache although direct writes are possible */
    uint64_t max_size; /* bytes; 0: the device's capacity, or no limit for a regular file */
    ota_fault *fault;  /* NULL: none */
} ota_sink_file_options;

ota_status ota_sink_file_new(const ota_sink_file_options *options, ota_sink **out, ota_error *error);

/* ---- App slot in flash: sink_flash.c ------------------------------------------------------------------------------ */
typedef struct ota_sink_flash_options {
    ota_flash *flash;  /* borrowed, must outlive the sink */
    uint64_t offset;   /* of the slot, multiple of OTA_FLASH_SECTOR */
    uint64_t size;     /* of the slot, bytes */
    bool rewrite_same; /* erase and program sectors even when they hold the right bytes already */
    ota_status (*begin)(void *user,
                        ota_error *error); /* before the first erase: drop the slot's boot entry; NULL: nothing */
    ota_status (*commit)(void *user, ota_error *error); /* choose the slot for the next boot; NULL: nothing */
    void (*end)(void *user); /* once after each begin that succeeded: committed, aborted or freed; NULL: nothing */
    void *user;
} ota_sink_flash_options;

ota_status ota_sink_flash_new(const ota_sink_flash_options *options, ota_sink **out, ota_error *error);

#endif
