/* Requests as bytes, replies taken apart; see rom_command.h. */
#include "flasher/rom_command.h"

#include <string.h>

#include "base/bytes.h"
#include "flasher/slip.h"

#define STUB_STATUS_LEN 2u
#define ROM_STATUS_LEN 4u
#define ROM_BAD_FORMAT 0x05
#define FLASH_PAGE 0x100u

const char *ota_rom_op_name(uint8_t op) {
    switch ((ota_rom_op)op) {
    case OTA_ROM_FLASH_BEGIN:
        return "FLASH_BEGIN";
    case OTA_ROM_FLASH_DATA:
        return "FLASH_DATA";
    case OTA_ROM_FLASH_END:
        return "FLASH_END";
    case OTA_ROM_MEM_BEGIN:
        return "MEM_BEGIN";
    case OTA_ROM_MEM_END:
        return "MEM_END";
    case OTA_ROM_MEM_DATA:
        return "MEM_DATA";
    case OTA_ROM_SYNC:
        return "SYNC";
    case OTA_ROM_WRITE_REG:
        return "WRITE_REG";
    case OTA_ROM_READ_REG:
        return "READ_REG";
    case OTA_ROM_SPI_SET_PARAMS:
        return "SPI_SET_PARAMS";
    case OTA_ROM_SPI_ATTACH:
        return "SPI_ATTACH";
    case OTA_ROM_READ_FLASH_SLOW:
        return "READ_FLASH_SLOW";
    case OTA_ROM_CHANGE_BAUDRATE:
        return "CHANGE_BAUDRATE";
    case OTA_ROM_FLASH_DEFL_BEGIN:
        return "FLASH_DEFL_BEGIN";
    case OTA_ROM_FLASH_DEFL_DATA:
        return "FLASH_DEFL_DATA";
    case OTA_ROM_FLASH_DEFL_END:
        return "FLASH_DEFL_END";
    case OTA_ROM_SPI_FLASH_MD5:
        return "SPI_FLASH_MD5";
    case OTA_ROM_GET_SECURITY_INFO:
        return "GET_SECURITY_INFO";
    case OTA_ROM_ERASE_FLASH:
        return "ERASE_FLASH";
    case OTA_ROM_ERASE_REGION:
        return "ERASE_REGION";
    case OTA_ROM_READ_FLASH:
        return "READ_FLASH";
    }
    return "?";
}

/* ---- Requests ---------------------------------------------------------------------------------------------------- */

static void start(ota_rom_request *request, ota_rom_op op, bool repeatable, uint16_t reply_len) {
    request->op = (uint8_t)op;
    request->repeatable = repeatable;
    request->checksum = 0;
    request->reply_len = reply_len;
    request->head_len = 0;
    request->payload = NULL;
    request->payload_len = 0;
    request->padding = 0;
}

static void add(ota_rom_request *request, uint32_t word) {
    ota_store_u32le(request->head + request->head_len, word);
    request->head_len += 4;
}

void ota_rom_sync(ota_rom_request *request) {
    static const uint8_t greeting[] = {0x07, 0x07, 0x12, 0x20};
    start(request, OTA_ROM_SYNC, false, 0); /* who syncs counts its tries */
    memcpy(request->head, greeting, sizeof greeting);
    memset(request->head + sizeof greeting, 0x55, 32);
    request->head_len = sizeof greeting + 32;
}

void ota_rom_read_reg(ota_rom_request *request, uint32_t address) {
    start(request, OTA_ROM_READ_REG, true, 0);
    add(request, address);
}

void ota_rom_write_regs(ota_rom_request *request, const ota_rom_reg_write *writes, size_t count) {
    start(request, OTA_ROM_WRITE_REG, true, 0);
    for (size_t i = 0; i < count && i < OTA_ROM_REG_WRITES_MAX; i++) {
        add(request, writes[i].address);
        add(request, writes[i].value);
        add(request, writes[i].mask);
        add(request, writes[i].delay_us);
    }
}

void ota_rom_get_security_info(ota_rom_request *request) {
    start(request, OTA_ROM_GET_SECURITY_INFO, true, OTA_ROM_SECURITY_INFO_SIZE);
}

void ota_rom_change_baudrate(ota_rom_request *request, uint32_t baud, uint32_t old_baud) {
    start(request, OTA_ROM_CHANGE_BAUDRATE, false, 0);
    add(request, baud);
    add(request, old_baud);
}

void ota_rom_spi_attach(ota_rom_request *request, bool to_stub, uint32_t pins) {
    start(request, OTA_ROM_SPI_ATTACH, true, 0);
    add(request, pins);
    if (!to_stub) { /* a stub refuses the second word */
        add(request, 0);
    }
}

void ota_rom_spi_set_params(ota_rom_request *request, uint32_t flash_size) {
    start(request, OTA_ROM_SPI_SET_PARAMS, true, 0);
    add(request, 0);
    add(request, flash_size);
    add(request, 0x10000);
    add(request, 0x1000);
    add(request, FLASH_PAGE);
    add(request, 0xFFFF);
}

void ota_rom_mem_begin(ota_rom_request *request, uint32_t size, uint32_t blocks, uint32_t block_size,
                       uint32_t address) {
    start(request, OTA_ROM_MEM_BEGIN, true, 0);
    add(request, size);
    add(request, blocks);
    add(request, block_size);
    add(request, address);
}

void ota_rom_mem_end(ota_rom_request *request, uint32_t entry) {
    start(request, OTA_ROM_MEM_END, false, 0);
    add(request, entry == 0);
    add(request, entry);
}

void ota_rom_flash_begin(ota_rom_request *request, bool deflated, uint32_t size, uint32_t blocks, uint32_t block_size,
                         uint32_t offset, unsigned words, bool encrypt) {
    start(request, deflated ? OTA_ROM_FLASH_DEFL_BEGIN : OTA_ROM_FLASH_BEGIN, true, 0);
    add(request, size);
    add(request, blocks);
    add(request, block_size);
    add(request, offset);
    if (words > 4) {
        add(request, encrypt);
    }
}

void ota_rom_data(ota_rom_request *request, ota_rom_op op, const uint8_t *bytes, size_t len, size_t padding,
                  uint32_t seq) {
    start(request, op, false, 0);
    add(request, (uint32_t)(len + padding));
    add(request, seq);
    add(request, 0);
    add(request, 0);
    request->payload = bytes;
    request->payload_len = len;
    request->padding = (uint32_t)padding;
    request->checksum = ota_rom_checksum(OTA_ROM_CHECKSUM_SEED, bytes, len);
    if (padding % 2 != 0) {
        request->checksum ^= 0xFF;
    }
}

void ota_rom_flash_end(ota_rom_request *request, bool deflated) {
    start(request, deflated ? OTA_ROM_FLASH_DEFL_END : OTA_ROM_FLASH_END, false, 0);
    add(request, 1);
}

void ota_rom_flash_md5(ota_rom_request *request, bool to_stub, uint32_t offset, uint32_t size) {
    start(request, OTA_ROM_SPI_FLASH_MD5, true, to_stub ? 16 : 32);
    add(request, offset);
    add(request, size);
    add(request, 0);
    add(request, 0);
}

void ota_rom_erase_region(ota_rom_request *request, uint32_t offset, uint32_t size) {
    start(request, OTA_ROM_ERASE_REGION, true, 0);
    add(request, offset);
    add(request, size);
}

void ota_rom_erase_flash(ota_rom_request *request) {
    start(request, OTA_ROM_ERASE_FLASH, true, 0);
}

void ota_rom_read_flash(ota_rom_request *request, uint32_t offset, uint32_t len, uint32_t packet) {
    start(request, OTA_ROM_READ_FLASH, false, 0); /* raw frames follow its reply */
    add(request, offset);
    add(request, len);
    add(request, packet);
    add(request, 1); /* unacknowledged packets: a stub of version 2 allows one, whatever is asked */
}

void ota_rom_read_flash_slow(ota_rom_request *request, uint32_t offset, uint32_t len) {
    start(request, OTA_ROM_READ_FLASH_SLOW, true, OTA_ROM_READ_SLOW_MAX);
    add(request, offset);
    add(request, len);
}

size_t ota_rom_request_size(const ota_rom_request *request) {
    return OTA_ROM_HEADER_SIZE + request->head_len + request->payload_len + request->padding;
}

size_t ota_rom_request_encode(const ota_rom_request *request, uint8_t *out, size_t capacity) {
    size_t size = ota_rom_request_size(request);
    if (size - OTA_ROM_HEADER_SIZE > UINT16_MAX || capacity < OTA_SLIP_FRAME_MAX(size)) {
        return 0;
    }
    uint8_t header[OTA_ROM_HEADER_SIZE] = {0, request->op};
    ota_store_u16le(header + 2, (uint16_t)(size - OTA_ROM_HEADER_SIZE));
    ota_store_u32le(header + 4, request->checksum);
    uint8_t *to = out;
    to += ota_slip_delimit(to);
    to += ota_slip_escape(to, header, sizeof header);
    to += ota_slip_escape(to, request->head, request->head_len);
    to += ota_slip_escape(to, request->payload, request->payload_len);
    memset(to, 0xFF, request->padding);
    to += request->padding;
    to += ota_slip_delimit(to);
    return (size_t)(to - out);
}

uint8_t ota_rom_checksum(uint8_t sum, const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++) {
        sum ^= bytes[i];
    }
    return sum;
}

/* ---- Replies ----------------------------------------------------------------------------------------------------- */

ota_rom_match ota_rom_reply_decode(const ota_rom_request *request, const uint8_t *frame, size_t len,
                                   ota_rom_reply *reply) {
    if (len < OTA_ROM_HEADER_SIZE + STUB_STATUS_LEN || frame[0] != 1 ||
        ota_load_u16le(frame + 2) != len - OTA_ROM_HEADER_SIZE) {
        return OTA_ROM_NO_REPLY;
    }
    const uint8_t *data = frame + OTA_ROM_HEADER_SIZE;
    size_t size = len - OTA_ROM_HEADER_SIZE;
    bool ours = frame[1] == request->op;
    /* Where the status is: behind the data of a good reply when that fits; a refusal may come without data. */
    size_t data_len = ours ? request->reply_len : 0;
    if (size < data_len + STUB_STATUS_LEN) {
        bool short_info =
            request->op == OTA_ROM_GET_SECURITY_INFO && size >= OTA_ROM_SECURITY_INFO_SIZE_S2 + STUB_STATUS_LEN;
        data_len = short_info ? OTA_ROM_SECURITY_INFO_SIZE_S2 : 0;
    }
    reply->op = frame[1];
    reply->value = ota_load_u32le(frame + 4);
    reply->status = data[data_len];
    reply->error = data[data_len + 1];
    reply->data = data;
    reply->data_len = reply->status == 0 ? data_len : 0;
    if (!ours) {
        return size <= ROM_STATUS_LEN && reply->status != 0 && reply->error == ROM_BAD_FORMAT ? OTA_ROM_UNSUPPORTED
                                                                                              : OTA_ROM_FOREIGN;
    }
    if (reply->status == 0 && data_len == 0 && request->reply_len > 0) {
        return OTA_ROM_NO_REPLY; /* says success without what was asked for: part of another reply */
    }
    return OTA_ROM_REPLY;
}

typedef struct error_text {
    uint8_t code;
    const char *text;
} error_text;

static const error_text rom_errors[] = {
    {0x00, "undefined error"},
    {0x01, "bad parameter"},
    {0x02, "out of memory"},
    {0x03, "sending failed"},
    {0x04, "receiving failed"},
    {0x05, "bad format, unknown command or wrong sequence number"},
    {0x06, "understood, but carrying it out failed"},
    {0x07, "wrong checksum"},
    {0x08, "flash write error: what was read back differs"},
    {0x09, "flash read error"},
    {0x0A, "wrong read length"},
    {0x0B, "inflating failed"},
    {0x0C, "wrong Adler-32 checksum"},
    {0x0D, "bad inflate parameter"},
    {0x0E, "wrong RAM image size"},
    {0x0F, "wrong RAM address"},
    {0x64, "bad parameter"},
    {0x65, "bad format"},
    {0x66, "description too long"},
    {0x67, "bad encoding"},
    {0x69, "no storage"},
};

static const error_text stub_errors[] = {
    {0xC0, "wrong length"},           {0xC1, "wrong checksum"},       {0xC2, "wrong block size"},
    {0xC3, "unknown command"},        {0xC4, "SPI operation failed"}, {0xC5, "SPI unlock failed"},
    {0xC6, "no flash write is open"}, {0xC7, "inflating failed"},     {0xC8, "too little data"},
    {0xC9, "too much data"},          {0xCA, "NAND program failed"},  {0xCB, "NAND erase failed"},
    {0xFF, "not implemented"},
};

static const char *look_up(const error_text *rows, size_t count, uint8_t code) {
    for (size_t i = 0; i < count; i++) {
        if (rows[i].code == code) {
            return rows[i].text;
        }
    }
    return "unknown error";
}

const char *ota_rom_error_text(bool from_stub, uint8_t status, uint8_t error) {
    if (status == 0) {
        return "success";
    }
    return from_stub ? look_up(stub_errors, sizeof stub_errors / sizeof stub_errors[0], status)
                     : look_up(rom_errors, sizeof rom_errors / sizeof rom_errors[0], error);
}

ota_status ota_rom_security_info_decode(const uint8_t *data, size_t len, ota_rom_security_info *info) {
    if (len != OTA_ROM_SECURITY_INFO_SIZE && len != OTA_ROM_SECURITY_INFO_SIZE_S2) {
        return OTA_ERR_CHIP_PROTOCOL;
    }
    info->flags = ota_load_u32le(data);
    info->flash_crypt_count = data[4];
    memcpy(info->key_purposes, data + 5, sizeof info->key_purposes);
    info->has_chip_id = len == OTA_ROM_SECURITY_INFO_SIZE;
    info->chip_id = info->has_chip_id ? ota_load_u32le(data + 12) : 0;
    info->eco_version = info->has_chip_id ? ota_load_u32le(data + 16) : 0;
    return OTA_OK;
}

bool ota_rom_is_flash_encrypted(uint32_t flash_crypt_count) {
    return __builtin_popcount(flash_crypt_count) % 2 != 0;
}
