/* Connecting; see rom_loader.h. `ask` says what to do in a state, `hear` where the outcome leads:
 *
 *     REUSE_*      SYNC at the rate of an earlier stub; it lives -> SYNCED, else ENTER
 *     ENTER        rate 115200, then the steps of a reset sequence, then SYNC up to five times; else ENTER once more
 *     SYNCED       drain the other SYNC replies
 *     SECURITY     GET_SECURITY_INFO, which names most chips; not known -> MAGIC
 *     MAGIC        READ_REG of the address that tells the others apart
 *     WATCHDOG     USB-Serial-JTAG only: WRITE_REGS
 *     CAL, DIV     what the ROM takes the crystal for, where its divider depends on it
 *     RATE_*       try our side, CHANGE_BAUDRATE, change our side, READ_REG at the new rate; fails -> a lower rate by way of ENTER
 *     MAC_*, CRYPT, PADS   eFuses
 *     MEM_*        the stub's segments, its start, its greeting; fails -> without a stub, by way of ENTER when the chip is silent
 *     ATTACH       ROM only
 *     USR*, RDID, ID       the flash chip's id through the SPI controller
 *     PARAMS       the size, which ROMs take for 2 MiB otherwise
 *     READY, FAILED */
#include "flasher/rom_loader.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "flasher/rom_write.h"

enum {
    START,
    REUSE_BAUD,
    REUSE_FLUSH,
    REUSE_SYNC,
    ENTER,
    SEQUENCE,
    FLUSH,
    SYNC,
    SYNC_PAUSE,
    SYNCED,
    SECURITY,
    SECURITY_DRAIN,
    MAGIC,
    WATCHDOG,
    REGS,
    CAL,
    DIV,
    RATE,
    RATE_TRY,
    RATE_BACK,
    RATE_CHANGE,
    RATE_SWITCH,
    RATE_PAUSE,
    RATE_FLUSH,
    RATE_VERIFY,
    MAC_LO,
    MAC_HI,
    CRYPT,
    PADS,
    PADS_HD,
    STUB,
    MEM_BEGIN,
    MEM_DATA,
    MEM_END,
    DETOUR_POINTER,
    DETOUR_CALL,
    DETOUR_BACK,
    GREETING,
    ATTACH,
    USR,
    USR2,
    RDID,
    ID,
    PARAMS,
    READY,
    FAILED,
};

#define ATTEMPTS 7
#define SYNCS_PER_ATTEMPT 5
#define SYNC_PAUSE_MS 50
#define SYNC_QUIET_MS 50 /* after the last of the replies to several SYNCs */
#define RATE_PAUSE_MS 50
#define REPEATS 2
#define MEM_TRIES 3
#define ID_TRIES 3
#define GREETING_FRAMES 8 /* late replies that may come before the greeting */

#define ESP32_CALIBRATION 0x3FF5F06Cu     /* REG: cycles of the 8 MHz oscillator, bits 31:7 */
#define ESP32_EFUSE_0 0x3FF5A000u         /* flash_crypt_cnt: bits 26:20 */
#define ESP32_EFUSE_3 0x3FF5A00Cu         /* hd pad: bits 8:4 */
#define ESP32_EFUSE_4 0x3FF5A010u         /* frequency of the 8 MHz oscillator, bits 7:0 */
#define ESP32_EFUSE_5 0x3FF5A014u         /* pads clk, q, d, cs: 5 bits each from bit 0 */
#define C5_CRYSTAL 0x60096110u            /* what the ROM takes the crystal for, MHz: bits 30:24 */
#define C2_ROM_CRYSTAL 40u                /* MHz, whatever is fitted */
#define S3_FLASH_READ_POINTER 0x3FCEF688u /* the ROM calls its flash read function through it */

#define SPI_USR_COMMAND (1u << 31)
#define SPI_USR_MISO (1u << 28)
#define SPI_CMD_USR (1u << 18)
#define JEDEC_ID 0x9Fu

#define USB_ESPRESSIF 0x303Au
#define USB_JTAG_PID 0x1001u
#define USB_SILABS 0x10C4u
#define USB_CP210X 0xEA64u /* CP2102C, which ties CTS to RTS */

static const uint32_t rates[] = {3000000, 2000000, 1500000, 1152000, 921600, 460800, 230400, 115200};

/* ---- Reset sequences --------------------------------------------------------------------------------------------- */

ota_status ota_rom_sequence_next(const char **text, ota_rom_step *step) {
    const char *at = *text;
    if (*at == '\0') {
        return OTA_DONE;
    }
    char kind = *at++;
    step->sets_lines = kind != 'W';
    step->wait_ms = 0;
    if (kind == 'D' || kind == 'R') {
        if (*at != '0' && *at != '1') {
            return OTA_ERR_ARGUMENT;
        }
        *(kind == 'D' ? &step->dtr : &step->rts) = *at++ == '1';
    } else if (kind == 'U') {
        if ((at[0] != '0' && at[0] != '1') || at[1] != ',' || (at[2] != '0' && at[2] != '1')) {
            return OTA_ERR_ARGUMENT;
        }
        step->dtr = at[0] == '1';
        step->rts = at[2] == '1';
        at += 3;
    } else if (kind == 'W') {
        uint32_t ms = 0, unit = 1000;
        bool has_digit = false;
        for (bool is_fraction = false; isdigit((unsigned char)*at) || (*at == '.' && !is_fraction); at++) {
            if (*at == '.') {
                is_fraction = true;
                continue;
            }
            has_digit = true;
            uint32_t digit = (uint32_t)(*at - '0');
            if (is_fraction) {
                unit /= 10;
                ms += digit * unit;
            } else if (ms <= 10000) {
                ms = ms * 10 + digit * 1000;
            }
        }
        if (!has_digit || ms > 10000) {
            return OTA_ERR_ARGUMENT;
        }
        step->wait_ms = ms;
    } else {
        return OTA_ERR_ARGUMENT;
    }
    if (*at == '|') {
        at++;
    } else if (*at != '\0') {
        return OTA_ERR_ARGUMENT;
    }
    *text = at;
    return OTA_OK;
}

ota_status ota_rom_sequence_check(const char *text) {
    ota_rom_step step = {0};
    ota_status status = *text == '\0' ? OTA_ERR_ARGUMENT : OTA_OK;
    while (status == OTA_OK) {
        status = ota_rom_sequence_next(&text, &step);
    }
    return status == OTA_DONE ? OTA_OK : status;
}

ota_flasher_link ota_rom_link(const ota_flasher_options *options) {
    if (options->link != OTA_FLASHER_LINK_AUTO) {
        return options->link;
    }
    const ota_serial *serial = options->serial;
    if (serial->usb_vid == USB_ESPRESSIF) {
        if (serial->usb_pid == USB_JTAG_PID) {
            return OTA_FLASHER_LINK_USB_JTAG;
        }
        size_t count;
        const ota_chip *chips = ota_chips(&count);
        for (size_t i = 0; i < count; i++) {
            if (chips[i].usb_pid != 0 && chips[i].usb_pid == serial->usb_pid) {
                return OTA_FLASHER_LINK_USB_OTG;
            }
        }
    }
    return OTA_FLASHER_LINK_UART;
}

static bool ties_cts_to_rts(const ota_serial *serial) {
    return serial->usb_vid == USB_SILABS && serial->usb_pid == USB_CP210X;
}

const char *ota_rom_enter_sequence(const ota_flasher_options *options, ota_flasher_link link, unsigned attempt) {
    /* Both lines at once first, then one after the other; each with a short and a long wait, for boards whose reset line has
     * a large capacitor. */
    static const char *const uart[] = {
        "U0,0|U1,1|U0,1|W0.1|U1,0|W0.05|U0,0|D0",
        "U0,0|U1,1|U0,1|W0.1|U1,0|W0.55|U0,0|D0",
        "D0|R1|W0.1|D1|R0|W0.05|D0",
        "D0|R1|W0.1|D1|R0|W0.55|D0",
    };
    static const char *const uart_tied[] = {
        "U0,0|U1,1|U0,1|W0.1|U1,0|W0.05",
        "U0,0|U1,1|U0,1|W0.1|U1,0|W0.55",
        "D0|R1|W0.1|D1|R0|W0.05",
        "D0|R1|W0.1|D1|R0|W0.55",
    };
    /* By way of (1,1) and never (0,0), which would let the core run. */
    static const char usb[] = "R0|D0|W0.1|D1|R0|W0.1|R1|D0|R1|W0.1|D0|R0";
    if (!options->serial->has_lines) {
        return NULL;
    }
    switch (options->before) {
    case OTA_FLASHER_NO_RESET:
    case OTA_FLASHER_NO_RESET_NO_SYNC:
        return NULL;
    case OTA_FLASHER_CUSTOM_RESET:
        return options->before_sequence;
    case OTA_FLASHER_USB_RESET:
        return usb;
    case OTA_FLASHER_CLASSIC_RESET:
        return (ties_cts_to_rts(options->serial) ? uart_tied : uart)[2 + attempt % 2];
    case OTA_FLASHER_DEFAULT_RESET:
        break;
    }
    if (link == OTA_FLASHER_LINK_USB_JTAG) {
        return usb;
    }
    return (ties_cts_to_rts(options->serial) ? uart_tied : uart)[attempt % 4];
}

const char *ota_rom_run_sequence(const ota_flasher_options *options, ota_flasher_link link) {
    if (link != OTA_FLASHER_LINK_UART) {
        return "U0,1|W0.2|U0,0|W0.2";
    }
    return ties_cts_to_rts(options->serial) ? "U0,1|W0.1|U1,1|W0.1|U1,0" : "U0,1|W0.1|U0,0";
}

/* ---- Registers --------------------------------------------------------------------------------------------------- */

static ota_rom_reg_write set_reg(uint32_t address, uint32_t value) {
    return (ota_rom_reg_write){.address = address, .value = value, .mask = UINT32_MAX};
}

size_t ota_rom_flash_id_writes(const ota_chip *chip, uint32_t usr, uint32_t usr2, ota_rom_reg_write *writes) {
    size_t n = 0;
    uint32_t base = chip->spi_base;
    writes[n++] = set_reg(base + chip->spi_miso_dlen, 24 - 1);
    writes[n++] = set_reg(base + chip->spi_usr, SPI_USR_COMMAND | SPI_USR_MISO);
    writes[n++] = set_reg(base + chip->spi_usr2, 7u << 28 | JEDEC_ID);
    writes[n++] = set_reg(base + chip->spi_w0, 0);
    writes[n++] = set_reg(base, SPI_CMD_USR);
    writes[n] = set_reg(base + chip->spi_usr, usr);
    writes[n++].delay_us = 200; /* 32 clocks; the slowest SPI clock is some MHz */
    writes[n++] = set_reg(base + chip->spi_usr2, usr2);
    return n;
}

size_t ota_rom_watchdog_off_writes(const ota_chip *chip, ota_rom_reg_write *writes) {
    size_t n = 0;
    writes[n++] = set_reg(chip->wdt_protect, OTA_CHIP_WDT_KEY);
    writes[n++] = set_reg(chip->wdt_config0, 0);
    writes[n++] = set_reg(chip->wdt_protect, 0);
    if (chip->swd_config != 0) {
        writes[n++] = set_reg(chip->swd_protect, chip->swd_key);
        writes[n++] = (ota_rom_reg_write){.address = chip->swd_config, .value = chip->swd_auto, .mask = chip->swd_auto};
        writes[n++] = set_reg(chip->swd_protect, 0);
    }
    return n;
}

size_t ota_rom_watchdog_reset_writes(const ota_chip *chip, ota_rom_reg_write *writes) {
    writes[0] = set_reg(chip->wdt_protect, OTA_CHIP_WDT_KEY);
    writes[1] = set_reg(chip->wdt_config1, 2000);        /* cycles of the slow clock */
    writes[2] = set_reg(chip->wdt_config0, 0xD0000102u); /* enabled, stage 0 resets the system */
    writes[3] = set_reg(chip->wdt_protect, 0);
    return 4;
}

uint32_t ota_rom_baud_request(uint32_t baud, uint64_t sees, uint64_t is) {
    uint64_t request = sees == 0 || is == 0 ? baud : baud * sees / is;
    return request == 0 || request > UINT32_MAX ? baud : (uint32_t)request;
}

/* ---- Helpers ----------------------------------------------------------------------------------------------------- */

static bool is_secure(const ota_rom_loader *loader) {
    return loader->info.secure_download;
}

static const char *title(const ota_rom_loader *loader) {
    return loader->chip != NULL ? loader->chip->title : "chip";
}

static void fail(ota_rom_loader *loader, ota_status status, int64_t device_code, const char *text) {
    ota_error_set(&loader->error, status, OTA_STAGE_TARGET, 0, device_code, "%s: %s", title(loader), text);
    loader->state = FAILED;
}

/* The last request got no answer, or a bad one. */
static void fail_command(ota_rom_loader *loader, const ota_rom_result *result) {
    char text[200];
    const char *name = ota_rom_op_name(loader->request.op);
    const char *persona = loader->info.is_stub ? "stub" : "boot ROM";
    if (!result->is_answered) {
        if (loader->log->has_crashed) {
            snprintf(text, sizeof text, "no answer to %s; the chip crashed: %s", name, loader->log->crash);
            fail(loader, OTA_ERR_CHIP_RESTARTED, 0, text);
        } else {
            snprintf(text, sizeof text, "no answer to %s from the %s", name, persona);
            fail(loader, OTA_ERR_CHIP_SILENT, 0, text);
        }
    } else if (result->is_unsupported) {
        snprintf(text, sizeof text, "the %s does not know %s", persona, name);
        fail(loader, OTA_ERR_CHIP_REFUSED, 0x0105, text);
    } else {
        uint8_t status = result->reply->status, error = result->reply->error;
        snprintf(text, sizeof text, "%s refused by the %s: status %02X %02X, %s", name, persona, status, error,
                 ota_rom_error_text(loader->info.is_stub, status, error));
        fail(loader, OTA_ERR_CHIP_REFUSED, status << 8 | error, text);
    }
}

static bool is_ok(const ota_rom_result *result) {
    return result->is_answered && !result->is_unsupported && result->reply != NULL && result->reply->status == 0;
}

/* A good answer; otherwise the machine has failed. */
static bool is_good(ota_rom_loader *loader, const ota_rom_result *result) {
    if (is_ok(result)) {
        return true;
    }
    fail_command(loader, result);
    return false;
}

static void command(ota_rom_loader *loader, ota_rom_action *action, uint64_t ms) {
    action->kind = OTA_ROM_ACT_COMMAND;
    action->ms = ms;
    action->repeats = loader->request.repeatable ? REPEATS : 0;
    action->request = &loader->request;
}

static void read_reg(ota_rom_loader *loader, ota_rom_action *action, uint32_t address) {
    ota_rom_read_reg(&loader->request, address);
    command(loader, action, OTA_ROM_REPLY_MS);
}

static void wait_for(ota_rom_action *action, ota_rom_action_kind kind, uint64_t ms) {
    action->kind = kind;
    action->ms = ms;
}

static void set_rate(ota_rom_action *action, uint32_t baud) {
    action->kind = OTA_ROM_ACT_BAUD;
    action->baud = baud;
}

/* Sends loader->regs, in one command where the chip takes that, and goes on with `next`. */
static void write_regs(ota_rom_loader *loader, int next) {
    loader->reg_sent = 0;
    loader->after_regs = next;
    loader->state = REGS;
}

/* Where a rate that did not work leads: to `next`, with the next lower one. */
static void step_down(ota_rom_loader *loader, int next) {
    uint32_t lower = 0;
    for (size_t i = 0; i < sizeof rates / sizeof rates[0] && lower == 0; i++) {
        lower = rates[i] < loader->baud ? rates[i] : 0;
    }
    loader->step_downs++;
    if (lower == 0 || lower < loader->options->baud_min) {
        char text[80];
        snprintf(text, sizeof text, "%lu baud do not work, and no lower rate is allowed", (unsigned long)loader->baud);
        fail(loader, OTA_ERR_CHIP_SILENT, 0, text);
        return;
    }
    loader->baud_limit = lower;
    loader->attempt = 0;
    loader->state = next;
}

/* What was believed belongs to another device. */
static void forget_facts(ota_rom_loader *loader) {
    memset(&loader->info.facts, 0, sizeof loader->info.facts);
    loader->info.revision = OTA_FLASHER_UNKNOWN;
}

/* What the silence means, from the boot messages. */
static void fail_connect(ota_rom_loader *loader) {
    const ota_rom_log *log = loader->log;
    char text[256];
    if (log->has_crashed) {
        snprintf(text, sizeof text, "no answer to SYNC; the chip crashed: %s", log->crash);
        fail(loader, OTA_ERR_CHIP_RESTARTED, 0, text);
    } else if (log->has_boot_mode && !log->is_download) {
        snprintf(text, sizeof text, "it boots its flash instead of the boot loader (is the strap pin low?): %s",
                 log->boot);
        fail(loader, OTA_ERR_CHIP_BOOT_MODE, 0, text);
    } else if (log->waits_for_download) {
        fail(loader, OTA_ERR_CHIP_SILENT, 0,
             "it waits for download but does not hear us: is the line towards the chip connected?");
    } else {
        snprintf(text, sizeof text, "no answer to SYNC on %s in %u attempts%s",
                 loader->options->serial->name != NULL ? loader->options->serial->name : "the line", loader->attempt,
                 loader->info.was_reset ? "" : "; nothing reset it: hold its boot button while it starts");
        fail(loader, OTA_ERR_CHIP_SILENT, 0, text);
    }
}

static bool rate_is_of_use(const ota_rom_loader *loader) {
    if (loader->info.link != OTA_FLASHER_LINK_UART || loader->line_baud == 0) {
        return false;
    }
    bool needs_regs = loader->chip->id == OTA_CHIP_ESP32C2 || loader->chip->id == OTA_CHIP_ESP32C5;
    return loader->baud != loader->line_baud && !(needs_regs && is_secure(loader));
}

static void choose_rate(ota_rom_loader *loader) {
    uint32_t baud = loader->options->baud != 0 ? loader->options->baud : (uint32_t)OTA_SERIAL_BAUD;
    const ota_flasher_facts *facts = &loader->info.facts;
    if (facts->is_known && facts->baud >= OTA_SERIAL_BAUD && facts->baud < baud) {
        baud = facts->baud;
    }
    loader->baud = baud < loader->baud_limit ? baud : loader->baud_limit;
}

static void set_chip(ota_rom_loader *loader, const ota_chip *chip) {
    loader->chip = chip;
    loader->info.chip_id = chip->id;
    loader->info.chip = chip->name;
    loader->info.title = chip->title;
    const ota_flasher_facts *facts = &loader->info.facts;
    if (facts->is_known && facts->chip_id != chip->id) {
        forget_facts(loader);
    } else if (facts->is_known) {
        loader->info.revision = facts->revision;
    }
}

/* The chip that is meant, or that the boot messages name; NULL: not known. */
static const ota_chip *expected_chip(const ota_rom_loader *loader) {
    const char *name = loader->options->chip;
    if (name != NULL && strcmp(name, "auto") != 0) {
        return ota_chip_by_name(name);
    }
    if (loader->log->chip != NULL) {
        return loader->log->chip;
    }
    return loader->info.facts.is_known ? ota_chip_by_id(loader->info.facts.chip_id) : NULL;
}

static void detected(ota_rom_loader *loader, const ota_chip *chip) {
    const char *name = loader->options->chip;
    set_chip(loader, chip);
    if (name != NULL && strcmp(name, "auto") != 0 && ota_chip_by_name(name) != chip) {
        char text[128];
        snprintf(text, sizeof text, "this chip was found, not the %s that was named", name);
        fail(loader, OTA_ERR_CHIP_OTHER, 0, text);
        return;
    }
    /* Boot messages that named an ESP32 may have been those of an earlier chip. */
    loader->state = chip->has_security_info && !loader->asked_security ? SECURITY : WATCHDOG;
}

/* What a stub changes and what secure download mode forbids. */
static void set_abilities(ota_rom_loader *loader) {
    ota_flasher_info *info = &loader->info;
    bool otg = info->link == OTA_FLASHER_LINK_USB_OTG;
    info->block_size = otg ? OTA_ROM_OTG_BLOCK : info->is_stub ? OTA_ROM_STUB_BLOCK : OTA_ROM_BLOCK_MAX;
    info->can_deflate = !info->secure_download;
    info->can_verify = !info->secure_download;
    info->baud = loader->line_baud;
}

static void store_mac(ota_rom_loader *loader, uint32_t hi) {
    ota_chip_mac(loader->mac_lo, hi, loader->info.mac);
    loader->info.has_mac = true;
    const ota_chip *chip = loader->chip;
    if (chip->revision[0].reg == chip->mac_lo + 4) { /* C2: told by the way */
        uint32_t values[OTA_CHIP_FIELDS_MAX] = {hi, hi, hi, hi};
        loader->info.revision = ota_chip_revision(chip, values);
    }
}

/* The low word tells most devices apart. */
static void compare_mac(ota_rom_loader *loader) {
    const ota_flasher_facts *facts = &loader->info.facts;
    uint8_t mac[6];
    ota_chip_mac(loader->mac_lo, 0, mac);
    if (facts->is_known && memcmp(mac + 2, facts->mac + 2, 4) != 0) {
        forget_facts(loader);
    }
}

static const char *stub_name(const ota_rom_loader *loader) {
    if (loader->chip->id == OTA_CHIP_ESP32P4 && loader->info.eco_version < 5) {
        return "esp32p4-rev1";
    }
    return loader->chip->name;
}

static const ota_flasher_stub *choose_stub(const ota_rom_loader *loader) {
    const ota_flasher_info *info = &loader->info;
    bool refused = is_secure(loader) || (loader->chip->id == OTA_CHIP_ESP32C3 && info->secure_boot) ||
                   (loader->chip->id == OTA_CHIP_ESP32C2 && info->revision < 100);
    for (size_t i = 0; !refused && i < loader->options->stub_count; i++) {
        if (strcmp(loader->options->stubs[i].name, stub_name(loader)) == 0) {
            return &loader->options->stubs[i];
        }
    }
    return NULL;
}

static const uint8_t *segment_bytes(const ota_rom_loader *loader, size_t *len, uint32_t *address) {
    const ota_flasher_stub *stub = loader->stub;
    bool text = loader->segment == 0;
    *len = text ? stub->text_len : stub->data_len;
    *address = text ? stub->text_start : stub->data_start;
    return text ? stub->text : stub->data;
}

static uint32_t mem_block(const ota_rom_loader *loader) {
    return loader->info.link == OTA_FLASHER_LINK_USB_OTG ? OTA_ROM_OTG_BLOCK : OTA_ROM_BLOCK_MAX;
}

/* A piece of the upload went wrong: the segment once more, in the end without a stub. */
static void again_or_without(ota_rom_loader *loader, const ota_rom_result *result) {
    loader->state = MEM_BEGIN;
    if (++loader->tries < MEM_TRIES) {
        return;
    }
    loader->info.stub_failed = loader->stub_failed = true;
    if (result->is_answered) {
        loader->state = ATTACH; /* the ROM refused it and listens on */
    } else {
        loader->attempt = 0;
        loader->state = ENTER;
    }
}

static void stub_runs(ota_rom_loader *loader) {
    loader->info.is_stub = true;
    loader->info.stub_name = loader->stub->name;
    loader->stub_uploads++;
    loader->state = loader->detours ? DETOUR_BACK : USR;
}

/* ---- What to do --------------------------------------------------------------------------------------------------- */

static uint32_t entry_rate(const ota_rom_loader *loader) {
    /* Without a reset nobody knows at which rate a stub was left: try those that are likely in turn. */
    const ota_flasher_options *options = loader->options;
    bool resets = ota_rom_enter_sequence(options, loader->info.link, loader->attempt) != NULL && !loader->lines_useless;
    uint32_t likely[] = {OTA_SERIAL_BAUD, options->reuse_baud, options->facts.is_known ? options->facts.baud : 0,
                         options->baud};
    uint32_t rate = resets ? (uint32_t)OTA_SERIAL_BAUD : likely[loader->attempt % 4];
    return rate == 0 ? (uint32_t)OTA_SERIAL_BAUD : rate;
}

static bool step_of_sequence(ota_rom_loader *loader, ota_rom_action *action) {
    ota_rom_step step = {.dtr = loader->dtr, .rts = loader->rts};
    if (loader->sequence == NULL || loader->lines_useless ||
        ota_rom_sequence_next(&loader->sequence, &step) != OTA_OK) {
        return false;
    }
    if (step.sets_lines) {
        action->kind = OTA_ROM_ACT_LINES;
        loader->dtr = action->dtr = step.dtr;
        loader->rts = action->rts = step.rts;
    } else {
        wait_for(action, OTA_ROM_ACT_PAUSE, step.wait_ms);
    }
    return true;
}

/* Fills the action of the state; false: nothing to do there, look again. */
static bool ask(ota_rom_loader *loader, ota_rom_action *action) {
    const ota_flasher_options *options = loader->options;
    ota_flasher_info *info = &loader->info;
    switch (loader->state) {
    case START:
        loader->state = options->before == OTA_FLASHER_NO_RESET_NO_SYNC ? SECURITY
                        : options->reuse_baud != 0                      ? REUSE_BAUD
                                                                        : ENTER;
        return false;
    case REUSE_BAUD:
        if (loader->line_baud == 0 || loader->line_baud == options->reuse_baud) {
            loader->state = REUSE_FLUSH;
            return false;
        }
        set_rate(action, options->reuse_baud);
        return true;
    case REUSE_FLUSH:
        wait_for(action, OTA_ROM_ACT_FLUSH, 0);
        return true;
    case REUSE_SYNC:
        ota_rom_sync(&loader->request);
        command(loader, action, OTA_ROM_SYNC_MS);
        return true;
    case ENTER:
        info->is_stub = false;
        if (loader->line_baud != 0 && loader->line_baud != entry_rate(loader)) {
            set_rate(action, entry_rate(loader));
            return true;
        }
        loader->sequence = ota_rom_enter_sequence(options, info->link, loader->attempt);
        if (loader->skips_reset) {
            loader->sequence = NULL;
        }
        loader->skips_reset = false;
        if (loader->sequence != NULL && !loader->lines_useless) {
            loader->resets++;
            info->was_reset = true;
        }
        loader->state = SEQUENCE;
        return false;
    case SEQUENCE:
        if (!step_of_sequence(loader, action)) {
            loader->state = FLUSH;
            return false;
        }
        return true;
    case FLUSH:
        loader->syncs = 0;
        wait_for(action, OTA_ROM_ACT_FLUSH, 0);
        return true;
    case SYNC:
        ota_rom_sync(&loader->request);
        command(loader, action, OTA_ROM_SYNC_MS);
        return true;
    case SYNC_PAUSE:
        wait_for(action, OTA_ROM_ACT_PAUSE, SYNC_PAUSE_MS);
        return true;
    case SYNCED:
        wait_for(action, OTA_ROM_ACT_DRAIN, SYNC_QUIET_MS);
        return true;
    case SECURITY: {
        const ota_chip *chip = loader->chip != NULL ? loader->chip : expected_chip(loader);
        if (chip != NULL && !chip->has_security_info) {
            loader->state = MAGIC;
            return false;
        }
        loader->asked_security = true;
        ota_rom_get_security_info(&loader->request);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    }
    case SECURITY_DRAIN:
        wait_for(action, OTA_ROM_ACT_DRAIN, OTA_ROM_DRAIN_MS);
        return true;
    case MAGIC:
        read_reg(loader, action, OTA_CHIP_MAGIC_REG);
        return true;
    case WATCHDOG:
        if (info->link != OTA_FLASHER_LINK_USB_JTAG || info->is_stub || is_secure(loader) ||
            loader->chip->wdt_config0 == 0) {
            loader->state = CAL;
            return false;
        }
        loader->reg_count = ota_rom_watchdog_off_writes(loader->chip, loader->regs);
        write_regs(loader, CAL);
        return false;
    case REGS: {
        size_t count = loader->one_by_one ? 1 : loader->reg_count - loader->reg_sent;
        ota_rom_write_regs(&loader->request, loader->regs + loader->reg_sent, count);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    }
    case CAL: /* the crystal: of the ESP32 as the ROM sees it, of C2 and C5 as it is */
        choose_rate(loader);
        if (!rate_is_of_use(loader) || info->is_stub || info->facts.rom_clock != 0) {
            loader->state = RATE;
            return false;
        }
        if (loader->chip->id == OTA_CHIP_ESP32 && !is_secure(loader)) {
            read_reg(loader, action, ESP32_CALIBRATION);
        } else if (loader->chip->id == OTA_CHIP_ESP32C2 || loader->chip->id == OTA_CHIP_ESP32C5) {
            read_reg(loader, action, loader->chip->uart_div);
        } else {
            loader->state = RATE;
            return false;
        }
        return true;
    case DIV:
        read_reg(loader, action, loader->chip->id == OTA_CHIP_ESP32 ? ESP32_EFUSE_4 : C5_CRYSTAL);
        return true;
    case RATE:
        choose_rate(loader);
        if (!rate_is_of_use(loader)) {
            loader->state = MAC_LO;
            return false;
        }
        loader->baud_before = loader->line_baud;
        loader->state = RATE_TRY;
        return false;
    case RATE_TRY: /* a rate that our side cannot do must not be asked of the chip */
    case RATE_SWITCH:
        set_rate(action, loader->baud);
        return true;
    case RATE_BACK:
        set_rate(action, loader->baud_before);
        return true;
    case RATE_CHANGE: {
        uint64_t sees = 0, is = 0;
        uint32_t clock = info->facts.rom_clock;
        if (!info->is_stub && clock != 0) {
            if (loader->chip->id == OTA_CHIP_ESP32) {
                sees = clock;
                is = clock > 33000000 ? 40000000 : 26000000;
            } else {
                is = clock & 0xFF;
                sees = clock >> 8;
            }
        }
        ota_rom_change_baudrate(&loader->request, ota_rom_baud_request(loader->baud, sees, is),
                                info->is_stub ? loader->line_baud : 0);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    }
    case RATE_PAUSE:
        wait_for(action, OTA_ROM_ACT_PAUSE, RATE_PAUSE_MS);
        return true;
    case RATE_FLUSH:
        wait_for(action, OTA_ROM_ACT_FLUSH, 0);
        return true;
    case RATE_VERIFY:
        if (is_secure(loader)) {
            ota_rom_get_security_info(&loader->request);
        } else {
            ota_rom_read_reg(&loader->request, loader->chip->mac_lo);
        }
        command(loader, action, OTA_ROM_REPLY_MS / 3);
        return true;
    case MAC_LO:
        if (is_secure(loader) || loader->has_mac_lo || info->facts.is_known) {
            loader->state = MAC_HI;
            return false;
        }
        read_reg(loader, action, loader->chip->mac_lo);
        return true;
    case MAC_HI:
        if (is_secure(loader) || info->has_mac) {
            loader->state = CRYPT;
            return false;
        }
        if (info->facts.is_known) {
            memcpy(info->mac, info->facts.mac, sizeof info->mac);
            info->has_mac = true;
            loader->state = CRYPT;
            return false;
        }
        read_reg(loader, action, loader->chip->mac_lo + 4);
        return true;
    case CRYPT: /* later chips tell by GET_SECURITY_INFO */
        if (loader->chip->id != OTA_CHIP_ESP32 || is_secure(loader)) {
            loader->state = STUB;
            return false;
        }
        read_reg(loader, action, ESP32_EFUSE_0);
        return true;
    case STUB:
        loader->segment = 0;
        loader->tries = 0;
        loader->stub = loader->stub_failed ? NULL : choose_stub(loader);
        if (info->is_stub) {
            info->stub_was_running = loader->stub_uploads == 0;
            info->stub_name = stub_name(loader);
            loader->state = USR;
        } else if (loader->stub == NULL) {
            loader->state = loader->chip->id == OTA_CHIP_ESP32 && !is_secure(loader) ? PADS : ATTACH;
        } else {
            loader->detours = loader->chip->id == OTA_CHIP_ESP32S3 && info->secure_boot;
            loader->state = MEM_BEGIN;
        }
        return false;
    case PADS: /* an ESP32 with flash in its package says in eFuses on which pads; a stub looks by itself */
        read_reg(loader, action, ESP32_EFUSE_5);
        return true;
    case PADS_HD:
        read_reg(loader, action, ESP32_EFUSE_3);
        return true;
    case MEM_BEGIN: {
        size_t len;
        uint32_t address, block = mem_block(loader);
        segment_bytes(loader, &len, &address);
        if (len == 0) {
            loader->state = MEM_END;
            return false;
        }
        loader->seq = 0;
        ota_rom_mem_begin(&loader->request, (uint32_t)len, (uint32_t)((len + block - 1) / block), block, address);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    }
    case MEM_DATA: {
        size_t len, from = (size_t)loader->seq * mem_block(loader);
        uint32_t address;
        const uint8_t *bytes = segment_bytes(loader, &len, &address);
        size_t left = len - from;
        ota_rom_data(&loader->request, OTA_ROM_MEM_DATA, bytes + from,
                     left < mem_block(loader) ? left : mem_block(loader), 0, loader->seq);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    }
    case MEM_END:
        ota_rom_mem_end(&loader->request, loader->detours ? 0 : loader->stub->entry);
        command(loader, action, loader->detours ? OTA_ROM_REPLY_MS : OTA_ROM_MEM_END_MS);
        return true;
    case DETOUR_POINTER: /* with secure boot the S3 starts nothing; its flash read function does it for us */
        read_reg(loader, action, S3_FLASH_READ_POINTER);
        return true;
    case DETOUR_CALL:
        ota_rom_read_flash_slow(&loader->request, 0, 0);
        loader->request.repeatable = false;
        command(loader, action, OTA_ROM_MEM_END_MS);
        return true;
    case DETOUR_BACK:
        loader->regs[0] = set_reg(S3_FLASH_READ_POINTER, loader->old_pointer);
        loader->reg_count = 1;
        write_regs(loader, USR);
        return false;
    case GREETING:
        wait_for(action, OTA_ROM_ACT_GREETING, OTA_ROM_OHAI_MS);
        return true;
    case ATTACH:
        set_abilities(loader);
        ota_rom_spi_attach(&loader->request, false, loader->pads);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    case USR:
        if (is_secure(loader)) {
            loader->state = PARAMS;
            return false;
        }
        loader->tries = 0;
        read_reg(loader, action, loader->chip->spi_base + loader->chip->spi_usr);
        return true;
    case USR2:
        read_reg(loader, action, loader->chip->spi_base + loader->chip->spi_usr2);
        return true;
    case RDID:
        loader->reg_count = ota_rom_flash_id_writes(loader->chip, loader->usr, loader->usr2, loader->regs);
        write_regs(loader, ID);
        return false;
    case ID:
        read_reg(loader, action, loader->chip->spi_base + loader->chip->spi_w0);
        return true;
    case PARAMS:
        if (info->flash_size > UINT32_MAX) {
            fail(loader, OTA_ERR_UNSUPPORTED, 0, "flash of 4 GiB or more");
            return false;
        }
        ota_rom_spi_set_params(&loader->request, (uint32_t)info->flash_size);
        command(loader, action, OTA_ROM_REPLY_MS);
        return true;
    default:
        return true; /* READY, FAILED: not asked */
    }
}

ota_status ota_rom_loader_next(ota_rom_loader *loader, ota_rom_action *action, ota_error *error) {
    do {
        memset(action, 0, sizeof *action);
    } while (!ask(loader, action));
    if (loader->state == FAILED) {
        return ota_error_set(error, loader->error.status, loader->error.stage, 0, loader->error.device_code, "%s",
                             loader->error.text);
    }
    return loader->state == READY ? OTA_DONE : OTA_OK;
}

/* ---- What came of it ----------------------------------------------------------------------------------------------- */

static void hear_sync(ota_rom_loader *loader, const ota_rom_result *result, int else_to) {
    loader->state = else_to;
    if (result->is_answered && !result->is_unsupported) {
        loader->info.is_stub = result->reply->value == 0; /* a ROM sends back bytes of the frame */
        loader->state = SYNCED;
    }
}

static void next_attempt(ota_rom_loader *loader) {
    int limit = loader->options->connect_attempts;
    loader->attempt++;
    loader->state = ENTER;
    if (limit >= 0 && loader->attempt >= (unsigned)(limit == 0 ? ATTEMPTS : limit)) {
        fail_connect(loader);
    }
}

static void hear_security(ota_rom_loader *loader, const ota_rom_result *result) {
    ota_flasher_info *info = &loader->info;
    if (!result->is_answered) {
        fail_command(loader, result);
        return;
    }
    if (result->is_unsupported || result->reply->status != 0) {
        loader->state = SECURITY_DRAIN;
        return;
    }
    ota_rom_security_info *security = &loader->security;
    if (ota_rom_security_info_decode(result->reply->data, result->reply->data_len, security) != OTA_OK) {
        fail(loader, OTA_ERR_CHIP_PROTOCOL, 0, "the security info has a wrong size");
        return;
    }
    loader->has_security = true;
    info->security_flags = security->flags;
    info->secure_boot = (security->flags & OTA_ROM_SECURE_BOOT) != 0;
    info->secure_download = (security->flags & OTA_ROM_SECURE_DOWNLOAD) != 0;
    info->flash_encrypted = ota_rom_is_flash_encrypted(security->flash_crypt_count);
    if (!security->has_chip_id) {
        loader->state = MAGIC;
        return;
    }
    info->eco_version = security->eco_version;
    const ota_chip *chip = ota_chip_by_id(security->chip_id);
    if (chip == NULL) {
        char text[64];
        snprintf(text, sizeof text, "chip id %lu is not known", (unsigned long)security->chip_id);
        fail(loader, OTA_ERR_CHIP_OTHER, security->chip_id, text);
        return;
    }
    detected(loader, chip);
}

static void hear_magic(ota_rom_loader *loader, const ota_rom_result *result) {
    bool has_short_info = loader->has_security && !loader->security.has_chip_id;
    if (has_short_info && result->is_answered && !is_ok(result)) {
        loader->info.secure_download = true; /* an S2 whose registers cannot be read */
        detected(loader, ota_chip_by_id(OTA_CHIP_ESP32S2));
        return;
    }
    if (!is_good(loader, result)) {
        return;
    }
    const ota_chip *chip = ota_chip_by_magic(result->reply->value);
    if (chip == NULL) {
        char text[64];
        snprintf(text, sizeof text, "no chip is known by %08lX", (unsigned long)result->reply->value);
        fail(loader, OTA_ERR_CHIP_OTHER, result->reply->value, text);
        return;
    }
    detected(loader, chip);
}

static void hear_regs(ota_rom_loader *loader, const ota_rom_result *result) {
    if (result->is_answered && !is_ok(result) && !loader->one_by_one) {
        loader->one_by_one = true; /* a ROM that takes single writes only */
        return;
    }
    if (is_good(loader, result)) {
        loader->reg_sent += loader->one_by_one ? 1 : loader->reg_count;
        loader->state = loader->reg_sent >= loader->reg_count ? loader->after_regs : REGS;
    }
}

/* Crystals that are fitted. */
static uint32_t snap_mhz(uint64_t mhz) {
    return mhz < 33 ? 26 : mhz < 44 ? 40 : 48;
}

static void hear_clock(ota_rom_loader *loader, const ota_rom_result *result) {
    if (!is_good(loader, result)) {
        return;
    }
    ota_flasher_facts *facts = &loader->info.facts;
    uint32_t value = result->reply->value;
    bool first = loader->state == CAL;
    loader->state = RATE;
    if (loader->chip->id == OTA_CHIP_ESP32) {
        if (first) {
            loader->calibration = value >> 7 & 0x1FFFFFF;
            loader->state = DIV;
        } else { /* 0 where the eFuse was not burnt: the plain rate then */
            uint64_t clock = (uint64_t)loader->calibration * 15625 * (value & 0xFF) / 40;
            facts->rom_clock = clock > UINT32_MAX ? 0 : (uint32_t)clock;
        }
    } else if (first) {
        loader->calibration = snap_mhz((uint64_t)loader->line_baud * (value & 0xFFFFF) / 1000000);
        facts->rom_clock = C2_ROM_CRYSTAL << 8 | loader->calibration;
        loader->state = loader->chip->id == OTA_CHIP_ESP32C5 ? DIV : RATE;
    } else {
        facts->rom_clock = (value >> 24 & 0x7F) << 8 | loader->calibration;
    }
}

static void hear_id(ota_rom_loader *loader, uint32_t id) {
    ota_flasher_info *info = &loader->info;
    id &= 0xFFFFFF;
    bool is_dead = id == 0 || id == 0xFFFFFF;
    if (is_dead && ++loader->tries < ID_TRIES) {
        loader->state = RDID;
        return;
    }
    info->flash_id = id;
    if (info->facts.is_known && info->facts.flash_id != id) {
        forget_facts(loader); /* another device after all: ask for what was believed */
        if (!loader->has_mac_lo) {
            info->has_mac = false;
        }
    }
    uint64_t size =
        info->facts.is_known && info->facts.flash_size != 0 ? info->facts.flash_size : ota_chip_flash_size(id);
    if (loader->options->flash_size == 0 && is_dead) {
        char text[80];
        snprintf(text, sizeof text, "the flash chip does not answer: its id reads %06lX", (unsigned long)id);
        fail(loader, OTA_ERR_CHIP_PROTOCOL, id, text);
        return;
    }
    if (loader->options->flash_size == 0 && size != 0) {
        info->flash_size = size;
        info->flash_size_known = true;
    }
    loader->state = info->has_mac ? PARAMS : MAC_LO; /* and then by way of CRYPT and STUB to the id once more */
}

static void ready(ota_rom_loader *loader) {
    ota_flasher_info *info = &loader->info;
    set_abilities(loader);
    info->facts.is_known = info->has_mac;
    info->facts.chip_id = info->chip_id;
    memcpy(info->facts.mac, info->mac, sizeof info->mac);
    info->facts.revision = info->revision;
    info->facts.flash_id = info->flash_id;
    info->facts.flash_size = info->flash_size_known ? info->flash_size : 0;
    if (loader->step_downs > 0) {
        info->facts.baud = loader->line_baud;
    }
    loader->state = READY;
}

void ota_rom_loader_tell(ota_rom_loader *loader, const ota_rom_result *result) {
    ota_flasher_info *info = &loader->info;
    uint32_t value = is_ok(result) ? result->reply->value : 0;
    switch (loader->state) {
    case REUSE_BAUD:
        loader->line_baud = result->failed ? loader->line_baud : loader->options->reuse_baud;
        loader->state = result->failed ? ENTER : REUSE_FLUSH;
        break;
    case REUSE_FLUSH:
        loader->state = REUSE_SYNC;
        break;
    case REUSE_SYNC:
        hear_sync(loader, result, ENTER);
        break;
    case ENTER:
        loader->line_baud = entry_rate(loader); /* no driver refuses 115200; of the others SYNC tells */
        break;
    case SEQUENCE:
        if (result->failed) {
            loader->lines_useless = true;
            info->was_reset = false;
            loader->resets--;
        }
        break;
    case FLUSH:
        loader->state = SYNC;
        break;
    case SYNC:
        loader->syncs++;
        hear_sync(loader, result, SYNC_PAUSE);
        break;
    case SYNC_PAUSE:
        loader->state = SYNC;
        if (loader->syncs == SYNCS_PER_ATTEMPT) {
            next_attempt(loader);
        }
        break;
    case SYNCED:
        loader->state = loader->chip != NULL ? WATCHDOG : SECURITY; /* the chip is known after a second reset */
        break;
    case SECURITY:
        hear_security(loader, result);
        break;
    case SECURITY_DRAIN:
        loader->state = MAGIC;
        break;
    case MAGIC:
        hear_magic(loader, result);
        break;
    case REGS:
        hear_regs(loader, result);
        break;
    case CAL:
    case DIV:
        hear_clock(loader, result);
        break;
    case RATE_TRY:
        loader->state = RATE_BACK;
        if (result->failed) {
            step_down(loader, RATE_BACK);
        }
        break;
    case RATE_BACK: /* the wanted rate is above the limit when our side cannot do it */
        loader->state = loader->baud > loader->baud_limit ? RATE : RATE_CHANGE;
        break;
    case RATE_CHANGE:
        if (is_ok(result)) {
            loader->state = RATE_SWITCH;
        } else {
            step_down(loader, result->is_answered ? RATE : ENTER);
        }
        break;
    case RATE_SWITCH:
        if (result->failed) {
            step_down(loader, ENTER);
        } else {
            loader->line_baud = loader->baud;
            loader->state = RATE_PAUSE;
        }
        break;
    case RATE_PAUSE:
        loader->state = RATE_FLUSH;
        break;
    case RATE_FLUSH:
        loader->state = RATE_VERIFY;
        break;
    case RATE_VERIFY:
        if (!is_ok(result)) {
            step_down(loader, ENTER);
            break;
        }
        loader->state = MAC_LO;
        if (!is_secure(loader)) {
            loader->mac_lo = value;
            loader->has_mac_lo = true;
            compare_mac(loader);
        }
        break;
    case MAC_LO:
        if (is_good(loader, result)) {
            loader->mac_lo = value;
            loader->has_mac_lo = true;
            loader->state = MAC_HI;
        }
        break;
    case MAC_HI:
        if (is_good(loader, result)) {
            store_mac(loader, value);
            loader->state = CRYPT;
        }
        break;
    case CRYPT:
        if (is_good(loader, result)) {
            info->flash_encrypted = ota_rom_is_flash_encrypted(value >> 20 & 0x7F);
            loader->state = STUB;
        }
        break;
    case PADS:
        if (is_good(loader, result)) {
            uint32_t clk = value & 31, q = value >> 5 & 31, d = value >> 10 & 31, cs = value >> 15 & 31;
            loader->pads = cs << 18 | d << 12 | q << 6 | clk;
            loader->state = loader->pads != 0 ? PADS_HD : ATTACH;
        }
        break;
    case PADS_HD:
        if (is_good(loader, result)) {
            loader->pads |= (value >> 4 & 31) << 24;
            loader->state = ATTACH;
        }
        break;
    case MEM_BEGIN:
        if (is_ok(result)) {
            loader->state = MEM_DATA;
        } else {
            again_or_without(loader, result);
        }
        break;
    case MEM_DATA: {
        size_t len;
        uint32_t address;
        segment_bytes(loader, &len, &address);
        if (!is_ok(result)) {
            again_or_without(loader, result);
        } else if ((size_t)++loader->seq * mem_block(loader) >= len) {
            loader->segment++;
            loader->state = loader->segment < 2 ? MEM_BEGIN : MEM_END;
        }
        break;
    }
    case MEM_END:
        if (result->is_greeted) {
            stub_runs(loader);
        } else if (result->is_answered && !is_ok(result)) {
            loader->tries = MEM_TRIES;
            again_or_without(loader, result);
        } else {
            loader->tries = 0;
            loader->state = loader->detours ? DETOUR_POINTER : GREETING;
        }
        break;
    case DETOUR_POINTER:
        if (is_good(loader, result)) {
            loader->old_pointer = value;
            loader->regs[0] = set_reg(S3_FLASH_READ_POINTER, loader->stub->entry);
            loader->reg_count = 1;
            write_regs(loader, DETOUR_CALL);
        }
        break;
    case DETOUR_CALL:
        loader->state = GREETING;
        if (result->is_greeted) {
            stub_runs(loader);
        }
        break;
    case GREETING:
        if (result->is_answered && ota_rom_is_greeting(result->frame, result->frame_len)) {
            stub_runs(loader);
        } else if (!result->is_answered || ++loader->tries == GREETING_FRAMES) {
            loader->info.stub_failed = loader->stub_failed = true;
            loader->attempt = 0;
            loader->state = ENTER;
        }
        break;
    case ATTACH:
        if (is_good(loader, result)) {
            loader->state = USR;
        }
        break;
    case USR:
        if (is_good(loader, result)) {
            loader->usr = value;
            loader->state = USR2;
        }
        break;
    case USR2:
        if (is_good(loader, result)) {
            loader->usr2 = value;
            loader->state = RDID;
        }
        break;
    case ID:
        if (is_good(loader, result)) {
            hear_id(loader, value);
        }
        break;
    case PARAMS:
        if (is_good(loader, result)) {
            ready(loader);
        }
        break;
    default:
        break;
    }
}

void ota_rom_loader_init(ota_rom_loader *loader, const ota_flasher_options *options, ota_rom_log *log,
                         uint32_t line_baud) {
    memset(loader, 0, sizeof *loader);
    loader->options = options;
    loader->log = log;
    loader->line_baud = line_baud;
    loader->baud_limit = UINT32_MAX;
    loader->state = START;
    ota_flasher_info *info = &loader->info;
    info->link = ota_rom_link(options);
    info->revision = OTA_FLASHER_UNKNOWN;
    info->eco_version = OTA_FLASHER_UNKNOWN;
    info->stub_name = "";
    info->chip = "";
    info->title = "";
    if (options->facts.is_known) {
        info->facts = options->facts;
    }
    info->flash_size_known = options->flash_size != 0;
    info->flash_size = options->flash_size != 0 ? options->flash_size : 2u << 20;
}

void ota_rom_loader_port_is_back(ota_rom_loader *loader, uint32_t line_baud) {
    loader->line_baud = line_baud;
    loader->skips_reset = true;
    loader->state = ENTER;
}
