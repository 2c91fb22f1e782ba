/* sources: flasher/rom_loader.c flasher/rom_exchange.c flasher/rom_write.c flasher/rom_command.c flasher/slip.c flasher/chip.c
 *     base/status.c
 *
 * The machine by hand: what it asks for, and where answers lead. Whole sessions are in test_flasher.c. */
#include "base/bytes.h"
#include "check.h"
#include "flasher/rom_loader.h"

#define UPLOAD_TRIES 3 /* of a segment, before the boot ROM does the work */

static ota_serial serial;
static ota_flasher_options options;
static ota_rom_log boot;
static ota_rom_loader loader;
static ota_rom_action action;
static ota_error error;

static void start(void) {
    memset(&error, 0, sizeof error);
    ota_rom_log_init(&boot);
    options.serial = &serial;
    ota_rom_loader_init(&loader, &options, &boot, 115200);
}

static void defaults(void) {
    serial = (ota_serial){.name = "line", .has_lines = true, .baud = 115200};
    options = (ota_flasher_options){0};
}

/* Goes on, with nothing but success that needs no answer, to the next command; its opcode, or minus a status at the end. */
static int next_command(void) {
    for (int i = 0; i < 1000; i++) {
        ota_status status = ota_rom_loader_next(&loader, &action, &error);
        if (status != OTA_OK) {
            return -(int)status;
        }
        if (action.kind == OTA_ROM_ACT_COMMAND) {
            return action.request->op;
        }
        if (action.kind == OTA_ROM_ACT_GREETING) {
            return 0x100;
        }
        ota_rom_loader_tell(&loader, &(ota_rom_result){0});
    }
    return -1000;
}

static void answer(uint8_t status, uint8_t code, uint32_t value, const void *data, size_t len) {
    ota_rom_reply reply = {.status = status, .error = code, .value = value, .data = data, .data_len = len};
    ota_rom_loader_tell(&loader, &(ota_rom_result){.is_answered = true, .reply = &reply});
}

static void value(uint32_t value) {
    answer(0, 5, value, NULL, 0);
}

static void silence(void) {
    ota_rom_loader_tell(&loader, &(ota_rom_result){0});
}

static void security_of(uint32_t chip_id, uint32_t flags) {
    uint8_t info[20] = {0};
    ota_store_u32le(info, flags);
    ota_store_u32le(info + 12, chip_id);
    answer(0, 0, 0, info, sizeof info);
}

TEST(sequences_parse_and_say_what_is_wrong) {
    static const char *const good[] = {"D0", "D0|R1|W0.1|D1|R0|W0.05|D0", "U1,0|W10|U0,0|", "W0", "W.5", "W1."};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        CHECK_EQ(ota_rom_sequence_check(good[i]), OTA_OK);
    }
    static const char *const bad[] = {"",       "D",      "D2",  "X0",    "D0R1", "D0||R1", "U1",
                                      "U1,",    "U1,2",   "U10", "W",     "W.",   "W10.1",  "W99999999999999",
                                      "W1.2.3", "D0|W-1", "|D0", "D0 |R1"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ(ota_rom_sequence_check(bad[i]), OTA_ERR_ARGUMENT);
    }
    const char *text = "R1|W0.125|D1|U0,0";
    ota_rom_step step = {.dtr = false, .rts = false};
    CHECK_EQ(ota_rom_sequence_next(&text, &step), OTA_OK);
    CHECK(step.sets_lines && step.rts && !step.dtr);
    CHECK_EQ(ota_rom_sequence_next(&text, &step), OTA_OK);
    CHECK(!step.sets_lines && step.wait_ms == 125);
    CHECK_EQ(ota_rom_sequence_next(&text, &step), OTA_OK);
    CHECK(step.sets_lines && step.rts && step.dtr);
    CHECK_EQ(ota_rom_sequence_next(&text, &step), OTA_OK);
    CHECK(!step.rts && !step.dtr);
    CHECK_EQ(ota_rom_sequence_next(&text, &step), OTA_DONE);
}

TEST(the_way_in_follows_from_port_and_try) {
    defaults();
    options.serial = &serial;
    CHECK(strcmp(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 0),
                 "U0,0|U1,1|U0,1|W0.1|U1,0|W0.05|U0,0|D0") == 0);
    CHECK(strstr(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 1), "W0.55") != NULL);
    CHECK(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 2)[0] == 'D');
    CHECK(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 4)[0] == 'U');
    CHECK(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_USB_JTAG, 0)[0] == 'R');
    CHECK(strcmp(ota_rom_run_sequence(&options, OTA_FLASHER_LINK_UART), "U0,1|W0.1|U0,0") == 0);
    serial.usb_vid = 0x10C4;
    serial.usb_pid = 0xEA64;
    const char *tied = ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 0);
    CHECK(strcmp(tied + strlen(tied) - 5, "W0.05") == 0); /* DTR stays */
    CHECK(strstr(ota_rom_run_sequence(&options, OTA_FLASHER_LINK_UART), "U1,0") != NULL);
    for (size_t i = 0; i < 8; i++) {
        CHECK_EQ(ota_rom_sequence_check(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, (unsigned)i)), OTA_OK);
    }
    serial.usb_vid = 0x303A;
    serial.usb_pid = 0x1001;
    CHECK_EQ(ota_rom_link(&options), OTA_FLASHER_LINK_USB_JTAG);
    serial.usb_pid = 0x0009;
    CHECK_EQ(ota_rom_link(&options), OTA_FLASHER_LINK_USB_OTG);
    serial.usb_pid = 0x8000; /* an application's own */
    CHECK_EQ(ota_rom_link(&options), OTA_FLASHER_LINK_UART);
    serial.has_lines = false;
    CHECK(ota_rom_enter_sequence(&options, OTA_FLASHER_LINK_UART, 0) == NULL);
}

TEST(syncs_and_attempts_are_bounded) {
    defaults();
    options.connect_attempts = 3;
    start();
    int syncs = 0, op;
    while ((op = next_command()) == OTA_ROM_SYNC) {
        syncs++;
        CHECK_EQ(action.ms, 100);
        silence();
    }
    CHECK_EQ(op, -OTA_ERR_CHIP_SILENT);
    CHECK_EQ(syncs, 15);
    CHECK_EQ(loader.resets, 3);
    CHECK_EQ(next_command(), -OTA_ERR_CHIP_SILENT); /* for ever */
}

TEST(lines_that_cannot_be_set_are_left_alone) {
    defaults();
    start();
    CHECK_EQ(ota_rom_loader_next(&loader, &action, &error), OTA_OK);
    CHECK_EQ(action.kind, OTA_ROM_ACT_LINES);
    ota_rom_loader_tell(&loader, &(ota_rom_result){.failed = true});
    CHECK_EQ(ota_rom_loader_next(&loader, &action, &error), OTA_OK);
    CHECK_EQ(action.kind, OTA_ROM_ACT_FLUSH);
    CHECK_EQ(loader.resets, 0);
    CHECK(!loader.info.was_reset);
}

TEST(security_info_that_is_not_known_leads_to_the_magic_register) {
    defaults();
    start();
    CHECK_EQ(next_command(), OTA_ROM_SYNC);
    value(0x20120707);
    CHECK_EQ(next_command(), OTA_ROM_GET_SECURITY_INFO);
    ota_rom_loader_tell(&loader, &(ota_rom_result){.is_answered = true, .is_unsupported = true});
    CHECK_EQ(ota_rom_loader_next(&loader, &action, &error), OTA_OK);
    CHECK_EQ(action.kind, OTA_ROM_ACT_DRAIN);
    CHECK_EQ(action.ms, 200);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), OTA_CHIP_MAGIC_REG);
    value(0x00F01D83);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(loader.info.chip_id, OTA_CHIP_ESP32);
    /* an unknown value is told */
    start();
    next_command();
    value(0x20120707);
    next_command();
    ota_rom_loader_tell(&loader, &(ota_rom_result){.is_answered = true, .is_unsupported = true});
    next_command();
    value(0xFFF0C101); /* an ESP8266 */
    CHECK_EQ(next_command(), -OTA_ERR_CHIP_OTHER);
    CHECK(strstr(error.text, "FFF0C101") != NULL);
}

TEST(boot_messages_spare_a_question_but_are_not_believed) {
    defaults();
    start();
    CHECK_EQ(next_command(), OTA_ROM_SYNC);
    static const char text[] = "ets Jun  8 2016 00:22:57\r\n";
    ota_rom_log_feed(&boot, text, sizeof text - 1);
    value(0x20120707);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    value(0x000007C6); /* it is an S2: its security flags are asked for after all */
    CHECK_EQ(next_command(), OTA_ROM_GET_SECURITY_INFO);
    answer(0, 0, 0, "\x04\0\0\0\x01\0\0\0\0\0\0\0", 12);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    answer(1, 5, 0, NULL, 0); /* secure download mode */
    CHECK_EQ(next_command(), OTA_ROM_SPI_ATTACH);
    CHECK(loader.info.secure_download && loader.info.flash_encrypted && loader.info.chip_id == OTA_CHIP_ESP32S2);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_SPI_SET_PARAMS);
    value(0);
    CHECK_EQ(next_command(), -OTA_DONE);
    CHECK(!loader.info.facts.is_known && !loader.info.has_mac);
}

TEST(rates_are_computed_from_what_the_rom_takes_the_crystal_for) {
    CHECK_EQ(ota_rom_baud_request(921600, 40000000, 40000000), 921600);
    CHECK_EQ(ota_rom_baud_request(921600, 41000000, 40000000), 944640);
    CHECK_EQ(ota_rom_baud_request(921600, 0, 40000000), 921600);
    CHECK_EQ(ota_rom_baud_request(921600, 40, 26), 1417846);
    CHECK_EQ(ota_rom_baud_request(3000000, UINT32_MAX, 1), 3000000);
    /* ESP32: calibration and eFuse */
    defaults();
    options.baud = 921600;
    options.chip = "esp32";
    start();
    next_command();
    value(1);
    next_command();
    value(0x00F01D83);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), 0x3FF5F06C);
    value(400 << 7);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), 0x3FF5A010);
    value(0xAB00 | 252); /* 400 * 15625 * 252 / 40 = 39,375,000 */
    CHECK_EQ(next_command(), OTA_ROM_CHANGE_BAUDRATE);
    CHECK_EQ(ota_load_u32le(action.request->head), 907200);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 0);
    CHECK_EQ(loader.info.facts.rom_clock, 39375000);
    /* an eFuse of 0 must not kill the link */
    start();
    next_command();
    value(1);
    next_command();
    value(0x00F01D83);
    next_command();
    value(400 << 7);
    next_command();
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_CHANGE_BAUDRATE);
    CHECK_EQ(ota_load_u32le(action.request->head), 921600);
    /* C5 with 48 MHz whose ROM expects 40 */
    options.chip = NULL;
    start();
    next_command();
    value(1);
    next_command();
    security_of(OTA_CHIP_ESP32C5, 0);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    value(0xF0000000 | 416); /* 48 MHz / 115200 */
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), 0x60096110);
    value(40u << 24);
    CHECK_EQ(next_command(), OTA_ROM_CHANGE_BAUDRATE);
    CHECK_EQ(ota_load_u32le(action.request->head), 921600 * 40 / 48);
    /* C2 in secure download mode: its crystal is not known */
    start();
    next_command();
    value(1);
    next_command();
    security_of(OTA_CHIP_ESP32C2, 4);
    CHECK_EQ(next_command(), OTA_ROM_SPI_ATTACH);
}

TEST(the_pads_of_flash_in_the_package_are_passed_on) {
    defaults();
    options.chip = "esp32";
    start();
    next_command();
    value(1);
    next_command();
    value(0x00F01D83);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG); /* MAC */
    value(1);
    next_command();
    value(2);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), 0x3FF5A000);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    value(16 << 15 | 8 << 10 | 17 << 5 | 6);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    value(11 << 4);
    CHECK_EQ(next_command(), OTA_ROM_SPI_ATTACH);
    CHECK_EQ(ota_load_u32le(action.request->head), 11 << 24 | 16 << 18 | 8 << 12 | 17 << 6 | 6);
}

static uint8_t text[0x1801], data[5];
static const ota_flasher_stub s3_stub = {.name = "esp32s3",
                                         .entry = 0x403795A8,
                                         .text_start = 0x40378000,
                                         .text = text,
                                         .text_len = sizeof text,
                                         .data_start = 0x3FCB2DC4,
                                         .data = data,
                                         .data_len = sizeof data};

static void to_the_stub(uint32_t flags) {
    defaults();
    options.stubs = &s3_stub;
    options.stub_count = 1;
    start();
    next_command();
    value(1);
    next_command();
    security_of(OTA_CHIP_ESP32S3, flags);
    next_command();
    value(1);
    next_command();
    value(2);
    CHECK_EQ(next_command(), OTA_ROM_MEM_BEGIN);
}

TEST(a_stub_is_uploaded_segment_by_segment_and_again_after_a_bad_block) {
    to_the_stub(0);
    CHECK_EQ(ota_load_u32le(action.request->head), sizeof text);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 2);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_DATA);
    CHECK_EQ(action.request->payload_len, 0x1800);
    answer(1, 7, 0, NULL, 0); /* the checksum did not fit */
    CHECK_EQ(next_command(), OTA_ROM_MEM_BEGIN);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_DATA);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_DATA);
    CHECK_EQ(action.request->payload_len, 1);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 1);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_BEGIN);
    CHECK_EQ(ota_load_u32le(action.request->head + 12), 0x3FCB2DC4);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_DATA);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_MEM_END);
    CHECK_EQ(action.ms, 200);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 0x403795A8);
    silence(); /* a reply that is not sent is no error */
    CHECK_EQ(next_command(), 0x100);
    ota_rom_loader_tell(&loader,
                        &(ota_rom_result){.is_answered = true, .frame = (const uint8_t *)"late", .frame_len = 4});
    CHECK_EQ(next_command(), 0x100);
    ota_rom_loader_tell(&loader,
                        &(ota_rom_result){.is_answered = true, .frame = (const uint8_t *)"OHAI", .frame_len = 4});
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK(loader.info.is_stub && loader.stub_uploads == 1);
}

TEST(with_secure_boot_the_s3_starts_a_stub_by_a_detour) {
    to_the_stub(OTA_ROM_SECURE_BOOT);
    int op;
    do {
        value(0);
        op = next_command();
    } while (op == OTA_ROM_MEM_DATA || op == OTA_ROM_MEM_BEGIN);
    CHECK_EQ(op, OTA_ROM_MEM_END);
    CHECK_EQ(ota_load_u32le(action.request->head), 1); /* no entry */
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK_EQ(ota_load_u32le(action.request->head), 0x3FCEF688);
    value(0x40001234);
    CHECK_EQ(next_command(), OTA_ROM_WRITE_REG);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 0x403795A8);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_READ_FLASH_SLOW);
    ota_rom_loader_tell(&loader, &(ota_rom_result){.is_greeted = true});
    CHECK_EQ(next_command(), OTA_ROM_WRITE_REG);
    CHECK_EQ(ota_load_u32le(action.request->head + 4), 0x40001234);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    CHECK(loader.info.is_stub);
}

TEST(a_flash_chip_that_does_not_answer_is_told) {
    to_the_stub(0);
    for (int i = 0; i < UPLOAD_TRIES; i++) {
        answer(1, 6, 0, NULL, 0);
        if (i + 1 < UPLOAD_TRIES) {
            CHECK_EQ(next_command(), OTA_ROM_MEM_BEGIN);
        }
    }
    CHECK_EQ(next_command(), OTA_ROM_SPI_ATTACH);
    CHECK(loader.info.stub_failed);
    value(0);
    next_command();
    value(0x80000000);
    next_command();
    value(0x70000003);
    CHECK_EQ(next_command(), OTA_ROM_WRITE_REG);
    CHECK_EQ(action.request->head_len, 7 * 16);
    value(0);
    CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    for (int i = 1; i < 3; i++) { /* asked again */
        value(i == 1 ? 0xFFFFFFFF : 0);
        CHECK_EQ(next_command(), OTA_ROM_WRITE_REG);
        value(0);
        CHECK_EQ(next_command(), OTA_ROM_READ_REG);
    }
    value(0xFFFFFFFF);
    CHECK_EQ(next_command(), -OTA_ERR_CHIP_PROTOCOL);
    CHECK(strstr(error.text, "FFFFFF") != NULL);
}

TEST(the_flash_id_is_read_and_the_controller_left_as_it_was) {
    ota_rom_reg_write writes[OTA_ROM_REG_WRITES_MAX];
    const ota_chip *chip = ota_chip_by_id(OTA_CHIP_ESP32);
    size_t count = ota_rom_flash_id_writes(chip, 0x11, 0x22, writes);
    CHECK_EQ(count, 7);
    CHECK_EQ(writes[0].address, 0x3FF4202C);
    CHECK_EQ(writes[0].value, 23);
    CHECK_EQ(writes[1].value, 0x90000000);
    CHECK_EQ(writes[2].value, 0x7000009F);
    CHECK_EQ(writes[4].address, 0x3FF42000);
    CHECK_EQ(writes[4].value, 1 << 18);
    CHECK(writes[5].value == 0x11 && writes[5].delay_us >= 100 && writes[6].value == 0x22);
    CHECK_EQ(ota_rom_watchdog_off_writes(ota_chip_by_id(OTA_CHIP_ESP32C2), writes), 3);
    CHECK_EQ(ota_rom_watchdog_off_writes(ota_chip_by_id(OTA_CHIP_ESP32C6), writes), 6);
    CHECK(writes[0].value == 0x50D83AA1 && writes[3].value == 0x50D83AA1 && writes[4].mask == 1 << 18);
    CHECK_EQ(ota_rom_watchdog_reset_writes(ota_chip_by_id(OTA_CHIP_ESP32C3), writes), 4);
    CHECK_EQ(writes[2].value, 0xD0000102);
}

int main(void) {
    RUN(sequences_parse_and_say_what_is_wrong);
    RUN(the_way_in_follows_from_port_and_try);
    RUN(syncs_and_attempts_are_bounded);
    RUN(lines_that_cannot_be_set_are_left_alone);
    RUN(security_info_that_is_not_known_leads_to_the_magic_register);
    RUN(boot_messages_spare_a_question_but_are_not_believed);
    RUN(rates_are_computed_from_what_the_rom_takes_the_crystal_for);
    RUN(the_pads_of_flash_in_the_package_are_passed_on);
    RUN(a_stub_is_uploaded_segment_by_segment_and_again_after_a_bad_block);
    RUN(with_secure_boot_the_s3_starts_a_stub_by_a_detour);
    RUN(a_flash_chip_that_does_not_answer_is_told);
    RUN(the_flash_id_is_read_and_the_controller_left_as_it_was);
    return DONE();
}
