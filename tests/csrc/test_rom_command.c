/* sources: flasher/rom_command.c flasher/slip.c */
#include <stdlib.h>

#include "check.h"
#include "flasher/rom_command.h"
#include "flasher/slip.h"

static uint8_t frame[OTA_SLIP_FRAME_MAX(0x11000)];

/* The request as it goes out, unescaped. */
static size_t encode(const ota_rom_request *request, uint8_t *out) {
    size_t len = ota_rom_request_encode(request, frame, sizeof frame), used;
    CHECK(len > 0);
    ota_slip_decoder decoder;
    ota_slip_init(&decoder, out, 0x5000);
    CHECK_EQ(ota_slip_step(&decoder, frame, len, &used), OTA_DONE);
    CHECK_EQ(used, len);
    CHECK_EQ(decoder.kind, OTA_SLIP_FRAME);
    CHECK_EQ(decoder.len, ota_rom_request_size(request));
    return decoder.len;
}

static void check_request(const ota_rom_request *request, const char *hex) {
    static uint8_t out[0x5000];
    char text[2048] = "";
    size_t len = encode(request, out);
    for (size_t i = 0; i < len; i++) {
        snprintf(text + 2 * i, 3, "%02x", out[i]);
    }
    CHECK(strcmp(text, hex) == 0);
    if (strcmp(text, hex) != 0) {
        printf("  %s, expected\n  %s\n", text, hex);
    }
}

TEST(requests_have_the_bytes_of_the_sheet) {
    ota_rom_request r;
    ota_rom_sync(&r);
    check_request(&r, "0008240000000000070712205555555555555555555555555555555555555555555555555555555555555555");
    ota_rom_read_reg(&r, 0x40001000);
    check_request(&r, "000a04000000000000100040");
    ota_rom_write_regs(&r, (ota_rom_reg_write[]){{1, 2, 3, 4}, {5, 6, 7, 8}}, 2);
    check_request(&r, "000920000000000001000000020000000300000004000000"
                      "05000000060000000700000008000000");
    ota_rom_get_security_info(&r);
    check_request(&r, "0014000000000000");
    ota_rom_change_baudrate(&r, 921600, 115200);
    check_request(&r, "000f08000000000000100e0000c20100");
    ota_rom_spi_attach(&r, false, 0);
    check_request(&r, "000d0800000000000000000000000000");
    ota_rom_spi_attach(&r, true, 1);
    check_request(&r, "000d04000000000001000000");
    ota_rom_spi_set_params(&r, 0x400000);
    check_request(&r, "000b18000000000000000000000040000000010000100000"
                      "00010000ffff0000");
    ota_rom_mem_begin(&r, 0x10, 1, 0x1800, 0x40380000);
    check_request(&r, "00051000000000001000000001000000001800000000"
                      "3840");
    ota_rom_mem_end(&r, 0);
    check_request(&r, "00060800000000000100000000000000");
    ota_rom_mem_end(&r, 0x40380e9a);
    check_request(&r, "0006080000000000000000009a0e3840");
    ota_rom_flash_begin(&r, false, 0x1000, 2, 0x800, 0x10000, 4, false);
    check_request(&r, "0002100000000000001000000200000000080000"
                      "00000100");
    ota_rom_flash_begin(&r, true, 0x1000, 2, 0x800, 0x10000, 5, true);
    check_request(&r, "001014000000000000100000020000000008000000000100"
                      "01000000");
    ota_rom_flash_end(&r, false);
    check_request(&r, "000404000000000001000000");
    ota_rom_flash_end(&r, true);
    check_request(&r, "001204000000000001000000");
    ota_rom_flash_md5(&r, true, 0x10000, 0x20);
    check_request(&r, "001310000000000000000100200000000000000000000000");
    CHECK_EQ(r.reply_len, 16);
    ota_rom_flash_md5(&r, false, 0x10000, 0x20);
    CHECK_EQ(r.reply_len, 32);
    ota_rom_erase_region(&r, 0x1000, 0x2000);
    check_request(&r, "00d10800000000000010000000200000");
    ota_rom_erase_flash(&r);
    check_request(&r, "00d0000000000000");
    ota_rom_read_flash(&r, 0x8000, 0xC00, 0x1000);
    check_request(&r, "00d210000000000000800000000c00000010000001000000");
    ota_rom_read_flash_slow(&r, 0x8000, 64);
    check_request(&r, "000e0800000000000080000040000000");
}

TEST(data_is_summed_and_padded) {
    ota_rom_request r;
    static const uint8_t bytes[] = {0xC0, 0xDB, 0x01};
    ota_rom_data(&r, OTA_ROM_FLASH_DATA, bytes, sizeof bytes, 1, 7);
    /* EF ^ C0 ^ DB ^ 01 ^ FF = 0A */
    check_request(&r, "000314000a000000040000000700000000000000"
                      "00000000c0db01ff");
    ota_rom_data(&r, OTA_ROM_FLASH_DEFL_DATA, bytes, sizeof bytes, 0, 0);
    check_request(&r, "00111300f5000000030000000000000000000000"
                      "00000000c0db01");
    CHECK_EQ(ota_rom_checksum(OTA_ROM_CHECKSUM_SEED, bytes, 3), 0xF5);
}

TEST(a_request_never_leaves_its_buffer) {
    static uint8_t block[OTA_ROM_STUB_BLOCK];
    memset(block, 0xC0, sizeof block); /* doubles on the wire */
    ota_rom_request r;
    ota_rom_data(&r, OTA_ROM_FLASH_DATA, block, sizeof block, 0, 0);
    size_t size = OTA_SLIP_FRAME_MAX(ota_rom_request_size(&r));
    for (size_t capacity = 0; capacity < size; capacity += 997) {
        uint8_t *out = malloc(capacity + 1);
        CHECK_EQ(ota_rom_request_encode(&r, out, capacity), 0);
        free(out);
    }
    uint8_t *out = malloc(size);
    CHECK(ota_rom_request_encode(&r, out, size) > 2 * sizeof block);
    free(out);
    ota_rom_data(&r, OTA_ROM_FLASH_DATA, block, 1, 0xFFFF, 0);
    CHECK_EQ(ota_rom_request_encode(&r, frame, sizeof frame), 0); /* the size field has 16 bits */
    ota_rom_reg_write writes[OTA_ROM_REG_WRITES_MAX + 5] = {{0}};
    ota_rom_write_regs(&r, writes, OTA_ROM_REG_WRITES_MAX + 5);
    CHECK_EQ(r.head_len, 16 * OTA_ROM_REG_WRITES_MAX);
}

static ota_rom_match decode(const ota_rom_request *request, const char *bytes, size_t len, ota_rom_reply *reply) {
    uint8_t *copy = malloc(len + 1);
    memcpy(copy, bytes, len);
    ota_rom_match match = ota_rom_reply_decode(request, copy, len, reply);
    reply->data = NULL;
    free(copy);
    return match;
}
#define DECODE(request, bytes, reply) decode(request, bytes, sizeof(bytes) - 1, reply)

TEST(status_is_where_the_reply_data_ends_and_stale_bytes_count_for_nothing) {
    ota_rom_request r;
    ota_rom_reply reply;
    ota_rom_spi_attach(&r, false, 0);
    CHECK_EQ(DECODE(&r, "\x01\x0D\x04\0\x07\x07\x12\x20\0\x05\0\0", &reply), OTA_ROM_REPLY);
    CHECK_EQ(reply.status, 0);
    CHECK_EQ(DECODE(&r, "\x01\x0D\x04\0\0\0\0\0\0\0\x66\x39", &reply), OTA_ROM_REPLY);
    CHECK_EQ(reply.status, 0);
    CHECK_EQ(DECODE(&r, "\x01\x0D\x04\0\0\0\0\0\x01\x06\x66\x39", &reply), OTA_ROM_REPLY);
    CHECK_EQ(reply.status, 1);
    CHECK_EQ(reply.error, 6);
    CHECK_EQ(DECODE(&r, "\x01\x0D\x02\0\0\0\0\0\xC0\0", &reply), OTA_ROM_REPLY); /* a stub's two bytes */
    CHECK_EQ(reply.status, 0xC0);
    ota_rom_read_reg(&r, 0);
    CHECK_EQ(DECODE(&r, "\x01\x0A\x04\0\x78\x56\x34\x12\0\0\0\0", &reply), OTA_ROM_REPLY);
    CHECK_EQ(reply.value, 0x12345678);
    ota_rom_flash_md5(&r, true, 0, 0);
    CHECK_EQ(DECODE(&r, "\x01\x13\x12\0\0\0\0\0\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\0\0",
                    &reply),
             OTA_ROM_REPLY);
    CHECK_EQ(reply.status, 0);
    CHECK_EQ(reply.data_len, 16);
    CHECK_EQ(DECODE(&r, "\x01\x13\x02\0\0\0\0\0\xC4\0", &reply), OTA_ROM_REPLY); /* a refusal has no data */
    CHECK_EQ(reply.status, 0xC4);
    CHECK_EQ(DECODE(&r, "\x01\x13\x02\0\0\0\0\0\0\0", &reply), OTA_ROM_NO_REPLY); /* success without data is none */
}

TEST(an_unknown_opcode_is_refused_under_another_one) {
    ota_rom_request r;
    ota_rom_reply reply;
    ota_rom_get_security_info(&r);
    CHECK_EQ(DECODE(&r, "\x01\x08\x04\0\x07\x07\x12\x20\x01\x05\0\0", &reply), OTA_ROM_UNSUPPORTED);
    CHECK_EQ(DECODE(&r, "\x01\x08\x04\0\x07\x07\x12\x20\0\x05\0\0", &reply),
             OTA_ROM_FOREIGN); /* a late reply to SYNC */
    CHECK_EQ(DECODE(&r, "\x01\x14\x02\0\0\0\0\0\xFF\0", &reply), OTA_ROM_REPLY);
    CHECK_EQ(reply.status, 0xFF);
}

TEST(what_is_no_reply_is_none) {
    ota_rom_request r;
    ota_rom_reply reply;
    ota_rom_read_reg(&r, 0);
    static const char good[] = "\x01\x0A\x04\0\x78\x56\x34\x12\0\0\0\0";
    for (size_t len = 0; len < sizeof good - 1; len++) { /* every truncation */
        CHECK_EQ(decode(&r, good, len, &reply), OTA_ROM_NO_REPLY);
    }
    CHECK_EQ(DECODE(&r, "\0\x0A\x04\0\x78\x56\x34\x12\0\0\0\0", &reply), OTA_ROM_NO_REPLY);
    CHECK_EQ(DECODE(&r, "\x01\x0A\x04\0\x78\x56\x34\x12\0\0\0\0\0", &reply), OTA_ROM_NO_REPLY); /* a byte too many */
}

TEST(any_bytes_are_decoded_without_harm) {
    unsigned long x = 1;
    ota_rom_request requests[4];
    ota_rom_read_reg(&requests[0], 0);
    ota_rom_flash_md5(&requests[1], false, 0, 0);
    ota_rom_get_security_info(&requests[2]);
    ota_rom_read_flash_slow(&requests[3], 0, 64);
    for (int round = 0; round < 20000; round++) {
        char bytes[80];
        x = x * 6364136223846793005ul + 1442695040888963407ul;
        size_t len = x >> 40 & 63;
        for (size_t i = 0; i < len; i++) {
            x = x * 6364136223846793005ul + 1442695040888963407ul;
            bytes[i] = (char)(x >> 56);
        }
        if (len > 4) {
            bytes[0] = 1;
            bytes[1] = (char)requests[round % 4].op;
            bytes[2] = (char)(len - 8);
            bytes[3] = 0;
        }
        ota_rom_reply reply = {0};
        ota_rom_match match = decode(&requests[round % 4], bytes, len, &reply);
        CHECK(match == OTA_ROM_NO_REPLY || reply.data_len + 10 <= len);
    }
}

TEST(security_info_is_taken_apart) {
    static const uint8_t info[20] = {0x05, 0, 0, 0, 0x07, 1, 2, 3, 4, 5, 6, 7, 0x09, 0, 0, 0, 0x02, 0, 0, 0};
    ota_rom_security_info out;
    CHECK_EQ(ota_rom_security_info_decode(info, 20, &out), OTA_OK);
    CHECK_EQ(out.flags, OTA_ROM_SECURE_BOOT | OTA_ROM_SECURE_DOWNLOAD);
    CHECK(out.has_chip_id && out.chip_id == 9 && out.eco_version == 2);
    CHECK(ota_rom_is_flash_encrypted(out.flash_crypt_count));
    CHECK(!ota_rom_is_flash_encrypted(3) && !ota_rom_is_flash_encrypted(0) && ota_rom_is_flash_encrypted(1));
    CHECK_EQ(ota_rom_security_info_decode(info, 12, &out), OTA_OK);
    CHECK(!out.has_chip_id);
    CHECK_EQ(ota_rom_security_info_decode(info, 19, &out), OTA_ERR_CHIP_PROTOCOL);
    CHECK_EQ(ota_rom_security_info_decode(info, 0, &out), OTA_ERR_CHIP_PROTOCOL);
}

TEST(names_and_errors_have_words) {
    CHECK(strcmp(ota_rom_op_name(0x11), "FLASH_DEFL_DATA") == 0);
    CHECK(strcmp(ota_rom_op_name(0x77), "?") == 0);
    CHECK(strstr(ota_rom_error_text(false, 1, 8), "flash write") != NULL);
    CHECK(strstr(ota_rom_error_text(true, 0xC7, 0), "inflating") != NULL);
    CHECK(strcmp(ota_rom_error_text(true, 0, 5), "success") == 0);
    CHECK(strcmp(ota_rom_error_text(false, 1, 0x77), "unknown error") == 0);
}

int main(void) {
    RUN(requests_have_the_bytes_of_the_sheet);
    RUN(data_is_summed_and_padded);
    RUN(a_request_never_leaves_its_buffer);
    RUN(status_is_where_the_reply_data_ends_and_stale_bytes_count_for_nothing);
    RUN(an_unknown_opcode_is_refused_under_another_one);
    RUN(what_is_no_reply_is_none);
    RUN(any_bytes_are_decoded_without_harm);
    RUN(security_info_is_taken_apart);
    RUN(names_and_errors_have_words);
    return DONE();
}
