/* sources: sink/sink_serial.c sink/image_store.c sink/sink.c sink/sink_flash.c flasher/flash_serial.c target/esp_target.c
 *          esp/esp_image.c esp/esp_otadata.c esp/esp_partition_table.c base/status.c base/bytes.c port/fault.c
 *          port/port_posix_file.c port/port_posix_clock.c flash_emu.c small_chip.c fake_flasher.c
 *
 * libs: libcrypto zlib
 */
#include "sink/sink_serial.h"

#include <openssl/evp.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "check.h"
#include "fake_flasher.h"
#include "flasher/flash_serial.h"
#include "small_chip.h"

#define SECTOR OTA_STORE_SECTOR
#define BLOCK OTA_STORE_BLOCK

enum {
    FLASH = 1 << 20,
    SLOT = 0x20000,
    SLOT_SIZE = 0xA0000 + SECTOR, /* no multiple of a block */
    SIZE = 500001,
    DEVICES = 3,
};

static uint8_t image[SIZE];
static ota_flasher chips[DEVICES];
static ota_sink_serial_device devices[DEVICES];
static ota_sink_serial_options options;
static ota_error error;

static void fill(uint8_t *bytes, size_t len, uint32_t state) {
    for (size_t i = 0; i < len; i++) {
        state = state * 1103515245u + 12345u;
        bytes[i] = (uint8_t)(state >> ((i & 1) != 0 ? 16 : 28));
    }
}

/* ---- Hooks ------------------------------------------------------------------------------------------------------------ */

typedef struct hooks {
    int begins, commits, ends;
    bool refuse;
    const uint8_t *image;
    size_t len;
} hooks;

static hooks hooked[DEVICES];

static ota_status hook_begin(void *user, ota_error *err) {
    hooks *self = user;
    if (self->refuse) {
        return ota_error_set(err, OTA_ERR_PENDING_VERIFY, OTA_STAGE_TARGET, 0, 0, "not now");
    }
    self->begins++;
    return OTA_OK;
}

static ota_status hook_commit(void *user, const uint8_t *bytes, size_t len, ota_error *err) {
    hooks *self = user;
    (void)err;
    self->commits++;
    self->image = bytes;
    self->len = len;
    return OTA_OK;
}

static void hook_end(void *user) {
    hooks *self = user;
    self->ends++;
}

/* Chips with erased flash, everything switched on. */
static void begin_test(size_t count) {
    memset(&error, 0, sizeof error);
    memset(hooked, 0, sizeof hooked);
    for (size_t i = 0; i < count; i++) {
        fake_flasher_init(&chips[i], FLASH);
        devices[i] = (ota_sink_serial_device){
            .name = "chip",
            .flasher = &chips[i],
            .offset = SLOT,
            .size = SLOT_SIZE,
            .begin = hook_begin,
            .commit = hook_commit,
            .end = hook_end,
            .user = &hooked[i],
        };
    }
    options = (ota_sink_serial_options){
        .devices = devices,
        .device_count = count,
        .skip_identical = true,
        .skip_blank = true,
        .sector_diff = true,
        .pre_erase = true,
    };
}

static void end_test(void) {
    for (size_t i = 0; i < options.device_count; i++) {
        CHECK_EQ(chips[i].mistakes, 0);
        CHECK_EQ(hooked[i].begins, hooked[i].ends);
        fake_flasher_end(&chips[i]);
    }
}

static ota_sink *new_sink(void) {
    ota_sink *sink = NULL;
    CHECK_EQ(ota_sink_serial_new(&options, &sink, &error), OTA_OK);
    return sink;
}

static ota_status append(ota_sink *sink, size_t from, size_t to) {
    static _Alignas(4096) uint8_t chunk[8 * SECTOR];
    ota_status status = OTA_OK;
    while (status >= 0 && from < to) {
        size_t len = to - from < sizeof chunk ? to - from : sizeof chunk;
        memcpy(chunk, image + from, len);
        status = sink->ops->write(sink, chunk, len, &error);
        from += len;
    }
    return status;
}

static ota_status install_into(ota_sink *sink, uint64_t size) {
    ota_status status = sink->ops->open(sink, size, 0, &error);
    status = status < 0 ? status : append(sink, 0, SIZE);
    status = status < 0 ? status : sink->ops->finish(sink, &error);
    status = status < 0 ? status : sink->ops->commit(sink, &error);
    if (status < 0) {
        sink->ops->abort(sink);
    }
    return status;
}

static ota_sink_serial_result result_of(ota_sink *sink, size_t i) {
    ota_sink_serial_result result = {0};
    CHECK(ota_sink_serial_get_result(sink, i, &result));
    return result;
}

static bool holds_image(const ota_flasher *chip) {
    return memcmp(chip->bytes + SLOT, image, SIZE) == 0;
}

static bool is_untouched(const ota_flasher *chip, uint64_t from, uint64_t to, uint8_t with) {
    for (uint64_t i = from; i < to; i++) {
        if (chip->bytes[i] != with) {
            return false;
        }
    }
    return true;
}

typedef enum before {
    BLANK,
    DIRTY,
    IDENTICAL,
    CHANGED,
    HALF,
    BEFORES,
} before;

/* What the flash holds beforehand; zeros outside the slot. */
static void prepare(ota_flasher *chip, before what) {
    memset(chip->bytes, 0, FLASH);
    uint8_t *slot = chip->bytes + SLOT;
    if (what == BLANK) {
        memset(slot, 0xFF, SLOT_SIZE);
    } else if (what == DIRTY) {
        fill(slot, SLOT_SIZE, 99);
    } else {
        memcpy(slot, image, SIZE);
    }
    if (what == CHANGED) {
        memcpy(slot + 3 * BLOCK + 5 * SECTOR + 17, "another", 7);
    } else if (what == HALF) {
        fill(slot + 4 * BLOCK + 1, SIZE - 4 * BLOCK - 1, 7);
    }
}

/* ---- Content ----------------------------------------------------------------------------------------------------------- */

TEST(every_switch_and_every_content_ends_with_the_image) {
    for (uint32_t bits = 0; bits < 64; bits++) {
        for (before what = BLANK; what < BEFORES; what++) {
            begin_test(1);
            options.skip_identical = (bits & 1) != 0;
            options.skip_blank = (bits & 2) != 0;
            options.sector_diff = (bits & 4) != 0;
            options.pre_erase = (bits & 8) != 0;
            chips[0].info.is_stub = (bits & 16) == 0;
            options.level = (bits & 32) == 0 ? 1 : -1;
            prepare(&chips[0], what);
            ota_sink *sink = new_sink();
            CHECK_EQ(install_into(sink, what == HALF ? OTA_SIZE_UNKNOWN : SIZE), OTA_OK);
            ota_sink_serial_result result = result_of(sink, 0);
            CHECK(holds_image(&chips[0]));
            CHECK(is_untouched(&chips[0], 0, SLOT, 0));
            CHECK(is_untouched(&chips[0], SLOT + SLOT_SIZE, FLASH, 0));
            CHECK_EQ(result.phase, OTA_SERIAL_DONE);
            CHECK(result.verified && result.committed);
            CHECK_EQ(result.done, SIZE);
            CHECK_EQ(result.size, SIZE);
            CHECK_EQ(result.identical, what == IDENTICAL && (bits & 5) != 0);
            CHECK_EQ(result.programmed + result.skipped + result.blank, SIZE);
            CHECK(hooked[0].image != NULL && hooked[0].len == SIZE);
            ota_sink_free(&sink);
            end_test();
        }
    }
}

TEST(an_identical_image_costs_one_digest_when_its_own_is_announced) {
    uint8_t md5[16];
    EVP_Digest(image, SIZE, md5, NULL, EVP_md5(), NULL);
    begin_test(1);
    options.md5 = md5;
    prepare(&chips[0], IDENTICAL);
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    CHECK(result_of(sink, 0).identical);
    CHECK_EQ(chips[0].md5s, 1);
    CHECK_EQ(chips[0].commands, 1);
    ota_sink_free(&sink);
    end_test();
}

TEST(a_changed_string_costs_one_sector) {
    begin_test(1);
    prepare(&chips[0], CHANGED);
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    ota_sink_serial_result result = result_of(sink, 0);
    CHECK_EQ(result.programmed, SECTOR);
    CHECK_EQ(result.skipped, SIZE - SECTOR);
    CHECK_EQ(chips[0].begins, 1);
    CHECK_EQ(result.probes, SIZE / BLOCK + 1 + 16 + 1); /* blocks, sectors of one, all */
    CHECK(holds_image(&chips[0]));
    ota_sink_free(&sink);
    end_test();
}

TEST(another_image_is_given_up_on_after_four_blocks) {
    begin_test(1);
    prepare(&chips[0], DIRTY);
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    ota_sink_serial_result result = result_of(sink, 0);
    CHECK_EQ(result.probes, 5);
    CHECK_EQ(result.programmed + result.blank, SIZE);
    ota_sink_free(&sink);
    end_test();
}

TEST(blank_runs_are_erased_and_not_sent) {
    begin_test(1);
    options.pre_erase = options.sector_diff = options.skip_identical = false;
    prepare(&chips[0], DIRTY);
    chips[0].info.is_stub = false; /* which waits for all of it, so that all blank runs are known */
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, OTA_SIZE_UNKNOWN, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, SIZE), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    ota_sink_serial_result result = result_of(sink, 0);
    CHECK_EQ(result.blank, 3 * SECTOR);
    CHECK_EQ(result.erased, 3 * SECTOR);
    CHECK_EQ(chips[0].begins, 3);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_OK);
    CHECK(holds_image(&chips[0]));
    ota_sink_free(&sink);
    end_test();
}

TEST(erasing_happens_while_the_image_arrives_and_not_again) {
    begin_test(1);
    prepare(&chips[0], DIRTY);
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, 5 * BLOCK), OTA_OK);
    const uint64_t all = (SIZE + BLOCK - 1) / BLOCK * BLOCK;
    while (result_of(sink, 0).erased < all && result_of(sink, 0).phase != OTA_SERIAL_FAILED) {
        sched_yield();
    }
    CHECK_EQ(append(sink, 5 * BLOCK, SIZE), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_OK);
    CHECK_EQ(result_of(sink, 0).erased, all);
    CHECK_EQ(chips[0].sectors_erased, all / SECTOR); /* the stub found nothing to erase */
    CHECK(holds_image(&chips[0]));
    ota_sink_free(&sink);
    end_test();
}

TEST(a_damaged_block_is_found_and_written_again_alone) {
    begin_test(1);
    options.skip_blank = options.sector_diff = options.skip_identical = options.pre_erase = false;
    prepare(&chips[0], BLANK);
    chips[0].flip_at = 6;
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    ota_sink_serial_result result = result_of(sink, 0);
    CHECK(holds_image(&chips[0]));
    CHECK_EQ(result.programmed, SIZE + SECTOR);
    CHECK_EQ(chips[0].begins, 2);
    ota_sink_free(&sink);
    end_test();
}

TEST(in_secure_download_mode_nothing_is_asked_and_the_result_says_so) {
    begin_test(1);
    prepare(&chips[0], DIRTY);
    chips[0].info.secure_download = true;
    chips[0].info.can_verify = chips[0].info.can_deflate = chips[0].info.is_stub = false;
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, SIZE), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    uint8_t byte;
    ota_error other = {0};
    CHECK_EQ(sink->ops->read(sink, 0, &byte, 1, &other), OTA_ERR_UNSUPPORTED);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_OK);
    CHECK(holds_image(&chips[0]));
    CHECK(!result_of(sink, 0).verified);
    CHECK(hooked[0].image == NULL);
    CHECK_EQ(chips[0].md5s, 0);
    ota_sink_free(&sink);
    end_test();
}

/* ---- Many ------------------------------------------------------------------------------------------------------------- */

TEST(devices_share_a_stream_and_one_that_fails_hurts_nobody) {
    begin_test(DEVICES);
    options.skip_blank = false;
    for (size_t i = 0; i < DEVICES; i++) {
        prepare(&chips[i], DIRTY);
    }
    chips[1].fail_at = 9;
    chips[1].fail_count = UINT64_MAX;
    chips[1].fail_state = OTA_FLASHER_GONE;
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    CHECK(holds_image(&chips[0]) && holds_image(&chips[2]));
    CHECK_EQ(result_of(sink, 1).phase, OTA_SERIAL_FAILED);
    CHECK_EQ(result_of(sink, 1).error.status, OTA_ERR_SYSTEM);
    CHECK_EQ(result_of(sink, 1).reconnects, 5);
    CHECK_EQ(hooked[1].commits, 0);
    CHECK_EQ(hooked[2].commits, 1);
    ota_image_store_counts counts;
    ota_sink_serial_get_store_counts(sink, &counts);
    CHECK_EQ(counts.streams, 1);
    CHECK_EQ(counts.compressed, SIZE);
    ota_sink_serial_result none;
    CHECK(!ota_sink_serial_get_result(sink, DEVICES, &none));
    ota_sink_free(&sink);
    end_test();
}

TEST(a_slot_that_is_too_small_or_a_hook_that_refuses_ends_that_device_alone) {
    begin_test(DEVICES);
    devices[0].size = 4 * BLOCK;
    hooked[1].refuse = true;
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    CHECK_EQ(result_of(sink, 0).error.status, OTA_ERR_TOO_LARGE);
    CHECK_EQ(hooked[0].begins, 0);
    CHECK_EQ(result_of(sink, 1).error.status, OTA_ERR_PENDING_VERIFY);
    CHECK_EQ(result_of(sink, 1).reconnects, 0);
    CHECK(is_untouched(&chips[0], 0, FLASH, 0xFF) && is_untouched(&chips[1], 0, FLASH, 0xFF));
    CHECK(holds_image(&chips[2]));
    ota_sink_free(&sink);
    end_test();
}

TEST(a_device_that_is_excluded_takes_no_part_and_jobs_bound_the_others) {
    begin_test(DEVICES);
    options.jobs = 1;
    ota_sink *sink = new_sink();
    ota_error why = {0};
    ota_error_set(&why, OTA_ERR_IMAGE_CHIP, OTA_STAGE_HEADER, 0, 0, "not for this one");
    CHECK(ota_sink_serial_exclude(sink, 1, &why));
    CHECK(!ota_sink_serial_exclude(sink, DEVICES, &why));
    CHECK_EQ(install_into(sink, SIZE), OTA_OK);
    CHECK(holds_image(&chips[0]) && holds_image(&chips[2]));
    CHECK_EQ(chips[1].commands, 0);
    CHECK_EQ(result_of(sink, 1).error.status, OTA_ERR_IMAGE_CHIP);
    CHECK_EQ(result_of(sink, 1).phase, OTA_SERIAL_FAILED);
    ota_sink_free(&sink);
    end_test();
}

TEST(an_abort_reaches_a_device_that_waits_for_its_place) {
    begin_test(DEVICES);
    options.jobs = 1;
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, BLOCK), OTA_OK);
    sink->ops->abort(sink);
    for (size_t i = 0; i < DEVICES; i++) {
        CHECK_EQ(result_of(sink, i).error.status, OTA_ERR_CANCELLED);
    }
    ota_sink_free(&sink);
    end_test();
}

TEST(the_sink_fails_when_all_devices_did) {
    begin_test(DEVICES);
    for (size_t i = 0; i < DEVICES; i++) {
        hooked[i].refuse = true;
    }
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_ERR_PENDING_VERIFY);
    CHECK(strstr(error.text, "all 3 devices failed") != NULL);
    ota_sink_free(&sink);
    end_test();
}

TEST(an_image_that_fails_reaches_every_device) {
    begin_test(DEVICES);
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, SIZE - 1), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_INCOMPLETE);
    sink->ops->abort(sink);
    for (size_t i = 0; i < DEVICES; i++) {
        CHECK(result_of(sink, i).error.status < 0);
        CHECK_EQ(hooked[i].commits, 0);
    }
    ota_sink_free(&sink);
    end_test();
}

/* ---- Cancel ------------------------------------------------------------------------------------------------------------ */

static void *cancel_when_it_hangs(void *user) {
    ota_sink *sink = user;
    fake_flasher_await_hang(&chips[1]);
    sink->ops->cancel(sink);
    return NULL;
}

TEST(a_cancel_ends_a_finish_that_waits_for_a_chip) {
    begin_test(DEVICES);
    chips[1].hang_at = 8;
    ota_sink *sink = new_sink();
    pthread_t thread;
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, SIZE), OTA_OK);
    CHECK_EQ(pthread_create(&thread, NULL, cancel_when_it_hangs, sink), 0);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_CANCELLED);
    pthread_join(thread, NULL);
    sink->ops->abort(sink);
    for (size_t i = 0; i < DEVICES; i++) {
        CHECK_EQ(hooked[i].commits, 0);
    }
    memset(&error, 0, sizeof error);
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_ERR_CANCELLED);
    ota_sink_free(&sink);
    end_test();
}

TEST(an_abort_in_mid_stream_ends_all_threads) {
    begin_test(DEVICES);
    chips[1].hang_at = 3;
    ota_sink *sink = new_sink();
    CHECK_EQ(sink->ops->open(sink, SIZE, 0, &error), OTA_OK);
    CHECK_EQ(append(sink, 0, 3 * BLOCK), OTA_OK);
    sink->ops->abort(sink);
    for (size_t i = 0; i < DEVICES; i++) {
        CHECK_EQ(result_of(sink, i).error.status, OTA_ERR_CANCELLED);
    }
    ota_sink_free(&sink);
    end_test();
}

/* ---- Lost links -------------------------------------------------------------------------------------------------------- */

TEST(a_link_lost_at_any_command_costs_only_what_was_not_verified_yet) {
    for (before what = BLANK; what < BEFORES; what++) {
        bool failed = true;
        for (uint64_t n = 0; failed; n++) {
            begin_test(1);
            options.sector_diff = what != DIRTY;
            prepare(&chips[0], what);
            chips[0].fail_at = n;
            chips[0].fail_count = 1 + n % 3; /* sometimes connecting fails, too */
            chips[0].fail_state = n % 2 == 0 ? OTA_FLASHER_BROKEN : OTA_FLASHER_GONE;
            ota_sink *sink = new_sink();
            CHECK_EQ(install_into(sink, SIZE), OTA_OK);
            ota_sink_serial_result result = result_of(sink, 0);
            CHECK(holds_image(&chips[0]));
            CHECK(is_untouched(&chips[0], 0, SLOT, 0));
            CHECK(result.verified && result.committed);
            failed = result.reconnects > 0;
            CHECK(result.programmed < 2 * SIZE);
            CHECK(what != DIRTY || result.programmed + result.blank <= SIZE + 3 * BLOCK);
            CHECK(chips[0].reopens == 0 || n % 2 == 1);
            ota_sink_free(&sink);
            end_test();
            if (check_failures > 20) {
                printf("content %d, command %llu\n", what, (unsigned long long)n);
                return;
            }
        }
    }
}

TEST(a_reconnect_that_finds_another_chip_writes_nothing_to_it) {
    begin_test(1);
    prepare(&chips[0], DIRTY);
    chips[0].fail_at = 10;
    chips[0].fail_count = 1;
    chips[0].other_after = true;
    ota_sink *sink = new_sink();
    CHECK_EQ(install_into(sink, SIZE), OTA_ERR_CHIP_OTHER);
    CHECK_EQ(hooked[0].begins, 1);
    ota_sink_free(&sink);
    end_test();
}

/* ---- A chip with slots ------------------------------------------------------------------------------------------------- */

/* Installs 2.0.0 over the hooks of a target, while commands from `fail_at` on fail, and says what boots afterwards. */
static ota_status install_small(uint64_t fail_at, uint64_t fail_count, int *boots, uint64_t *commands) {
    static _Alignas(4096) uint8_t small[2 * OTA_FLASH_SECTOR + OTA_FLASH_SECTOR];
    flash_emu emu;
    ota_flasher chip;
    ota_flash *flash = NULL;
    ota_esp_target *target = NULL;
    ota_esp_hooks hook;
    ota_sink *sink = NULL;
    ota_error err = {0};
    small_chip_init(&emu, false);
    small_chip_load(&emu, CHIP_OTA_0, "1.0.0", 0);
    small_chip_load(&emu, CHIP_OTA_1, "0.5.0", 0);
    small_chip_entry(&emu, 0, 1, OTA_ESP_STATE_VALID);
    small_chip_entry(&emu, 1, 2, OTA_ESP_STATE_INVALID);
    fake_flasher_init(&chip, CHIP_FLASH_SIZE);
    memcpy(chip.bytes, emu.bytes, CHIP_FLASH_SIZE);
    ota_esp_target_options how = small_chip_options(&emu);
    flash_emu_free(&emu);
    CHECK_EQ(ota_flash_serial_new(&chip, &flash, &err), OTA_OK);
    how.flash = flash;
    how.stopped = true;
    CHECK_EQ(ota_esp_target_new(&how, &target, &err), OTA_OK);
    CHECK_EQ(ota_esp_target_get_hooks(target, 1, &hook, &err), OTA_OK);
    chip.fail_at = chip.commands + fail_at;
    chip.fail_count = fail_count;
    ota_sink_serial_device one = {
        .name = "small",
        .flasher = &chip,
        .flash = flash,
        .offset = hook.offset,
        .size = hook.size,
        .begin = hook.begin,
        .commit = hook.commit,
        .end = hook.end,
        .user = hook.user,
    };
    ota_sink_serial_options small_options = {
        .devices = &one, .device_count = 1, .sector_diff = true, .skip_blank = true, .pre_erase = true};
    CHECK_EQ(ota_sink_serial_new(&small_options, &sink, &err), OTA_OK);
    small_chip_image(small, "2.0.0", 0);
    uint64_t first = chip.commands;
    ota_status status = sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &err);
    status = status < 0 ? status : sink->ops->write(sink, small, CHIP_IMAGE_SIZE, &err);
    status = status < 0 ? status : sink->ops->finish(sink, &err);
    status = status < 0 ? status : sink->ops->commit(sink, &err);
    if (status < 0) {
        sink->ops->abort(sink);
    }
    *commands = chip.commands - first;
    ota_sink_free(&sink);
    ota_esp_target_free(&target);
    /* What the boot loader makes of it. */
    chip.state = OTA_FLASHER_READY;
    chip.fail_at = UINT64_MAX;
    ota_flash_serial_forget(flash);
    how.stopped = false;
    memset(&err, 0, sizeof err);
    *boots = OTA_ESP_SLOT_NONE;
    if (ota_esp_target_new(&how, &target, &err) == OTA_OK) {
        *boots = ota_esp_target_running(target);
        CHECK(*boots >= 0 && ota_esp_target_verify(target, *boots, NULL, &err) == OTA_OK);
    }
    CHECK_EQ(chip.mistakes, 0);
    ota_esp_target_free(&target);
    flash->ops->close(flash);
    fake_flasher_end(&chip);
    return status;
}

TEST(a_link_lost_for_good_at_any_command_leaves_the_old_image_or_the_new_one_whole) {
    int boots;
    uint64_t commands, ignored, old = 0;
    CHECK_EQ(install_small(UINT64_MAX, 0, &boots, &commands), OTA_OK);
    CHECK_EQ(boots, 1);
    for (uint64_t n = 0; n < commands; n++) {
        ota_status status = install_small(n, UINT64_MAX, &boots, &ignored);
        CHECK(status < 0);
        CHECK(boots == 0 || boots == 1);
        old += boots == 0;
        CHECK_EQ(install_small(n, 1, &boots, &ignored), OTA_OK); /* one that comes back is an update as any */
        CHECK_EQ(boots, 1);
    }
    CHECK(old >= commands - 2); /* the entry is among the last things written */
}

int main(void) {
    fill(image, SIZE, 1);
    memset(image + 9 * SECTOR, 0xFF, SECTOR);
    memset(image + 40 * SECTOR, 0xFF, 2 * SECTOR);
    RUN(every_switch_and_every_content_ends_with_the_image);
    RUN(an_identical_image_costs_one_digest_when_its_own_is_announced);
    RUN(a_changed_string_costs_one_sector);
    RUN(another_image_is_given_up_on_after_four_blocks);
    RUN(blank_runs_are_erased_and_not_sent);
    RUN(erasing_happens_while_the_image_arrives_and_not_again);
    RUN(a_damaged_block_is_found_and_written_again_alone);
    RUN(in_secure_download_mode_nothing_is_asked_and_the_result_says_so);
    RUN(devices_share_a_stream_and_one_that_fails_hurts_nobody);
    RUN(a_slot_that_is_too_small_or_a_hook_that_refuses_ends_that_device_alone);
    RUN(a_device_that_is_excluded_takes_no_part_and_jobs_bound_the_others);
    RUN(an_abort_reaches_a_device_that_waits_for_its_place);
    RUN(the_sink_fails_when_all_devices_did);
    RUN(an_image_that_fails_reaches_every_device);
    RUN(a_cancel_ends_a_finish_that_waits_for_a_chip);
    RUN(an_abort_in_mid_stream_ends_all_threads);
    RUN(a_link_lost_at_any_command_costs_only_what_was_not_verified_yet);
    RUN(a_reconnect_that_finds_another_chip_writes_nothing_to_it);
    RUN(a_link_lost_for_good_at_any_command_leaves_the_old_image_or_the_new_one_whole);
    return DONE();
}
