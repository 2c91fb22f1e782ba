/* sources: flasher/rom_exchange.c flasher/rom_command.c flasher/slip.c flasher/chip.c */
#include <stdlib.h>

#include "check.h"
#include "flasher/rom_exchange.h"

static ota_rom_log boot;
static ota_rom_exchange ex;
static ota_rom_request request;

/* Feeds in pieces of `step` bytes (0: all at once) until the outcome is known; returns the bytes taken. */
static size_t feed(const char *bytes, size_t len, size_t step) {
    size_t taken = 0;
    while (taken < len) {
        size_t piece = step == 0 || step > len - taken ? len - taken : step, used;
        ota_rom_outcome outcome = ota_rom_exchange_feed(&ex, bytes + taken, piece, &used);
        taken += used;
        if (outcome != OTA_ROM_WAITING && outcome != OTA_ROM_IDLE) {
            break;
        }
    }
    return taken;
}
#define FEED(bytes, step) feed(bytes, sizeof(bytes) - 1, step)

static void begin(void) {
    ota_rom_log_init(&boot);
    ota_rom_exchange_init(&ex, &boot);
    ota_rom_read_reg(&request, 0x40001000);
    ota_rom_exchange_begin(&ex, &request);
}

#define SYNC_REPLY "\xC0\x01\x08\x04\0\x07\x07\x12\x20\0\x05\0\0\xC0"
#define REG_REPLY "\xC0\x01\x0A\x04\0\x78\x56\x34\x12\0\x05\0\0\xC0"

TEST(the_answer_is_found_among_noise_and_stale_replies) {
    static const char stream[] = "boot\r\n" SYNC_REPLY SYNC_REPLY "garbage\xC0\xC0\x01\x0A" REG_REPLY SYNC_REPLY;
    for (size_t step = 0; step < 40; step++) {
        begin();
        size_t used = FEED(stream, step);
        CHECK_EQ(ex.outcome, OTA_ROM_ANSWERED);
        CHECK_EQ(used, sizeof stream - sizeof SYNC_REPLY); /* what follows is left */
        CHECK_EQ(ex.reply.value, 0x12345678);
        CHECK_EQ(ex.reply.status, 0);
        CHECK_EQ(ex.foreign, 2);
        CHECK_EQ(ex.damaged, 3);
        CHECK_EQ(ex.frames, 3);
    }
}

TEST(every_truncation_waits_on) {
    static const char stream[] = SYNC_REPLY REG_REPLY;
    for (size_t len = 0; len < sizeof stream - 1; len++) {
        begin();
        feed(stream, len, 0);
        CHECK_EQ(ex.outcome, OTA_ROM_WAITING);
        ota_rom_exchange_end(&ex); /* half of it is given up, and the next exchange is not disturbed */
        ota_rom_exchange_begin(&ex, &request);
        FEED(REG_REPLY, 0);
        CHECK_EQ(ex.outcome, OTA_ROM_ANSWERED);
    }
}

TEST(an_unknown_command_is_told) {
    begin();
    ota_rom_get_security_info(&request);
    static const char stream[] = SYNC_REPLY "\xC0\x01\x08\x04\0\x07\x07\x12\x20\x01\x05\0\0\xC0";
    CHECK_EQ(FEED(stream, 1), sizeof stream - 1);
    CHECK_EQ(ex.outcome, OTA_ROM_NOT_SUPPORTED);
}

TEST(raw_frames_and_greetings) {
    begin();
    ota_rom_mem_end(&request, 1);
    FEED("\xC0OHAI\xC0", 3);
    CHECK_EQ(ex.outcome, OTA_ROM_WAITING);
    CHECK(ex.greeted);
    ota_rom_exchange_begin(&ex, NULL);
    CHECK(!ex.greeted);
    FEED("\xC0OHAI\xC0", 1);
    CHECK_EQ(ex.outcome, OTA_ROM_ANSWERED);
    CHECK(ota_rom_is_greeting(ex.frame, ex.frame_len));
    CHECK(!ota_rom_is_greeting((const uint8_t *)"OHAIO", 5) && !ota_rom_is_greeting((const uint8_t *)"OHAJ", 4));
}

TEST(idle_takes_everything) {
    begin();
    ota_rom_exchange_end(&ex);
    static const char stream[] = REG_REPLY "ESP-ROM:esp32c3-api1-20210207\r\n" REG_REPLY;
    CHECK_EQ(FEED(stream, 0), sizeof stream - 1);
    CHECK_EQ(ex.outcome, OTA_ROM_IDLE);
    CHECK(boot.chip == ota_chip_by_id(OTA_CHIP_ESP32C3));
}

static void read_log(const char *text, size_t step) {
    ota_rom_log_init(&boot);
    size_t len = strlen(text);
    for (size_t at = 0; at < len; at += step) {
        ota_rom_log_feed(&boot, text + at, step < len - at ? step : len - at);
    }
}

TEST(boot_messages_are_understood_in_any_slices) {
    for (size_t step = 1; step < 60; step++) {
        read_log("ets Jul 29 2019 12:21:46\r\n\r\nrst:0x1 (POWERON_RESET),boot:0xf (UART_BOOT(UART0))\r\n", step);
        CHECK(boot.has_boot_mode && boot.is_download && boot.boots == 1 && !boot.waits_for_download);
        CHECK(boot.chip == ota_chip_by_id(OTA_CHIP_ESP32));
        read_log(
            "rst:0x1 (POWERON_RESET),boot:0x3 (DOWNLOAD_BOOT(UART0/UART1/SDIO_REI_REO_V2))\r\nwaiting for download\r\n",
            step);
        CHECK(boot.has_boot_mode && boot.is_download && boot.waits_for_download);
        read_log("ESP-ROM:esp32s3-20210327\r\nBuild:Mar 27 2021\r\nrst:0x1 (POWERON),boot:0x8 (SPI_FAST_FLASH_BOOT)\r\n"
                 "rst:0x3 (RTC_SW_SYS_RST),boot:0x8 (SPI_FAST_FLASH_BOOT)\r\n",
                 step);
        CHECK(boot.has_boot_mode && !boot.is_download && boot.boots == 2);
        CHECK(boot.chip == ota_chip_by_id(OTA_CHIP_ESP32S3));
        CHECK(strstr(boot.boot, "RTC_SW_SYS_RST") != NULL);
        read_log("ESP-ROM:esp32c3-api1-20210207\r\nwait uart0 download\r\n", step);
        CHECK(boot.waits_for_download);
        read_log("x\r\nGuru Meditation Error: Core 1 panic'ed (IllegalInstruction)\r\nmore\r\n", step);
        CHECK(boot.has_crashed);
        CHECK(strcmp(boot.crash, "Guru Meditation Error: Core 1 panic'ed (IllegalInstruction)") == 0);
    }
}

TEST(any_bytes_are_read_without_harm) {
    unsigned long x = 7;
    ota_rom_log_init(&boot);
    for (int i = 0; i < 100000; i++) {
        x = x * 6364136223846793005ul + 1442695040888963407ul;
        uint8_t byte = (uint8_t)(x >> 56);
        ota_rom_log_feed(&boot, &byte, 1);
        CHECK(boot.len < sizeof boot.line && boot.line[boot.len] == '\0');
    }
    static const char header[] = "boot:0x";
    for (int i = 0; i < 500; i++) { /* a line that never ends */
        ota_rom_log_feed(&boot, header, sizeof header - 1);
    }
    CHECK(memchr(boot.boot, '\0', sizeof boot.boot) != NULL);
}

int main(void) {
    RUN(the_answer_is_found_among_noise_and_stale_replies);
    RUN(every_truncation_waits_on);
    RUN(an_unknown_command_is_told);
    RUN(raw_frames_and_greetings);
    RUN(idle_takes_everything);
    RUN(boot_messages_are_understood_in_any_slices);
    RUN(any_bytes_are_read_without_harm);
    return DONE();
}
