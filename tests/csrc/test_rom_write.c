/* sources: flasher/rom_write.c flasher/rom_command.c flasher/slip.c base/status.c */
#include "base/bytes.h"
#include "check.h"
#include "flasher/rom_write.h"

static ota_rom_write session;
static ota_rom_request request;
static uint64_t ms;
static uint8_t block[OTA_ROM_STUB_BLOCK];

static uint32_t word(size_t i) {
    return ota_load_u32le(request.head + 4 * i);
}

TEST(a_stub_gets_the_exact_size_and_enough_blocks) {
    ota_flasher_write write = {.offset = 0x10000, .size = 100001, .deflated = true, .wire_bound = 0x4000};
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    CHECK_EQ(request.op, OTA_ROM_FLASH_DEFL_BEGIN);
    CHECK_EQ(word(0), 100001);
    CHECK(word(1) >= 2);
    CHECK_EQ(word(3), 0x10000);
    CHECK_EQ(request.head_len, 16);
    write.wire_bound = 0;
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    CHECK(session.wire_bound > write.size && word(1) * 0x4000 >= session.wire_bound);
}

TEST(a_rom_gets_whole_sectors_and_the_true_number_of_blocks) {
    ota_flasher_write write = {.offset = 0x10000, .size = 0x2001, .deflated = true, .wire_bound = 0x1801};
    ota_rom_write_begin(&session, &write, false, 5, 0x1800, 1, &request, &ms);
    CHECK_EQ(word(0), 0x3000); /* not the multiple of a block, which may reach into the sector behind */
    CHECK_EQ(word(1), 2);
    CHECK_EQ(request.head_len, 20);
    CHECK(ms >= 3 * 400);
    write.deflated = false;
    ota_rom_write_begin(&session, &write, false, 4, 0x1800, 2, &request, &ms);
    CHECK_EQ(request.op, OTA_ROM_FLASH_BEGIN);
    CHECK_EQ(word(0), 0x2001);
    CHECK_EQ(word(1), 2);
    CHECK_EQ(ms, 2 * (3000 + 3 * 400));
}

TEST(blocks_are_numbered_padded_and_settled) {
    ota_flasher_write write = {.offset = 0, .size = 0x1800 + 5};
    ota_rom_write_begin(&session, &write, false, 5, 0x1800, 1, &request, &ms);
    CHECK_EQ(ota_rom_write_block(&session, block, 0x1800, 0, &request, &ms, NULL), OTA_OK);
    CHECK_EQ(word(1), 0);
    CHECK_EQ(session.settled_len, 0);
    ota_rom_write_answered(&session);
    CHECK_EQ(session.settled_len, 0x1800);
    CHECK_EQ(ota_rom_write_block(&session, block, 5, 0, &request, &ms, NULL), OTA_OK);
    CHECK_EQ(word(1), 1);
    CHECK_EQ(word(0), 8);
    CHECK_EQ(request.padding, 3);
    ota_rom_write_answered(&session);
    CHECK_EQ(ota_rom_write_end(&session, &request, &ms, NULL), OTA_DONE);
    /* of a stub a block is settled by the answer to what follows */
    write.size = 0x8000;
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    CHECK_EQ(ota_rom_write_block(&session, block, 0x4000, 0, &request, &ms, NULL), OTA_OK);
    ota_rom_write_answered(&session);
    CHECK_EQ(session.settled_len, 0);
    CHECK_EQ(ota_rom_write_block(&session, block, 0x4000, 0, &request, &ms, NULL), OTA_OK);
    ota_rom_write_answered(&session);
    CHECK_EQ(session.settled_len, 0x4000);
    CHECK_EQ(ota_rom_write_end(&session, &request, &ms, NULL), OTA_OK);
    CHECK_EQ(request.op, OTA_ROM_FLASH_END);
}

TEST(nothing_beyond_the_announced_is_made) {
    ota_error error = {0};
    ota_flasher_write write = {.offset = 0x1000, .size = 100};
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    CHECK_EQ(ota_rom_write_block(&session, block, 101, 0, &request, &ms, &error), OTA_ERR_SIZE);
    CHECK_EQ(error.offset, 0x1000);
    CHECK_EQ(ota_rom_write_end(&session, &request, &ms, NULL), OTA_ERR_SIZE);
    write.deflated = true;
    write.wire_bound = 50;
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    CHECK_EQ(ota_rom_write_block(&session, block, 51, 1, &request, &ms, NULL), OTA_ERR_SIZE);
    CHECK_EQ(ota_rom_write_block(&session, block, 10, 101, &request, &ms, NULL), OTA_ERR_SIZE);
    CHECK_EQ(ota_rom_write_block(&session, block, 10, UINT64_MAX, &request, &ms, NULL), OTA_ERR_SIZE);
    CHECK_EQ(ota_rom_write_block(&session, block, 50, 100, &request, &ms, NULL), OTA_OK);
}

TEST(time_outs_grow_with_the_work) {
    CHECK_EQ(ota_rom_erase_ms(0), 3000);
    CHECK_EQ(ota_rom_erase_ms(1), 3400);
    CHECK(ota_rom_write_ms(327680) > 23400); /* what a slow flash needed */
    CHECK(ota_rom_md5_ms(1000000) >= 8000);
    CHECK_EQ(ota_rom_wire_ms(11520, 115200), 1001);
    CHECK_EQ(ota_rom_wire_ms(11520, 0), 1001);
    /* a deflated block that yielded much makes the next one wait */
    ota_flasher_write write = {.size = 10 << 20, .deflated = true};
    ota_rom_write_begin(&session, &write, true, 4, 0x4000, 1, &request, &ms);
    uint64_t first, second;
    CHECK_EQ(ota_rom_write_block(&session, block, 0x4000, 1 << 20, &request, &first, NULL), OTA_OK);
    CHECK_EQ(ota_rom_write_block(&session, block, 0x4000, 1, &request, &second, NULL), OTA_OK);
    CHECK(second > first + 256 * 400);
}

int main(void) {
    RUN(a_stub_gets_the_exact_size_and_enough_blocks);
    RUN(a_rom_gets_whole_sectors_and_the_true_number_of_blocks);
    RUN(blocks_are_numbered_padded_and_settled);
    RUN(nothing_beyond_the_announced_is_made);
    RUN(time_outs_grow_with_the_work);
    return DONE();
}
