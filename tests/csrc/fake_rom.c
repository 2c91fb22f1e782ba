/* A chip on a serial line, in memory; see fake_rom.h. */
#include "fake_rom.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

#include "base/bytes.h"

#define SECTOR 4096u
#define BLOCK 65536u
#define SECTOR_ERASE_US 45000u
#define BLOCK_ERASE_US 150000u
#define PAGE_US 1100u
#define REPLY_US 300u
#define MD5_US_PER_KB 400u

typedef struct chip_facts {
    uint32_t id, magic, mac, spi, usr, usr2, w0;
    const char *log_name;
} chip_facts;

static const chip_facts chips[] = {
    {0, 0x00F01D83, 0x3FF5A004, 0x3FF42000, 0x1C, 0x24, 0x80, NULL},
    {2, 0x000007C6, 0x3F41A044, 0x3F402000, 0x18, 0x20, 0x58, "esp32s2"},
    {5, 0x1B31506F, 0x60008844, 0x60002000, 0x18, 0x20, 0x58, "esp32c3"},
    {9, 0x00000009, 0x60007044, 0x60002000, 0x18, 0x20, 0x58, "esp32s3"},
    {12, 0x6F51306F, 0x60008840, 0x60002000, 0x18, 0x20, 0x58, "esp32c2"},
    {13, 0x2CE0806F, 0x600B0844, 0x60003000, 0x18, 0x20, 0x58, "esp32c6"},
    {16, 0xD7B73E80, 0x600B0844, 0x60003000, 0x18, 0x20, 0x58, "esp32h2"},
    {18, 0, 0x5012D044, 0x5008D000, 0x18, 0x20, 0x58, "esp32p4"},
    {20, 0x7211606F, 0x600B4844, 0x60003000, 0x18, 0x20, 0x58, "esp32c61"},
    {23, 0x1101406F, 0x600B4844, 0x60003000, 0x18, 0x20, 0x58, "esp32c5"},
};

static const chip_facts *facts_of(const fake_rom *fake) {
    for (size_t i = 0; i < sizeof chips / sizeof chips[0]; i++) {
        if (chips[i].id == fake->options.chip_id) {
            return &chips[i];
        }
    }
    abort();
}

static fake_rom *of(ota_serial *serial) {
    return (fake_rom *)(void *)serial;
}

static uint64_t slow(const fake_rom *fake, uint64_t us) {
    return us * (fake->faults.slowness == 0 ? 1 : fake->faults.slowness);
}

/* ---- The wire to the host ---------------------------------------------------------------------------------------- */

static uint64_t byte_us(uint32_t baud) {
    return baud == 0 ? 1 : 10000000u / baud + 1;
}

static void queue_byte(fake_rom *fake, uint8_t byte, uint64_t at_us) {
    if (fake->out_len == fake->out_capacity) {
        fake->out_capacity = fake->out_capacity == 0 ? 4096 : 2 * fake->out_capacity;
        fake->out = realloc(fake->out, fake->out_capacity * sizeof *fake->out);
        if (fake->out == NULL) {
            abort();
        }
    }
    fake->out[fake->out_len++] = (fake_rom_byte){at_us, byte};
}

static void send_byte(fake_rom *fake, uint8_t byte, uint64_t *at_us) {
    uint64_t number = ++fake->bytes_to_host;
    *at_us += byte_us(fake->baud);
    if (number == fake->faults.drop_out) {
        return;
    }
    if (fake->serial.baud != 0 &&
        (fake->serial.baud != fake->baud || (fake->faults.baud_max != 0 && fake->baud > fake->faults.baud_max))) {
        byte = (uint8_t)(byte * 37 + 11);
    }
    if (number == fake->faults.flip_out) {
        byte ^= 0x10;
    }
    queue_byte(fake, byte, *at_us);
    if (number == fake->faults.double_out || number == fake->faults.insert_out) {
        queue_byte(fake, number == fake->faults.double_out ? byte : 0x55, *at_us);
    }
}

static void send_text(fake_rom *fake, const char *text, uint64_t at_us) {
    for (; *text != '\0'; text++) {
        send_byte(fake, (uint8_t)*text, &at_us);
    }
}

void fake_rom_say(fake_rom *fake, const void *bytes, size_t len) {
    uint64_t at = fake->now_us;
    for (size_t i = 0; i < len; i++) {
        send_byte(fake, ((const uint8_t *)bytes)[i], &at);
    }
}

static void send_frame(fake_rom *fake, const uint8_t *bytes, size_t len, uint64_t at_us) {
    if (++fake->replies == fake->faults.lose_reply) {
        return;
    }
    send_byte(fake, 0xC0, &at_us);
    for (size_t i = 0; i < len; i++) {
        if (bytes[i] == 0xC0 || bytes[i] == 0xDB) {
            send_byte(fake, 0xDB, &at_us);
            send_byte(fake, bytes[i] == 0xC0 ? 0xDC : 0xDD, &at_us);
        } else {
            send_byte(fake, bytes[i], &at_us);
        }
    }
    send_byte(fake, 0xC0, &at_us);
}

/* ---- Registers ---------------------------------------------------------------------------------------------------- */

void fake_rom_set_reg(fake_rom *fake, uint32_t address, uint32_t value) {
    for (size_t i = 0; i < fake->reg_count; i++) {
        if (fake->regs[i].address == address) {
            fake->regs[i].value = value;
            return;
        }
    }
    if (fake->reg_count == FAKE_ROM_REGS) {
        abort();
    }
    fake->regs[fake->reg_count].address = address;
    fake->regs[fake->reg_count++].value = value;
}

uint32_t fake_rom_reg(const fake_rom *fake, uint32_t address) {
    for (size_t i = 0; i < fake->reg_count; i++) {
        if (fake->regs[i].address == address) {
            return fake->regs[i].value;
        }
    }
    return 0;
}

static void restart(fake_rom *fake, fake_rom_mode mode, const char *last_words);

static void write_reg(fake_rom *fake, const uint8_t *entry) {
    const chip_facts *chip = facts_of(fake);
    uint32_t address = ota_load_u32le(entry), value = ota_load_u32le(entry + 4), mask = ota_load_u32le(entry + 8);
    fake->busy_until_us += ota_load_u32le(entry + 12);
    fake_rom_set_reg(fake, address, (fake_rom_reg(fake, address) & ~mask) | (value & mask));
    if (address == chip->spi && (value & 1u << 18) != 0) {
        bool reads_id = (fake_rom_reg(fake, chip->spi + chip->usr2) & 0xFF) == 0x9F &&
                        fake_rom_reg(fake, chip->spi + chip->usr) >> 31 == 1;
        fake_rom_set_reg(fake, chip->spi + chip->w0, reads_id && fake->attached ? fake->options.flash_id : 0xFFFFFFFF);
        fake_rom_set_reg(fake, address, 0);
    }
    fake->watchdog_writes += value == 0x50D83AA1u;
    if (value == 0xD0000102u) {
        restart(fake, FAKE_ROM_APP, "");
    }
}

/* ---- Flash --------------------------------------------------------------------------------------------------------- */

static bool is_blank(const fake_rom *fake, uint64_t offset, uint64_t len) {
    for (uint64_t i = 0; i < len; i++) {
        if (fake->flash[offset + i] != 0xFF) {
            return false;
        }
    }
    return true;
}

static void erase_sector(fake_rom *fake, uint64_t offset) {
    if (offset + SECTOR <= fake->options.flash_size) {
        memset(fake->flash + offset, 0xFF, SECTOR);
    }
    fake->erased_sectors++;
    fake->busy_until_us += slow(fake, SECTOR_ERASE_US);
}

/* As a stub erases while it writes: everything up to `end`, in blocks where it can. */
static void erase_up_to(fake_rom *fake, uint64_t end) {
    while (fake->erased_to < end && fake->erased_to < fake->write_end) {
        bool block = fake->erased_to % BLOCK == 0 && fake->write_end - fake->erased_to >= BLOCK;
        if (fake->skips_blank && is_blank(fake, fake->erased_to, SECTOR)) {
            fake->blank_skips++;
            fake->erased_to += SECTOR;
        } else if (block) {
            memset(fake->flash + fake->erased_to, 0xFF, BLOCK);
            fake->erased_blocks++;
            fake->busy_until_us += slow(fake, BLOCK_ERASE_US);
            fake->erased_to += BLOCK;
            fake->skips_blank = false;
        } else {
            erase_sector(fake, fake->erased_to);
            fake->erased_to += SECTOR;
            fake->skips_blank = false;
        }
    }
}

/* False: what lies there afterwards differs. */
static bool program(fake_rom *fake, uint64_t offset, const uint8_t *bytes, size_t len) {
    bool good = true;
    for (size_t i = 0; i < len; i++) {
        uint64_t at = offset + i;
        if (at >= fake->options.flash_size ||
            (fake->faults.bad_sector != 0 && at / SECTOR + 1 == fake->faults.bad_sector)) {
            good = false;
            continue;
        }
        fake->flash[at] &= bytes[i];
        good = good && fake->flash[at] == bytes[i];
    }
    fake->busy_until_us += slow(fake, (len + 255) / 256 * PAGE_US);
    return good;
}

static void md5(const fake_rom *fake, uint64_t offset, uint64_t len, uint8_t digest[16]) {
    if (EVP_Digest(fake->flash + offset, len, digest, NULL, EVP_md5(), NULL) != 1) {
        abort();
    }
    digest[0] ^= fake->faults.md5_lies;
}

/* ---- Replies ------------------------------------------------------------------------------------------------------- */

static void emit(fake_rom *fake, uint8_t op, uint32_t value, const uint8_t *body, size_t len) {
    uint8_t frame[8 + 128] = {1, op};
    ota_store_u16le(frame + 2, (uint16_t)len);
    ota_store_u32le(frame + 4, value);
    memcpy(frame + 8, body, len);
    send_frame(fake, frame, 8 + len, fake->busy_until_us + REPLY_US);
}

/* The ROM's reply buffer keeps what earlier replies left in it. */
static void rom_reply(fake_rom *fake, uint8_t op, const void *data, size_t len, uint8_t status, uint8_t error) {
    if (len > 0) {
        memcpy(fake->reply, data, len);
    }
    fake->reply[len] = status;
    if (status != 0) {
        fake->reply[len + 1] = error;
    }
    fake->reply_op = op;
    emit(fake, op, fake->reply_value, fake->reply, len + 4);
}

static void stub_reply(fake_rom *fake, uint8_t op, uint32_t value, const void *data, size_t len, uint8_t status) {
    uint8_t body[64] = {0};
    if (len > 0) {
        memcpy(body, data, len);
    }
    body[len] = status;
    emit(fake, op, value, body, len + 2);
}

static void answer(fake_rom *fake, uint8_t op, uint8_t status, uint8_t error) {
    if (fake->mode == FAKE_ROM_STUB) {
        stub_reply(fake, op, 0, NULL, 0, status);
    } else {
        rom_reply(fake, op, NULL, 0, status, error);
    }
}

/* ---- Restart ------------------------------------------------------------------------------------------------------- */

static void close_write(fake_rom *fake) {
    if (fake->inflater_open) {
        inflateEnd(&fake->inflater);
    }
    fake->inflater_open = false;
    fake->writing = false;
}

static void restart(fake_rom *fake, fake_rom_mode mode, const char *last_words) {
    char text[256];
    const chip_facts *chip = facts_of(fake);
    bool download = mode != FAKE_ROM_APP;
    close_write(fake);
    fake->resets++;
    fake->mode = mode;
    fake->baud = OTA_SERIAL_BAUD;
    fake->attached = 0;
    fake->in_len = 0;
    fake->reading = false;
    fake->late_status = 0;
    fake->busy_until_us = fake->frame_free_us = fake->now_us;
    while (fake->out_len > fake->out_pos && fake->out[fake->out_len - 1].at_us > fake->now_us) {
        fake->out_len--; /* not sent yet: never will be */
    }
    if (fake->faults.vanishes_on_reset) {
        fake->is_gone = true;
    }
    if (chip->log_name == NULL) {
        snprintf(text, sizeof text, "ets Jul 29 2019 12:21:46\r\n\r\nrst:0x1 (POWERON_RESET),boot:0x%s\r\n%s",
                 download ? "3 (DOWNLOAD_BOOT(UART0/UART1/SDIO_REI_REO_V2))" : "13 (SPI_FAST_FLASH_BOOT)",
                 download ? "waiting for download\r\n" : "entry 0x400805e4\r\n" FAKE_ROM_APP_LOG);
    } else {
        snprintf(text, sizeof text,
                 "ESP-ROM:%s-api1-20210207\r\nBuild:Feb  7 2021\r\nrst:0x1 (POWERON),boot:0x%s\r\n%s", chip->log_name,
                 download ? "2 (UART0_BOOT)" : "c (SPI_FAST_FLASH_BOOT)",
                 download ? "wait uart0 download\r\n" : "entry 0x403cc710\r\n" FAKE_ROM_APP_LOG);
    }
    send_text(fake, last_words, fake->now_us);
    send_text(fake, text, fake->now_us + 20000);
}

/* ---- Commands ------------------------------------------------------------------------------------------------------ */

/* The ROM's begin_len: ESP32 16 bytes, others 20. A stub takes both. */
static void begin(fake_rom *fake, uint8_t op, const uint8_t *data, size_t len) {
    bool stub = fake->mode == FAKE_ROM_STUB;
    size_t expected = fake->options.chip_id == 0 ? 16 : 20;
    uint32_t block_max = fake->faults.rom_block_max != 0 ? fake->faults.rom_block_max : 0x1800;
    if (stub ? len != 16 && len != 20 : len != expected || ota_load_u32le(data + 8) > block_max) {
        answer(fake, op, stub ? 0xC0 : 1, 5);
        return;
    }
    if (!fake->attached) {
        answer(fake, op, 1, 6);
        return;
    }
    close_write(fake);
    fake->deflated = op == 0x10;
    fake->block_size = ota_load_u32le(data + 8);
    fake->seq = 0;
    fake->write_at = ota_load_u32le(data + 12);
    fake->write_left = ota_load_u32le(data);
    fake->wire_left = (uint64_t)ota_load_u32le(data + 4) * fake->block_size;
    if (!ota_range_inside(fake->write_at, fake->write_left, fake->options.flash_size)) {
        answer(fake, op, stub ? 0xC4 : 1, 6);
        return;
    }
    fake->writing = true;
    fake->erased_to = ota_round_down(fake->write_at, SECTOR);
    fake->write_end = ota_round_up(fake->write_at + fake->write_left, SECTOR);
    fake->skips_blank = stub;
    if (fake->deflated) {
        memset(&fake->inflater, 0, sizeof fake->inflater);
        if (inflateInit(&fake->inflater) != Z_OK) {
            abort();
        }
        fake->inflater_open = true;
        fake->inflater_done = false;
    }
    if (stub) {
        stub_reply(fake, op, 0, NULL, 0, 0);
        erase_up_to(fake, fake->erased_to + 1);
    } else {
        for (uint64_t at = fake->erased_to; at < fake->write_end; at += SECTOR) {
            erase_sector(fake, at);
        }
        rom_reply(fake, op, NULL, 0, 0, 0);
    }
}

/* Content, plain or inflated, into flash. Returns the stub's status (0xC9: hang). */
static uint8_t take_content(fake_rom *fake, const uint8_t *bytes, size_t len) {
    bool stub = fake->mode == FAKE_ROM_STUB;
    if (stub && len > fake->write_left) {
        if (fake->deflated) {
            fake->mode = FAKE_ROM_HUNG; /* spins in its erase loop */
            return 0;
        }
        len = fake->write_left;
    }
    if (stub) {
        erase_up_to(fake, fake->write_at + len);
    }
    bool good = program(fake, fake->write_at, bytes, len);
    fake->write_at += len;
    fake->write_left -= len < fake->write_left ? len : fake->write_left;
    return good ? 0 : stub ? 0xC4 : 8;
}

static uint8_t inflate_block(fake_rom *fake, const uint8_t *bytes, size_t len) {
    bool stub = fake->mode == FAKE_ROM_STUB;
    uint8_t out[32768];
    fake->inflater.next_in = (Bytef *)bytes;
    fake->inflater.avail_in = (uInt)len;
    while (fake->inflater.avail_in > 0 && !fake->inflater_done) {
        fake->inflater.next_out = out;
        fake->inflater.avail_out = sizeof out;
        int result = inflate(&fake->inflater, Z_NO_FLUSH);
        fake->inflater_done = result == Z_STREAM_END;
        if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
            return stub ? 0xC7 : 0x0B;
        }
        uint8_t status = take_content(fake, out, sizeof out - fake->inflater.avail_out);
        if (status != 0 || fake->mode == FAKE_ROM_HUNG) {
            return status;
        }
        if (result == Z_BUF_ERROR) {
            break;
        }
    }
    return 0;
}

static void flash_data(fake_rom *fake, uint8_t op, const uint8_t *data, size_t len, uint32_t checksum) {
    bool stub = fake->mode == FAKE_ROM_STUB;
    uint8_t sum = 0xEF;
    if (len < 16 || ota_load_u32le(data) != len - 16) {
        answer(fake, op, stub ? 0xC0 : 1, 5);
        return;
    }
    const uint8_t *bytes = data + 16;
    size_t count = len - 16;
    for (size_t i = 0; i < count; i++) {
        sum ^= bytes[i];
    }
    if (!fake->writing || fake->deflated != (op == 0x11)) {
        answer(fake, op, stub ? 0xC6 : 1, 5);
        return;
    }
    if (!stub) { /* the counter advances, whatever comes of the block */
        uint32_t seq = fake->seq++;
        if (ota_load_u32le(data + 4) != seq) {
            fake->seq = seq;
            rom_reply(fake, op, NULL, 0, 1, 5);
            return;
        }
    }
    if (sum != (uint8_t)checksum) {
        answer(fake, op, stub ? 0xC1 : 1, 7);
        return;
    }
    if (stub) {
        stub_reply(fake, op, 0, NULL, 0, 0); /* before the work */
        fake->frame_free_us = fake->busy_until_us;
    }
    uint8_t status = 0;
    if (stub && fake->deflated && count > fake->wire_left) {
        fake->mode = FAKE_ROM_HUNG;
    } else {
        fake->wire_left -= count < fake->wire_left ? count : fake->wire_left;
        status = fake->deflated ? inflate_block(fake, bytes, count) : take_content(fake, bytes, count);
    }
    if (stub) {
        fake->late_status = status;
    } else {
        rom_reply(fake, op, NULL, 0, status != 0, status);
    }
}

static void send_packet(fake_rom *fake) {
    uint64_t left = fake->read_len - fake->read_sent;
    if (left == 0) {
        uint8_t digest[16];
        md5(fake, fake->read_from, fake->read_len, digest);
        fake->reading = false;
        send_frame(fake, digest, sizeof digest, fake->now_us + REPLY_US);
        return;
    }
    uint64_t piece = left < 4096 ? left : 4096;
    send_frame(fake, fake->flash + fake->read_from + fake->read_sent, (size_t)piece, fake->now_us + REPLY_US);
    fake->read_sent += piece;
}

static void security_info(fake_rom *fake, uint8_t op) {
    uint8_t info[20] = {0};
    size_t len = fake->options.chip_id == 2 ? 12 : 20;
    ota_store_u32le(info, (fake->options.secure_boot ? 1 : 0) | (fake->options.secure_download ? 4 : 0));
    info[4] = fake->options.flash_encrypted ? 1 : 0;
    ota_store_u32le(info + 12, fake->options.chip_id);
    ota_store_u32le(info + 16, fake->options.eco_version);
    if (fake->mode == FAKE_ROM_STUB) {
        stub_reply(fake, op, 0, info, len, 0);
    } else {
        rom_reply(fake, op, info, len, 0, 0);
    }
}

/* Opcodes that secure download mode leaves. */
static bool is_secure_op(uint8_t op) {
    return op == 0x02 || op == 0x03 || op == 0x04 || op == 0x08 || op == 0x0B || op == 0x0D || op == 0x0F || op == 0x14;
}

static bool is_known(const fake_rom *fake, uint8_t op) {
    if (fake->mode == FAKE_ROM_STUB) {
        return (op >= 0x02 && op <= 0x0B) || op == 0x0D || (op >= 0x0F && op <= 0x13) ||
               (op == 0x14 && fake->options.chip_id != 0) || (op >= 0xD0 && op <= 0xD2);
    }
    return ((op >= 0x02 && op <= 0x0B) || (op >= 0x0D && op <= 0x13) || (op == 0x14 && fake->options.chip_id != 0)) &&
           (!fake->options.secure_download || is_secure_op(op));
}

static void md5_command(fake_rom *fake, uint8_t op, const uint8_t *data) {
    uint64_t offset = ota_load_u32le(data), size = ota_load_u32le(data + 4);
    if (!fake->attached || !ota_range_inside(offset, size, fake->options.flash_size)) {
        answer(fake, op, fake->mode == FAKE_ROM_STUB ? 0xC4 : 1, 6);
        return;
    }
    uint8_t digest[16];
    char hex[33];
    md5(fake, offset, size, digest);
    fake->busy_until_us += size / 1024 * MD5_US_PER_KB;
    if (fake->mode == FAKE_ROM_STUB) {
        stub_reply(fake, op, 0, digest, 16, 0);
        return;
    }
    for (size_t i = 0; i < 16; i++) {
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    }
    rom_reply(fake, op, hex, 32, 0, 0);
}

static void end(fake_rom *fake, uint8_t op) {
    if (fake->mode != FAKE_ROM_STUB) { /* deaf afterwards */
        rom_reply(fake, op, NULL, 0, 1, 6);
        fake->mode = FAKE_ROM_HUNG;
        return;
    }
    uint8_t status = !fake->writing ? 0xC6 : fake->write_left != 0 ? 0xC0 : 0;
    close_write(fake);
    stub_reply(fake, op, 0, NULL, 0, status);
}

static void execute(fake_rom *fake, uint8_t op, const uint8_t *data, size_t len, uint32_t checksum) {
    bool stub = fake->mode == FAKE_ROM_STUB;
    fake->commands[op]++;
    fake->total_commands++;
    if (fake->late_status != 0) { /* the block before failed: told here, and this command is not carried out */
        uint8_t status = fake->late_status;
        fake->late_status = 0;
        close_write(fake);
        stub_reply(fake, op, 0, NULL, 0, status);
        return;
    }
    if (!is_known(fake, op)) {
        if (stub) {
            stub_reply(fake, op, 0, NULL, 0, op == 0x14 ? 0xFF : 0xC3);
            return;
        }
        for (int i = fake->reply_op == 0x08 ? 8 : 1; i > 0; i--) {
            rom_reply(fake, fake->reply_op, NULL, 0, 1, 5);
        }
        return;
    }
    static const uint8_t lengths[256] = {[0x05] = 16, [0x06] = 8, [0x08] = 36, [0x0A] = 4, [0x0B] = 24, [0x0D] = 4,
                                         [0x0E] = 8,  [0x0F] = 8, [0x13] = 16, [0xD1] = 8, [0xD2] = 16};
    if (len < lengths[op]) {
        answer(fake, op, stub ? 0xC0 : 1, 5);
        return;
    }
    switch (op) {
    case 0x02:
    case 0x10:
        begin(fake, op, data, len);
        break;
    case 0x03:
    case 0x11:
        flash_data(fake, op, data, len, checksum);
        break;
    case 0x04:
    case 0x12:
        end(fake, op);
        break;
    case 0x05:
        answer(fake, op, fake->faults.refuses_stub || ota_load_u32le(data + 8) > 0x1800,
               fake->faults.refuses_stub ? 6 : 5);
        break;
    case 0x06:
        rom_reply(fake, op, NULL, 0, 0, 0);
        if (ota_load_u32le(data + 4) == FAKE_ROM_ENTRY) {
            fake->mode = FAKE_ROM_STUB;
            fake->attached = 1;
            if (!fake->faults.no_greeting) {
                send_frame(fake, (const uint8_t *)"OHAI", 4, fake->now_us + 10000);
            }
        }
        break;
    case 0x07: {
        uint8_t sum = 0xEF;
        for (size_t i = 16; i < len; i++) {
            sum ^= data[i];
        }
        answer(fake, op, len < 16 || sum != (uint8_t)checksum, 7);
        break;
    }
    case 0x08:
        fake->reply_value = 0x20120707;
        for (int i = 0; i < 8; i++) {
            if (stub) {
                stub_reply(fake, op, 0, NULL, 0, 0);
            } else {
                rom_reply(fake, op, NULL, 0, 0, 0);
            }
        }
        break;
    case 0x09:
        if (len == 0 || len % 16 != 0 || (fake->faults.refuses_batches && len > 16)) {
            answer(fake, op, 1, 5);
            break;
        }
        {
            fake_rom_mode before = fake->mode;
            uint64_t resets = fake->resets;
            for (size_t i = 0; i < len && fake->resets == resets; i += 16) {
                write_reg(fake, data + i);
            }
            if (fake->mode == before && fake->resets == resets) {
                answer(fake, op, 0, 0);
            }
        }
        break;
    case 0x0A:
        fake->reply_value = fake_rom_reg(fake, ota_load_u32le(data));
        if (stub) {
            stub_reply(fake, op, fake->reply_value, NULL, 0, 0);
        } else {
            rom_reply(fake, op, NULL, 0, 0, 0);
        }
        break;
    case 0x0D:
        if (stub && len != 4) {
            stub_reply(fake, op, 0, NULL, 0, 0xC0);
            break;
        }
        fake->attached = 1;
        answer(fake, op, 0, 0);
        break;
    case 0x0E: {
        uint64_t offset = ota_load_u32le(data), size = ota_load_u32le(data + 4);
        if (!fake->attached || size > 64 || !ota_range_inside(offset, size, fake->options.flash_size)) {
            rom_reply(fake, op, NULL, 0, 1, 0x0A);
            break;
        }
        uint8_t piece[64] = {0};
        memcpy(piece, fake->flash + offset, size);
        rom_reply(fake, op, piece, 64, 0, 0);
        break;
    }
    case 0x0F:
        answer(fake, op, 0, 0);
        fake->baud = ota_load_u32le(data);
        break;
    case 0x13:
        md5_command(fake, op, data);
        break;
    case 0x14:
        security_info(fake, op);
        break;
    case 0xD1: {
        uint64_t offset = ota_load_u32le(data), size = ota_load_u32le(data + 4);
        if (offset % SECTOR != 0 || size % SECTOR != 0 || !ota_range_inside(offset, size, fake->options.flash_size)) {
            stub_reply(fake, op, 0, NULL, 0, 0xC0);
            break;
        }
        fake->erased_to = offset;
        fake->write_end = offset + size;
        fake->skips_blank = false;
        erase_up_to(fake, offset + size);
        stub_reply(fake, op, 0, NULL, 0, 0);
        break;
    }
    case 0xD2:
        fake->read_from = ota_load_u32le(data);
        fake->read_len = ota_load_u32le(data + 4);
        fake->read_sent = 0;
        if (!ota_range_inside(fake->read_from, fake->read_len, fake->options.flash_size)) {
            stub_reply(fake, op, 0, NULL, 0, 0xC0);
            break;
        }
        stub_reply(fake, op, 0, NULL, 0, 0);
        fake->reading = true;
        send_packet(fake);
        break;
    default: /* 0x0B */
        answer(fake, op, 0, 0);
        break;
    }
}

static void take_frame(fake_rom *fake) {
    size_t len = fake->in_len;
    fake->in_len = 0;
    fake->in_escape = false;
    if (len == 0 || (fake->mode != FAKE_ROM_ROM && fake->mode != FAKE_ROM_STUB)) {
        return;
    }
    if (fake->reading) {
        bool good = len == 4 && ota_load_u32le(fake->in) == fake->read_sent;
        fake->reading = good;
        if (good) {
            send_packet(fake);
        }
        return;
    }
    if (fake->mode == FAKE_ROM_STUB && fake->in_started_us < fake->frame_free_us) {
        fake->lost_frames++; /* both buffers are taken */
        return;
    }
    if (len > sizeof fake->in - 1 || len < 8) {
        return;
    }
    if (fake->busy_until_us < fake->now_us) {
        fake->busy_until_us = fake->now_us;
    }
    if (fake->in[0] != 0 || ota_load_u16le(fake->in + 2) != len - 8) {
        if (fake->mode == FAKE_ROM_STUB) {
            stub_reply(fake, fake->in[1], 0, NULL, 0, fake->in[0] != 0 ? 0xC3 : 0xC0);
        }
        return;
    }
    fake->frame_free_us = fake->busy_until_us;
    execute(fake, fake->in[1], fake->in + 8, len - 8, ota_load_u32le(fake->in + 4));
}

static void receive_byte(fake_rom *fake, uint8_t byte) {
    if (byte == 0xC0) {
        take_frame(fake);
        fake->in_started_us = fake->now_us;
        return;
    }
    if (fake->in_escape) {
        byte = byte == 0xDC ? 0xC0 : byte == 0xDD ? 0xDB : byte;
        fake->in_escape = false;
    } else if (byte == 0xDB) {
        fake->in_escape = true;
        return;
    }
    if (fake->in_len < sizeof fake->in) {
        fake->in[fake->in_len++] = byte;
    }
}

static void wire_byte(fake_rom *fake, uint8_t byte) {
    const fake_rom_faults *faults = &fake->faults;
    uint64_t number = ++fake->bytes_to_chip;
    fake->now_us += byte_us(fake->serial.baud);
    if (number == faults->reset_at) {
        restart(fake, faults->reset_into, faults->crash_text != NULL ? faults->crash_text : "");
        return;
    }
    if (number == faults->drop_in) {
        return;
    }
    if (fake->serial.baud != 0 &&
        (fake->serial.baud != fake->baud || (faults->baud_max != 0 && fake->baud > faults->baud_max))) {
        byte = (uint8_t)(byte * 37 + 11);
    }
    receive_byte(fake, number == faults->flip_in ? byte ^ 0x10 : byte);
    if (number == faults->double_in || number == faults->insert_in) {
        receive_byte(fake, number == faults->double_in ? byte : 0x55);
    }
}

/* ---- The port ------------------------------------------------------------------------------------------------------- */

/* A reset line rises slowly: the strap is looked at a little later. */
static void look_at_strap(fake_rom *fake) {
    if (fake->is_rising && fake->now_us >= fake->rises_at_us) {
        bool usb = fake->options.usb_vid == 0x303A;
        bool download = usb ? fake->latched_download : fake->dtr && !fake->rts;
        fake->is_rising = false;
        restart(fake, download && !fake->faults.strap_high ? FAKE_ROM_ROM : FAKE_ROM_APP, "");
    }
}

void fake_rom_pass(fake_rom *fake, uint32_t ms) {
    fake->now_us += (uint64_t)ms * 1000;
    look_at_strap(fake);
}

static int call(fake_rom *fake) {
    look_at_strap(fake);
    if (fake->is_woken) {
        return ECANCELED;
    }
    if (++fake->calls == fake->faults.fail_call) {
        fake->is_gone = fake->faults.fail_errnum == 0 || fake->faults.fail_errnum == ENODEV;
        return fake->faults.fail_errnum == 0 ? ENODEV : fake->faults.fail_errnum;
    }
    return fake->is_gone ? ENODEV : 0;
}

static int port_read(ota_serial *serial, void *buf, size_t len, uint64_t deadline_ms, size_t *got) {
    fake_rom *fake = of(serial);
    *got = 0;
    if (fake->is_rising && deadline_ms * 1000 > fake->rises_at_us && fake->now_us < fake->rises_at_us) {
        fake->now_us = fake->rises_at_us;
    }
    int errnum = call(fake);
    if (errnum != 0) {
        return errnum;
    }
    uint64_t deadline_us = deadline_ms > UINT64_MAX / 1000 ? UINT64_MAX : deadline_ms * 1000;
    if (fake->out_pos == fake->out_len || fake->out[fake->out_pos].at_us > fake->now_us) {
        uint64_t next = fake->out_pos < fake->out_len ? fake->out[fake->out_pos].at_us : UINT64_MAX;
        if (next > deadline_us) {
            fake->now_us = fake->now_us > deadline_us ? fake->now_us : deadline_us;
            return 0;
        }
        if (next == UINT64_MAX) {
            fake->is_stuck = true;
            return EDEADLK;
        }
        fake->now_us = next;
    }
    while (*got < len && fake->out_pos < fake->out_len && fake->out[fake->out_pos].at_us <= fake->now_us) {
        ((uint8_t *)buf)[(*got)++] = fake->out[fake->out_pos++].byte;
    }
    serial->reads++;
    serial->bytes_read += *got;
    if (fake->out_pos == fake->out_len) {
        fake->out_pos = fake->out_len = 0;
    }
    return 0;
}

static int port_write(ota_serial *serial, const void *buf, size_t len, uint64_t deadline_ms) {
    fake_rom *fake = of(serial);
    (void)deadline_ms;
    int errnum = call(fake);
    for (size_t i = 0; i < len && errnum == 0; i++) {
        wire_byte(fake, ((const uint8_t *)buf)[i]);
        errnum = fake->is_gone ? ENODEV : 0;
    }
    if (errnum == 0) {
        serial->writes++;
        serial->bytes_written += len;
    }
    return errnum;
}

static int port_set_lines(ota_serial *serial, bool dtr, bool rts) {
    fake_rom *fake = of(serial);
    int errnum = call(fake);
    if (errnum != 0 || !serial->has_lines) {
        return errnum != 0 ? errnum : ENOTTY;
    }
    bool held = fake->rts && !fake->dtr, holds = rts && !dtr;
    if (rts && !fake->rts) {
        fake->latched_download = dtr;
    }
    fake->dtr = dtr;
    fake->rts = rts;
    serial->line_changes++;
    if (holds) {
        fake->is_rising = false;
    } else if (held) {
        fake->is_rising = true;
        fake->rises_at_us = fake->now_us + (fake->options.usb_vid == 0x303A ? 0 : 1000);
        look_at_strap(fake);
    }
    return fake->is_gone ? ENODEV : 0;
}

static int port_set_baud(ota_serial *serial, uint32_t baud) {
    fake_rom *fake = of(serial);
    int errnum = call(fake);
    if (errnum != 0 || serial->baud == 0) {
        return errnum;
    }
    if (fake->faults.driver_baud_max != 0 && baud > fake->faults.driver_baud_max) {
        serial->baud = fake->faults.driver_baud_max;
        return EINVAL;
    }
    serial->baud = baud;
    serial->baud_changes++;
    return 0;
}

static int port_flush(ota_serial *serial) {
    fake_rom *fake = of(serial);
    int errnum = call(fake);
    if (errnum == 0) {
        fake->out_pos = fake->out_len = 0;
    }
    return errnum;
}

static uint64_t port_now_ms(ota_serial *serial) {
    return of(serial)->now_us / 1000;
}

static int port_wait_ms(ota_serial *serial, uint32_t ms) {
    fake_rom *fake = of(serial);
    int errnum = call(fake);
    if (errnum == 0) {
        fake_rom_pass(fake, ms);
    }
    return errnum;
}

static int port_reopen(ota_serial *serial, uint64_t deadline_ms) {
    fake_rom *fake = of(serial);
    (void)deadline_ms;
    fake->is_gone = false;
    int errnum = call(fake);
    if (errnum == 0) {
        serial->reopens++;
        fake->out_pos = fake->out_len = 0;
    }
    return errnum;
}

static void port_wake(ota_serial *serial) {
    of(serial)->is_woken = true;
}

static void port_rearm(ota_serial *serial) {
    of(serial)->is_woken = false;
}

static void port_close(ota_serial *serial) {
    (void)serial; /* who made the chip frees it */
}

static const ota_serial_ops ops = {
    .read = port_read,
    .write = port_write,
    .set_lines = port_set_lines,
    .set_baud = port_set_baud,
    .flush = port_flush,
    .now_ms = port_now_ms,
    .wait_ms = port_wait_ms,
    .reopen = port_reopen,
    .wake = port_wake,
    .rearm = port_rearm,
    .close = port_close,
};

void fake_rom_init(fake_rom *fake, const fake_rom_options *options) {
    memset(fake, 0, sizeof *fake);
    fake->options = *options;
    if (fake->options.flash_size == 0) {
        fake->options.flash_size = 4u << 20;
    }
    if (fake->options.flash_id == 0) {
        uint32_t code = 0;
        while (1ull << code < fake->options.flash_size) {
            code++;
        }
        fake->options.flash_id = code << 16 | 0x40EF;
    }
    fake->flash = malloc(fake->options.flash_size);
    if (fake->flash == NULL) {
        abort();
    }
    memset(fake->flash, 0xFF, fake->options.flash_size);
    fake->mode = options->starts;
    fake->attached = options->starts == FAKE_ROM_STUB;
    fake->baud = OTA_SERIAL_BAUD;
    fake->now_us = 1000000;
    memset(fake->reply, 0x5A, sizeof fake->reply);
    fake->serial.ops = &ops;
    fake->serial.name = "fake";
    fake->serial.baud = options->is_socket ? 0 : OTA_SERIAL_BAUD;
    fake->serial.has_lines = !options->no_lines && !options->is_socket;
    fake->serial.usb_vid = options->usb_vid;
    fake->serial.usb_pid = options->usb_pid;
    const chip_facts *chip = facts_of(fake);
    fake_rom_set_reg(fake, 0x40001000, chip->magic);
    fake_rom_set_reg(fake, chip->mac, 0x10203040 + chip->id);
    fake_rom_set_reg(fake, chip->mac + 4, 0x2462);
    fake_rom_set_reg(fake, chip->spi + chip->usr, 0x80000000);
    fake_rom_set_reg(fake, chip->spi + chip->usr2, 0x70000003);
    if (chip->id == 0) {
        fake_rom_set_reg(fake, 0x3FF5A000, options->flash_encrypted ? 1u << 20 : 0);
    }
}

void fake_rom_free(fake_rom *fake) {
    close_write(fake);
    free(fake->out);
    free(fake->flash);
    memset(fake, 0, sizeof *fake);
}
