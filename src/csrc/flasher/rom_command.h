/* Commands of the ESP32 boot ROM and of stub version 2: requests as bytes, replies taken apart by position. No I/O, no state.
 *
 * Source: esp-serial-protocol.md 2, 3. All numbers are little-endian on the wire. */
#ifndef OTA_FLASHER_ROM_COMMAND_H
#define OTA_FLASHER_ROM_COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef enum ota_rom_op {
    OTA_ROM_FLASH_BEGIN = 0x02,
    OTA_ROM_FLASH_DATA = 0x03,
    OTA_ROM_FLASH_END = 0x04, /* to a stub only: ROMs stop answering */
    OTA_ROM_MEM_BEGIN = 0x05,
    OTA_ROM_MEM_END = 0x06,
    OTA_ROM_MEM_DATA = 0x07,
    OTA_ROM_SYNC = 0x08,
    OTA_ROM_WRITE_REG = 0x09,
    OTA_ROM_READ_REG = 0x0A,
    OTA_ROM_SPI_SET_PARAMS = 0x0B,
    OTA_ROM_SPI_ATTACH = 0x0D,
    OTA_ROM_READ_FLASH_SLOW = 0x0E, /* ROM only */
    OTA_ROM_CHANGE_BAUDRATE = 0x0F,
    OTA_ROM_FLASH_DEFL_BEGIN = 0x10,
    OTA_ROM_FLASH_DEFL_DATA = 0x11,
    OTA_ROM_FLASH_DEFL_END = 0x12,
    OTA_ROM_SPI_FLASH_MD5 = 0x13,
    OTA_ROM_GET_SECURITY_INFO = 0x14,
    OTA_ROM_ERASE_FLASH = 0xD0, /* from here on: stub only */
    OTA_ROM_ERASE_REGION = 0xD1,
    OTA_ROM_READ_FLASH = 0xD2,
} ota_rom_op;

enum {
    OTA_ROM_HEADER_SIZE = 8,
    OTA_ROM_DATA_HEADER_SIZE = 16, /* in front of the bytes of a DATA command */
    OTA_ROM_BLOCK_MAX = 0x1800,    /* bytes of one DATA command that a ROM takes; measured, 0x2000 is refused */
    OTA_ROM_BLOCK_SMALL = 0x400,   /* what every ROM takes */
    OTA_ROM_STUB_BLOCK = 0x4000,   /* ... that a stub takes */
    OTA_ROM_OTG_BLOCK = 0x800,     /* ... over USB-OTG, ROM and stub */
    OTA_ROM_READ_SLOW_MAX = 64,    /* bytes of one READ_FLASH_SLOW */
    OTA_ROM_READ_PACKET = 0x1000,  /* bytes of one frame of READ_FLASH */
    OTA_ROM_REG_WRITES_MAX = 24,   /* entries of one WRITE_REG that fit our request */
    OTA_ROM_SYNC_REPLIES = 8,
    OTA_ROM_SECURITY_INFO_SIZE = 20, /* 12 on the ESP32-S2 */
    OTA_ROM_SECURITY_INFO_SIZE_S2 = 12,
    OTA_ROM_REPLY_MAX = 0x1100, /* bytes of the longest frame that a chip sends, READ_FLASH included */
};

/* "FLASH_DEFL_DATA"; "?" for an opcode that is not listed. Lives for ever. */
const char *ota_rom_op_name(uint8_t op);

/* One request. Made by the functions below; `payload` is borrowed until it was encoded. */
typedef struct ota_rom_request {
    uint8_t op;
    bool repeatable;        /* sending it again after its reply got lost does no harm */
    uint32_t checksum;      /* of the payload of DATA commands; else 0 */
    uint16_t reply_len;     /* bytes of a good reply before its status bytes */
    uint16_t head_len;      /* bytes of head in front of the payload */
    const uint8_t *payload; /* bytes after head; may be NULL */
    size_t payload_len;
    uint32_t padding; /* bytes 0xFF after the payload, counted and summed with it */
    uint8_t head[16 * OTA_ROM_REG_WRITES_MAX];
} ota_rom_request;

typedef struct ota_rom_reg_write {
    uint32_t address, value;
    uint32_t mask;     /* new = (old & ~mask) | (value & mask) */
    uint32_t delay_us; /* before the write */
} ota_rom_reg_write;

void ota_rom_sync(ota_rom_request *request);
void ota_rom_read_reg(ota_rom_request *request, uint32_t address);
/* 1..OTA_ROM_REG_WRITES_MAX entries, carried out in order; more are cut off. */
void ota_rom_write_regs(ota_rom_request *request, const ota_rom_reg_write *writes, size_t count);
void ota_rom_get_security_info(ota_rom_request *request);
void ota_rom_change_baudrate(ota_rom_request *request, uint32_t baud, uint32_t old_baud); /* old: 0 to a ROM */
void ota_rom_spi_attach(ota_rom_request *request, bool to_stub, uint32_t pins);
void ota_rom_spi_set_params(ota_rom_request *request, uint32_t flash_size);
void ota_rom_mem_begin(ota_rom_request *request, uint32_t size, uint32_t blocks, uint32_t block_size, uint32_t address);
void ota_rom_mem_end(ota_rom_request *request, uint32_t entry); /* 0: stay in the loader */
/* FLASH_BEGIN, or with `deflated` FLASH_DEFL_BEGIN. `words` 4, or 5 with `encrypt` as the fifth. */
void ota_rom_flash_begin(ota_rom_request *request, bool deflated, uint32_t size, uint32_t blocks, uint32_t block_size,
                         uint32_t offset, unsigned words, bool encrypt);
/* MEM_DATA, FLASH_DATA or FLASH_DEFL_DATA with block number `seq`. */
void ota_rom_data(ota_rom_request *request, ota_rom_op op, const uint8_t *bytes, size_t len, size_t padding,
                  uint32_t seq);
/* FLASH_END or FLASH_DEFL_END that stays in the loader. */
void ota_rom_flash_end(ota_rom_request *request, bool deflated);
void ota_rom_flash_md5(ota_rom_request *request, bool to_stub, uint32_t offset, uint32_t size);
void ota_rom_erase_region(ota_rom_request *request, uint32_t offset, uint32_t size);
void ota_rom_erase_flash(ota_rom_request *request);
void ota_rom_read_flash(ota_rom_request *request, uint32_t offset, uint32_t len, uint32_t packet);
void ota_rom_read_flash_slow(ota_rom_request *request, uint32_t offset, uint32_t len);

/* Bytes of a request before escaping. */
size_t ota_rom_request_size(const ota_rom_request *request);

/* Writes the request as a SLIP frame; returns its bytes, or 0 when `capacity` is below OTA_SLIP_FRAME_MAX of its size. */
size_t ota_rom_request_encode(const ota_rom_request *request, uint8_t *out, size_t capacity);

/* 0xEF and all bytes XORed: finds single flipped bits only. Continues from `sum`; start with OTA_ROM_CHECKSUM_SEED. */
#define OTA_ROM_CHECKSUM_SEED 0xEFu
uint8_t ota_rom_checksum(uint8_t sum, const uint8_t *bytes, size_t len);

typedef struct ota_rom_reply {
    uint8_t op;
    uint8_t status;      /* 0: success, whatever follows */
    uint8_t error;       /* stale when status is 0 */
    uint32_t value;      /* stale unless the command sets it */
    const uint8_t *data; /* bytes before the status, in the frame that was decoded */
    size_t data_len;     /* reply_len of the request, or 12 for the security info of an S2; 0 when status is not 0 */
} ota_rom_reply;

typedef enum ota_rom_match {
    OTA_ROM_NO_REPLY,    /* no reply at all: too short, a wrong direction, its size and length differ */
    OTA_ROM_FOREIGN,     /* a whole reply to something else */
    OTA_ROM_UNSUPPORTED, /* the boot ROM's answer to an opcode it does not know: under another opcode, 01 05 */
    OTA_ROM_REPLY,       /* the reply to this request, good or bad */
} ota_rom_match;

/* Looks at an unescaped frame as an answer to `request`. `*reply` is set unless NO_REPLY. */
ota_rom_match ota_rom_reply_decode(const ota_rom_request *request, const uint8_t *frame, size_t len,
                                   ota_rom_reply *reply);

/* What a status and error byte mean, in words; lives for ever. Error bytes of ROMs and status bytes of stubs differ. */
const char *ota_rom_error_text(bool from_stub, uint8_t status, uint8_t error);

typedef struct ota_rom_security_info {
    uint32_t flags; /* OTA_ROM_SECURE_* */
    uint8_t flash_crypt_count;
    uint8_t key_purposes[7];
    bool has_chip_id;
    uint32_t chip_id;     /* has_chip_id only */
    uint32_t eco_version; /* has_chip_id only */
} ota_rom_security_info;

enum {
    OTA_ROM_SECURE_BOOT = 1 << 0,
    OTA_ROM_SECURE_DOWNLOAD = 1 << 2,
};

/* ERR_CHIP_PROTOCOL unless 12 or 20 bytes. */
ota_status ota_rom_security_info_decode(const uint8_t *data, size_t len, ota_rom_security_info *info);
/* Flash encryption is on when the count has an odd number of 1 bits. */
bool ota_rom_is_flash_encrypted(uint32_t flash_crypt_count);

#endif
