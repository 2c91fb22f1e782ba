/* sources: flasher/flasher.c flasher/rom_loader.c flasher/rom_exchange.c flasher/rom_write.c flasher/rom_command.c
 *     flasher/slip.c flasher/chip.c base/status.c fake_rom.c
 * libs: zlib libcrypto
 *
 * Whole sessions with a chip in memory: every chip of the table through boot ROM and stub, reading, writing, erasing, restarting,
 * and what the boot messages and the chip's answers are turned into. */
#include <errno.h>
#include <stdlib.h>

#include <zlib.h>

#include "check.h"
#include "fake_rom.h"
#include "flasher/chip.h"
#include "flasher/flasher.h"

#define MAIN_SIZE 300000u

static uint8_t stub_text[6456], stub_data[212];

static const char *const stub_names[] = {"esp32",   "esp32s2", "esp32c3", "esp32s3",      "esp32c2", "esp32c6",
                                         "esp32h2", "esp32p4", "esp32c5", "esp32p4-rev1", "esp32c61"};
#define STUBS (sizeof stub_names / sizeof stub_names[0])
static ota_flasher_stub stubs[STUBS];

static uint8_t content[MAIN_SIZE];
static uint8_t packed[MAIN_SIZE + 1000];
static uLongf packed_len;

static void prepare(void) {
    for (size_t i = 0; i < STUBS; i++) {
        stubs[i] = (ota_flasher_stub){.name = stub_names[i],
                                      .entry = FAKE_ROM_ENTRY,
                                      .text_start = 0x40380000,
                                      .text = stub_text,
                                      .text_len = sizeof stub_text,
                                      .data_start = 0x3FC96D6C,
                                      .data = stub_data,
                                      .data_len = sizeof stub_data};
    }
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof content; i++) {
        x = x * 1664525 + 1013904223;
        content[i] = (uint8_t)(i % 3 == 0 ? x >> 24 : i / 64);
    }
    packed_len = sizeof packed;
    if (compress2(packed, &packed_len, content, sizeof content, 9) != Z_OK) {
        abort();
    }
}

typedef struct bench {
    fake_rom fake;
    ota_flasher_options options;
    ota_flasher *flasher;
    ota_error error;
} bench;

static void set_up(bench *b, fake_rom_options chip, bool with_stub) {
    memset(b, 0, sizeof *b);
    fake_rom_init(&b->fake, &chip);
    if (chip.chip_id == OTA_CHIP_ESP32C2) {
        fake_rom_set_reg(&b->fake, 0x60008844, 1u << 20 | 0x2462); /* revision 1.0: stubs do not run on 0.x */
    }
    b->options.serial = &b->fake.serial;
    b->options.stubs = stubs;
    b->options.stub_count = with_stub ? STUBS : 0;
}

static ota_status connect(bench *b) {
    if (b->flasher == NULL) {
        CHECK_EQ(ota_flasher_new(&b->options, &b->flasher, &b->error), OTA_OK);
    }
    memset(&b->error, 0, sizeof b->error);
    ota_status status = ota_flasher_connect(b->flasher, &b->error);
    CHECK(status == b->error.status);
    return status;
}

static void tear_down(bench *b) {
    CHECK(!b->fake.is_stuck);
    ota_flasher_free(&b->flasher);
    CHECK(b->flasher == NULL);
    fake_rom_free(&b->fake);
}

static ota_status write_all(bench *b, uint64_t offset, bool deflated) {
    ota_flasher_write write = {
        .offset = offset, .size = sizeof content, .deflated = deflated, .wire_bound = deflated ? packed_len : 0};
    ota_status status = ota_flasher_write_begin(b->flasher, &write, &b->error);
    const uint8_t *bytes = deflated ? packed : content;
    size_t len = deflated ? packed_len : sizeof content;
    for (size_t done = 0; done < len && status == OTA_OK;) {
        size_t piece = len - done < 10007 ? len - done : 10007;
        uint64_t inflated = !deflated ? 0 : done + piece == len ? sizeof content * (uint64_t)1 - done : piece;
        status = ota_flasher_write_data(b->flasher, bytes + done, piece, inflated, &b->error);
        done += piece;
    }
    return status == OTA_OK ? ota_flasher_write_end(b->flasher, &b->error) : status;
}

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        ota_status status_ = (call);                                                                                   \
        CHECK_EQ(status_, OTA_OK);                                                                                     \
        if (status_ != OTA_OK) {                                                                                       \
            printf("    %s\n", b.error.text);                                                                          \
        }                                                                                                              \
    } while (0)

TEST(every_chip_is_found_and_flashed_through_rom_and_stub) {
    size_t count;
    const ota_chip *chips = ota_chips(&count);
    for (size_t i = 0; i < count; i++) {
        for (int with_stub = 0; with_stub < 2; with_stub++) {
            bench b;
            set_up(&b, (fake_rom_options){.chip_id = chips[i].id, .eco_version = 5}, with_stub);
            OK(connect(&b));
            const ota_flasher_info *info = ota_flasher_get_info(b.flasher);
            CHECK_EQ(info->chip_id, chips[i].id);
            CHECK_EQ(info->is_stub, with_stub);
            CHECK(strcmp(info->stub_name, with_stub ? chips[i].name : "") == 0);
            CHECK_EQ(info->flash_size, 4 << 20);
            CHECK_EQ(info->flash_id, 0x1640EF);
            CHECK(info->has_mac && info->flash_size_known && info->was_reset && info->can_deflate && info->can_verify);
            uint8_t mac[6] = {0x24, 0x62, 0x10, 0x20, 0x30, (uint8_t)(0x40 + chips[i].id)};
            CHECK_MEM(info->mac, mac, 6);
            memset(b.fake.flash + 0x100000, 0x00, sizeof content);
            OK(write_all(&b, 0x100000, true));
            CHECK_MEM(b.fake.flash + 0x100000, content, sizeof content);
            CHECK_EQ(b.fake.lost_frames, 0);
            OK(ota_flasher_reset(b.flasher, OTA_FLASHER_HARD_RESET, &b.error));
            fake_rom_pass(&b.fake, 10);
            CHECK_EQ(b.fake.mode, FAKE_ROM_APP);
            CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_OFF);
            tear_down(&b);
        }
    }
}

TEST(twenty_commands_are_enough_up_to_the_first_data) {
    size_t count;
    const ota_chip *chips = ota_chips(&count);
    for (size_t i = 0; i < count; i++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = chips[i].id, .eco_version = 5}, true);
        b.options.baud = 921600;
        if (chips[i].id == OTA_CHIP_ESP32C5 || chips[i].id == OTA_CHIP_ESP32C2) {
            fake_rom_set_reg(&b.fake, chips[i].uart_div, 347); /* 40 MHz at 115200 */
            fake_rom_set_reg(&b.fake, 0x60096110, 40u << 24);
        }
        OK(connect(&b));
        CHECK_EQ(b.fake.serial.baud, 921600);
        CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 921600);
        OK(ota_flasher_write_begin(b.flasher, &(ota_flasher_write){.offset = 0x10000, .size = 1}, &b.error));
        ota_flasher_counts first = ota_flasher_get_counts(b.flasher);
        printf("  %-9s %2d commands", chips[i].name, (int)first.commands);
        CHECK(first.commands <= 20);
        CHECK_EQ(first.commands, b.fake.total_commands);
        CHECK_EQ(first.retries, 0);
        /* and fewer when the device is known */
        b.options.facts = ota_flasher_get_info(b.flasher)->facts;
        ota_flasher_free(&b.flasher);
        OK(connect(&b));
        OK(ota_flasher_write_begin(b.flasher, &(ota_flasher_write){.offset = 0x10000, .size = 1}, &b.error));
        printf(", %2d with facts\n", (int)ota_flasher_get_counts(b.flasher).commands);
        CHECK(ota_flasher_get_counts(b.flasher).commands < first.commands);
        tear_down(&b);
    }
}

TEST(an_esp32_that_nobody_names_needs_one_command_more) {
    static const char *const names[] = {"auto", "esp32"};
    for (size_t i = 0; i < 2; i++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = 0, .starts = FAKE_ROM_ROM}, true);
        b.options.before = OTA_FLASHER_NO_RESET;
        b.options.baud = 921600;
        b.options.chip = names[i];
        OK(connect(&b));
        OK(ota_flasher_write_begin(b.flasher, &(ota_flasher_write){.offset = 0x10000, .size = 1}, &b.error));
        CHECK_EQ(ota_flasher_get_counts(b.flasher).commands, i == 0 ? 21 : 20);
        tear_down(&b);
    }
}

TEST(plain_and_deflated_writes_read_back) {
    for (int with_stub = 0; with_stub < 2; with_stub++) {
        for (int deflated = 0; deflated < 2; deflated++) {
            bench b;
            set_up(&b, (fake_rom_options){.chip_id = 5}, with_stub);
            OK(connect(&b));
            memset(b.fake.flash, 0x12, 1 << 20);
            OK(write_all(&b, 0x20000, deflated));
            CHECK_MEM(b.fake.flash + 0x20000, content, sizeof content);
            CHECK_EQ(b.fake.flash[0x1FFFF], 0x12);
            CHECK_EQ(b.fake.flash[0x20000 + 74 * 4096], 0x12); /* the sector behind */
            static uint8_t back[70001];
            OK(ota_flasher_read(b.flasher, 0x20003, back, sizeof back, &b.error));
            CHECK_MEM(back, content + 3, sizeof back);
            uint8_t digest[16], again[16];
            OK(ota_flasher_md5(b.flasher, 0x20000, sizeof content, digest, &b.error));
            OK(ota_flasher_md5(b.flasher, 0x20000, sizeof content, again, &b.error));
            CHECK_MEM(digest, again, 16);
            ota_flasher_counts counts = ota_flasher_get_counts(b.flasher);
            CHECK_EQ(counts.written_bytes, sizeof content);
            CHECK_EQ(counts.read_bytes, sizeof back);
            CHECK_EQ(counts.md5_bytes, 2 * sizeof content);
            tear_down(&b);
        }
    }
}

TEST(erase_takes_whole_sectors_only_and_no_more) {
    for (int with_stub = 0; with_stub < 2; with_stub++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = 0}, with_stub);
        OK(connect(&b));
        memset(b.fake.flash, 0, 4 << 20);
        OK(ota_flasher_erase(b.flasher, 0xF1000, 0x21000, &b.error));
        CHECK_EQ(b.fake.flash[0xF0FFF], 0);
        CHECK_EQ(b.fake.flash[0xF1000], 0xFF);
        CHECK_EQ(b.fake.flash[0x111FFF], 0xFF);
        CHECK_EQ(b.fake.flash[0x112000], 0);
        CHECK_EQ(ota_flasher_erase(b.flasher, 0x800, 0x1000, &b.error), OTA_ERR_ARGUMENT);
        memset(&b.error, 0, sizeof b.error);
        CHECK_EQ(ota_flasher_erase(b.flasher, 0x3FF000, 0x2000, &b.error), OTA_ERR_ARGUMENT);
        CHECK_EQ(b.error.offset, 0x3FF000);
        CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_READY);
        tear_down(&b);
    }
}

TEST(a_program_keeps_what_lies_around_it) {
    for (int with_stub = 0; with_stub < 2; with_stub++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = 9}, with_stub);
        OK(connect(&b));
        uint8_t entry[32];
        memset(entry, 0x3C, sizeof entry);
        /* into a sector that was just erased: two commands and the data */
        OK(ota_flasher_erase(b.flasher, 0xD000, 0x1000, &b.error));
        uint64_t md5s = b.fake.commands[0x13];
        OK(ota_flasher_program(b.flasher, 0xD000, entry, sizeof entry, &b.error));
        CHECK_EQ(b.fake.commands[0x13], md5s);
        CHECK_MEM(b.fake.flash + 0xD000, entry, sizeof entry);
        CHECK_EQ(b.fake.flash[0xD020], 0xFF);
        /* into one that holds something, over its end */
        memset(b.fake.flash + 0xE000, 0xF5, 0x2000);
        OK(ota_flasher_program(b.flasher, 0xEFF0, entry, sizeof entry, &b.error));
        CHECK_EQ(b.fake.flash[0xEFEF], 0xF5);
        CHECK_EQ(b.fake.flash[0xEFF0], 0xF5 & 0x3C);
        CHECK_EQ(b.fake.flash[0xF00F], 0xF5 & 0x3C);
        CHECK_EQ(b.fake.flash[0xF010], 0xF5);
        /* a blank one is told by its MD5 */
        uint64_t reads = b.fake.commands[0xD2] + b.fake.commands[0x0E];
        OK(ota_flasher_program(b.flasher, 0x20010, entry, sizeof entry, &b.error));
        CHECK_EQ(b.fake.commands[0xD2] + b.fake.commands[0x0E], reads);
        CHECK_EQ(b.fake.flash[0x2000F], 0xFF);
        CHECK_MEM(b.fake.flash + 0x20010, entry, sizeof entry);
        tear_down(&b);
    }
}

TEST(a_stub_that_still_runs_is_used_again) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5, .starts = FAKE_ROM_STUB}, true);
    b.options.before = OTA_FLASHER_NO_RESET;
    OK(connect(&b));
    CHECK(ota_flasher_get_info(b.flasher)->stub_was_running);
    CHECK_EQ(b.fake.commands[0x05], 0);
    tear_down(&b);
    /* at another rate, looked for before any reset */
    set_up(&b, (fake_rom_options){.chip_id = 5, .starts = FAKE_ROM_STUB}, true);
    b.fake.baud = 921600;
    b.options.reuse_baud = 921600;
    b.options.baud = 2000000;
    OK(connect(&b));
    CHECK(ota_flasher_get_info(b.flasher)->stub_was_running);
    CHECK_EQ(b.fake.resets, 0);
    CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 2000000);
    tear_down(&b);
    /* without a reset the likely rates are tried in turn */
    set_up(&b, (fake_rom_options){.chip_id = 5, .starts = FAKE_ROM_STUB}, true);
    b.fake.baud = 921600;
    b.options.before = OTA_FLASHER_NO_RESET;
    b.options.baud = 921600;
    OK(connect(&b));
    CHECK(ota_flasher_get_info(b.flasher)->stub_was_running);
    tear_down(&b);
    /* and when none runs, the chip is reset */
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.reuse_baud = 921600;
    OK(connect(&b));
    CHECK(!ota_flasher_get_info(b.flasher)->stub_was_running);
    tear_down(&b);
}

TEST(rates_that_do_not_work_step_down) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.baud = 3000000;
    b.fake.faults.baud_max = 1000000;
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 921600);
    CHECK(ota_flasher_get_counts(b.flasher).step_downs >= 3);
    CHECK_EQ(ota_flasher_get_info(b.flasher)->facts.baud, 921600);
    OK(write_all(&b, 0x10000, true));
    /* what was learned spares the search */
    uint64_t step_downs = ota_flasher_get_counts(b.flasher).step_downs;
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_counts(b.flasher).step_downs, step_downs);
    CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 921600);
    tear_down(&b);
    /* a driver that refuses is asked before the chip */
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.baud = 2000000;
    b.fake.faults.driver_baud_max = 921600;
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 921600);
    CHECK_EQ(b.fake.commands[0x0F], 1);
    tear_down(&b);
    /* down to where it is allowed */
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.baud = 2000000;
    b.options.baud_min = 1500000;
    b.fake.faults.baud_max = 1000000;
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_SILENT);
    tear_down(&b);
    /* a socket has none */
    set_up(&b, (fake_rom_options){.chip_id = 5, .is_socket = true, .starts = FAKE_ROM_ROM}, true);
    b.options.baud = 2000000;
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 0);
    CHECK_EQ(b.fake.commands[0x0F], 0);
    CHECK(!ota_flasher_get_info(b.flasher)->was_reset);
    tear_down(&b);
}

TEST(silence_is_explained_by_the_boot_messages) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.fake.faults.strap_high = true;
    b.options.connect_attempts = 1;
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_BOOT_MODE);
    CHECK(strstr(b.error.text, "boot:0xc (SPI_FAST_FLASH_BOOT)") != NULL);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_BROKEN);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 5, .no_lines = true}, true);
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_SILENT);
    CHECK(strstr(b.error.text, "boot button") != NULL);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 5, .no_lines = true}, true);
    b.options.connect_attempts = 1;
    static const char crash[] = "\r\nGuru Meditation Error: Core  0 panic'ed (LoadProhibited)\r\n";
    fake_rom_say(&b.fake, crash, strlen(crash));
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_RESTARTED);
    CHECK(strstr(b.error.text, "LoadProhibited") != NULL);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 5, .no_lines = true}, true);
    static const char waits[] = "rst:0x1 (POWERON),boot:0x2 (UART0_BOOT)\r\nwait uart0 download\r\n";
    fake_rom_say(&b.fake, waits, strlen(waits));
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_SILENT);
    CHECK(strstr(b.error.text, "does not hear us") != NULL);
    tear_down(&b);
}

TEST(another_chip_than_the_one_named_is_refused) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.chip = "esp32s3";
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_OTHER);
    CHECK(strstr(b.error.text, "ESP32-C3") != NULL && strstr(b.error.text, "esp32s3") != NULL);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.chip = "esp32";
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_OTHER);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 0}, true);
    b.options.chip = "ESP32-C3";
    CHECK_EQ(connect(&b), OTA_ERR_CHIP_OTHER);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 0}, true);
    b.options.chip = "esp8266";
    CHECK_EQ(ota_flasher_new(&b.options, &b.flasher, &b.error), OTA_ERR_ARGUMENT);
    tear_down(&b);
}

TEST(secure_download_mode_leaves_plain_writes_only) {
    for (int s2 = 0; s2 < 2; s2++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = s2 ? 2 : 5, .secure_download = true}, true);
        b.options.baud = 921600;
        b.options.flash_size = 4 << 20;
        OK(connect(&b));
        const ota_flasher_info *info = ota_flasher_get_info(b.flasher);
        CHECK(info->secure_download && !info->is_stub && !info->can_deflate && !info->can_verify && !info->has_mac);
        CHECK_EQ(info->baud, 921600);
        uint8_t digest[16];
        CHECK_EQ(ota_flasher_md5(b.flasher, 0, 16, digest, NULL), OTA_ERR_UNSUPPORTED);
        CHECK_EQ(ota_flasher_read(b.flasher, 0, digest, 16, NULL), OTA_ERR_UNSUPPORTED);
        CHECK_EQ(ota_flasher_program(b.flasher, 0, digest, 16, NULL), OTA_ERR_UNSUPPORTED);
        CHECK_EQ(write_all(&b, 0x10000, true), OTA_ERR_UNSUPPORTED);
        memset(&b.error, 0, sizeof b.error);
        OK(write_all(&b, 0x10000, false));
        CHECK_MEM(b.fake.flash + 0x10000, content, sizeof content);
        OK(ota_flasher_erase(b.flasher, 0x10000, 0x1000, &b.error));
        CHECK_EQ(b.fake.flash[0x10000], 0xFF);
        OK(ota_flasher_reset(b.flasher, OTA_FLASHER_AFTER_AUTO, &b.error));
        tear_down(&b);
    }
}

TEST(plain_text_is_not_written_to_an_encrypted_flash) {
    for (int c3 = 0; c3 < 2; c3++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = c3 ? 5 : 0, .flash_encrypted = true}, true);
        OK(connect(&b));
        CHECK(ota_flasher_get_info(b.flasher)->flash_encrypted);
        CHECK_EQ(write_all(&b, 0x10000, false), OTA_ERR_UNSUPPORTED);
        CHECK(strstr(b.error.text, "encryption") != NULL);
        ota_flasher_free(&b.flasher);
        b.options.allow_encrypted = true;
        OK(connect(&b));
        OK(write_all(&b, 0x10000, false));
        tear_down(&b);
    }
}

TEST(a_stub_is_told_no_more_than_it_was_promised) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    OK(connect(&b));
    ota_flasher_write write = {.offset = 0, .size = 4096};
    OK(ota_flasher_write_begin(b.flasher, &write, &b.error));
    CHECK_EQ(ota_flasher_write_data(b.flasher, content, 4097, 0, &b.error), OTA_ERR_SIZE);
    CHECK_EQ(ota_flasher_write_end(b.flasher, NULL), OTA_ERR_STATE);
    write.deflated = true;
    memset(&b.error, 0, sizeof b.error);
    OK(ota_flasher_write_begin(b.flasher, &write, &b.error));
    CHECK_EQ(ota_flasher_write_data(b.flasher, packed, 10, 4097, &b.error), OTA_ERR_SIZE);
    memset(&b.error, 0, sizeof b.error);
    OK(ota_flasher_write_begin(b.flasher, &write, &b.error));
    OK(ota_flasher_write_data(b.flasher, packed, 10, 4095, &b.error));
    CHECK_EQ(ota_flasher_write_end(b.flasher, &b.error), OTA_ERR_SIZE);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_READY);
    write.wire_bound = 9;
    memset(&b.error, 0, sizeof b.error);
    OK(ota_flasher_write_begin(b.flasher, &write, &b.error));
    OK(ota_flasher_write_data(b.flasher, packed, 10, 4096, &b.error));
    CHECK_EQ(ota_flasher_write_end(b.flasher, &b.error), OTA_ERR_SIZE);
    tear_down(&b);
}

TEST(refusals_name_chip_command_status_and_offset) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, false);
    OK(connect(&b));
    b.fake.faults.bad_sector = (0x20000 + 0x3000) / 4096 + 1;
    CHECK_EQ(write_all(&b, 0x20000, false), OTA_ERR_CHIP_REFUSED);
    CHECK_EQ(b.error.device_code, 0x0108);
    CHECK_EQ(b.error.offset, 0x23000 - 0x3000 % 0x1800);
    CHECK(strstr(b.error.text, "ESP32-C3: FLASH_DATA at 0x23000 refused by the boot ROM: status 01 08") != NULL);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_READY);
    CHECK_EQ(ota_flasher_write_data(b.flasher, content, 1, 1, NULL), OTA_ERR_STATE);
    memset(&b.error, 0, sizeof b.error);
    b.fake.faults.bad_sector = 0;
    OK(write_all(&b, 0x20000, false));
    tear_down(&b);
    /* a stub says it one command late, and does not carry that one out */
    set_up(&b, (fake_rom_options){.chip_id = 0}, true);
    OK(connect(&b));
    b.fake.faults.bad_sector = (0x20000 + 0x9000) / 4096 + 1;
    CHECK_EQ(write_all(&b, 0x20000, false), OTA_ERR_CHIP_REFUSED);
    CHECK_EQ(b.error.device_code, 0xC400);
    CHECK_EQ(b.error.offset, 0x28000);
    CHECK(strstr(b.error.text, "ESP32: FLASH_DATA at 0x28000 refused by the stub: status C4 00") != NULL);
    b.fake.faults.bad_sector = 0;
    memset(&b.error, 0, sizeof b.error);
    OK(write_all(&b, 0x20000, true));
    CHECK_MEM(b.fake.flash + 0x20000, content, sizeof content);
    tear_down(&b);
}

TEST(roms_with_smaller_blocks_and_single_writes_are_served) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, false);
    b.fake.faults.rom_block_max = 0x400;
    b.fake.faults.refuses_batches = true;
    OK(connect(&b));
    OK(write_all(&b, 0x20000, true));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->block_size, 0x400);
    CHECK_MEM(b.fake.flash + 0x20000, content, sizeof content);
    tear_down(&b);
}

TEST(a_stub_that_does_not_start_leaves_the_work_to_the_rom) {
    for (int silent = 0; silent < 2; silent++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = 5}, true);
        b.fake.faults.no_greeting = silent;
        b.fake.faults.refuses_stub = !silent;
        b.options.baud = 921600;
        OK(connect(&b));
        CHECK(!ota_flasher_get_info(b.flasher)->is_stub && ota_flasher_get_info(b.flasher)->stub_failed);
        CHECK_EQ(ota_flasher_get_info(b.flasher)->baud, 921600);
        OK(write_all(&b, 0x20000, true));
        tear_down(&b);
    }
}

TEST(slow_flash_survives) {
    for (int with_stub = 0; with_stub < 2; with_stub++) {
        bench b;
        set_up(&b, (fake_rom_options){.chip_id = 5}, with_stub);
        OK(connect(&b));
        memset(b.fake.flash, 0, 1 << 20);
        b.fake.faults.slowness = 8; /* 360 ms for a sector: more than 327,680 bytes in 23.4 s */
        OK(write_all(&b, 0x20000, true));
        OK(ota_flasher_erase(b.flasher, 0x20000, 0x100000, &b.error));
        CHECK_EQ(ota_flasher_get_counts(b.flasher).retries, 0);
        tear_down(&b);
    }
}

TEST(watchdogs_are_silenced_on_usb_and_restart_the_chip) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5, .usb_vid = 0x303A, .usb_pid = 0x1001}, true);
    b.options.baud = 921600;
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->link, OTA_FLASHER_LINK_USB_JTAG);
    CHECK_EQ(b.fake.watchdog_writes, 1);
    CHECK_EQ(b.fake.commands[0x0F], 0);
    CHECK_EQ(fake_rom_reg(&b.fake, 0x60008090), 0);
    CHECK_EQ(fake_rom_reg(&b.fake, 0x600080AC), 1u << 31);
    OK(ota_flasher_reset(b.flasher, OTA_FLASHER_WATCHDOG_RESET, &b.error));
    fake_rom_pass(&b.fake, 10);
    CHECK_EQ(b.fake.mode, FAKE_ROM_APP);
    tear_down(&b);
    /* the C6 would freeze */
    set_up(&b, (fake_rom_options){.chip_id = 13, .usb_vid = 0x303A, .usb_pid = 0x1001}, true);
    OK(connect(&b));
    CHECK_EQ(b.fake.watchdog_writes, 2);
    CHECK_EQ(ota_flasher_reset(b.flasher, OTA_FLASHER_WATCHDOG_RESET, &b.error), OTA_ERR_UNSUPPORTED);
    tear_down(&b);
    /* entered by the button: only the watchdog leaves the boot loader */
    set_up(&b, (fake_rom_options){.chip_id = 5, .usb_vid = 0x303A, .usb_pid = 0x1001, .starts = FAKE_ROM_ROM}, true);
    b.options.before = OTA_FLASHER_NO_RESET;
    OK(connect(&b));
    uint64_t changes = b.fake.serial.line_changes;
    OK(ota_flasher_reset(b.flasher, OTA_FLASHER_AFTER_AUTO, &b.error));
    CHECK_EQ(b.fake.serial.line_changes, changes);
    fake_rom_pass(&b.fake, 10);
    CHECK_EQ(b.fake.mode, FAKE_ROM_APP);
    tear_down(&b);
}

TEST(a_port_that_vanishes_with_the_reset_comes_back) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 9, .usb_vid = 0x303A, .usb_pid = 0x1001}, true);
    b.fake.faults.vanishes_on_reset = true;
    OK(connect(&b));
    CHECK_EQ(b.fake.serial.reopens, 1);
    CHECK_EQ(b.fake.resets, 1);
    OK(ota_flasher_reset(b.flasher, OTA_FLASHER_HARD_RESET, &b.error));
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_GONE);
    CHECK_EQ(ota_flasher_connect(b.flasher, NULL), OTA_ERR_STATE);
    OK(ota_flasher_reopen(b.flasher, 5000, &b.error));
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_OFF);
    tear_down(&b);
}

TEST(usb_otg_uses_small_blocks) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 2, .usb_vid = 0x303A, .usb_pid = 2}, true);
    OK(connect(&b));
    CHECK_EQ(ota_flasher_get_info(b.flasher)->link, OTA_FLASHER_LINK_USB_OTG);
    CHECK_EQ(ota_flasher_get_info(b.flasher)->block_size, 0x800);
    CHECK_EQ(b.fake.commands[0x07], 5);
    OK(write_all(&b, 0x20000, true));
    CHECK_EQ(b.fake.commands[0x11], (packed_len + 0x7FF) / 0x800);
    tear_down(&b);
}

TEST(the_console_is_read_after_the_restart) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 0}, true);
    b.options.baud = 921600;
    OK(connect(&b));
    char text[1024];
    size_t len = 0, got = 1;
    CHECK_EQ(ota_flasher_read_console(b.flasher, text, sizeof text, 100, &got, NULL), OTA_ERR_STATE);
    OK(ota_flasher_reset(b.flasher, OTA_FLASHER_AFTER_AUTO, &b.error));
    CHECK_EQ(b.fake.serial.baud, OTA_SERIAL_BAUD);
    do {
        OK(ota_flasher_read_console(b.flasher, text + len, 7, 1000, &got, &b.error));
        len += got;
    } while (got > 0 && len < sizeof text - 8);
    text[len] = '\0';
    CHECK(strstr(text, FAKE_ROM_APP_LOG) != NULL);
    tear_down(&b);
}

TEST(custom_sequences_and_no_lines) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.before = OTA_FLASHER_CUSTOM_RESET;
    b.options.before_sequence = "D0|R1|W0.1|D1|R0|W0.05|D0";
    b.options.after = OTA_FLASHER_AFTER_CUSTOM;
    b.options.after_sequence = "U0,1|W0.25|U0,0";
    OK(connect(&b));
    CHECK_EQ(b.fake.resets, 1);
    OK(ota_flasher_reset(b.flasher, OTA_FLASHER_AFTER_AUTO, &b.error));
    fake_rom_pass(&b.fake, 10);
    CHECK_EQ(b.fake.mode, FAKE_ROM_APP);
    ota_flasher_free(&b.flasher);
    b.options.before_sequence = "D2";
    CHECK_EQ(ota_flasher_new(&b.options, &b.flasher, &b.error), OTA_ERR_ARGUMENT);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 0, .no_lines = true, .starts = FAKE_ROM_ROM}, true);
    OK(connect(&b));
    CHECK_EQ(ota_flasher_reset(b.flasher, OTA_FLASHER_AFTER_AUTO, &b.error), OTA_ERR_UNSUPPORTED);
    tear_down(&b);
}

TEST(revisions_are_read_on_demand) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 0}, true);
    fake_rom_set_reg(&b.fake, 0x3FF5A00C, 1u << 15);
    fake_rom_set_reg(&b.fake, 0x3FF5A014, 1u << 20 | 1u << 24);
    fake_rom_set_reg(&b.fake, 0x3FF6607C, 1u << 31);
    OK(connect(&b));
    uint64_t before = b.fake.total_commands;
    uint32_t revision;
    CHECK_EQ(ota_flasher_get_info(b.flasher)->revision, OTA_FLASHER_UNKNOWN);
    OK(ota_flasher_read_revision(b.flasher, &revision, &b.error));
    CHECK_EQ(revision, 301);
    CHECK_EQ(b.fake.total_commands - before, 3);
    OK(ota_flasher_read_revision(b.flasher, &revision, &b.error));
    CHECK_EQ(b.fake.total_commands - before, 3);
    tear_down(&b);
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    fake_rom_set_reg(&b.fake, 0x60008850, 4u << 18);
    OK(connect(&b));
    OK(ota_flasher_read_revision(b.flasher, &revision, &b.error));
    CHECK_EQ(revision, 4);
    tear_down(&b);
}

TEST(facts_of_another_device_are_forgotten) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    b.options.facts = (ota_flasher_facts){.is_known = true,
                                          .chip_id = 5,
                                          .mac = {1, 2, 3, 4, 5, 6},
                                          .revision = 4,
                                          .flash_id = 0x1840EF,
                                          .flash_size = 16 << 20};
    OK(connect(&b));
    const ota_flasher_info *info = ota_flasher_get_info(b.flasher);
    CHECK_EQ(info->flash_size, 4 << 20);
    CHECK_EQ(info->revision, OTA_FLASHER_UNKNOWN);
    CHECK_EQ(info->mac[0], 0x24);
    CHECK(info->facts.is_known && info->facts.flash_id == 0x1640EF && !info->stub_was_running);
    tear_down(&b);
}

TEST(a_cancelled_flasher_can_be_used_after_rearm) {
    bench b;
    set_up(&b, (fake_rom_options){.chip_id = 5}, true);
    OK(connect(&b));
    ota_flasher_cancel(b.flasher);
    CHECK_EQ(ota_flasher_erase(b.flasher, 0, 4096, &b.error), OTA_ERR_CANCELLED);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_STOPPED);
    CHECK_EQ(ota_flasher_connect(b.flasher, NULL), OTA_ERR_STATE);
    ota_flasher_rearm(b.flasher);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_BROKEN);
    OK(connect(&b));
    tear_down(&b);
}

int main(void) {
    prepare();
    RUN(every_chip_is_found_and_flashed_through_rom_and_stub);
    RUN(twenty_commands_are_enough_up_to_the_first_data);
    RUN(an_esp32_that_nobody_names_needs_one_command_more);
    RUN(plain_and_deflated_writes_read_back);
    RUN(erase_takes_whole_sectors_only_and_no_more);
    RUN(a_program_keeps_what_lies_around_it);
    RUN(a_stub_that_still_runs_is_used_again);
    RUN(rates_that_do_not_work_step_down);
    RUN(silence_is_explained_by_the_boot_messages);
    RUN(another_chip_than_the_one_named_is_refused);
    RUN(secure_download_mode_leaves_plain_writes_only);
    RUN(plain_text_is_not_written_to_an_encrypted_flash);
    RUN(a_stub_is_told_no_more_than_it_was_promised);
    RUN(refusals_name_chip_command_status_and_offset);
    RUN(roms_with_smaller_blocks_and_single_writes_are_served);
    RUN(a_stub_that_does_not_start_leaves_the_work_to_the_rom);
    RUN(slow_flash_survives);
    RUN(watchdogs_are_silenced_on_usb_and_restart_the_chip);
    RUN(a_port_that_vanishes_with_the_reset_comes_back);
    RUN(usb_otg_uses_small_blocks);
    RUN(the_console_is_read_after_the_restart);
    RUN(custom_sequences_and_no_lines);
    RUN(revisions_are_read_on_demand);
    RUN(facts_of_another_device_are_forgotten);
    RUN(a_cancelled_flasher_can_be_used_after_rearm);
    return DONE();
}
