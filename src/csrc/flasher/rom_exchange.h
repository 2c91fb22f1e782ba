/* One command and its answer, found among stale replies, noise and boot messages: a resumable machine that does no I/O and reads no
 * clock. Beside it the reader of boot messages, which gets all that is no frame.
 *
 * Source: esp-serial-protocol.md 1, 2. */
#ifndef OTA_FLASHER_ROM_EXCHANGE_H
#define OTA_FLASHER_ROM_EXCHANGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "flasher/chip.h"
#include "flasher/rom_command.h"
#include "flasher/slip.h"

/* ---- Boot messages ------------------------------------------------------------------------------------------------
 * Reads the text a chip prints, for what it says about the way it booted. Fed in any slices. */

#define OTA_ROM_LOG_LINE 160

typedef struct ota_rom_log {
    char line[OTA_ROM_LOG_LINE]; /* the line so far, printable characters only; NUL-terminated */
    size_t len;
    bool is_counted;              /* of rom_loader.c: this line was counted as a boot */
    bool has_boot_mode;           /* the last boot told its mode */
    bool is_download;             /* ... which is one of download */
    bool waits_for_download;      /* "waiting for download", "wait uart0 download" */
    bool has_crashed;             /* "Guru Meditation Error", "Fatal exception" */
    uint32_t boots;               /* lines with "rst:0x": one for each restart */
    char crash[OTA_ROM_LOG_LINE]; /* the line with the first crash; "" without */
    char boot[OTA_ROM_LOG_LINE];  /* the last line with a boot mode; "" without */
    const ota_chip *chip;         /* "ESP-ROM:esp32c3-...", "ets Jul 29 2019" of the ESP32; NULL: not named */
} ota_rom_log;

void ota_rom_log_init(ota_rom_log *log);
void ota_rom_log_feed(ota_rom_log *log, const void *bytes, size_t len);

/* ---- One command --------------------------------------------------------------------------------------------------
 *
 *     IDLE    -- begin ---------------------------> WAITING
 *     WAITING -- the reply -----------------------> ANSWERED
 *     WAITING -- 01 05 under a foreign opcode ----> UNSUPPORTED   (the caller drains)
 *     WAITING -- noise, foreign replies ----------> WAITING       (counted; text goes to the log)
 *
 * A raw exchange waits for any frame instead (OHAI, packets of READ_FLASH). */

typedef enum ota_rom_outcome {
    OTA_ROM_IDLE,
    OTA_ROM_WAITING,
    OTA_ROM_ANSWERED,      /* reply or frame is set; the reply's status may tell of an error */
    OTA_ROM_NOT_SUPPORTED, /* the chip does not know this command */
} ota_rom_outcome;

typedef struct ota_rom_exchange {
    ota_slip_decoder decoder;
    uint8_t buf[OTA_ROM_REPLY_MAX];
    ota_rom_outcome outcome;
    const ota_rom_request *request; /* NULL: raw */
    ota_rom_reply reply;            /* ANSWERED; its data lasts until more is fed */
    const uint8_t *frame;           /* ANSWERED, raw: the frame; lasts until more is fed */
    size_t frame_len;
    bool greeted;                      /* OHAI came since begin */
    ota_rom_log *log;                  /* what is no frame is read by it; may be NULL */
    uint64_t frames, damaged, foreign; /* since init */
} ota_rom_exchange;

void ota_rom_exchange_init(ota_rom_exchange *exchange, ota_rom_log *log);
/* Waits for the answer to `request`, which outlives the exchange, or with NULL for any frame. */
void ota_rom_exchange_begin(ota_rom_exchange *exchange, const ota_rom_request *request);
/* Whether a frame is the greeting of a stub that has started, OHAI. */
bool ota_rom_is_greeting(const uint8_t *frame, size_t len);

/* Gives up waiting. Half a frame goes to the log. */
void ota_rom_exchange_end(ota_rom_exchange *exchange);
/* Takes bytes until the outcome is known, all of them when idle; `*used` says how many. */
ota_rom_outcome ota_rom_exchange_feed(ota_rom_exchange *exchange, const void *bytes, size_t len, size_t *used);

#endif
