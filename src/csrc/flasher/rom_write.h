/* How long work on the flash may take, and write sessions: what may be sent, in which blocks, numbered how. No I/O, no clock.
 *
 * Source: esp-serial-protocol.md 9, 12.2, 13. */
#ifndef OTA_FLASHER_ROM_WRITE_H
#define OTA_FLASHER_ROM_WRITE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "flasher/flasher.h"
#include "flasher/rom_command.h"

/* ---- Time-outs ---------------------------------------------------------------------------------------------------
 * Milliseconds that work may take at most, computed from datasheet maxima and what users measured: a sector 400 ms, a page 3 ms,
 * MD5 8 s for 10^6 bytes; never below OTA_ROM_REPLY_MS. */

enum {
    OTA_ROM_REPLY_MS = 3000,  /* any command without work */
    OTA_ROM_SYNC_MS = 100,    /* SYNC */
    OTA_ROM_MEM_END_MS = 200, /* MEM_END, whose reply a ROM may not send */
    OTA_ROM_OHAI_MS = 3000,   /* the stub's greeting */
    OTA_ROM_DRAIN_MS = 200,   /* quiet needed after an unsupported command */
    OTA_ROM_SECTOR_ERASE_MS = 400,
    OTA_ROM_SECTOR_PROGRAM_MS = 48,
};
uint64_t ota_rom_erase_ms(uint64_t len);
uint64_t ota_rom_write_ms(uint64_t len); /* erase and program */
uint64_t ota_rom_md5_ms(uint64_t len);
/* On the wire at `baud` (0: no rate, as 115200). */
uint64_t ota_rom_wire_ms(uint64_t bytes, uint32_t baud);

/* ---- Write sessions -----------------------------------------------------------------------------------------------
 * Checks what may be sent, numbers blocks, and computes time-outs. A failed block ends the session: a ROM never takes the same
 * number again, a stub reports a block's failure one command late and drops that command. */

typedef struct ota_rom_write {
    bool is_open;
    bool is_stub;
    bool deflated;
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
