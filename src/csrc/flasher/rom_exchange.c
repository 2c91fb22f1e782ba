/* One command and its answer; boot messages. See rom_exchange.h. */
#include "flasher/rom_exchange.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

/* ---- Boot messages ----------------------------------------------------------------------------------------------- */

void ota_rom_log_init(ota_rom_log *log) {
    memset(log, 0, sizeof *log);
}

static bool names_download(const char *mode) {
    return strstr(mode, "DOWNLOAD") != NULL || strstr(mode, "UART") != NULL;
}

/* "ESP-ROM:esp32c3-api1-20210207" names the chip; the ESP32's ROM opens with "ets " and a date. */
static const ota_chip *named_chip(const char *line) {
    const char *at = strstr(line, "ESP-ROM:");
    if (at == NULL) {
        bool is_old = strncmp(line, "ets J", 5) == 0; /* "ets Jun  8 2016 00:22:57", "ets Jul 29 2019 12:21:46" */
        return is_old ? ota_chip_by_id(OTA_CHIP_ESP32) : NULL;
    }
    char name[16] = "";
    at += strlen("ESP-ROM:");
    for (size_t i = 0; i + 1 < sizeof name && isalnum((unsigned char)at[i]); i++) {
        name[i] = at[i];
    }
    return ota_chip_by_name(name);
}

/* What the line so far says; called again when it has grown. */
static void look_at_line(ota_rom_log *log) {
    const char *line = log->line;
    const char *mode = strstr(line, "boot:0x");
    if (mode != NULL) {
        log->has_boot_mode = true;
        log->is_download = names_download(mode);
        memcpy(log->boot, line, sizeof log->boot);
    }
    if (strstr(line, "rst:0x") != NULL && !log->is_counted) {
        log->is_counted = true;
        log->boots++;
        log->waits_for_download = false;
    }
    if (strstr(line, "waiting for download") != NULL ||
        (strstr(line, "wait ") != NULL && strstr(line, " download") != NULL)) {
        log->waits_for_download = true;
    }
    if (strstr(line, "Guru Meditation Error") != NULL || strstr(line, "Fatal exception") != NULL) {
        if (!log->has_crashed || strncmp(line, log->crash, strlen(log->crash)) == 0) {
            memcpy(log->crash, line, sizeof log->crash);
        }
        log->has_crashed = true;
    }
}

static void end_line(ota_rom_log *log) {
    look_at_line(log);
    const ota_chip *chip = named_chip(log->line);
    log->chip = chip != NULL ? chip : log->chip;
    log->len = 0;
    log->line[0] = '\0';
    log->is_counted = false;
}

void ota_rom_log_feed(ota_rom_log *log, const void *bytes, size_t len) {
    const uint8_t *in = bytes;
    bool grown = false;
    for (size_t i = 0; i < len; i++) {
        if (in[i] == '\n' || in[i] == '\r') {
            end_line(log);
            grown = false;
        } else if (in[i] >= ' ' && in[i] < 0x7F) {
            if (log->len + 1 == sizeof log->line) {
                end_line(log);
            }
            log->line[log->len++] = (char)in[i];
            log->line[log->len] = '\0';
            grown = true;
        }
    }
    if (grown) {
        look_at_line(log);
    }
}

/* ---- One command ------------------------------------------------------------------------------------------------- */

void ota_rom_exchange_init(ota_rom_exchange *exchange, ota_rom_log *log) {
    memset(exchange, 0, sizeof *exchange);
    ota_slip_init(&exchange->decoder, exchange->buf, sizeof exchange->buf);
    exchange->log = log;
}

void ota_rom_exchange_begin(ota_rom_exchange *exchange, const ota_rom_request *request) {
    exchange->request = request;
    exchange->outcome = OTA_ROM_WAITING;
    exchange->greeted = false;
}

static void no_frame(ota_rom_exchange *exchange, const uint8_t *bytes, size_t len) {
    exchange->damaged++;
    if (exchange->log != NULL) {
        ota_rom_log_feed(exchange->log, bytes, len);
    }
}

void ota_rom_exchange_end(ota_rom_exchange *exchange) {
    if (exchange->decoder.len > 0 && !exchange->decoder.is_out) {
        no_frame(exchange, exchange->decoder.buf, exchange->decoder.len);
    }
    ota_slip_reset(&exchange->decoder);
    exchange->outcome = OTA_ROM_IDLE;
}

bool ota_rom_is_greeting(const uint8_t *frame, size_t len) {
    return len == 4 && memcmp(frame, "OHAI", 4) == 0;
}

/* A whole frame, or a piece that is none. */
static void look_at_frame(ota_rom_exchange *exchange) {
    const uint8_t *frame = exchange->decoder.buf;
    size_t len = exchange->decoder.len;
    if (exchange->decoder.kind != OTA_SLIP_FRAME) {
        no_frame(exchange, frame, len);
        return;
    }
    bool waits = exchange->outcome == OTA_ROM_WAITING;
    if (ota_rom_is_greeting(frame, len)) {
        exchange->greeted = true;
    }
    if (waits && exchange->request == NULL) {
        exchange->frames++;
        exchange->frame = frame;
        exchange->frame_len = len;
        exchange->outcome = OTA_ROM_ANSWERED;
        return;
    }
    static const ota_rom_request nothing = {0}; /* no reply is one to this */
    ota_rom_reply reply;
    switch (ota_rom_reply_decode(waits ? exchange->request : &nothing, frame, len, &reply)) {
    case OTA_ROM_NO_REPLY:
        no_frame(exchange, frame, len);
        break;
    case OTA_ROM_FOREIGN:
        exchange->frames++;
        exchange->foreign++;
        break;
    case OTA_ROM_UNSUPPORTED:
        exchange->frames++;
        exchange->foreign++;
        exchange->outcome = waits ? OTA_ROM_NOT_SUPPORTED : exchange->outcome;
        break;
    case OTA_ROM_REPLY:
        exchange->frames++;
        if (waits) {
            exchange->reply = reply;
            exchange->outcome = OTA_ROM_ANSWERED;
        }
        break;
    }
}

ota_rom_outcome ota_rom_exchange_feed(ota_rom_exchange *exchange, const void *bytes, size_t len, size_t *used) {
    const uint8_t *in = bytes;
    bool waits = exchange->outcome == OTA_ROM_WAITING;
    if (!waits) {
        exchange->outcome = OTA_ROM_IDLE;
    }
    size_t taken = 0;
    while (taken < len && !(waits && exchange->outcome != OTA_ROM_WAITING)) {
        size_t step;
        ota_status status = ota_slip_step(&exchange->decoder, in + taken, len - taken, &step);
        taken += step;
        if (status == OTA_DONE) {
            look_at_frame(exchange);
        }
    }
    *used = taken;
    return exchange->outcome;
}
