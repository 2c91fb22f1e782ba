/* The flash of an ESP32 behind a serial line, through its boot ROM or a stub: connect, read, erase, write, check, restart.
 *
 * Calls block, and never call Python. One thread uses a flasher; ota_flasher_cancel may come from any. Offsets are bytes from
 * the start of the flash chip. Nothing is written but what is asked for, yet every write erases the sectors it touches first.
 *
 * Errors have stage TARGET and name chip, command, status bytes and flash offset; `offset` is that flash offset, `device_code`
 * is status << 8 | error of the chip's answer, or an errno. Beside the statuses named at each function:
 *
 *     ERR_SERIAL_LOST     the device is gone: unplugged, or the port vanished when the chip restarted
 *     ERR_CHIP_SILENT     no answer in time
 *     ERR_CHIP_PROTOCOL   an answer that cannot be understood, even when asked again
 *     ERR_CHIP_REFUSED    the chip's own error; the text says which
 *     ERR_CHIP_RESTARTED  boot messages or a crash report came instead of an answer
 *     ERR_CANCELLED       somebody called ota_flasher_cancel
 *     ERR_STATE           not connected (any more); nothing was sent
 *
 * ota_flasher_get_state says what an error has left behind, and so what to do next. */
#ifndef OTA_FLASHER_FLASHER_H
#define OTA_FLASHER_FLASHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "port/port.h"

typedef struct ota_flasher ota_flasher;

typedef enum ota_flasher_state {
    OTA_FLASHER_OFF,     /* not connected yet, or the chip was restarted on request: ota_flasher_connect */
    OTA_FLASHER_READY,   /* go on; after a failed write: with a new ota_flasher_write_begin at a sector boundary */
    OTA_FLASHER_BROKEN,  /* fatal to the session, the line is there: ota_flasher_connect again */
    OTA_FLASHER_GONE,    /* fatal to the session, the line is gone: ota_flasher_reopen, then ota_flasher_connect */
    OTA_FLASHER_STOPPED, /* cancelled: ota_flasher_rearm, then as BROKEN */
} ota_flasher_state;

/* How the boot loader is entered. */
typedef enum ota_flasher_before {
    OTA_FLASHER_DEFAULT_RESET, /* by DTR and RTS, as USB product id and platform suggest; lines without DTR and RTS: NO_RESET */
    OTA_FLASHER_CLASSIC_RESET,    /* one line at a time only */
    OTA_FLASHER_USB_RESET,        /* as for USB-Serial-JTAG */
    OTA_FLASHER_NO_RESET,         /* the chip waits in its boot loader, or a stub runs */
    OTA_FLASHER_NO_RESET_NO_SYNC, /* ... and is in step already; taken for a boot ROM */
    OTA_FLASHER_CUSTOM_RESET,     /* before_sequence */
} ota_flasher_before;

/* How the chip is restarted. */
typedef enum ota_flasher_after {
    OTA_FLASHER_AFTER_AUTO, /* HARD_RESET, or WATCHDOG_RESET where only that leaves the boot loader (straps low on USB) */
    OTA_FLASHER_HARD_RESET,     /* by RTS */
    OTA_FLASHER_WATCHDOG_RESET, /* by the RTC watchdog: S2, S3, C3, C5, C61, P4. ERR_UNSUPPORTED on others */
    OTA_FLASHER_AFTER_CUSTOM,   /* after_sequence */
    OTA_FLASHER_STAY,           /* not at all */
} ota_flasher_after;

typedef enum ota_flasher_link {
    OTA_FLASHER_LINK_AUTO, /* from serial->usb_vid and usb_pid: 303A:1001 is USB_JTAG, 303A:0002, 0009, 0012 are USB_OTG */
    OTA_FLASHER_LINK_UART,     /* a UART, behind a USB bridge or not */
    OTA_FLASHER_LINK_USB_JTAG, /* the chip's USB-Serial-JTAG: no rate, core reset only */
    OTA_FLASHER_LINK_USB_OTG,  /* CDC of the chip's ROM: no rate, blocks of 0x800 bytes */
} ota_flasher_link;

/* A stub of version 2 as its data file holds it. All borrowed, outlives the flasher. */
typedef struct ota_flasher_stub {
    const char *name; /* of its file: "esp32c3", "esp32p4-rev1", ... */
    uint32_t entry;
    uint32_t text_start; /* address in the chip's RAM */
    const uint8_t *text;
    size_t text_len; /* 1..256 KiB */
    uint32_t data_start;
    const uint8_t *data;
    size_t data_len; /* 0: none; at most 256 KiB */
} ota_flasher_stub;

/* What an earlier session learned about the device at this port; saves questions. chip_id and flash_id are checked at each
 * connect, mac wherever it is read on the way; when one differs, all are forgotten and asked for. */
typedef struct ota_flasher_facts {
    bool is_known; /* false: the rest is not looked at */
    uint16_t chip_id;
    uint8_t mac[6];
    uint32_t revision; /* major * 100 + minor; OTA_FLASHER_UNKNOWN */
    uint32_t flash_id; /* JEDEC: vendor | type << 8 | size code << 16 */
    uint64_t flash_size;
    uint32_t
        baud; /* the highest rate that works, where a higher one failed: options.baud is cut to it. 0: none failed */
    uint32_t
        rom_clock; /* of the crystal, for the rate. ESP32: as its ROM sees it, Hz; C2, C5: so << 8 | as it is, MHz. 0: not known */
} ota_flasher_facts;

#define OTA_FLASHER_UNKNOWN UINT32_MAX

typedef enum ota_flasher_trace {
    OTA_FLASHER_TRACE_SENT,     /* a frame as it was written */
    OTA_FLASHER_TRACE_RECEIVED, /* bytes as they were read */
    OTA_FLASHER_TRACE_NOTE,     /* a sentence: reset, rate changed, repeated, ... */
} ota_flasher_trace;

typedef struct ota_flasher_options {
    ota_serial *serial; /* borrowed, outlives the flasher; nobody else uses it meanwhile */
    const char *chip;   /* "esp32c3", "ESP32-C3"; NULL or "auto": whatever is there. Copied */
    ota_flasher_before before;
    ota_flasher_after after; /* what ota_flasher_reset(AFTER_AUTO) does; STAY is allowed */
    const char
        *before_sequence; /* CUSTOM_RESET: "D0|R1|W0.1|D1|R0|W0.05|D0", U<dtr>,<rts> both at once, W seconds (up to 10).
                                    Copied, at most 255 bytes */
    const char *after_sequence;
    ota_flasher_link link;
    uint32_t baud;     /* bits per second to go to after detection; 0: stay at 115200. Ignored on USB and on sockets */
    uint32_t baud_min; /* step-down ends here; 0: 115200 */
    int connect_attempts;          /* 0: 7; below 0: for ever (until cancelled) */
    uint32_t reuse_baud;           /* before any reset look for a stub that still runs at this rate; 0: do not */
    const ota_flasher_stub *stubs; /* to choose from by name; none for the chip: the boot ROM does the work. Borrowed */
    size_t stub_count;
    ota_flasher_facts facts; /* copied */
    uint64_t flash_size; /* bytes; 0: ask the flash chip. Needed in secure download mode (2 MiB is assumed otherwise) */
    bool allow_encrypted; /* write although flash encryption is on: the bytes are ciphertext already */
    uint32_t slow;        /* every time-out for work is multiplied by this; 0: 1 */
    void (*trace)(void *user, ota_flasher_trace what, const void *bytes,
                  size_t len); /* NULL: none. On the calling thread */
    void *trace_user;
} ota_flasher_options;

typedef struct ota_flasher_info {
    uint16_t chip_id;
    const char *chip;  /* "esp32c3"; lives for ever */
    const char *title; /* "ESP32-C3" */
    bool has_mac;      /* false in secure download mode */
    uint8_t mac[6];
    uint32_t revision; /* major * 100 + minor; OTA_FLASHER_UNKNOWN until facts or ota_flasher_read_revision told it */
    uint32_t eco_version;  /* of the security info; OTA_FLASHER_UNKNOWN */
    uint32_t flash_id;     /* JEDEC; 0 when it cannot be read */
    uint64_t flash_size;   /* bytes */
    bool flash_size_known; /* read or given; false: 2 MiB assumed */
    bool is_stub;          /* a stub does the work, not the boot ROM */
    bool stub_failed;      /* there is one for this chip, but it did not start: the boot ROM does the work */
    bool stub_was_running; /* ... of an earlier session */
    const char *stub_name; /* "" without; of a stub that was running: the name the chip would get */
    uint32_t baud;         /* now; 0: the line has no rate */
    ota_flasher_link link; /* never AUTO */
    bool was_reset;        /* the chip was reset on the way in; false: lines cannot, or were not to */
    bool secure_download;  /* nothing can be read, nothing verified, no deflate */
    bool secure_boot;
    bool flash_encrypted;
    uint32_t security_flags; /* of the security info, 0 on the ESP32 */
    uint32_t block_size;     /* bytes of one DATA command: cut streams like that for the fewest copies */
    bool can_deflate;        /* deflated writes are possible */
    bool can_verify;         /* MD5 and read are possible */
    ota_flasher_facts facts; /* to keep for the next session with this device */
} ota_flasher_info;

/* Since the flasher was made. */
typedef struct ota_flasher_counts {
    uint64_t commands;  /* requests sent, repeated ones and unanswered SYNCs included; acks of READ_FLASH not */
    uint64_t frames_in; /* frames received that were one */
    uint64_t damaged;   /* frames and pieces that were none: noise, boot messages, flipped bits */
    uint64_t bytes_out, bytes_in; /* on the wire */
    uint64_t retries;             /* requests repeated because no whole answer came */
    uint64_t resets;              /* by lines or watchdog */
    uint64_t step_downs;          /* rates that did not work */
    uint64_t connects, stub_uploads;
    uint64_t md5_bytes, read_bytes, erased_bytes; /* as asked for */
    uint64_t written_bytes;                       /* of flash content that was accepted, inflated */
} ota_flasher_counts;

/* Checks and copies the options; sends nothing. ERR_ARGUMENT: unknown chip, a sequence that does not parse, a bad stub. */
ota_status ota_flasher_new(const ota_flasher_options *options, ota_flasher **out, ota_error *error);
/* Sends nothing; the line and what runs on the chip stay as they are. */
void ota_flasher_free(ota_flasher **flasher);

/* Enters the boot loader and makes everything ready: reset, SYNC, chip, watchdogs, security, rate, stub, flash id and size. At
 * most 20 commands up to the first data of a write, fewer with facts (21 for an ESP32 that is not named, was not reset, so that
 * no boot messages name it, and goes to another rate). Also to be called after an error that broke the session.
 * ERR_CHIP_SILENT: nobody there; the text says what the boot messages told. ERR_CHIP_BOOT_MODE: the chip boots its flash (the
 * strap pin was not low). ERR_CHIP_OTHER: not the chip of options.chip, or one not known. */
ota_status ota_flasher_connect(ota_flasher *flasher, ota_error *error);

/* Gives the port back and takes it again, under whatever name it has by then; waits up to `timeout_ms`. Then OFF. */
ota_status ota_flasher_reopen(ota_flasher *flasher, uint32_t timeout_ms, ota_error *error);

ota_flasher_state ota_flasher_get_state(const ota_flasher *flasher);
/* Lives as long as the flasher; changes with connect. Before the first connect all zero. */
const ota_flasher_info *ota_flasher_get_info(const ota_flasher *flasher);
ota_flasher_counts ota_flasher_get_counts(const ota_flasher *flasher);

/* Asks for the chip revision where it is not known yet (one to three commands) and keeps it in info and facts.
 * ERR_UNSUPPORTED: secure download mode. */
ota_status ota_flasher_read_revision(ota_flasher *flasher, uint32_t *revision, ota_error *error);

/* ---- Flash -------------------------------------------------------------------------------------------------------
 * ERR_ARGUMENT: outside the flash, or not aligned as said. ERR_UNSUPPORTED: secure download mode allows it not. */

/* Any offset and length; checked by the stub's MD5, and repeated when damaged. Through the boot ROM 64 bytes each command. */
ota_status ota_flasher_read(ota_flasher *flasher, uint64_t offset, void *buf, size_t len, ota_error *error);

/* offset and len are multiples of OTA_FLASH_SECTOR. Done when it returns. */
ota_status ota_flasher_erase(ota_flasher *flasher, uint64_t offset, uint64_t len, ota_error *error);

/* MD5 of what lies in flash, computed by the chip; any offset and len, 0 too. */
ota_status ota_flasher_md5(ota_flasher *flasher, uint64_t offset, uint64_t len, uint8_t digest[16], ota_error *error);

typedef struct ota_flasher_write {
    uint64_t offset; /* in flash, a multiple of OTA_FLASH_SECTOR */
    uint64_t size;   /* exact bytes of the content, above 0 (deflated: after inflating) */
    bool
        deflated; /* the data is one zlib stream with a window of at most 32 KiB; ERR_UNSUPPORTED without can_deflate */
    bool encrypt; /* the chip encrypts what it writes; offset and size multiples of 32. MD5 cannot verify it */
    uint64_t
        wire_bound; /* deflated: at least as many bytes as the stream will have; 0: what zlib can need at most (fine for a
                            stub; give the true size without one) */
} ota_flasher_write;

/* Opens a write session; erases at least the first sector, through the boot ROM all of it before it returns. One session at a
 * time; a new one may follow an old one that failed or was left. ERR_UNSUPPORTED also: flash encryption is on (see
 * allow_encrypted). */
ota_status ota_flasher_write_begin(ota_flasher *flasher, const ota_flasher_write *write, ota_error *error);

/* The next `len` bytes of content or stream, any number; they are gathered to blocks, whole blocks of info.block_size are not
 * copied. `inflated_len`: bytes of content whose last compressed byte is in this call (0 allowed for a call that completes
 * nothing); for plain data it is `len`, whatever is given. The sum never exceeds size: a stub would hang (ERR_SIZE, nothing is
 * sent). When it fails the session is over; what part of the range was written is unknown from error->offset on. */
ota_status ota_flasher_write_data(ota_flasher *flasher, const void *bytes, size_t len, uint64_t inflated_len,
                                  ota_error *error);

/* Sends what is left and returns when all is in flash. ERR_SIZE: less than `size` was given. Whether the bytes are right only
 * ota_flasher_md5 can tell (in secure download mode nobody can; the ROM compared each block with what it had received). */
ota_status ota_flasher_write_end(ota_flasher *flasher, ota_error *error);

/* Forgets an open session without sending anything; the flash stays half written. */
void ota_flasher_write_abort(ota_flasher *flasher);

/* A small plain write, begin to end, that works as a NOR flash programs: bits are only cleared, the rest of the sectors it
 * touches keeps its content. Where that rest is not blank the sector is read, erased and written again: a power cut meanwhile
 * loses it, so program into erased sectors. ERR_UNSUPPORTED in secure download mode unless it is whole sectors. */
ota_status ota_flasher_program(ota_flasher *flasher, uint64_t offset, const void *buf, size_t len, ota_error *error);

/* ---- Afterwards --------------------------------------------------------------------------------------------------- */

/* Restarts the chip into its application, also when the session is broken. Ends in OFF, or GONE where the port vanished on
 * the way, which is no error. AFTER_AUTO follows options.after first. Afterwards the line is at 115200. */
ota_status ota_flasher_reset(ota_flasher *flasher, ota_flasher_after how, ota_error *error);

/* Bytes the restarted chip sends, up to `len`: waits at most `timeout_ms` for the first one; `*got` 0: none came. The line keeps
 * its rate (115200 after ota_flasher_reset; change it by serial->ops->set_baud). Allowed in OFF and BROKEN. */
ota_status ota_flasher_read_console(ota_flasher *flasher, void *buf, size_t len, uint32_t timeout_ms, size_t *got,
                                    ota_error *error);

/* From any thread: the call that waits now, and all later ones, end with ERR_CANCELLED until ota_flasher_rearm. */
void ota_flasher_cancel(ota_flasher *flasher);
/* On the flasher's thread: forgets cancels, so that the chip can be reset or connected again. */
void ota_flasher_rearm(ota_flasher *flasher);

#endif
