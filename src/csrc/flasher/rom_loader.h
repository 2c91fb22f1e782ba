/* The way from a chip in an unknown state to one that takes flash commands, the exchange of one command, and write sessions:
 * resumable machines that do no I/O and read no clock. flasher.c drives them over a serial line; tests feed them by hand.
 *
 * Source: esp-serial-protocol.md 2, 4-9, 13. */
#ifndef OTA_FLASHER_ROM_LOADER_H
#define OTA_FLASHER_ROM_LOADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "flasher/chip.h"
#include "flasher/flasher.h"
#include "flasher/rom_command.h"
#include "flasher/slip.h"

/* ---- Time-outs ---------------------------------------------------------------------------------------------------
 * Milliseconds that work may take at most, computed from datasheet maxima and what users measured: a sector 400 ms, a page 3 ms,
 * MD5 8 s for 10^6 bytes; never below OTA_ROM_REPLY_MS. */

enum {
    OTA_ROM_REPLY_MS = 3000,     /* any command without work */
    OTA_ROM_SYNC_MS = 100,       /* SYNC */
    OTA_ROM_MEM_END_MS = 200,    /* MEM_END, whose reply a ROM may not send */
    OTA_ROM_OHAI_MS = 3000,      /* the stub's greeting */
    OTA_ROM_DRAIN_MS = 200,      /* quiet needed after an unsupported command */
    OTA_ROM_SECTOR_ERASE_MS = 400,
    OTA_ROM_SECTOR_PROGRAM_MS = 48,
};
uint64_t ota_rom_erase_ms(uint64_t len);
uint64_t ota_rom_write_ms(uint64_t len); /* erase and program */
uint64_t ota_rom_md5_ms(uint64_t len);
/* On the wire at `baud` (0: no rate, as 115200). */
uint64_t ota_rom_wire_ms(uint64_t bytes, uint32_t baud);

/* ---- Boot messages ------------------------------------------------------------------------------------------------
 * Reads the text a chip prints, for what it says about the way it booted. Fed in any slices. */

#define OTA_ROM_LOG_TAIL 160

typedef struct ota_rom_log {
    char tail[OTA_ROM_LOG_TAIL]; /* the last line so far, printable characters only; NUL-terminated */
    size_t len;
    bool has_boot_mode;
    uint32_t boot_mode;      /* "boot:0x13" */
    bool is_download;        /* the boot mode is one of download */
    bool waits_for_download; /* "waiting for download", "wait uart0 download" */
    bool has_crashed;        /* "Guru Meditation Error", "Fatal exception" */
    uint32_t boots;          /* "rst:0x" lines: one for each restart */
    char crash[OTA_ROM_LOG_TAIL]; /* the line with the crash; "" without */
    char boot[OTA_ROM_LOG_TAIL];  /* the last line with a boot mode; "" without */
    const ota_chip *chip;         /* "ESP-ROM:esp32c3-...", "ets " for the ESP32; NULL: not named */
} ota_rom_log;

void ota_rom_log_init(ota_rom_log *log);
void ota_rom_log_feed(ota_rom_log *log, const void *bytes, size_t len);

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

/* ---- One command --------------------------------------------------------------------------------------------------
 *
 *     begin -> WAITING -- the reply ---------------> ANSWERED
 *                      -- 01 05, foreign opcode ---> UNSUPPORTED   (the caller drains)
 *                      -- noise, foreign replies --> WAITING       (counted; text goes to the log)
 *
 * A raw exchange waits for any frame instead (OHAI, packets of READ_FLASH). */

typedef enum ota_rom_outcome {
    OTA_ROM_WAITING,
    OTA_ROM_ANSWERED,   /* reply is set; its status may tell of an error */
    OTA_ROM_NOT_KNOWN,  /* the chip does not know this command */
} ota_rom_outcome;

typedef struct ota_rom_exchange {
    ota_slip_decoder decoder;
    uint8_t buf[OTA_ROM_REPLY_MAX];
    const ota_rom_request *request; /* NULL: raw */
    ota_rom_outcome outcome;
    ota_rom_reply reply; /* ANSWERED; its data lasts until more is fed */
    const uint8_t *frame; /* raw ANSWERED: the frame */
    size_t frame_len;
    ota_rom_log *log;     /* what is no frame is read by it; may be NULL */
    uint64_t frames, damaged, foreign; /* since init */
} ota_rom_exchange;

void ota_rom_exchange_init(ota_rom_exchange *exchange, ota_rom_log *log);
/* Starts to wait for the answer to `request` (NULL: for any frame), which outlives the exchange. Half a frame that was received
 * before is kept when `keep`, else it is given up. */
void ota_rom_exchange_begin(ota_rom_exchange *exchange, const ota_rom_request *request, bool keep);
/* Takes bytes until the outcome is known; `*used` says how many. Without a begun exchange everything goes to the log. */
ota_rom_outcome ota_rom_exchange_feed(ota_rom_exchange *exchange, const void *bytes, size_t len, size_t *used);

/* ---- Connecting ---------------------------------------------------------------------------------------------------
 * The caller asks for the next action, carries it out, and tells what came of it, until DONE or an error. */

typedef enum ota_rom_action_kind {
    OTA_ROM_ACT_LINES,   /* set DTR and RTS; ENOTTY, EINVAL are told by lines_failed and no error */
    OTA_ROM_ACT_PAUSE,   /* wait `ms`; what arrives is kept for the next action */
    OTA_ROM_ACT_FLUSH,   /* drop what was received, reading it for the log */
    OTA_ROM_ACT_DRAIN,   /* read and drop until nothing came for `ms` */
    OTA_ROM_ACT_BAUD,    /* change the rate of the line; a failure is told and no error */
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
    bool is_answered;          /* COMMAND, GREETING: something came in time */
    bool is_unsupported;       /* COMMAND: the chip does not know it */
    bool failed;               /* LINES, BAUD: the line cannot */
    const ota_rom_reply *reply; /* is_answered COMMAND */
    const uint8_t *frame;       /* is_answered GREETING */
    size_t frame_len;
    uint32_t sync_replies; /* SYNC: replies that came */
} ota_rom_result;

typedef struct ota_rom_loader {
    const ota_flasher_options *options; /* borrowed */
    ota_rom_log *log;                   /* borrowed */
    ota_flasher_info info;              /* out: complete after DONE, as far as it got before */
    ota_flasher_facts facts;            /* believed; is_known false: not (any more) */
    const ota_chip *chip;               /* NULL until detected */
    uint32_t line_baud;                 /* rate of our side now */
    uint32_t step_downs, stub_uploads, resets; /* out: counted */
    /* Below: of rom_loader.c. */
    int state;
    bool waits; /* an action was handed out */
    bool dtr, rts;
    unsigned attempt, syncs, reads;
    const char *sequence;
    uint32_t baud_limit, baud_wanted, baud_request, cal, word;
    uint32_t usr, usr2, old_pointer, mac_lo, efuse3;
    bool lines_useless, detour, one_by_one;
    bool saw_text, stub_failed;
    const ota_flasher_stub *stub;
    unsigned segment;
    uint32_t seq;
    unsigned entry;
    ota_rom_reg_write regs[OTA_ROM_REG_WRITES_MAX];
    unsigned reg_count;
    uint32_t magic_seen;
    ota_rom_security_info security;
    bool has_security;
    ota_rom_request request;
} ota_rom_loader;

/* `options` were checked; `line_baud` is the rate of the line now (0: it has none). */
void ota_rom_loader_init(ota_rom_loader *loader, const ota_flasher_options *options, ota_rom_log *log, uint32_t line_baud);
/* What to do next. OTA_OK: `*action`. OTA_DONE: the chip is ready. An error, now and ever after: as ota_flasher_connect. */
ota_status ota_rom_loader_next(ota_rom_loader *loader, ota_rom_action *action, ota_error *error);
/* What came of the action. */
void ota_rom_loader_tell(ota_rom_loader *loader, const ota_rom_result *result);

/* ---- Write sessions -----------------------------------------------------------------------------------------------
 * Checks what may be sent, numbers blocks, and computes time-outs. A failed block ends the session: a ROM never takes the same
 * number again, a stub reports a block's failure one command late and drops that command. */

typedef struct ota_rom_write {
    bool is_open;
    bool is_stub;
    bool deflated;
    bool encrypt;
    uint8_t begin_words;
    uint32_t block_size;
    uint32_t seq;         /* of the next block */
    uint64_t offset;      /* in flash */
    uint64_t size;        /* of the content */
    uint64_t wire_bound;  /* bytes announced on the wire */
    uint64_t wire_len;    /* sent */
    uint64_t content_len; /* sent, inflated */
    uint64_t settled_len; /* content of which the chip said that it lies in flash */
    uint64_t previous;    /* content of the block before */
    uint32_t slow;
} ota_rom_write;

/* The request that opens the session and the time its answer may take. The arguments were checked against the chip. */
void ota_rom_write_begin(ota_rom_write *session, const ota_flasher_write *write, bool is_stub, unsigned begin_words,
                         uint32_t block_size, uint32_t slow, ota_rom_request *request, uint64_t *ms);
/* One block: 1..block_size bytes that complete `inflated_len` bytes of content. ERR_SIZE: more than announced. */
ota_status ota_rom_write_block(ota_rom_write *session, const uint8_t *bytes, size_t len, uint64_t inflated_len,
                               ota_rom_request *request, uint64_t *ms, ota_error *error);
/* The block's good answer arrived. */
void ota_rom_write_answered(ota_rom_write *session);
/* OTA_OK: `request` ends the session. OTA_DONE: nothing is to be sent (ROM). ERR_SIZE: content is missing. */
ota_status ota_rom_write_end(ota_rom_write *session, ota_rom_request *request, uint64_t *ms, ota_error *error);

#endif
