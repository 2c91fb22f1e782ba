/* The way from a chip in an unknown state to one that takes flash commands: reset, SYNC, which chip, watchdogs, security, rate,
 * stub, flash id. A resumable machine that does no I/O and reads no clock; flasher.c drives it over a serial line, tests feed it
 * by hand.
 *
 * Source: esp-serial-protocol.md 4-8, 13. */
#ifndef OTA_FLASHER_ROM_LOADER_H
#define OTA_FLASHER_ROM_LOADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "flasher/chip.h"
#include "flasher/flasher.h"
#include "flasher/rom_command.h"
#include "flasher/rom_exchange.h"

/* ---- Reset sequences ----------------------------------------------------------------------------------------------
 * "D0|R1|W0.1|U1,0": see ota_flasher_options.before_sequence. */

typedef struct ota_rom_step {
    bool sets_lines; /* else it waits */
    bool dtr, rts;   /* both, as they are after the step */
    uint32_t wait_ms;
} ota_rom_step;

/* The next step of `*text`, which is moved behind it. `step` holds the lines as they are before. OTA_DONE: the end. ERR_ARGUMENT:
 * it does not parse. */
ota_status ota_rom_sequence_next(const char **text, ota_rom_step *step);
/* ERR_ARGUMENT unless all of it parses. */
ota_status ota_rom_sequence_check(const char *text);
/* The sequence for the n-th try (from 0) of entering the boot loader; NULL: no reset. */
const char *ota_rom_enter_sequence(const ota_flasher_options *options, ota_flasher_link link, unsigned attempt);
/* The sequence of a hard reset. */
const char *ota_rom_run_sequence(const ota_flasher_options *options, ota_flasher_link link);
/* The link that is meant: never AUTO. */
ota_flasher_link ota_rom_link(const ota_flasher_options *options);

/* ---- Connecting ---------------------------------------------------------------------------------------------------
 * The caller asks for the next action, carries it out, and tells what came of it, until DONE or an error. */

typedef enum ota_rom_action_kind {
    OTA_ROM_ACT_LINES,   /* set DTR and RTS; ENOTTY and EINVAL are told and are no error */
    OTA_ROM_ACT_PAUSE,   /* wait `ms` */
    OTA_ROM_ACT_FLUSH,   /* read what was received for the log, and drop it */
    OTA_ROM_ACT_DRAIN,   /* ... until nothing came for `ms` */
    OTA_ROM_ACT_BAUD,    /* change the rate of the line to `baud`; EINVAL is told and is no error */
    OTA_ROM_ACT_COMMAND, /* send `request`, wait up to `ms` for the answer; send again `repeats` times when none comes */
    OTA_ROM_ACT_GREETING, /* wait up to `ms` for a raw frame */
} ota_rom_action_kind;

typedef struct ota_rom_action {
    ota_rom_action_kind kind;
    uint64_t ms;
    uint32_t baud;
    bool dtr, rts;
    unsigned repeats;
    const ota_rom_request *request; /* lasts until the next action */
} ota_rom_action;

/* What came of an action. */
typedef struct ota_rom_result {
    bool is_answered;           /* COMMAND, GREETING: something came in time */
    bool is_unsupported;        /* COMMAND: the chip does not know it */
    bool is_greeted;            /* COMMAND: the stub's greeting came instead of an answer, or behind it */
    bool failed;                /* LINES, BAUD: the line cannot */
    const ota_rom_reply *reply; /* COMMAND that is_answered and not is_unsupported */
    const uint8_t *frame;       /* GREETING that is_answered */
    size_t frame_len;
} ota_rom_result;

typedef struct ota_rom_loader {
    const ota_flasher_options *options; /* borrowed */
    ota_rom_log *log;                   /* borrowed */
    ota_flasher_info info; /* out: complete after DONE, as far as it got before. info.facts: believed when known */
    const ota_chip *chip;  /* NULL until detected */
    uint32_t resets, step_downs, stub_uploads; /* out: counted */
    ota_error error;                           /* FAILED: why */
    /* Below: of rom_loader.c. */
    int state, after_regs; /* after_regs: where WRITE_REG leads */
    uint32_t line_baud;    /* rate of our side; 0: it has none */
    bool dtr, rts;
    const char *sequence; /* what is left of it */
    unsigned attempt, syncs, tries;
    bool lines_useless, skips_reset, asked_security, one_by_one, stub_failed, has_mac_lo, has_pads, detours;
    uint32_t baud_limit, baud, baud_before; /* highest rate still trusted; wanted; before the change */
    uint32_t calibration, div, mac_lo, usr, usr2, pads, old_pointer;
    ota_rom_security_info security;
    bool has_security;
    const ota_flasher_stub *stub;
    unsigned segment;
    uint32_t seq;
    ota_rom_reg_write regs[OTA_ROM_REG_WRITES_MAX];
    size_t reg_count, reg_sent;
    ota_rom_request request;
} ota_rom_loader;

/* `options` were checked; `line_baud` is the rate of the line now (0: it has none). */
void ota_rom_loader_init(ota_rom_loader *loader, const ota_flasher_options *options, ota_rom_log *log,
                         uint32_t line_baud);
/* What to do next. OTA_OK: `*action`. OTA_DONE: the chip is ready. An error, now and ever after: as ota_flasher_connect. */
ota_status ota_rom_loader_next(ota_rom_loader *loader, ota_rom_action *action, ota_error *error);
/* What came of the action. */
void ota_rom_loader_tell(ota_rom_loader *loader, const ota_rom_result *result);
/* The port vanished when the chip was reset, and is back: go on with SYNC. */
void ota_rom_loader_port_is_back(ota_rom_loader *loader, uint32_t line_baud);
/* Register writes that read the flash chip's JEDEC id into the first data register of the SPI controller and leave the other
 * registers as `usr` and `usr2` say; returns their number. */
size_t ota_rom_flash_id_writes(const ota_chip *chip, uint32_t usr, uint32_t usr2, ota_rom_reg_write *writes);
/* Register writes that silence the watchdogs (3 or 6), or that let the RTC watchdog reset the chip (4). */
size_t ota_rom_watchdog_off_writes(const ota_chip *chip, ota_rom_reg_write *writes);
size_t ota_rom_watchdog_reset_writes(const ota_chip *chip, ota_rom_reg_write *writes);
/* The rate to ask a boot ROM for, so that the chip ends at `baud`: `sees` and `is` are the crystal as the ROM takes it and as it
 * is, in the same unit; 0 in either: `baud`. */
uint32_t ota_rom_baud_request(uint32_t baud, uint64_t sees, uint64_t is);

#endif
