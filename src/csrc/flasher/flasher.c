/* Drives the machines of rom_loader.h, rom_exchange.h and rom_write.h over a serial line; see flasher.h.
 *
 * Every command goes through run_command, every byte through send_bytes and receive. What an error leaves behind is decided in
 * three places: port_failed (the line), command_failed (silence ends the session, a refusal does not) and connect. */
#include "flasher/flasher.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

#include "base/bytes.h"
#include "flasher/chip.h"
#include "flasher/rom_command.h"
#include "flasher/rom_exchange.h"
#include "flasher/rom_loader.h"
#include "flasher/rom_write.h"
#include "flasher/slip.h"

#define SEQUENCE_MAX 255u
#define STUB_SEGMENT_MAX (256u << 10)
#define WRITE_MS 10000u         /* a USB device that takes nothing for so long is stuck */
#define MIDFRAME_QUIET_MS 250u  /* no frame pauses so long: what came is text */
#define DAMAGED_REPEAT_MS 300u  /* a damaged answer was it; ask again after that */
#define LATE_REPLY_QUIET_MS 50u /* after a repeated command: its first answer may still come */
#define DRAIN_MAX_MS 3000u
#define FLUSH_READS_MAX 64u /* a chip that talks all the time */
#define REOPEN_MS 5000u     /* Linux needs 0.1-1 s to make the port of a chip that was reset again */
#define WATCHDOG_RESET_MS 500u
#define READ_TRANSFER_MAX 0x10000u /* of one READ_FLASH, whose MD5 stands for all of it */
#define READ_TRIES 3u
#define ERASE_PIECE (1u << 20) /* of one ERASE_REGION, a multiple of what a flash chip erases at once */
#define REPEATS 2u
#define WORK_REPEATS 1u
#define STATUS_UNSUPPORTED 0x0105
#define ROM_BAD_FORMAT 0x05
#define STRAP_GPIO0 (1u << 3)
#define ROM_FLASH_LIMIT (16u << 20)

struct ota_flasher {
    ota_flasher_options options; /* strings point into the fields below; facts grow with each connect */
    char chip_name[32];
    char before_sequence[SEQUENCE_MAX + 1];
    char after_sequence[SEQUENCE_MAX + 1];
    ota_serial *serial;
    ota_flasher_state state;
    ota_flasher_info info;
    ota_flasher_counts counts;
    const ota_chip *chip; /* of the last connect; NULL before */
    bool dtr, rts;        /* as they were set last */
    ota_rom_loader loader;
    ota_rom_log log;
    uint32_t boots; /* of the log, when the session began */
    ota_rom_exchange exchange;
    uint8_t rx[4096]; /* read and not looked at yet: rx_pos..rx_len */
    size_t rx_pos, rx_len;
    uint8_t *tx; /* one frame */
    size_t tx_capacity;
    ota_rom_write session;
    uint64_t session_offset;
    uint8_t *block; /* gathered for the session */
    size_t block_len;
    uint64_t block_content;
    uint64_t blank_from, blank_to; /* a range known to be erased; equal: none */
    ota_rom_request request;
};

/* ---- Errors and traces ------------------------------------------------------------------------------------------- */

static const char *who(const ota_flasher *flasher) {
    return flasher->chip != NULL ? flasher->chip->title : "chip";
}

static const char *persona(const ota_flasher *flasher) {
    return flasher->info.is_stub ? "stub" : "boot ROM";
}

__attribute__((format(printf, 2, 3))) static void note(const ota_flasher *flasher, const char *format, ...) {
    if (flasher->options.trace == NULL) {
        return;
    }
    char text[256];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len > 0) {
        size_t used = (size_t)len < sizeof text ? (size_t)len : sizeof text - 1;
        flasher->options.trace(flasher->options.trace_user, OTA_FLASHER_TRACE_NOTE, text, used);
    }
}

static ota_status bad_argument(const ota_flasher *flasher, ota_error *error, uint64_t offset, const char *what) {
    return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, offset, 0, "%s: %s", who(flasher), what);
}

static ota_status unsupported(const ota_flasher *flasher, ota_error *error, uint64_t offset, const char *what) {
    return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TARGET, offset, 0, "%s: %s", who(flasher), what);
}

/* The line failed; what was open is over. */
static ota_status port_failed(ota_flasher *flasher, int errnum, const char *what, ota_error *error) {
    const char *name = flasher->serial->name != NULL ? flasher->serial->name : "serial line";
    flasher->session.is_open = false;
    if (errnum == ECANCELED) {
        flasher->state = OTA_FLASHER_STOPPED;
        return ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_TARGET, 0, errnum, "%s: %s was cancelled",
                             who(flasher), what);
    }
    if (errnum == ENODEV) {
        flasher->state = OTA_FLASHER_GONE;
        return ota_error_set(error, OTA_ERR_SERIAL_LOST, OTA_STAGE_TARGET, 0, errnum, "%s: %s is gone (during %s)",
                             who(flasher), name, what);
    }
    flasher->state = OTA_FLASHER_BROKEN;
    if (errnum == ETIMEDOUT) {
        return ota_error_set(error, OTA_ERR_CHIP_SILENT, OTA_STAGE_TARGET, 0, errnum,
                             "%s: %s takes no more bytes (during %s)", who(flasher), name, what);
    }
    char text[160];
    snprintf(text, sizeof text, "%s: %s failed during %s", who(flasher), name, what);
    return ota_error_set_errno(error, OTA_STAGE_TARGET, 0, errnum, text);
}

/* What became of a command. */
typedef struct outcome {
    bool is_answered;
    bool is_unsupported;
    bool has_restarted;
} outcome;

/* A command that was not answered, or not with success. Silence ends the session; after a refusal the chip listens on. */
static ota_status command_failed(ota_flasher *flasher, const ota_rom_request *request, uint64_t offset,
                                 const outcome *what, ota_error *error) {
    const char *name = ota_rom_op_name(request->op);
    if (what->is_answered && !what->is_unsupported) {
        uint8_t status = flasher->exchange.reply.status, code = flasher->exchange.reply.error;
        return ota_error_set(error, OTA_ERR_CHIP_REFUSED, OTA_STAGE_TARGET, offset, status << 8 | code,
                             "%s: %s at 0x%llx refused by the %s: status %02X %02X, %s", who(flasher), name,
                             (unsigned long long)offset, persona(flasher), status, code,
                             ota_rom_error_text(flasher->info.is_stub, status, code));
    }
    if (what->is_unsupported) {
        return ota_error_set(error, OTA_ERR_CHIP_REFUSED, OTA_STAGE_TARGET, offset, STATUS_UNSUPPORTED,
                             "%s: the %s does not know %s (status 01 05)", who(flasher), persona(flasher), name);
    }
    flasher->state = OTA_FLASHER_BROKEN;
    flasher->session.is_open = false;
    if (flasher->log.has_crashed) {
        return ota_error_set(error, OTA_ERR_CHIP_RESTARTED, OTA_STAGE_TARGET, offset, 0,
                             "%s: it crashed during %s at 0x%llx: %s", who(flasher), name, (unsigned long long)offset,
                             flasher->log.crash);
    }
    if (what->has_restarted) {
        return ota_error_set(error, OTA_ERR_CHIP_RESTARTED, OTA_STAGE_TARGET, offset, 0,
                             "%s: it restarted during %s at 0x%llx: %s", who(flasher), name, (unsigned long long)offset,
                             flasher->log.boot);
    }
    return ota_error_set(error, OTA_ERR_CHIP_SILENT, OTA_STAGE_TARGET, offset, 0,
                         "%s: no answer to %s at 0x%llx from the %s", who(flasher), name, (unsigned long long)offset,
                         persona(flasher));
}

/* ---- Bytes ------------------------------------------------------------------------------------------------------- */

static uint64_t now(const ota_flasher *flasher) {
    return flasher->serial->ops->now_ms(flasher->serial);
}

static int send_bytes(ota_flasher *flasher, const uint8_t *bytes, size_t len) {
    if (flasher->options.trace != NULL) {
        flasher->options.trace(flasher->options.trace_user, OTA_FLASHER_TRACE_SENT, bytes, len);
    }
    uint64_t deadline = now(flasher) + WRITE_MS + 2 * ota_rom_wire_ms(len, flasher->serial->baud);
    int errnum = flasher->serial->ops->write(flasher->serial, bytes, len, deadline);
    if (errnum == 0) {
        flasher->counts.bytes_out += len;
    }
    return errnum;
}

/* Reads what is there, or waits for it. Nothing may be left in rx. */
static int fill(ota_flasher *flasher, uint64_t deadline) {
    size_t got = 0;
    flasher->rx_pos = flasher->rx_len = 0;
    int errnum = flasher->serial->ops->read(flasher->serial, flasher->rx, sizeof flasher->rx, deadline, &got);
    if (errnum == 0 && got > 0) {
        flasher->rx_len = got;
        flasher->counts.bytes_in += got;
        if (flasher->options.trace != NULL) {
            flasher->options.trace(flasher->options.trace_user, OTA_FLASHER_TRACE_RECEIVED, flasher->rx, got);
        }
    }
    return errnum;
}

static ota_rom_outcome feed(ota_flasher *flasher) {
    size_t used = 0;
    ota_rom_outcome result = ota_rom_exchange_feed(&flasher->exchange, flasher->rx + flasher->rx_pos,
                                                   flasher->rx_len - flasher->rx_pos, &used);
    flasher->rx_pos += used;
    flasher->counts.frames_in = flasher->exchange.frames;
    flasher->counts.damaged = flasher->exchange.damaged;
    return result;
}

/* Takes what has arrived unasked: late replies, boot messages. */
static int absorb(ota_flasher *flasher) {
    if (flasher->rx_pos < flasher->rx_len) {
        feed(flasher);
    }
    for (unsigned i = 0; i < FLUSH_READS_MAX; i++) {
        int errnum = fill(flasher, 0);
        if (errnum != 0 || flasher->rx_len == 0) {
            return errnum;
        }
        feed(flasher);
    }
    return flasher->serial->ops->flush(flasher->serial);
}

/* Reads until nothing came for `quiet_ms`. */
static int drain(ota_flasher *flasher, uint64_t quiet_ms) {
    if (flasher->rx_pos < flasher->rx_len) {
        feed(flasher);
    }
    uint64_t end = now(flasher) + DRAIN_MAX_MS;
    int errnum;
    do {
        errnum = fill(flasher, now(flasher) + quiet_ms);
        feed(flasher);
    } while (errnum == 0 && flasher->rx_len > 0 && now(flasher) < end);
    ota_rom_exchange_end(&flasher->exchange);
    return errnum;
}

static bool has_restarted(const ota_flasher *flasher) {
    return flasher->state == OTA_FLASHER_READY && (flasher->log.boots != flasher->boots || flasher->log.has_crashed);
}

/* Waits for the end of the exchange that was begun. A damaged frame was the answer, most likely: with `is_short` the wait for
 * another one is short. *result is WAITING when the time is over or the chip has restarted. */
static int receive(ota_flasher *flasher, uint64_t deadline, bool is_short, ota_rom_outcome *result) {
    uint64_t damaged = flasher->exchange.damaged;
    for (;;) {
        *result = flasher->rx_pos < flasher->rx_len ? feed(flasher) : flasher->exchange.outcome;
        if (*result != OTA_ROM_WAITING || has_restarted(flasher)) {
            return 0;
        }
        if (flasher->exchange.damaged != damaged && is_short) {
            uint64_t soon = now(flasher) + DAMAGED_REPEAT_MS;
            deadline = soon < deadline ? soon : deadline;
            damaged = flasher->exchange.damaged;
        }
        uint64_t time = now(flasher), until = deadline;
        if (flasher->exchange.decoder.len > 0 && time + MIDFRAME_QUIET_MS < until) {
            until = time + MIDFRAME_QUIET_MS;
        }
        int errnum = fill(flasher, until);
        if (errnum != 0) {
            return errnum;
        }
        if (flasher->rx_len == 0) {
            if (until == deadline) {
                return 0;
            }
            const ota_rom_request *request = flasher->exchange.request;
            ota_rom_exchange_end(&flasher->exchange); /* text: for the log */
            ota_rom_exchange_begin(&flasher->exchange, request);
        }
    }
}

/* ---- Commands ---------------------------------------------------------------------------------------------------- */

/* Sends a request and waits up to `ms` for its answer, `repeats` times more when none comes. */
static ota_status exchange(ota_flasher *flasher, const ota_rom_request *request, uint64_t ms, unsigned repeats,
                           outcome *what, ota_error *error) {
    const char *name = ota_rom_op_name(request->op);
    bool is_short = request->repeatable && ms <= OTA_ROM_REPLY_MS;
    memset(what, 0, sizeof *what);
    for (unsigned i = 0;; i++) {
        ota_rom_exchange_end(&flasher->exchange);
        int errnum = absorb(flasher);
        if (errnum != 0) {
            return port_failed(flasher, errnum, name, error);
        }
        ota_rom_exchange_end(&flasher->exchange);
        size_t len = ota_rom_request_encode(request, flasher->tx, flasher->tx_capacity);
        if (len == 0) {
            return bad_argument(flasher, error, 0, "a command is too long");
        }
        flasher->counts.commands++;
        errnum = send_bytes(flasher, flasher->tx, len);
        if (errnum != 0) {
            return port_failed(flasher, errnum, name, error);
        }
        ota_rom_outcome result;
        ota_rom_exchange_begin(&flasher->exchange, request);
        errnum = receive(flasher, now(flasher) + ms + ota_rom_wire_ms(len, flasher->serial->baud), is_short, &result);
        if (errnum != 0) {
            return port_failed(flasher, errnum, name, error);
        }
        what->is_answered = result != OTA_ROM_WAITING;
        what->is_unsupported = result == OTA_ROM_NOT_SUPPORTED;
        what->has_restarted = has_restarted(flasher);
        if (what->is_answered &&
            i > 0) { /* the first answer may come late, and would look like that of the next command */
            ota_rom_reply reply = flasher->exchange.reply;
            uint8_t data[OTA_ROM_READ_SLOW_MAX] = {0};
            if (!what->is_unsupported && reply.data_len > 0 && reply.data_len <= sizeof data) {
                memcpy(data, reply.data, reply.data_len);
            }
            errnum = drain(flasher, LATE_REPLY_QUIET_MS);
            if (errnum != 0) {
                return port_failed(flasher, errnum, name, error);
            }
            memcpy(flasher->exchange.buf, data, sizeof data);
            flasher->exchange.reply = reply;
            flasher->exchange.reply.data = flasher->exchange.buf;
        }
        /* What all chips know can be asked again: a bit of the opcode flipped on the way. */
        bool is_misheard = what->is_unsupported && i < repeats && request->op != OTA_ROM_GET_SECURITY_INFO;
        if (is_misheard) {
            errnum = drain(flasher, OTA_ROM_DRAIN_MS);
            if (errnum != 0) {
                return port_failed(flasher, errnum, name, error);
            }
        }
        if ((what->is_answered && !is_misheard) || what->has_restarted || i == repeats) {
            break;
        }
        ota_rom_exchange_end(&flasher->exchange);
        what->has_restarted = has_restarted(flasher);
        if (what->has_restarted) {
            break;
        }
        flasher->counts.retries++;
        note(flasher, "no answer to %s, asked again", name);
    }
    if (!what->is_answered) {
        ota_rom_exchange_end(&flasher->exchange);
        what->has_restarted = has_restarted(flasher);
    }
    return OTA_OK;
}

/* The same, with anything but success as an error. */
static ota_status run_command(ota_flasher *flasher, const ota_rom_request *request, uint64_t ms, unsigned repeats,
                              uint64_t offset, ota_error *error) {
    outcome what;
    ota_status status = exchange(flasher, request, ms, request->repeatable ? repeats : 0, &what, error);
    if (status != OTA_OK) {
        return status;
    }
    if (what.is_answered && !what.is_unsupported && flasher->exchange.reply.status == 0) {
        return OTA_OK;
    }
    if (what.is_unsupported) {
        int errnum = drain(flasher, OTA_ROM_DRAIN_MS);
        if (errnum != 0) {
            return port_failed(flasher, errnum, ota_rom_op_name(request->op), error);
        }
    }
    return command_failed(flasher, request, offset, &what, error);
}

static ota_status read_reg(ota_flasher *flasher, uint32_t address, uint32_t *value, ota_error *error) {
    ota_rom_read_reg(&flasher->request, address);
    ota_status status = run_command(flasher, &flasher->request, OTA_ROM_REPLY_MS, REPEATS, 0, error);
    *value = status == OTA_OK ? flasher->exchange.reply.value : 0;
    return status;
}

static ota_status write_regs(ota_flasher *flasher, const ota_rom_reg_write *writes, size_t count, ota_error *error) {
    ota_rom_write_regs(&flasher->request, writes, count);
    return run_command(flasher, &flasher->request, OTA_ROM_REPLY_MS, 0, 0, error);
}

/* ---- Life --------------------------------------------------------------------------------------------------------- */

static bool copy_text(char *to, size_t capacity, const char *from, const char **option) {
    if (from == NULL) {
        return true;
    }
    if (strlen(from) >= capacity) {
        return false;
    }
    memcpy(to, from, strlen(from) + 1);
    *option = to;
    return true;
}

static const char *check_options(const ota_flasher_options *options) {
    if (options->serial == NULL) {
        return "no serial line";
    }
    if (options->chip != NULL && strcmp(options->chip, "auto") != 0 && ota_chip_by_name(options->chip) == NULL) {
        return "no such chip";
    }
    if (options->before == OTA_FLASHER_CUSTOM_RESET &&
        (options->before_sequence == NULL || ota_rom_sequence_check(options->before_sequence) != OTA_OK)) {
        return "the reset sequence cannot be understood";
    }
    if (options->after == OTA_FLASHER_AFTER_CUSTOM &&
        (options->after_sequence == NULL || ota_rom_sequence_check(options->after_sequence) != OTA_OK)) {
        return "the sequence to restart cannot be understood";
    }
    for (size_t i = 0; i < options->stub_count; i++) {
        const ota_flasher_stub *stub = &options->stubs[i];
        if (stub->name == NULL || stub->text == NULL || stub->text_len == 0 || stub->text_len > STUB_SEGMENT_MAX ||
            stub->data_len > STUB_SEGMENT_MAX || (stub->data == NULL && stub->data_len != 0) || stub->entry == 0) {
            return "a stub without name, code or entry, or one that is too large";
        }
    }
    return NULL;
}

ota_status ota_flasher_new(const ota_flasher_options *options, ota_flasher **out, ota_error *error) {
    *out = NULL;
    const char *wrong = check_options(options);
    if (wrong != NULL) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0, "%s", wrong);
    }
    ota_flasher *flasher = calloc(1, sizeof *flasher);
    if (flasher == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "out of memory");
    }
    flasher->options = *options;
    flasher->serial = options->serial;
    flasher->info.chip = flasher->info.title = flasher->info.stub_name = "";
    if (flasher->options.slow == 0) {
        flasher->options.slow = 1;
    }
    ota_rom_log_init(&flasher->log);
    ota_rom_exchange_init(&flasher->exchange, &flasher->log);
    flasher->tx_capacity = OTA_SLIP_FRAME_MAX(OTA_ROM_HEADER_SIZE + OTA_ROM_DATA_HEADER_SIZE + OTA_ROM_STUB_BLOCK);
    flasher->tx = malloc(flasher->tx_capacity);
    flasher->block = malloc(OTA_ROM_STUB_BLOCK);
    ota_status status = OTA_OK;
    if (flasher->tx == NULL || flasher->block == NULL) {
        status = ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "out of memory");
    } else if (!copy_text(flasher->chip_name, sizeof flasher->chip_name, options->chip, &flasher->options.chip) ||
               !copy_text(flasher->before_sequence, sizeof flasher->before_sequence, options->before_sequence,
                          &flasher->options.before_sequence) ||
               !copy_text(flasher->after_sequence, sizeof flasher->after_sequence, options->after_sequence,
                          &flasher->options.after_sequence)) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0, "a name or sequence is too long");
    }
    if (status != OTA_OK) {
        ota_flasher_free(&flasher);
        return status;
    }
    *out = flasher;
    return OTA_OK;
}

void ota_flasher_free(ota_flasher **flasher) {
    if (*flasher != NULL) {
        free((*flasher)->tx);
        free((*flasher)->block);
        free(*flasher);
        *flasher = NULL;
    }
}

ota_flasher_state ota_flasher_get_state(const ota_flasher *flasher) {
    return flasher->state;
}

const ota_flasher_info *ota_flasher_get_info(const ota_flasher *flasher) {
    return &flasher->info;
}

ota_flasher_counts ota_flasher_get_counts(const ota_flasher *flasher) {
    return flasher->counts;
}

void ota_flasher_cancel(ota_flasher *flasher) {
    flasher->serial->ops->wake(flasher->serial);
}

void ota_flasher_rearm(ota_flasher *flasher) {
    flasher->serial->ops->rearm(flasher->serial);
    if (flasher->state == OTA_FLASHER_STOPPED) {
        flasher->state = OTA_FLASHER_BROKEN;
    }
}

/* ---- Connecting --------------------------------------------------------------------------------------------------- */

/* Carries out one action. An errno of the line ends it, unless it is one that the machine wants to hear of. */
static int set_lines(ota_flasher *flasher, bool dtr, bool rts) {
    flasher->dtr = dtr;
    flasher->rts = rts;
    return flasher->serial->ops->set_lines(flasher->serial, dtr, rts);
}

static ota_status greeting(ota_flasher *flasher, uint64_t ms, ota_rom_result *result, ota_error *error) {
    ota_rom_outcome got;
    ota_rom_exchange_begin(&flasher->exchange, NULL);
    int errnum = receive(flasher, now(flasher) + ms, false, &got);
    if (errnum != 0) {
        return port_failed(flasher, errnum, "the stub's start", error);
    }
    result->is_answered = got == OTA_ROM_ANSWERED;
    result->frame = flasher->exchange.frame;
    result->frame_len = flasher->exchange.frame_len;
    if (!result->is_answered) {
        ota_rom_exchange_end(&flasher->exchange);
    }
    return OTA_OK;
}

static ota_status act(ota_flasher *flasher, const ota_rom_action *action, ota_rom_result *result, ota_error *error) {
    ota_serial *serial = flasher->serial;
    int errnum = 0;
    const char *what = "connect";
    switch (action->kind) {
    case OTA_ROM_ACT_LINES:
        what = "reset";
        errnum = set_lines(flasher, action->dtr, action->rts);
        result->failed = errnum == ENOTTY || errnum == EINVAL;
        if (result->failed) {
            note(flasher, "DTR and RTS cannot be set here: go on without a reset");
        }
        break;
    case OTA_ROM_ACT_PAUSE:
        errnum = serial->ops->wait_ms(serial, (uint32_t)action->ms);
        break;
    case OTA_ROM_ACT_FLUSH:
        errnum = absorb(flasher);
        ota_rom_exchange_end(&flasher->exchange);
        break;
    case OTA_ROM_ACT_DRAIN:
        errnum = drain(flasher, action->ms);
        break;
    case OTA_ROM_ACT_BAUD:
        what = "a change of the rate";
        errnum = serial->ops->set_baud(serial, action->baud);
        result->failed = errnum == EINVAL || errnum == ENOTTY;
        note(flasher, "rate %lu%s", (unsigned long)action->baud, result->failed ? ": not possible here" : "");
        break;
    case OTA_ROM_ACT_COMMAND: {
        outcome got;
        ota_status status = exchange(flasher, action->request, action->ms, action->repeats, &got, error);
        result->is_answered = got.is_answered;
        result->is_unsupported = got.is_unsupported;
        result->is_greeted = flasher->exchange.greeted;
        result->reply = &flasher->exchange.reply;
        return status;
    }
    case OTA_ROM_ACT_GREETING:
        return greeting(flasher, action->ms, result, error);
    }
    return errnum == 0 || result->failed ? OTA_OK : port_failed(flasher, errnum, what, error);
}

/* A chip on USB takes its port with it when it is reset. True when the port is back and connecting goes on. */
static bool port_came_back(ota_flasher *flasher, bool *tried, ota_error *error) {
    ota_serial *serial = flasher->serial;
    if (flasher->state != OTA_FLASHER_GONE || *tried || flasher->loader.resets == 0 ||
        flasher->loader.info.link == OTA_FLASHER_LINK_UART) {
        return false;
    }
    *tried = true;
    if (serial->ops->reopen(serial, now(flasher) + REOPEN_MS) != 0) {
        return false;
    }
    note(flasher, "the port vanished with the reset and is back");
    if (error != NULL) {
        memset(error, 0, sizeof *error);
    }
    flasher->rx_pos = flasher->rx_len = 0;
    ota_rom_exchange_end(&flasher->exchange);
    ota_rom_loader_port_is_back(&flasher->loader, serial->baud);
    return true;
}

ota_status ota_flasher_connect(ota_flasher *flasher, ota_error *error) {
    if (flasher->state == OTA_FLASHER_GONE || flasher->state == OTA_FLASHER_STOPPED) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "%s: %s", who(flasher),
                             flasher->state == OTA_FLASHER_GONE ? "the line is gone: reopen it first"
                                                                : "cancelled: rearm first");
    }
    flasher->state = OTA_FLASHER_OFF;
    flasher->session.is_open = false;
    flasher->blank_from = flasher->blank_to = 0;
    flasher->counts.connects++;
    ota_rom_log_init(&flasher->log);
    ota_rom_exchange_end(&flasher->exchange);
    ota_rom_loader *loader = &flasher->loader;
    ota_rom_loader_init(loader, &flasher->options, &flasher->log, flasher->serial->baud);
    bool reopened = false;
    ota_status status;
    ota_rom_action action;
    while ((status = ota_rom_loader_next(loader, &action, error)) == OTA_OK) {
        ota_rom_result result = {0};
        flasher->info.is_stub = loader->info.is_stub;
        status = act(flasher, &action, &result, error);
        if (status == OTA_OK) {
            ota_rom_loader_tell(loader, &result);
        } else if (!port_came_back(flasher, &reopened, error)) {
            break;
        }
    }
    flasher->counts.resets += loader->resets;
    flasher->counts.step_downs += loader->step_downs;
    flasher->counts.stub_uploads += loader->stub_uploads;
    flasher->info = loader->info;
    flasher->chip = loader->chip;
    if (status != OTA_DONE) {
        if (flasher->state == OTA_FLASHER_OFF) {
            flasher->state = OTA_FLASHER_BROKEN;
        }
        return status;
    }
    flasher->options.facts = loader->info.facts;
    ota_rom_log_init(&flasher->log);
    flasher->boots = 0;
    flasher->state = OTA_FLASHER_READY;
    return OTA_OK;
}

ota_status ota_flasher_reopen(ota_flasher *flasher, uint32_t timeout_ms, ota_error *error) {
    ota_serial *serial = flasher->serial;
    flasher->rx_pos = flasher->rx_len = 0;
    ota_rom_exchange_end(&flasher->exchange);
    int errnum = serial->ops->reopen(serial, now(flasher) + timeout_ms);
    if (errnum != 0) {
        return port_failed(flasher, errnum, "the wait for the port", error);
    }
    flasher->state = OTA_FLASHER_OFF;
    flasher->session.is_open = false;
    return OTA_OK;
}

static ota_status check_ready(const ota_flasher *flasher, ota_error *error) {
    if (flasher->state == OTA_FLASHER_READY) {
        return OTA_OK;
    }
    return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "%s: not connected", who(flasher));
}

ota_status ota_flasher_read_revision(ota_flasher *flasher, uint32_t *revision, ota_error *error) {
    *revision = OTA_FLASHER_UNKNOWN;
    ota_status status = check_ready(flasher, error);
    if (status != OTA_OK) {
        return status;
    }
    if (flasher->info.revision == OTA_FLASHER_UNKNOWN) {
        if (flasher->info.secure_download) {
            return unsupported(flasher, error, 0, "the revision cannot be read in secure download mode");
        }
        uint32_t values[OTA_CHIP_FIELDS_MAX] = {0};
        const ota_chip_field *fields = flasher->chip->revision;
        for (size_t i = 0; i < OTA_CHIP_FIELDS_MAX && fields[i].reg != 0; i++) {
            size_t known = 0;
            while (known < i && fields[known].reg != fields[i].reg) {
                known++;
            }
            status = known < i ? OTA_OK : read_reg(flasher, fields[i].reg, &values[i], error);
            if (status != OTA_OK) {
                return status;
            }
            values[i] = values[known];
        }
        flasher->info.revision = ota_chip_revision(flasher->chip, values);
        flasher->info.facts.revision = flasher->options.facts.revision = flasher->info.revision;
    }
    *revision = flasher->info.revision;
    return OTA_OK;
}

/* ---- Flash: ranges ------------------------------------------------------------------------------------------------ */

static ota_status check_range(const ota_flasher *flasher, uint64_t offset, uint64_t len, ota_error *error) {
    ota_status status = check_ready(flasher, error);
    if (status != OTA_OK) {
        return status;
    }
    const ota_flasher_info *info = &flasher->info;
    if (!ota_range_inside(offset, len, info->flash_size)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, offset, 0,
                             "%s: %llu bytes at 0x%llx are not inside its flash of %llu bytes%s", who(flasher),
                             (unsigned long long)len, (unsigned long long)offset, (unsigned long long)info->flash_size,
                             info->flash_size_known ? "" : " (assumed; give the size)");
    }
    if (!info->is_stub && offset + len > ROM_FLASH_LIMIT) {
        return unsupported(flasher, error, offset, "the boot ROM wraps addresses at 16 MiB: a stub is needed beyond");
    }
    return OTA_OK;
}

static uint64_t slowed(const ota_flasher *flasher, uint64_t ms) {
    return ms * flasher->options.slow;
}

static unsigned begin_words(const ota_flasher *flasher, bool encrypt) {
    return flasher->info.is_stub ? (encrypt ? 5 : 4) : flasher->chip->begin_words;
}

static void no_longer_blank(ota_flasher *flasher) {
    flasher->blank_from = flasher->blank_to = 0;
}

/* ---- Flash: MD5, erase, read -------------------------------------------------------------------------------------- */

static int hex_digit(uint8_t c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

static bool parse_hex(const uint8_t *text, uint8_t digest[16]) {
    for (size_t i = 0; i < 16; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            return false;
        }
        digest[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

ota_status ota_flasher_md5(ota_flasher *flasher, uint64_t offset, uint64_t len, uint8_t digest[16], ota_error *error) {
    ota_status status = check_range(flasher, offset, len, error);
    if (status != OTA_OK) {
        return status;
    }
    if (!flasher->info.can_verify) {
        return unsupported(flasher, error, offset, "nothing can be verified in secure download mode");
    }
    ota_rom_flash_md5(&flasher->request, flasher->info.is_stub, (uint32_t)offset, (uint32_t)len);
    status = run_command(flasher, &flasher->request, slowed(flasher, ota_rom_md5_ms(len)), WORK_REPEATS, offset, error);
    if (status != OTA_OK) {
        return status;
    }
    flasher->counts.md5_bytes += len;
    const uint8_t *data = flasher->exchange.reply.data;
    if (flasher->info.is_stub) {
        memcpy(digest, data, 16);
    } else if (!parse_hex(data, digest)) {
        return ota_error_set(error, OTA_ERR_CHIP_PROTOCOL, OTA_STAGE_TARGET, offset, 0,
                             "%s: the MD5 from the boot ROM is not hexadecimal", who(flasher));
    }
    return OTA_OK;
}

ota_status ota_flasher_erase(ota_flasher *flasher, uint64_t offset, uint64_t len, ota_error *error) {
    ota_status status = check_range(flasher, offset, len, error);
    if (status != OTA_OK || len == 0) {
        return status;
    }
    if (offset % OTA_FLASH_SECTOR != 0 || len % OTA_FLASH_SECTOR != 0) {
        return bad_argument(flasher, error, offset, "only whole sectors can be erased");
    }
    flasher->session.is_open = false;
    no_longer_blank(flasher);
    for (uint64_t done = 0; done < len;) {
        uint64_t at = offset + done, piece = ERASE_PIECE - at % ERASE_PIECE;
        piece = piece < len - done ? piece : len - done;
        if (flasher->info.is_stub) {
            ota_rom_erase_region(&flasher->request, (uint32_t)at, (uint32_t)piece);
        } else { /* BEGIN erases, and nothing need follow */
            uint32_t block = flasher->info.block_size;
            ota_rom_flash_begin(&flasher->request, false, (uint32_t)piece, (uint32_t)((piece + block - 1) / block),
                                block, (uint32_t)at, begin_words(flasher, false), false);
        }
        status =
            run_command(flasher, &flasher->request, slowed(flasher, ota_rom_erase_ms(piece)), WORK_REPEATS, at, error);
        if (status != OTA_OK) {
            return status;
        }
        done += piece;
        flasher->counts.erased_bytes += piece;
    }
    flasher->blank_from = offset;
    flasher->blank_to = offset + len;
    return OTA_OK;
}

static int send_frame(ota_flasher *flasher, const uint8_t *bytes, size_t len) {
    uint8_t frame[OTA_SLIP_FRAME_MAX(4)];
    size_t used = ota_slip_delimit(frame);
    used += ota_slip_escape(frame + used, bytes, len);
    used += ota_slip_delimit(frame + used);
    return send_bytes(flasher, frame, used);
}

/* Waits for one raw frame of READ_FLASH. OTA_OK: it is there and has `len` bytes; OTA_DONE: it is not. */
static ota_status read_packet(ota_flasher *flasher, size_t len, ota_error *error) {
    ota_rom_outcome got;
    uint64_t damaged = flasher->exchange.damaged;
    ota_rom_exchange_begin(&flasher->exchange, NULL);
    uint64_t deadline = now(flasher) + slowed(flasher, OTA_ROM_REPLY_MS) + ota_rom_wire_ms(len, flasher->serial->baud);
    do {
        int errnum = receive(flasher, deadline, true, &got);
        if (errnum != 0) {
            return port_failed(flasher, errnum, "READ_FLASH", error);
        }
    } while (got == OTA_ROM_WAITING && !has_restarted(flasher) && flasher->exchange.damaged == damaged &&
             now(flasher) < deadline);
    return got == OTA_ROM_ANSWERED && flasher->exchange.frame_len == len ? OTA_OK : OTA_DONE;
}

/* One READ_FLASH. OTA_DONE: it went wrong on the way and was ended; the stub listens again. */
static ota_status read_transfer(ota_flasher *flasher, uint64_t offset, uint8_t *buf, size_t len, ota_error *error) {
    ota_rom_read_flash(&flasher->request, (uint32_t)offset, (uint32_t)len, OTA_ROM_READ_PACKET);
    outcome what;
    ota_status status = exchange(flasher, &flasher->request, slowed(flasher, OTA_ROM_REPLY_MS), 0, &what, error);
    if (status != OTA_OK) {
        return status;
    }
    if (what.has_restarted || (what.is_answered && (what.is_unsupported || flasher->exchange.reply.status != 0))) {
        return command_failed(flasher, &flasher->request, offset, &what, error);
    }
    bool is_good = what.is_answered;
    for (size_t done = 0; is_good && done < len;) {
        size_t piece = len - done < OTA_ROM_READ_PACKET ? len - done : (size_t)OTA_ROM_READ_PACKET;
        status = read_packet(flasher, piece, error);
        if (status < 0) {
            return status;
        }
        is_good = status == OTA_OK;
        if (is_good) {
            memcpy(buf + done, flasher->exchange.frame, piece);
            done += piece;
            uint8_t ack[4];
            ota_store_u32le(ack, (uint32_t)done);
            int errnum = send_frame(flasher, ack, sizeof ack);
            if (errnum != 0) {
                return port_failed(flasher, errnum, "READ_FLASH", error);
            }
        }
    }
    uint8_t digest[16];
    if (is_good) {
        status = read_packet(flasher, sizeof digest, error);
        if (status < 0) {
            return status;
        }
        is_good = status == OTA_OK && EVP_Digest(buf, len, digest, NULL, EVP_md5(), NULL) == 1 &&
                  memcmp(digest, flasher->exchange.frame, sizeof digest) == 0;
    }
    if (is_good) {
        return OTA_OK;
    }
    ota_rom_exchange_end(&flasher->exchange);
    if (has_restarted(flasher)) {
        what = (outcome){.has_restarted = true};
        return command_failed(flasher, &flasher->request, offset, &what, error);
    }
    int errnum = send_frame(flasher, (const uint8_t[]){0}, 1); /* an ack that is none ends the transfer */
    if (errnum == 0) {
        errnum = drain(flasher, OTA_ROM_DRAIN_MS);
    }
    return errnum == 0 ? OTA_DONE : port_failed(flasher, errnum, "READ_FLASH", error);
}

static ota_status read_with_stub(ota_flasher *flasher, uint64_t offset, uint8_t *buf, size_t len, ota_error *error) {
    for (size_t done = 0; done < len;) {
        size_t piece = len - done < READ_TRANSFER_MAX ? len - done : READ_TRANSFER_MAX;
        ota_status status = OTA_DONE;
        for (unsigned i = 0; i < READ_TRIES && status == OTA_DONE; i++) {
            if (i > 0) {
                flasher->counts.retries++;
                note(flasher, "READ_FLASH at 0x%llx was damaged, read again", (unsigned long long)(offset + done));
            }
            status = read_transfer(flasher, offset + done, buf + done, piece, error);
        }
        if (status == OTA_DONE) {
            flasher->state = OTA_FLASHER_BROKEN;
            return ota_error_set(error, OTA_ERR_CHIP_PROTOCOL, OTA_STAGE_TARGET, offset + done, 0,
                                 "%s: READ_FLASH at 0x%llx from the stub came damaged %u times", who(flasher),
                                 (unsigned long long)(offset + done), READ_TRIES);
        }
        if (status != OTA_OK) {
            return status;
        }
        done += piece;
    }
    return OTA_OK;
}

static ota_status read_with_rom(ota_flasher *flasher, uint64_t offset, uint8_t *buf, size_t len, ota_error *error) {
    for (size_t done = 0; done < len;) {
        size_t piece = len - done < OTA_ROM_READ_SLOW_MAX ? len - done : (size_t)OTA_ROM_READ_SLOW_MAX;
        ota_rom_read_flash_slow(&flasher->request, (uint32_t)(offset + done), (uint32_t)piece);
        ota_status status = run_command(flasher, &flasher->request, OTA_ROM_REPLY_MS, REPEATS, offset + done, error);
        if (status != OTA_OK) {
            return status;
        }
        memcpy(buf + done, flasher->exchange.reply.data, piece);
        done += piece;
    }
    return OTA_OK;
}

ota_status ota_flasher_read(ota_flasher *flasher, uint64_t offset, void *buf, size_t len, ota_error *error) {
    ota_status status = check_range(flasher, offset, len, error);
    if (status != OTA_OK) {
        return status;
    }
    if (!flasher->info.can_verify) {
        return unsupported(flasher, error, offset, "nothing can be read in secure download mode");
    }
    flasher->session.is_open = false;
    status = (flasher->info.is_stub ? read_with_stub : read_with_rom)(flasher, offset, buf, len, error);
    if (status == OTA_OK) {
        flasher->counts.read_bytes += len;
    }
    return status;
}

/* ---- Flash: writing ----------------------------------------------------------------------------------------------- */

static ota_status check_write(const ota_flasher *flasher, const ota_flasher_write *write, ota_error *error) {
    ota_status status = check_range(flasher, write->offset, write->size, error);
    if (status != OTA_OK) {
        return status;
    }
    if (write->size == 0 || write->offset % OTA_FLASH_SECTOR != 0) {
        return bad_argument(flasher, error, write->offset, "a write needs some bytes and starts at a sector");
    }
    if (write->deflated && !flasher->info.can_deflate) {
        return unsupported(flasher, error, write->offset, "only plain data can be written in secure download mode");
    }
    if (write->encrypt && (write->offset % 32 != 0 || write->size % 32 != 0)) {
        return bad_argument(flasher, error, write->offset, "encrypted writes come in multiples of 32 bytes");
    }
    if (write->encrypt && !flasher->info.is_stub && flasher->chip->begin_words < 5) {
        return unsupported(flasher, error, write->offset, "its boot ROM does not encrypt");
    }
    if (flasher->info.flash_encrypted && !write->encrypt && !flasher->options.allow_encrypted) {
        return unsupported(flasher, error, write->offset,
                           "flash encryption is on: plain text would not boot (give ciphertext and say so)");
    }
    return OTA_OK;
}

ota_status ota_flasher_write_begin(ota_flasher *flasher, const ota_flasher_write *write, ota_error *error) {
    flasher->session.is_open = false;
    ota_status status = check_write(flasher, write, error);
    if (status != OTA_OK) {
        return status;
    }
    no_longer_blank(flasher);
    uint64_t ms;
    outcome what;
    for (;;) {
        ota_rom_write_begin(&flasher->session, write, flasher->info.is_stub, begin_words(flasher, write->encrypt),
                            flasher->info.block_size, flasher->options.slow, &flasher->request, &ms);
        flasher->session.is_open = false;
        status = exchange(flasher, &flasher->request, ms, WORK_REPEATS, &what, error);
        if (status != OTA_OK) {
            return status;
        }
        const ota_rom_reply *reply = &flasher->exchange.reply;
        if (what.is_answered && !what.is_unsupported && reply->status == 0) {
            break;
        }
        bool may_be_block_size = what.is_answered && !what.is_unsupported && !flasher->info.is_stub &&
                                 reply->error == ROM_BAD_FORMAT && flasher->info.block_size > OTA_ROM_BLOCK_SMALL;
        if (!may_be_block_size) {
            return command_failed(flasher, &flasher->request, write->offset, &what, error);
        }
        note(flasher, "blocks of %lu bytes refused, smaller ones tried", (unsigned long)flasher->info.block_size);
        flasher->info.block_size = OTA_ROM_BLOCK_SMALL;
    }
    flasher->session.is_open = true;
    flasher->block_len = 0;
    flasher->block_content = 0;
    return OTA_OK;
}

static ota_status send_block(ota_flasher *flasher, const uint8_t *bytes, size_t len, uint64_t inflated_len,
                             ota_error *error) {
    ota_rom_write *session = &flasher->session;
    uint64_t ms;
    ota_status status = ota_rom_write_block(session, bytes, len, inflated_len, &flasher->request, &ms, error);
    if (status == OTA_OK) {
        status = run_command(flasher, &flasher->request, ms, 0, session->offset + session->settled_len, error);
    }
    if (status != OTA_OK) {
        session->is_open = false;
        return status;
    }
    uint64_t settled = session->settled_len;
    ota_rom_write_answered(session);
    flasher->counts.written_bytes += session->settled_len - settled;
    return OTA_OK;
}

static ota_status check_session(const ota_flasher *flasher, ota_error *error) {
    ota_status status = check_ready(flasher, error);
    if (status != OTA_OK) {
        return status;
    }
    return flasher->session.is_open
               ? OTA_OK
               : ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "%s: no write is open", who(flasher));
}

ota_status ota_flasher_write_data(ota_flasher *flasher, const void *bytes, size_t len, uint64_t inflated_len,
                                  ota_error *error) {
    ota_status status = check_session(flasher, error);
    if (status != OTA_OK) {
        return status;
    }
    ota_rom_write *session = &flasher->session;
    uint64_t content = session->deflated ? inflated_len : len;
    if (content > session->size - session->content_len - flasher->block_content) {
        session->is_open = false;
        return ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_TARGET, session->offset + session->content_len, 0,
                             "%s: %llu bytes of content were announced, and more came", who(flasher),
                             (unsigned long long)session->size);
    }
    const uint8_t *in = bytes;
    if (session->deflated) {
        flasher->block_content +=
            inflated_len; /* goes with the first block that holds some of it: time-outs grow with it */
    }
    while (len > 0) {
        size_t size = session->block_size, piece = size - flasher->block_len;
        piece = piece < len ? piece : len;
        bool whole = flasher->block_len == 0 && piece == size;
        if (!whole) {
            memcpy(flasher->block + flasher->block_len, in, piece);
        }
        flasher->block_len += piece;
        if (flasher->block_len == size) {
            uint64_t yields = flasher->block_content;
            flasher->block_len = 0;
            flasher->block_content = 0;
            status = send_block(flasher, whole ? in : flasher->block, size, yields, error);
            if (status != OTA_OK) {
                return status;
            }
        }
        in += piece;
        len -= piece;
    }
    if (!session->deflated) {
        flasher->block_content = flasher->block_len;
    }
    return OTA_OK;
}

ota_status ota_flasher_write_end(ota_flasher *flasher, ota_error *error) {
    ota_status status = check_session(flasher, error);
    if (status != OTA_OK) {
        return status;
    }
    ota_rom_write *session = &flasher->session;
    if (flasher->block_len > 0) {
        status = send_block(flasher, flasher->block, flasher->block_len, flasher->block_content, error);
    } else {
        session->content_len += flasher->block_content; /* told behind the last byte of the stream */
    }
    flasher->block_len = 0;
    flasher->block_content = 0;
    if (status != OTA_OK) {
        return status;
    }
    uint64_t ms;
    status = ota_rom_write_end(session, &flasher->request, &ms, error);
    if (status == OTA_OK) {
        status = run_command(flasher, &flasher->request, ms, 0, session->offset + session->settled_len, error);
    } else if (status == OTA_DONE) {
        status = OTA_OK;
    }
    if (status == OTA_OK) {
        flasher->counts.written_bytes += session->size - session->settled_len;
    }
    session->is_open = false;
    return status;
}

void ota_flasher_write_abort(ota_flasher *flasher) {
    flasher->session.is_open = false;
}

static ota_status write_plain(ota_flasher *flasher, uint64_t offset, const uint8_t *bytes, size_t len,
                              ota_error *error) {
    ota_flasher_write write = {.offset = offset, .size = len};
    ota_status status = ota_flasher_write_begin(flasher, &write, error);
    if (status == OTA_OK) {
        status = ota_flasher_write_data(flasher, bytes, len, len, error);
    }
    return status == OTA_OK ? ota_flasher_write_end(flasher, error) : status;
}

/* Whether a sector is blank; asked by MD5 unless it was erased just now. */
static ota_status sector_is_blank(ota_flasher *flasher, uint64_t offset, bool *is_blank, ota_error *error) {
    static const uint8_t md5_of_blank[16] = {0x6A, 0xE5, 0x9E, 0x64, 0x85, 0x03, 0x77, 0xEE,
                                             0x54, 0x70, 0xC8, 0x54, 0x76, 0x15, 0x51, 0xEA};
    *is_blank = offset >= flasher->blank_from && offset + OTA_FLASH_SECTOR <= flasher->blank_to;
    if (*is_blank) {
        return OTA_OK;
    }
    uint8_t digest[16];
    ota_status status = ota_flasher_md5(flasher, offset, OTA_FLASH_SECTOR, digest, error);
    *is_blank = status == OTA_OK && memcmp(digest, md5_of_blank, sizeof digest) == 0;
    return status;
}

/* The part of a program that lies in one sector. */
static ota_status program_sector(ota_flasher *flasher, uint64_t offset, const uint8_t *bytes, size_t len,
                                 ota_error *error) {
    uint64_t sector = ota_round_down(offset, OTA_FLASH_SECTOR);
    size_t at = (size_t)(offset - sector);
    bool is_blank = false;
    ota_status status = sector_is_blank(flasher, sector, &is_blank, error);
    if (status != OTA_OK) {
        return status;
    }
    uint8_t content[OTA_FLASH_SECTOR];
    size_t size = is_blank ? at + len : sizeof content;
    if (is_blank) {
        memset(content, 0xFF, sizeof content);
    } else {
        status = ota_flasher_read(flasher, sector, content, sizeof content, error);
    }
    for (size_t i = 0; i < len; i++) {
        content[at + i] &= bytes[i];
    }
    return status == OTA_OK ? write_plain(flasher, sector, content, size, error) : status;
}

ota_status ota_flasher_program(ota_flasher *flasher, uint64_t offset, const void *buf, size_t len, ota_error *error) {
    ota_status status = check_range(flasher, offset, len, error);
    if (status != OTA_OK || len == 0) {
        return status;
    }
    const uint8_t *bytes = buf;
    if (!flasher->info.can_verify) {
        if (offset % OTA_FLASH_SECTOR != 0 || len % OTA_FLASH_SECTOR != 0) {
            return unsupported(flasher, error, offset,
                               "only whole sectors can be programmed in secure download mode: the rest cannot be read");
        }
        return write_plain(flasher, offset, bytes, len, error);
    }
    uint64_t blank_from = flasher->blank_from, blank_to = flasher->blank_to;
    for (size_t done = 0; done < len && status == OTA_OK;) {
        uint64_t at = offset + done;
        size_t piece = OTA_FLASH_SECTOR - (size_t)(at % OTA_FLASH_SECTOR);
        piece = piece < len - done ? piece : len - done;
        /* Sectors behind this one stay blank, if they were. */
        flasher->blank_from = blank_from;
        flasher->blank_to = blank_to;
        status = program_sector(flasher, at, bytes + done, piece, error);
        done += piece;
    }
    no_longer_blank(flasher);
    return status;
}

/* ---- Afterwards --------------------------------------------------------------------------------------------------- */

static ota_status run_sequence(ota_flasher *flasher, const char *sequence, bool *vanished, ota_error *error) {
    ota_serial *serial = flasher->serial;
    ota_rom_step step = {.dtr = flasher->dtr, .rts = flasher->rts};
    while (ota_rom_sequence_next(&sequence, &step) == OTA_OK) {
        int errnum =
            step.sets_lines ? set_lines(flasher, step.dtr, step.rts) : serial->ops->wait_ms(serial, step.wait_ms);
        if (errnum == ENODEV) {
            *vanished = true;
            return OTA_OK;
        }
        if (errnum == ENOTTY || errnum == EINVAL) {
            return unsupported(flasher, error, 0, "the line has no DTR and RTS: restart the chip by hand");
        }
        if (errnum != 0) {
            return port_failed(flasher, errnum, "reset", error);
        }
    }
    return OTA_OK;
}

/* Whether only a system reset leaves the boot loader: on USB the straps are not looked at again after a core reset. */
static ota_status needs_watchdog(ota_flasher *flasher, bool *needs, ota_error *error) {
    const ota_flasher_info *info = &flasher->info;
    *needs = false;
    if (flasher->state != OTA_FLASHER_READY || info->secure_download || !flasher->chip->has_watchdog_reset) {
        return OTA_OK;
    }
    if (!flasher->serial->has_lines) {
        *needs = true;
    } else if (info->link == OTA_FLASHER_LINK_USB_JTAG) {
        *needs = !info->was_reset; /* entered with the button: the strap is low as the chip remembers it */
    } else if (info->link == OTA_FLASHER_LINK_USB_OTG && flasher->chip->strap_reg != 0) {
        uint32_t strap = 0, force = 0;
        ota_status status = read_reg(flasher, flasher->chip->strap_reg, &strap, error);
        if (status == OTA_OK) {
            status = read_reg(flasher, flasher->chip->force_boot_reg, &force, error);
        }
        *needs = status == OTA_OK && (strap & STRAP_GPIO0) == 0 && (force & 1) == 0;
        return status;
    }
    return OTA_OK;
}

/* The line's rate for the boot messages; a line that is gone by now is no error. */
static ota_status console_rate(ota_flasher *flasher, bool *vanished, ota_error *error) {
    ota_serial *serial = flasher->serial;
    if (serial->baud == 0 || serial->baud == OTA_SERIAL_BAUD || *vanished) {
        return OTA_OK;
    }
    int errnum = serial->ops->set_baud(serial, OTA_SERIAL_BAUD);
    *vanished = errnum == ENODEV;
    return errnum == 0 || *vanished ? OTA_OK : port_failed(flasher, errnum, "a change of the rate", error);
}

/* Lets the RTC watchdog reset the chip; it may be faster than its answer. */
static ota_status watchdog_reset(ota_flasher *flasher, bool *vanished, ota_error *error) {
    if (flasher->state != OTA_FLASHER_READY || flasher->info.secure_download || !flasher->chip->has_watchdog_reset) {
        return unsupported(flasher, error, 0, "the watchdog cannot reset it");
    }
    ota_rom_reg_write writes[4];
    ota_error own = {0};
    ota_status status = write_regs(flasher, writes, ota_rom_watchdog_reset_writes(flasher->chip, writes), &own);
    if (status == OTA_ERR_CANCELLED || status == OTA_ERR_CHIP_REFUSED) {
        return ota_error_set(error, own.status, own.stage, 0, own.device_code, "%s", own.text);
    }
    *vanished = status == OTA_ERR_SERIAL_LOST;
    status = console_rate(flasher, vanished, error); /* before it speaks, not after the wait */
    if (status != OTA_OK || *vanished) {
        return status;
    }
    int errnum = flasher->serial->ops->wait_ms(flasher->serial, WATCHDOG_RESET_MS);
    *vanished = errnum == ENODEV;
    return errnum == 0 || *vanished ? OTA_OK : port_failed(flasher, errnum, "reset", error);
}

ota_status ota_flasher_reset(ota_flasher *flasher, ota_flasher_after how, ota_error *error) {
    if (flasher->state == OTA_FLASHER_GONE || flasher->state == OTA_FLASHER_STOPPED) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "%s: the line is gone or cancelled",
                             who(flasher));
    }
    ota_status status = OTA_OK;
    how = how == OTA_FLASHER_AFTER_AUTO ? flasher->options.after : how;
    if (how == OTA_FLASHER_AFTER_AUTO) {
        bool needs;
        status = needs_watchdog(flasher, &needs, error);
        how = needs ? OTA_FLASHER_WATCHDOG_RESET : OTA_FLASHER_HARD_RESET;
    }
    if (status != OTA_OK || how == OTA_FLASHER_STAY) {
        return status;
    }
    flasher->session.is_open = false;
    no_longer_blank(flasher);
    bool vanished = false;
    if (how == OTA_FLASHER_WATCHDOG_RESET) {
        status = watchdog_reset(flasher, &vanished, error);
    } else {
        if (flasher->state == OTA_FLASHER_READY && flasher->chip->force_boot_reg != 0 &&
            !flasher->info.secure_download) {
            ota_rom_reg_write write = {.address = flasher->chip->force_boot_reg, .mask = 1};
            status = write_regs(flasher, &write, 1, error);
        }
        if (status == OTA_OK) {
            status = console_rate(flasher, &vanished, error);
        }
        ota_flasher_link link = ota_rom_link(&flasher->options);
        const char *sequence = how == OTA_FLASHER_AFTER_CUSTOM ? flasher->options.after_sequence
                                                               : ota_rom_run_sequence(&flasher->options, link);
        if (status == OTA_OK && sequence == NULL) {
            status = bad_argument(flasher, error, 0, "no sequence to restart it was given");
        }
        if (status == OTA_OK && !vanished) {
            status = run_sequence(flasher, sequence, &vanished, error);
        }
    }
    if (status == OTA_OK) {
        flasher->counts.resets++;
        flasher->state = vanished ? OTA_FLASHER_GONE : OTA_FLASHER_OFF;
        note(flasher, "restarted");
    }
    return status;
}

ota_status ota_flasher_read_console(ota_flasher *flasher, void *buf, size_t len, uint32_t timeout_ms, size_t *got,
                                    ota_error *error) {
    *got = 0;
    if (flasher->state != OTA_FLASHER_OFF && flasher->state != OTA_FLASHER_BROKEN) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "%s: its console cannot be read now",
                             who(flasher));
    }
    if (flasher->rx_pos == flasher->rx_len) {
        int errnum = fill(flasher, now(flasher) + timeout_ms);
        if (errnum != 0) {
            return port_failed(flasher, errnum, "reading the console", error);
        }
    }
    size_t have = flasher->rx_len - flasher->rx_pos;
    *got = have < len ? have : len;
    memcpy(buf, flasher->rx + flasher->rx_pos, *got);
    flasher->rx_pos += *got;
    return OTA_OK;
}
