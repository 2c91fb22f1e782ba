/* sources: flasher/flash_serial.c flasher/flasher.c flasher/rom_loader.c flasher/rom_exchange.c flasher/rom_write.c
 *          flasher/rom_command.c flasher/chip.c flasher/slip.c sink/sink_serial.c sink/image_store.c sink/sink.c
 *          sink/sink_flash.c target/esp_target.c esp/esp_image.c esp/esp_otadata.c esp/esp_partition_table.c base/status.c
 *          base/bytes.c port/fault.c port/port_posix_file.c port/port_posix_clock.c flash_emu.c small_chip.c fake_rom.c
 *
 * libs: libcrypto zlib
 *
 * An ESP32's flash, and an update of it, through the whole of the flasher to a chip in memory. */
#include "flasher/flash_serial.h"

#include <stdlib.h>

#include "check.h"
#include "fake_rom.h"
#include "sink/sink_serial.h"
#include "small_chip.h"

static const uint8_t text[64] = {1};
static const ota_flasher_stub stub = {
    .name = "esp32c3", .entry = FAKE_ROM_ENTRY, .text_start = 0x4038E000, .text = text, .text_len = sizeof text};

static fake_rom rom;
static ota_flasher *flasher;
static ota_flash *flash;
static ota_esp_target *target;
static ota_error error;
static uint8_t image[3 * OTA_FLASH_SECTOR];

/* A chip that runs 1.0.0 from ota_0. */
static void begin_test(bool with_stub) {
    flash_emu emu;
    memset(&error, 0, sizeof error);
    fake_rom_options chip = {.chip_id = CHIP_ID, .flash_size = 1 << 18};
    fake_rom_init(&rom, &chip);
    small_chip_init(&emu, false);
    small_chip_load(&emu, CHIP_OTA_0, "1.0.0", 0);
    small_chip_load(&emu, CHIP_OTA_1, "0.5.0", 0);
    small_chip_entry(&emu, 0, 1, OTA_ESP_STATE_VALID);
    small_chip_entry(&emu, 1, 2, OTA_ESP_STATE_INVALID);
    memcpy(rom.flash, emu.bytes, CHIP_FLASH_SIZE);
    flash_emu_free(&emu);
    ota_flasher_options options = {
        .serial = &rom.serial, .baud = 921600, .stubs = &stub, .stub_count = with_stub ? 1 : 0};
    CHECK_EQ(ota_flasher_new(&options, &flasher, &error), OTA_OK);
    CHECK_EQ(ota_flash_serial_new(flasher, &flash, &error), OTA_ERR_STATE);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_flasher_connect(flasher, &error), OTA_OK);
    CHECK_EQ(ota_flasher_get_info(flasher)->is_stub, with_stub);
    CHECK_EQ(ota_flash_serial_new(flasher, &flash, &error), OTA_OK);
    small_chip_image(image, "2.0.0", 0);
}

static void end_test(void) {
    ota_esp_target_free(&target);
    flash->ops->close(flash);
    ota_flasher_free(&flasher);
    fake_rom_free(&rom);
}

static ota_status open_target(void) {
    ota_esp_target_options options = {.flash = flash,
                                      .table_offset = CHIP_TABLE,
                                      .rules = OTA_ESP_IMAGE_RULES_NONE,
                                      .rollback = true,
                                      .running = OTA_ESP_SLOT_NONE,
                                      .stopped = true};
    options.rules.chip_id = CHIP_ID;
    return ota_esp_target_new(&options, &target, &error);
}

/* What the boot loader makes of the flash as it lies there, without any line. */
static int boots(void) {
    flash_emu emu;
    ota_esp_target *after = NULL;
    ota_error err = {0};
    flash_emu_init(&emu, CHIP_FLASH_SIZE);
    flash_emu_load(&emu, 0, rom.flash, CHIP_FLASH_SIZE);
    ota_esp_target_options options = small_chip_options(&emu);
    CHECK_EQ(ota_esp_target_new(&options, &after, &err), OTA_OK);
    int slot = ota_esp_target_running(after);
    CHECK(slot >= 0 && ota_esp_target_verify(after, slot, NULL, &err) == OTA_OK);
    ota_esp_target_free(&after);
    flash_emu_free(&emu);
    return slot;
}

static ota_status update(void) {
    ota_esp_hooks hooks;
    ota_sink *sink = NULL;
    ota_status status = target != NULL ? OTA_OK : open_target();
    status = status < 0 ? status : ota_esp_target_get_hooks(target, 1, &hooks, &error);
    if (status < 0) {
        return status;
    }
    ota_sink_serial_device one = {
        .name = "chip",
        .flasher = flasher,
        .serial = &rom.serial,
        .flash = flash,
        .offset = hooks.offset,
        .size = hooks.size,
        .begin = hooks.begin,
        .commit = hooks.commit,
        .end = hooks.end,
        .user = hooks.user,
    };
    ota_sink_serial_options options = {
        .devices = &one, .device_count = 1, .sector_diff = true, .skip_blank = true, .pre_erase = true};
    status = ota_sink_serial_new(&options, &sink, &error);
    status = status < 0 ? status : sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &error);
    status = status < 0 ? status : sink->ops->write(sink, image, CHIP_IMAGE_SIZE, &error);
    status = status < 0 ? status : sink->ops->finish(sink, &error);
    status = status < 0 ? status : sink->ops->commit(sink, &error);
    if (status < 0 && sink != NULL) {
        sink->ops->abort(sink);
    }
    ota_sink_free(&sink);
    return status;
}

TEST(reads_are_kept_until_something_is_written) {
    uint8_t first[64], again[64];
    begin_test(true);
    CHECK_EQ(flash->ops->read(flash, CHIP_OTADATA, first, sizeof first, &error), OTA_OK);
    uint64_t commands = rom.total_commands;
    CHECK_EQ(flash->ops->read(flash, CHIP_OTADATA + 8, again, 32, &error), OTA_OK);
    CHECK_EQ(rom.total_commands, commands);
    CHECK_MEM(again, first + 8, 32);
    CHECK_EQ(flash->ops->erase(flash, CHIP_OTADATA, OTA_FLASH_SECTOR, &error), OTA_OK);
    CHECK_EQ(flash->ops->read(flash, CHIP_OTADATA, again, sizeof again, &error), OTA_OK);
    CHECK_EQ(again[0], 0xFF);
    CHECK_EQ(flash->ops->program(flash, CHIP_OTADATA, first, 32, &error), OTA_OK);
    CHECK_EQ(flash->ops->read(flash, CHIP_OTADATA, again, sizeof again, &error), OTA_OK);
    CHECK_MEM(again, first, 32);
    CHECK_EQ(again[32], 0xFF);
    CHECK_EQ(flash->ops->erase(flash, CHIP_OTADATA + 1, OTA_FLASH_SECTOR, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(flash->ops->read(flash, flash->size - 1, again, 2, &error), OTA_ERR_ARGUMENT);
    end_test();
}

TEST(an_update_reaches_the_chip_with_and_without_a_stub) {
    ota_esp_image_header header;
    ota_esp_app_descriptor app;
    for (int with_stub = 0; with_stub < 2; with_stub++) {
        begin_test(with_stub != 0);
        CHECK_EQ(open_target(), OTA_OK);
        CHECK_EQ(ota_esp_target_describe(target, 1, &header, &app, &error), OTA_OK);
        CHECK(strcmp(app.version, "0.5.0") == 0);
        CHECK_EQ(update(), OTA_OK);
        CHECK(error.status == OTA_OK || puts(error.text) < 0);
        CHECK_MEM(rom.flash + CHIP_OTA_1, image, CHIP_IMAGE_SIZE);
        CHECK_EQ(ota_esp_target_describe(target, 1, &header, &app, &error), OTA_OK);
        CHECK(strcmp(app.version, "2.0.0") == 0); /* what was known of the slot is not told any more */
        CHECK_EQ(boots(), 1);
        CHECK_EQ(rom.lost_frames, 0);
        end_test();
    }
}

/* Many a call of the port is the last one the line takes; it comes back when it is opened again. */
static void lose_the_line(bool with_stub, uint64_t step) {
    begin_test(with_stub);
    uint64_t first = rom.calls;
    CHECK_EQ(update(), OTA_OK);
    uint64_t calls = rom.calls - first;
    end_test();
    CHECK(calls > 20);
    for (uint64_t n = 1; n <= calls; n += step) {
        begin_test(with_stub);
        rom.faults.fail_call = rom.calls + n;
        ota_status status = update();
        /* Looking at the slots is not tried again by anybody but the caller; once the sink has begun, the sink does it. */
        if (status < 0) {
            CHECK(target == NULL || boots() == 0);
        } else {
            CHECK_EQ(boots(), 1);
            CHECK_MEM(rom.flash + CHIP_OTA_1, image, CHIP_IMAGE_SIZE);
        }
        CHECK(!rom.is_stuck);
        end_test();
    }
}

TEST(a_line_lost_at_any_call_leaves_a_chip_that_boots) {
    lose_the_line(true, 13);
    lose_the_line(false, 97);
}

int main(void) {
    RUN(reads_are_kept_until_something_is_written);
    RUN(an_update_reaches_the_chip_with_and_without_a_stub);
    RUN(a_line_lost_at_any_call_leaves_a_chip_that_boots);
    return DONE();
}
