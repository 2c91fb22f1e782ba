/* Time-outs of flash work, and write sessions; see rom_write.h. */
#include "flasher/rom_write.h"

#include "base/bytes.h"
#include "port/port.h"

#define FLASH_BLOCK 0x10000u /* the larger erase unit, which a stub uses where it can */
#define INFLATE_UNIT 0x8000u /* a stub programs inflated data in pieces of this size */
#define MD5_MS_PER_MB 8000u
#define MB 1000000u
#define BITS_PER_BYTE 10u /* start and stop bit with it */
#define ROM_PADDING 4u    /* a ROM programs words */

/* ---- Time-outs --------------------------------------------------------------------------------------------------- */

static uint64_t sectors(uint64_t len) {
    return len / OTA_FLASH_SECTOR + (len % OTA_FLASH_SECTOR != 0);
}

uint64_t ota_rom_erase_ms(uint64_t len) {
    return OTA_ROM_REPLY_MS + sectors(len) * OTA_ROM_SECTOR_ERASE_MS;
}

uint64_t ota_rom_write_ms(uint64_t len) {
    return OTA_ROM_REPLY_MS + sectors(len) * (OTA_ROM_SECTOR_ERASE_MS + OTA_ROM_SECTOR_PROGRAM_MS);
}

uint64_t ota_rom_md5_ms(uint64_t len) {
    return OTA_ROM_REPLY_MS + len * MD5_MS_PER_MB / MB;
}

uint64_t ota_rom_wire_ms(uint64_t bytes, uint32_t baud) {
    return bytes * BITS_PER_BYTE * 1000 / (baud == 0 ? (uint32_t)OTA_SERIAL_BAUD : baud) + 1;
}

/* ---- Write sessions ---------------------------------------------------------------------------------------------- */

/* What zlib can need for `size` bytes at most, with some room for flush points. */
static uint64_t deflate_bound(uint64_t size) {
    return size + size / 1000 + size / 16384 * 16 + 1024;
}

static uint32_t blocks_of(uint64_t bytes, uint32_t block_size) {
    return (uint32_t)((bytes + block_size - 1) / block_size);
}

void ota_rom_write_begin(ota_rom_write *session, const ota_flasher_write *write, bool is_stub, unsigned begin_words,
                         uint32_t block_size, uint32_t slow, ota_rom_request *request, uint64_t *ms) {
    *session = (ota_rom_write){
        .is_open = true,
        .is_stub = is_stub,
        .deflated = write->deflated,
        .block_size = block_size,
        .offset = write->offset,
        .size = write->size,
        .wire_bound = !write->deflated         ? write->size
                      : write->wire_bound != 0 ? write->wire_bound
                                               : deflate_bound(write->size),
        .slow = slow,
    };
    /* A stub wants the exact size: with less it hangs when the stream yields more. It uses the number of blocks only as a bound.
     * A ROM erases all sectors that the size touches, and nothing beyond them. */
    uint64_t size = is_stub || !write->deflated ? write->size : ota_round_up(write->size, OTA_FLASH_SECTOR);
    uint32_t blocks = blocks_of(session->wire_bound, block_size) + (is_stub && write->deflated ? 1 : 0);
    ota_rom_flash_begin(request, write->deflated, (uint32_t)size, blocks, block_size, (uint32_t)write->offset,
                        begin_words, write->encrypt);
    *ms = (is_stub ? ota_rom_erase_ms(FLASH_BLOCK) : ota_rom_erase_ms(write->size)) * slow;
}

ota_status ota_rom_write_block(ota_rom_write *session, const uint8_t *bytes, size_t len, uint64_t inflated_len,
                               ota_rom_request *request, uint64_t *ms, ota_error *error) {
    uint64_t content = session->deflated ? inflated_len : len;
    if (content > session->size - session->content_len) {
        return ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_TARGET, session->offset + session->content_len, 0,
                             "%llu bytes of content were announced, and more came", (unsigned long long)session->size);
    }
    if (len > session->wire_bound - session->wire_len) {
        return ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_TARGET, session->offset + session->content_len, 0,
                             "%llu bytes of compressed data were announced, and more came",
                             (unsigned long long)session->wire_bound);
    }
    size_t padding = session->is_stub || session->deflated ? 0 : (ROM_PADDING - len % ROM_PADDING) % ROM_PADDING;
    ota_rom_data(request, session->deflated ? OTA_ROM_FLASH_DEFL_DATA : OTA_ROM_FLASH_DATA, bytes, len, padding,
                 session->seq);
    /* A stub answers when it has taken the block before: all of its content, and the erases that run ahead of it. A ROM
     * answers when this one lies in flash; what a deflated block yields is known by the piece only. */
    uint64_t work = session->is_stub ? session->previous + FLASH_BLOCK * (session->previous / INFLATE_UNIT + 2)
                                     : content + (session->deflated ? INFLATE_UNIT : 0);
    *ms = ota_rom_write_ms(work) * session->slow;
    session->seq++;
    session->wire_len += len;
    session->content_len += content;
    session->previous = content;
    return OTA_OK;
}

void ota_rom_write_answered(ota_rom_write *session) {
    session->settled_len = session->content_len - (session->is_stub ? session->previous : 0);
}

ota_status ota_rom_write_end(ota_rom_write *session, ota_rom_request *request, uint64_t *ms, ota_error *error) {
    if (session->content_len != session->size) {
        return ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_TARGET, session->offset + session->content_len, 0,
                             "%llu bytes of content were announced, %llu came", (unsigned long long)session->size,
                             (unsigned long long)session->content_len);
    }
    if (!session->is_stub) { /* FLASH_END makes some ROMs deaf, and the last block's answer said all */
        session->settled_len = session->size;
        return OTA_DONE;
    }
    ota_rom_flash_end(request, session->deflated);
    *ms = ota_rom_write_ms(session->previous + FLASH_BLOCK * (session->previous / INFLATE_UNIT + 2)) * session->slow;
    return OTA_OK;
}
