/* Slots of one or many chips behind serial lines, all written with one image at the same time.
 *
 * The image goes into one store (sink/image_store.h); a thread for each device takes it from there at the pace of its line. A
 * device that fails never hurts another: the sink fails only when all of them did, and what became of each is asked for
 * afterwards. finish waits until every device was written and verified by the MD5 the chip computes, or failed; commit runs each
 * device's own. Offset 0 is the only one to open at: what a chip holds already is found by comparing.
 *
 * Hooks are called on the device's thread, which is the only one that uses its flasher and flash between open and the end of
 * finish, commit or abort. After an abort or cancel a flasher may be STOPPED: ota_flasher_rearm. */
#ifndef OTA_SINK_SINK_SERIAL_H
#define OTA_SINK_SINK_SERIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "flasher/flasher.h"
#include "port/port.h"
#include "sink/image_store.h"
#include "sink/sink.h"

/* What a device is at; numbers are indexes of phase_ms. */
#define OTA_SERIAL_PHASE_LIST(X)                                                                                       \
    X(IDLE, "idle")             /* waits for image bytes */                                                            \
    X(CONNECTING, "connecting") /* ... again, after the link was lost */                                               \
    X(PREPARING, "preparing")   /* its begin hook */                                                                   \
    X(COMPARING, "comparing")   /* MD5 probes of what is there */                                                      \
    X(ERASING, "erasing")                                                                                              \
    X(WRITING, "writing")                                                                                              \
    X(VERIFYING, "verifying")                                                                                          \
    X(WRITTEN, "written") /* waits for the others and the verdict */                                                   \
    X(COMMITTING, "committing")                                                                                        \
    X(DONE, "done")                                                                                                    \
    X(FAILED, "failed")

typedef enum ota_serial_phase {
#define OTA_SERIAL_PHASE_ENUM(name, text) OTA_SERIAL_##name,
    OTA_SERIAL_PHASE_LIST(OTA_SERIAL_PHASE_ENUM)
#undef OTA_SERIAL_PHASE_ENUM
    OTA_SERIAL_PHASES
} ota_serial_phase;

const char *ota_serial_phase_name(ota_serial_phase phase);

typedef struct ota_sink_serial_device {
    const char *name;      /* for messages; copied */
    ota_flasher *flasher;  /* borrowed; connected or to be connected */
    ota_serial *serial;    /* its line, for the clock; NULL: the system's */
    ota_flash *flash;      /* of ota_flash_serial_new: forgets what it kept when the link was lost; NULL: none */
    uint64_t offset, size; /* of the slot in flash, whole sectors */
    /* As of ota_esp_hooks; each may be NULL. begin and end may be called again after the link was lost. */
    ota_status (*begin)(void *user, ota_error *error);
    ota_status (*commit)(void *user, const uint8_t *image, size_t len, ota_error *error); /* image NULL: not verified */
    void (*end)(void *user);
    void *user;
} ota_sink_serial_device;

typedef struct ota_sink_serial_options {
    const ota_sink_serial_device *devices; /* copied */
    size_t device_count;                   /* 1..OTA_SINK_SERIAL_MAX */
    bool skip_identical;                   /* leave a slot alone that holds the image already */
    bool
        skip_blank; /* do not send runs of FF, of whole sectors, that are known before they would be sent: erase them */
    bool sector_diff;    /* find by MD5 what differs and write that alone */
    bool pre_erase;      /* erase while the image still arrives (stub only; the boot ROM erases when a write begins) */
    int level;           /* of deflate, 1..9; 0: 6; -1: send plain bytes */
    size_t jobs;         /* devices that are written at the same time; 0: all */
    uint32_t reconnects; /* for each device; 0: 5 */
    uint32_t reopen_ms;  /* how long to wait for a port that is gone; 0: 30 s */
    const char *cache_dir; /* see ota_image_store_options; copied */
    const uint8_t *sha256; /* of the image as announced, 32 bytes; NULL: not known. Copied */
    const uint8_t *md5;    /* of the image as announced, 16 bytes; NULL: not known. Copied */
} ota_sink_serial_options;

#define OTA_SINK_SERIAL_MAX 256

typedef struct ota_sink_serial_result {
    ota_error error; /* status OTA_OK: none */
    ota_serial_phase phase;
    bool identical;             /* the slot held the image; nothing was written */
    bool verified;              /* the chip's MD5 said so; false in the end: secure download mode, nobody can tell */
    bool committed;             /* the commit hook ran, or there is none */
    uint64_t done;              /* image bytes that are dealt with */
    uint64_t size;              /* of the image; OTA_SIZE_UNKNOWN */
    uint64_t wire_out, wire_in; /* bytes on the line */
    uint64_t commands, retries; /* requests sent; those sent again */
    uint64_t programmed;        /* image bytes written */
    uint64_t skipped;           /* image bytes that were there already */
    uint64_t blank;             /* image bytes of FF that were erased or blank, not sent */
    uint64_t erased;            /* bytes erased by command; what writes erase on the way is not counted */
    uint64_t probes;            /* MD5 digests asked for */
    uint64_t reconnects;
    uint64_t resumed_at;                  /* image offset of the last write after a lost link; 0: none, or the start */
    uint64_t phase_ms[OTA_SERIAL_PHASES]; /* on the line's clock */
} ota_sink_serial_result;

ota_status ota_sink_serial_new(const ota_sink_serial_options *options, ota_sink **out, ota_error *error);

/* Before open: this device takes no part, and its result is that error. False: no device has that number, or it is too late. */
bool ota_sink_serial_exclude(ota_sink *sink, size_t device, const ota_error *error);

/* Before open, in place of those of the options: digests of the image as announced, 32 and 16 bytes; NULL: not known. A wrong
 * MD5 costs a question, a wrong SHA-256 nothing. */
void ota_sink_serial_announce(ota_sink *sink, const uint8_t *sha256, const uint8_t *md5);

/* How a device is doing, or did; from any thread. False: no device has that number. */
bool ota_sink_serial_get_result(ota_sink *sink, size_t device, ota_sink_serial_result *result);

/* What was done once for all devices; zero before open. From any thread. */
void ota_sink_serial_get_store_counts(ota_sink *sink, ota_image_store_counts *counts);

#endif
