/* sources: target/esp_target.c sink/sink.c sink/sink_flash.c esp/esp_image.c esp/esp_otadata.c
 *          esp/esp_partition_table.c base/status.c base/bytes.c port/fault.c flash_emu.c small_chip.c
 *
 * libs: libcrypto zlib
 */
#include "target/esp_target.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "check.h"
#include "small_chip.h"

#define SECTOR OTA_FLASH_SECTOR
#define BLANK OTA_ESP_SEQ_UNUSED

enum {
    NEW = OTA_ESP_STATE_NEW,
    PENDING = OTA_ESP_STATE_PENDING_VERIFY,
    VALID = OTA_ESP_STATE_VALID,
    INVALID = OTA_ESP_STATE_INVALID,
    ABORTED = OTA_ESP_STATE_ABORTED,
};

static flash_emu emu;
static ota_error error;
static ota_esp_target_options options;

/* A chip with 1.0.0 in ota_0, running there, and 0.5.0 in ota_1 (and 0.9.0 in factory). */
static void chip(bool factory, uint32_t seq0, uint32_t state0, uint32_t seq1, uint32_t state1) {
    if (emu.bytes != NULL) {
        flash_emu_free(&emu);
    }
    small_chip_init(&emu, factory);
    small_chip_load(&emu, CHIP_OTA_0, "1.0.0", 0);
    small_chip_load(&emu, CHIP_OTA_1, "0.5.0", 0);
    if (factory) {
        small_chip_load(&emu, CHIP_FACTORY, "0.9.0", 0);
    }
    small_chip_entry(&emu, 0, seq0, state0);
    small_chip_entry(&emu, 1, seq1, state1);
    options = small_chip_options(&emu);
    memset(&error, 0, sizeof error);
}

static ota_esp_target *open_target(void) {
    ota_esp_target *target = NULL;
    CHECK_EQ(ota_esp_target_new(&options, &target, &error), OTA_OK);
    return target;
}

static void check_entry(int sector, uint32_t seq, uint32_t state) {
    ota_esp_otadata_entry entry;
    ota_esp_otadata_entry_parse(emu.bytes + CHIP_OTADATA + sector * SECTOR, &entry);
    CHECK_EQ(entry.seq, seq);
    CHECK_EQ(entry.state, seq == BLANK ? OTA_ESP_STATE_UNDEFINED : state);
    CHECK(seq == BLANK || ota_esp_otadata_crc_ok(&entry));
}

static ota_error fresh_error(void) {
    return (ota_error){0};
}

static int boot(ota_esp_target *target) {
    ota_esp_boot_decision decision;
    ota_error err = fresh_error();
    CHECK_EQ(ota_esp_target_boot(target, &decision, &err), OTA_OK);
    CHECK_EQ(ota_esp_target_running(target), decision.slot);
    return decision.slot;
}

/* Set when the last install came as far as its commit. */
static bool commit_began;

/* Installs an image; the first error. */
static ota_status install(ota_esp_target *target, int slot, const char *version, uint32_t secure_version,
                          ota_error *err) {
    static _Alignas(4096) uint8_t image[CHIP_SLOT_SIZE];
    ota_sink *sink = NULL;
    small_chip_image(image, version, secure_version);
    commit_began = false;
    ota_status status = ota_esp_target_sink_new(target, slot, true, false, &sink, err);
    status = status < 0 ? status : sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, err);
    status = status < 0 ? status : sink->ops->write(sink, image, 2 * SECTOR, err);
    status = status < 0 ? status : sink->ops->write(sink, image + 2 * SECTOR, CHIP_IMAGE_SIZE - 2 * SECTOR, err);
    status = status < 0 ? status : sink->ops->finish(sink, err);
    if (status == OTA_OK) {
        commit_began = true;
        status = sink->ops->commit(sink, err);
    }
    ota_sink_free(&sink);
    return status;
}

static bool holds(uint64_t offset, const char *version) {
    uint8_t image[CHIP_IMAGE_SIZE];
    small_chip_image(image, version, 0);
    return memcmp(emu.bytes + offset, image, sizeof image) == 0;
}

/* ---- What is there ---------------------------------------------------------------------------------------------------- */

TEST(a_target_tells_its_slots_what_runs_and_what_they_hold) {
    chip(true, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    size_t count;
    const ota_esp_slot *slots = ota_esp_target_slots(target, &count);
    CHECK_EQ(count, 3);
    CHECK_EQ(slots[1].number, 1);
    CHECK_EQ(slots[1].offset, CHIP_OTA_1);
    CHECK_EQ(slots[1].size, CHIP_SLOT_SIZE);
    CHECK(strcmp(slots[2].name, "factory") == 0);
    CHECK_EQ(ota_esp_target_running(target), 0);
    int next;
    CHECK_EQ(ota_esp_target_next_slot(target, &next, &error), OTA_OK);
    CHECK_EQ(next, 1);
    ota_esp_image_header header;
    ota_esp_app_descriptor descriptor;
    CHECK_EQ(ota_esp_target_describe(target, OTA_ESP_SLOT_FACTORY, &header, &descriptor, &error), OTA_OK);
    CHECK(strcmp(descriptor.version, "0.9.0") == 0);
    CHECK_EQ(header.chip_id, CHIP_ID);
    uint64_t size = 0;
    CHECK_EQ(ota_esp_target_verify(target, 1, &size, &error), OTA_OK);
    CHECK_EQ(size, CHIP_IMAGE_SIZE);
    uint32_t state;
    CHECK_EQ(ota_esp_target_state(target, 0, &state, &error), OTA_OK);
    CHECK_EQ(state, VALID);
    CHECK_EQ(ota_esp_target_state(target, 1, &state, &error), OTA_ERR_NOT_FOUND);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_state(target, OTA_ESP_SLOT_FACTORY, &state, &error), OTA_ERR_UNSUPPORTED);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_describe(target, 5, &header, &descriptor, &error), OTA_ERR_ARGUMENT);
    CHECK_EQ(emu.flash.erases + emu.flash.programs, 0);
    ota_esp_target_free(&target);
}

TEST(what_runs_is_what_was_told_or_else_what_would_boot) {
    chip(false, 1, VALID, 2, VALID);
    options.running = 0;
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    ota_esp_target_free(&target);
    options.running = 7; /* the table lacks it */
    target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 1);
    ota_esp_target_free(&target);
    small_chip_entry(&emu, 1, 2, PENDING); /* would be aborted */
    options.running = OTA_ESP_SLOT_NONE;
    target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    check_entry(1, 2, PENDING);
    ota_esp_target_free(&target);
}

TEST(a_chip_that_is_off_is_switched_on_by_the_first_change) {
    chip(false, BLANK, 0, BLANK, 0);
    ota_esp_target *target = open_target();
    ota_sink *sink = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 1, true, false, &sink, &error), OTA_OK);
    CHECK_EQ(emu.flash.erases + emu.flash.programs, 0); /* a refused image leaves it off */
    CHECK_EQ(sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &error), OTA_OK);
    check_entry(0, 1, VALID); /* first use */
    ota_sink_free(&sink);
    ota_esp_target_free(&target);

    chip(false, 1, VALID, 2, NEW);
    target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 1);
    CHECK_EQ(ota_esp_target_sink_new(target, 0, true, false, &sink, &error), OTA_ERR_PENDING_VERIFY);
    check_entry(1, 2, NEW); /* it would be pending when it ran */
    error = fresh_error();
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK);
    check_entry(1, 2, VALID);
    CHECK_EQ(install(target, 0, "3.0.0", 0, &error), OTA_OK);
    check_entry(0, 3, NEW);
    ota_esp_target_free(&target);

    chip(false, 1, VALID, 2, PENDING);
    target = open_target();
    CHECK_EQ(ota_esp_target_set_boot(target, 1, &error), OTA_OK);
    CHECK_EQ(ota_esp_target_running(target), 0);
    check_entry(0, 1, VALID);
    check_entry(1, 2, NEW); /* by way of ABORTED */
    CHECK_EQ(boot(target), 1);
    ota_esp_target_free(&target);
}

/* Opens a chip that a flasher holds; the slot that counts as running. Nothing may be written by that. */
static int stopped(bool factory, uint32_t seq0, uint32_t state0, uint32_t seq1, uint32_t state1) {
    chip(factory, seq0, state0, seq1, state1);
    options.stopped = true;
    uint64_t programs = emu.flash.programs;
    ota_esp_target *target = open_target();
    int running = ota_esp_target_running(target);
    CHECK_EQ(emu.flash.programs, programs);
    ota_esp_target_free(&target);
    return running;
}

TEST(of_a_chip_that_was_stopped_the_image_that_ran_last_counts) {
    CHECK_EQ(stopped(false, 1, VALID, 2, VALID), 1);
    CHECK_EQ(stopped(false, 1, VALID, 2, PENDING), 1); /* a restart would abort it, stopping did not */
    CHECK_EQ(stopped(false, 1, VALID, 2, NEW), 0);     /* it never ran */
    CHECK_EQ(stopped(true, 1, NEW, BLANK, 0), OTA_ESP_SLOT_FACTORY);
    CHECK_EQ(stopped(false, 1, VALID, 2, ABORTED), 0);
    CHECK_EQ(stopped(false, BLANK, 0, BLANK, 0), 0);
    CHECK_EQ(stopped(true, BLANK, 0, BLANK, 0), OTA_ESP_SLOT_FACTORY);
    CHECK_EQ(stopped(false, 2, NEW, BLANK, 0), 1); /* no other can have run: what boots */
    CHECK_EQ(stopped(false, 3, VALID, 2, VALID), 0);
    options.rollback = false;
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    ota_esp_target_free(&target);
    small_chip_entry(&emu, 0, 3, NEW); /* a boot loader without rollback leaves it like that */
    target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    ota_esp_target_free(&target);
}

TEST(a_stopped_image_on_trial_is_confirmed_or_marked_invalid_as_it_is) {
    chip(false, 1, VALID, 2, PENDING);
    options.stopped = true;
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK);
    check_entry(1, 2, VALID);
    ota_esp_target_free(&target);

    chip(false, 1, VALID, 2, PENDING);
    options.stopped = true;
    target = open_target();
    CHECK_EQ(ota_esp_target_mark_invalid(target, &error), OTA_OK);
    check_entry(1, 2, INVALID);
    CHECK_EQ(boot(target), 0);
    ota_esp_target_free(&target);

    chip(false, 1, VALID, 2, NEW);
    options.stopped = true;
    target = open_target();
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_ERR_STATE); /* it never ran */
    check_entry(1, 2, NEW);
    ota_esp_target_free(&target);
}

TEST(a_trial_that_was_stopped_is_given_again_and_nothing_else_changes) {
    ota_esp_boot_decision decision;
    chip(false, 1, VALID, 2, PENDING);
    options.stopped = true;
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_retry(target, &error), OTA_OK);
    check_entry(0, 1, VALID);
    check_entry(1, 2, NEW);
    CHECK_EQ(ota_esp_target_choose(target, &decision, &error), OTA_OK);
    CHECK_EQ(decision.slot, 1);
    ota_esp_target_free(&target);

    static const uint32_t others[] = {NEW, VALID, INVALID, ABORTED, OTA_ESP_STATE_UNDEFINED};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        chip(false, 1, VALID, 2, others[i]);
        options.stopped = true;
        target = open_target();
        uint64_t programs = emu.flash.programs;
        CHECK_EQ(ota_esp_target_retry(target, &error), OTA_OK);
        CHECK_EQ(emu.flash.programs, programs);
        ota_esp_target_free(&target);
    }
}

TEST(a_stopped_chip_reads_images_only_where_the_last_one_is_gone) {
    CHECK_EQ(stopped(false, 1, VALID, 2, VALID), 1);
    uint64_t few = emu.flash.bytes_read;
    CHECK(few < 2 * CHIP_SLOT_SIZE);
    memset(emu.bytes + CHIP_OTA_1, 0xFF, SECTOR);
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    CHECK(emu.flash.bytes_read > 2 * few);
    ota_esp_target_free(&target);
}

TEST(a_table_that_lies_is_an_error) {
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = NULL;
    emu.bytes[CHIP_TABLE + 5] ^= 1;
    CHECK_EQ(ota_esp_target_new(&options, &target, &error), OTA_ERR_PARTITION_TABLE);
    CHECK(target == NULL);
    error = fresh_error();
    memset(emu.bytes + CHIP_TABLE, 0xFF, SECTOR);
    CHECK_EQ(ota_esp_target_new(&options, &target, &error), OTA_ERR_PARTITION_TABLE);
    uint64_t offsets[] = {1, CHIP_FLASH_SIZE, UINT64_MAX - SECTOR + 1};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        error = fresh_error();
        options.table_offset = offsets[i];
        CHECK_EQ(ota_esp_target_new(&options, &target, &error), OTA_ERR_ARGUMENT);
    }
    chip(false, 1, VALID, BLANK, 0);
    ota_fault fault = {.count = UINT64_MAX, .errnum = EIO};
    emu.fault = &fault;
    CHECK_EQ(ota_esp_target_new(&options, &target, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EIO);
}

/* ---- Update ----------------------------------------------------------------------------------------------------------- */

TEST(an_update_is_installed_booted_and_confirmed) {
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    flash_emu_count_anew(&emu);
    CHECK_EQ(install(target, 1, "2.0.0", 0, &error), OTA_OK);
    CHECK(flash_emu_most_programmed(&emu) <= 1);
    CHECK(flash_emu_most_erased(&emu) <= 1);
    CHECK_EQ(emu.clashes, 0);
    CHECK(holds(CHIP_OTA_1, "2.0.0"));
    check_entry(0, 1, VALID);
    check_entry(1, 2, NEW);
    CHECK_EQ(ota_esp_target_running(target), 0);
    CHECK_EQ(boot(target), 1);
    check_entry(1, 2, PENDING);
    CHECK_EQ(install(target, 0, "3.0.0", 0, &error), OTA_ERR_PENDING_VERIFY);
    error = fresh_error();
    int to = 9;
    CHECK_EQ(ota_esp_target_can_rollback(target, &to, &error), OTA_OK);
    CHECK_EQ(to, 0);
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK);
    check_entry(1, 2, VALID);
    CHECK_EQ(boot(target), 1);
    uint64_t writes = emu.flash.erases + emu.flash.programs;
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK); /* nothing left to do */
    CHECK_EQ(emu.flash.erases + emu.flash.programs, writes);
    CHECK_EQ(install(target, 0, "3.0.0", 0, &error), OTA_OK);
    check_entry(0, 3, NEW);
    CHECK_EQ(boot(target), 0);
    ota_esp_target_free(&target);
}

TEST(an_update_that_is_not_confirmed_is_rolled_back) {
    for (int reject = 0; reject <= 1; reject++) {
        chip(false, 1, VALID, BLANK, 0);
        ota_esp_target *target = open_target();
        CHECK_EQ(install(target, 1, "2.0.0", 0, &error), OTA_OK);
        CHECK_EQ(boot(target), 1);
        if (reject) {
            CHECK_EQ(ota_esp_target_mark_invalid(target, &error), OTA_OK);
            CHECK_EQ(ota_esp_target_running(target), 1); /* until it restarts */
        }
        CHECK_EQ(boot(target), 0);
        check_entry(1, 2, reject ? INVALID : ABORTED);
        CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK);
        CHECK_EQ(install(target, 1, "2.0.1", 0, &error), OTA_OK);
        CHECK_EQ(boot(target), 1);
        ota_esp_target_free(&target);
    }
}

TEST(an_aborted_installation_never_boots) {
    chip(false, 1, VALID, 2, VALID); /* ota_1 is active */
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 1);
    ota_sink *sink = NULL;
    static _Alignas(4096) uint8_t image[CHIP_SLOT_SIZE];
    small_chip_image(image, "3.0.0", 0);
    CHECK_EQ(ota_esp_target_sink_new(target, 0, true, false, &sink, &error), OTA_OK);
    check_entry(0, 1, VALID); /* nothing is changed before open */
    CHECK_EQ(sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &error), OTA_OK);
    check_entry(0, BLANK, 0);
    check_entry(1, 2, VALID);
    CHECK_EQ(sink->ops->write(sink, image, SECTOR, &error), OTA_OK);
    sink->ops->abort(sink);
    CHECK_EQ(boot(target), 1);
    int to;
    CHECK_EQ(ota_esp_target_can_rollback(target, &to, &error), OTA_ERR_ROLLBACK);
    ota_sink_free(&sink);
    ota_esp_target_free(&target);
}

TEST(a_damaged_image_is_found_at_commit) {
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    static _Alignas(4096) uint8_t image[CHIP_SLOT_SIZE];
    small_chip_image(image, "2.0.0", 0);
    image[SECTOR] ^= 4;
    ota_sink *sink = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 1, true, false, &sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->open(sink, OTA_SIZE_UNKNOWN, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, CHIP_IMAGE_SIZE, &error), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_ERR_IMAGE_CHECKSUM);
    CHECK_EQ(error.stage, OTA_STAGE_COMMIT);
    ota_sink_free(&sink);
    check_entry(1, BLANK, 0);
    CHECK_EQ(boot(target), 0);
    ota_esp_target_free(&target);
}

TEST(without_activate_the_boot_choice_stays) {
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    static _Alignas(4096) uint8_t image[CHIP_SLOT_SIZE];
    small_chip_image(image, "2.0.0", 0);
    ota_sink *sink = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 1, false, false, &sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, CHIP_IMAGE_SIZE, &error), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_OK);
    ota_sink_free(&sink);
    CHECK_EQ(boot(target), 0);
    CHECK_EQ(ota_esp_target_set_boot(target, 1, &error), OTA_OK);
    CHECK_EQ(boot(target), 1);
    ota_esp_target_free(&target);
}

TEST(only_one_sink_writes_a_slot_at_a_time) {
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    ota_sink *first = NULL, *second = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 1, true, false, &first, &error), OTA_OK);
    CHECK_EQ(ota_esp_target_sink_new(target, 1, false, false, &second, &error), OTA_OK);
    CHECK_EQ(first->ops->open(first, 100, 0, &error), OTA_OK);
    CHECK_EQ(second->ops->open(second, 100, 0, &error), OTA_ERR_BUSY);
    second->ops->abort(second);
    error = fresh_error();
    CHECK_EQ(second->ops->open(second, 100, 0, &error), OTA_ERR_BUSY); /* an abort of the other did not free it */
    second->ops->abort(second);
    first->ops->abort(first);
    error = fresh_error();
    CHECK_EQ(second->ops->open(second, 100, 0, &error), OTA_OK);
    ota_sink_free(&first);
    ota_sink_free(&second);
    ota_esp_target_free(&target);
}

TEST(slots_that_may_not_be_written_are_refused) {
    chip(true, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    ota_sink *sink = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 0, true, false, &sink, &error), OTA_ERR_SLOT_RUNNING);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_sink_new(target, OTA_ESP_SLOT_FACTORY, true, false, &sink, &error), OTA_ERR_ARGUMENT);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_sink_new(target, 2, true, false, &sink, &error), OTA_ERR_ARGUMENT);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_sink_new(target, OTA_ESP_SLOT_TEST, true, false, &sink, &error), OTA_ERR_ARGUMENT);
    CHECK(sink == NULL);
    ota_esp_target_free(&target);
}

TEST(without_rollback_nothing_is_tracked) {
    chip(false, 1, VALID, BLANK, 0);
    options.rollback = false;
    ota_esp_target *target = open_target();
    CHECK_EQ(install(target, 1, "2.0.0", 0, &error), OTA_OK);
    check_entry(1, 2, OTA_ESP_STATE_UNDEFINED);
    CHECK_EQ(boot(target), 1);
    CHECK_EQ(boot(target), 1);
    check_entry(1, 2, OTA_ESP_STATE_UNDEFINED);
    CHECK_EQ(install(target, 0, "3.0.0", 0, &error), OTA_OK);
    CHECK_EQ(boot(target), 0);
    ota_esp_target_free(&target);
}

TEST(set_boot_to_factory_erases_otadata) {
    chip(true, 1, VALID, 2, VALID);
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_set_boot(target, OTA_ESP_SLOT_FACTORY, &error), OTA_OK);
    check_entry(0, BLANK, 0);
    check_entry(1, BLANK, 0);
    CHECK_EQ(boot(target), OTA_ESP_SLOT_FACTORY);
    int next;
    CHECK_EQ(ota_esp_target_next_slot(target, &next, &error), OTA_OK);
    CHECK_EQ(next, 0);
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_ERR_STATE);
    error = fresh_error();
    CHECK_EQ(install(target, 0, "2.0.0", 0, &error), OTA_OK);
    CHECK_EQ(boot(target), 0);
    CHECK_EQ(ota_esp_target_mark_invalid(target, &error), OTA_OK);
    CHECK_EQ(boot(target), OTA_ESP_SLOT_FACTORY);
    ota_esp_target_free(&target);
}

/* ---- Anti-rollback ---------------------------------------------------------------------------------------------------- */

TEST(the_secure_version_rises_when_an_image_is_confirmed) {
    chip(false, 1, VALID, BLANK, 0);
    options.anti_rollback = true;
    ota_esp_target *target = open_target();
    CHECK_EQ(install(target, 1, "2.0.0", 3, &error), OTA_OK);
    CHECK_EQ(boot(target), 1);
    CHECK_EQ(ota_esp_target_secure_version(target), 0);
    CHECK_EQ(ota_esp_target_mark_valid(target, &error), OTA_OK);
    CHECK_EQ(ota_esp_target_secure_version(target), 3);
    int to;
    CHECK_EQ(ota_esp_target_can_rollback(target, &to, &error), OTA_ERR_ROLLBACK); /* 1.0.0 is too old now */
    CHECK_EQ(boot(target), 1);
    ota_esp_target_free(&target);
}

TEST(an_image_with_too_small_a_secure_version_is_refused_and_erased) {
    chip(false, 1, VALID, BLANK, 0);
    small_chip_load(&emu, CHIP_OTA_0, "1.0.0", 2);
    options.anti_rollback = true;
    options.secure_version = 2;
    ota_esp_target *target = open_target();
    CHECK_EQ(ota_esp_target_running(target), 0);
    CHECK_EQ(install(target, 1, "2.0.0", 1, &error), OTA_ERR_SECURE_VERSION);
    for (size_t i = 0; i < CHIP_SLOT_SIZE; i++) {
        if (emu.bytes[CHIP_OTA_1 + i] != 0xFF) {
            CHECK_EQ(i, CHIP_SLOT_SIZE);
            break;
        }
    }
    check_entry(1, BLANK, 0);
    CHECK_EQ(boot(target), 0);
    ota_esp_target_free(&target);
}

/* ---- Faults ----------------------------------------------------------------------------------------------------------- */

typedef struct scenario {
    const char *name;
    bool factory, rollback, anti_rollback;
    int running;                         /* a slot, told to the target */
    uint32_t seq0, state0, seq1, state1; /* otadata at the start */
    bool confirm;                        /* mark_valid at the end, else mark_invalid (with rollback) */
    bool corrupt_next;                   /* the other slot holds no image at the start */
} scenario;

static const scenario scenarios[] = {
    {.name = "ota_0 runs, other sector blank",
     .rollback = true,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = BLANK,
     .confirm = true},
    {.name = "the same, rejected", .rollback = true, .seq0 = 1, .state0 = VALID, .seq1 = BLANK},
    {.name = "ota_1 runs, both entries live",
     .rollback = true,
     .running = 1,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = 2,
     .state1 = VALID,
     .confirm = true},
    {.name = "the same, rejected",
     .rollback = true,
     .running = 1,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = 2,
     .state1 = VALID},
    {.name = "after a rollback",
     .rollback = true,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = 2,
     .state1 = ABORTED,
     .confirm = true},
    {.name = "fallback: the active entry names the other slot",
     .rollback = true,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = 2,
     .state1 = VALID,
     .confirm = true,
     .corrupt_next = true},
    {.name = "ota_1 runs, otadata blank",
     .rollback = true,
     .running = 1,
     .seq0 = BLANK,
     .seq1 = BLANK,
     .confirm = true,
     .corrupt_next = true},
    {.name = "ota_1 runs, otadata blank, rejected",
     .rollback = true,
     .running = 1,
     .seq0 = BLANK,
     .seq1 = BLANK,
     .corrupt_next = true},
    {.name = "ota_0 runs, otadata blank", .rollback = true, .seq0 = BLANK, .seq1 = BLANK, .confirm = true},
    {.name = "running undefined",
     .rollback = true,
     .seq0 = 1,
     .state0 = OTA_ESP_STATE_UNDEFINED,
     .seq1 = BLANK,
     .confirm = true},
    {.name = "factory runs",
     .factory = true,
     .rollback = true,
     .running = OTA_ESP_SLOT_FACTORY,
     .seq0 = BLANK,
     .seq1 = BLANK,
     .confirm = true},
    {.name = "factory runs, rejected",
     .factory = true,
     .rollback = true,
     .running = OTA_ESP_SLOT_FACTORY,
     .seq0 = BLANK,
     .seq1 = BLANK},
    {.name = "factory there, ota_1 runs",
     .factory = true,
     .rollback = true,
     .running = 1,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = 2,
     .state1 = VALID,
     .confirm = true},
    {.name = "no rollback", .seq0 = 1, .state0 = OTA_ESP_STATE_UNDEFINED, .seq1 = BLANK, .confirm = true},
    {.name = "no rollback, ota_1 runs",
     .running = 1,
     .seq0 = 3,
     .state0 = OTA_ESP_STATE_UNDEFINED,
     .seq1 = 4,
     .state1 = OTA_ESP_STATE_UNDEFINED,
     .confirm = true},
    {.name = "anti-rollback",
     .rollback = true,
     .anti_rollback = true,
     .seq0 = 1,
     .state0 = VALID,
     .seq1 = BLANK,
     .confirm = true},
};

static uint64_t offset_of(int slot) {
    return slot == OTA_ESP_SLOT_FACTORY ? CHIP_FACTORY : slot == 0 ? CHIP_OTA_0 : CHIP_OTA_1;
}

static const char *old_version(const scenario *s) {
    return s->running == OTA_ESP_SLOT_FACTORY ? "0.9.0" : s->running == 0 ? "1.0.0" : "0.5.0";
}

static void start(const scenario *s) {
    chip(s->factory, s->seq0, s->state0, s->seq1, s->state1);
    options.rollback = s->rollback;
    options.anti_rollback = s->anti_rollback;
    options.running = s->running;
    if (s->corrupt_next) {
        emu.bytes[(s->running == 0 ? CHIP_OTA_1 : CHIP_OTA_0) + SECTOR + 9] ^= 1;
        memcpy(emu.synced, emu.bytes, CHIP_FLASH_SIZE);
    }
}

/* How far the flow came: what was promised to its caller. */
typedef struct outcome {
    ota_status status;
    bool commit_began, committed, booted, confirmed, rejected;
    int running;
    uint32_t secure_version;
} outcome;

/* Update, restart, verdict, of which only the first `steps` are done. */
static outcome flow(const scenario *s, int steps, ota_error *err) {
    outcome o = {.running = s->running};
    ota_esp_target *target = NULL;
    ota_esp_boot_decision decision;
    int next = -1;
    o.status = ota_esp_target_new(&options, &target, err);
    o.status = o.status < 0 ? o.status : ota_esp_target_next_slot(target, &next, err);
    o.status = o.status < 0 ? o.status : install(target, next, "2.0.0", 0, err);
    o.commit_began = commit_began;
    o.committed = o.status == OTA_OK;
    if (steps > 1) {
        o.status = o.status < 0 ? o.status : ota_esp_target_boot(target, &decision, err);
    }
    if (o.status == OTA_OK && steps > 1) {
        o.booted = true;
        o.running = ota_esp_target_running(target);
        CHECK_EQ(o.running, next);
        if (steps < 3) {
            /* killed before any verdict */
        } else if (s->confirm) {
            o.status = ota_esp_target_mark_valid(target, err);
            o.confirmed = o.status == OTA_OK;
        } else {
            o.status = ota_esp_target_mark_invalid(target, err);
            o.rejected = o.status == OTA_OK;
        }
    }
    if (target != NULL) {
        o.secure_version = ota_esp_target_secure_version(target);
    }
    ota_esp_target_free(&target);
    return o;
}

/* Power comes back: an intact image boots, the old or the new one as was promised, and goes on booting; what the chip says of
 * itself is so; and the next update works. */
static void check_recovery(const scenario *s, const outcome *o) {
    int other = s->running == 0 ? 1 : 0;
    emu.fault = NULL;
    options.running = o->running;
    options.secure_version = o->secure_version;
    ota_esp_target *target = open_target();
    int booted = boot(target);
    bool is_new = booted == other;
    CHECK(holds(offset_of(s->running), old_version(s))); /* the old image was never touched */
    CHECK(is_new || booted == s->running);
    CHECK(!is_new || holds(offset_of(other), "2.0.0"));
    CHECK(!is_new || o->commit_began); /* a complete image that nobody chose does not boot */
    if (o->confirmed || (o->status == OTA_OK && o->committed && !o->booted)) {
        CHECK(is_new); /* as was promised */
    }
    if (o->rejected || (s->rollback && o->booted && !o->confirmed && (!s->confirm || o->status == OTA_OK))) {
        CHECK(!is_new);
    }
    /* The running slot is what otadata says, and is confirmed by nobody but mark_valid. */
    uint32_t state;
    ota_error err = fresh_error();
    if (is_new && s->rollback && !o->confirmed) {
        CHECK_EQ(ota_esp_target_state(target, booted, &state, &err), OTA_OK);
        CHECK(state == PENDING || (state == VALID && o->booted && s->confirm)); /* VALID: the last sync was cut */
    }
    int again = boot(target);
    CHECK(again == booted || again == s->running);
    CHECK(again == booted || (is_new && s->rollback && !o->confirmed)); /* back only if it was not confirmed */
    CHECK_EQ(boot(target), again);
    err = fresh_error();
    if (ota_esp_target_state(target, again, &state, &err) == OTA_OK) {
        CHECK(!s->rollback || state != PENDING);
        err = fresh_error();
        ota_status confirmed = ota_esp_target_mark_valid(target, &err);
        CHECK(confirmed == OTA_OK || confirmed == OTA_ERR_STATE);
    }
    int next;
    err = fresh_error();
    CHECK_EQ(ota_esp_target_next_slot(target, &next, &err), OTA_OK);
    CHECK_EQ(install(target, next, "3.0.0", 0, &err), OTA_OK);
    CHECK_EQ(boot(target), next);
    CHECK(holds(offset_of(next), "3.0.0"));
    CHECK_EQ(ota_esp_target_mark_valid(target, &err), OTA_OK);
    CHECK_EQ(boot(target), next);
    ota_esp_target_free(&target);
}

static void complain(const scenario *s, int before, uint64_t n, uint64_t torn, int cache) {
    if (check_failures != before) {
        printf("  in scenario \"%s\", operation %llu, torn %llu, cache %d\n", s->name, (unsigned long long)n,
               (unsigned long long)torn, cache);
    }
}

TEST(a_power_cut_anywhere_leaves_the_old_or_the_new_image) {
    static const uint64_t torn[] = {0, 4, 28, 31, 2048, 4096, UINT64_MAX};
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        const scenario *s = &scenarios[i];
        for (int cache = FLASH_EMU_NO_CACHE; cache <= FLASH_EMU_LOSES_SOME; cache++) {
            for (size_t t = 0; t < sizeof torn / sizeof *torn; t++) {
                for (uint64_t n = 0;; n++) {
                    int before = check_failures;
                    start(s);
                    /* reads change nothing, so a cut before one is a cut after the write before it */
                    ota_fault fault = {.ops = OTA_FAULT_WRITE | OTA_FAULT_ERASE | OTA_FAULT_SYNC,
                                       .after = n,
                                       .power_cut = true,
                                       .torn_len = torn[t]};
                    emu.fault = &fault;
                    emu.cache = (flash_emu_cache)cache;
                    emu.seed = (uint32_t)(n * 7 + t);
                    outcome o = flow(s, 3, &error);
                    CHECK_EQ(o.status, fault.lost ? OTA_ERR_SYSTEM : OTA_OK);
                    check_recovery(s, &o);
                    complain(s, before, n, torn[t], cache);
                    if (!fault.lost) {
                        CHECK(n > 8);
                        break;
                    }
                }
            }
        }
    }
}

TEST(what_was_promised_survives_a_power_cut_right_after) {
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        for (int cache = FLASH_EMU_NO_CACHE; cache <= FLASH_EMU_LOSES_SOME; cache++) {
            for (int steps = 1; steps <= 3; steps++) {
                int before = check_failures;
                start(&scenarios[i]);
                emu.cache = (flash_emu_cache)cache;
                outcome o = flow(&scenarios[i], steps, &error);
                CHECK_EQ(o.status, OTA_OK);
                flash_emu_lose_power(&emu);
                check_recovery(&scenarios[i], &o);
                complain(&scenarios[i], before, 0, 0, cache);
            }
        }
    }
}

TEST(what_set_boot_verified_is_on_the_medium_before_the_entry_is) {
    chip(false, 1, VALID, BLANK, 0);
    uint8_t image[CHIP_IMAGE_SIZE];
    small_chip_image(image, "2.0.0", 0);
    ota_esp_target *target = open_target();
    emu.cache = FLASH_EMU_LOSES_ALL;
    CHECK_EQ(emu.flash.ops->erase(&emu.flash, CHIP_OTA_1, CHIP_SLOT_SIZE, &error), OTA_OK);
    CHECK_EQ(emu.flash.ops->program(&emu.flash, CHIP_OTA_1, image, sizeof image, &error), OTA_OK);
    ota_fault fault = {.ops = OTA_FAULT_WRITE, .power_cut = true};
    emu.fault = &fault;
    CHECK_EQ(ota_esp_target_set_boot(target, 1, &error), OTA_ERR_SYSTEM); /* cut before the entry */
    CHECK(holds(CHIP_OTA_1, "2.0.0"));
    ota_esp_target_free(&target);
}

TEST(the_old_entry_is_gone_for_good_when_a_sink_is_open) {
    chip(false, 1, VALID, 2, VALID);
    options.running = 0; /* by fallback */
    ota_esp_target *target = open_target();
    emu.cache = FLASH_EMU_LOSES_ALL;
    ota_sink *sink = NULL;
    CHECK_EQ(ota_esp_target_sink_new(target, 1, true, false, &sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->open(sink, CHIP_IMAGE_SIZE, 0, &error), OTA_OK);
    flash_emu_lose_power(&emu);
    check_entry(0, 1, VALID);
    check_entry(1, BLANK, 0);
    ota_sink_free(&sink);
    ota_esp_target_free(&target);
}

TEST(any_operation_may_fail_and_leaves_the_old_or_the_new_image) {
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        const scenario *s = &scenarios[i];
        for (uint64_t n = 0;; n++) {
            int before = check_failures;
            start(s);
            ota_fault fault = {.after = n, .count = 1, .errnum = ENOSPC, .torn_len = n % 3 * 20};
            emu.fault = &fault;
            outcome o = flow(s, 3, &error);
            bool hit = fault.seen > n;
            CHECK_EQ(o.status, hit ? OTA_ERR_NO_SPACE : OTA_OK);
            CHECK_EQ(error.device_code, hit ? ENOSPC : 0);
            check_recovery(s, &o);
            complain(s, before, n, 0, 0);
            if (!hit) {
                CHECK(n > 20);
                break;
            }
        }
    }
}

TEST(hooks_activate_a_slot_by_bytes_it_is_known_to_hold_without_reading_it) {
    static uint8_t image[CHIP_IMAGE_SIZE];
    chip(false, 1, VALID, BLANK, 0);
    ota_esp_target *target = open_target();
    ota_esp_hooks hooks;
    CHECK_EQ(ota_esp_target_get_hooks(target, 0, &hooks, &error), OTA_ERR_SLOT_RUNNING);
    error = fresh_error();
    CHECK_EQ(ota_esp_target_get_hooks(target, 1, &hooks, &error), OTA_OK);
    CHECK_EQ(hooks.offset, CHIP_OTA_1);
    CHECK_EQ(hooks.size, CHIP_SLOT_SIZE);
    CHECK_EQ(hooks.begin(hooks.user, &error), OTA_OK);
    CHECK_EQ(hooks.begin(hooks.user, &error), OTA_ERR_BUSY);
    error = fresh_error();
    small_chip_image(image, "2.0.0", 0);
    flash_emu_load(&emu, CHIP_OTA_1, image, sizeof image);
    image[300] ^= 1; /* bytes that are no image are found to be none, wherever they came from */
    CHECK(hooks.commit(hooks.user, image, sizeof image, &error) < 0);
    check_entry(1, BLANK, 0);
    error = fresh_error();
    image[300] ^= 1;
    uint64_t read = emu.flash.bytes_read;
    CHECK_EQ(hooks.commit(hooks.user, image, sizeof image, &error), OTA_OK);
    CHECK(emu.flash.bytes_read - read < CHIP_IMAGE_SIZE); /* otadata alone */
    hooks.end(hooks.user);
    check_entry(1, 2, NEW);
    CHECK_EQ(boot(target), 1);
    ota_esp_target_free(&target);
}

int main(void) {
    RUN(hooks_activate_a_slot_by_bytes_it_is_known_to_hold_without_reading_it);
    RUN(a_target_tells_its_slots_what_runs_and_what_they_hold);
    RUN(what_runs_is_what_was_told_or_else_what_would_boot);
    RUN(a_chip_that_is_off_is_switched_on_by_the_first_change);
    RUN(of_a_chip_that_was_stopped_the_image_that_ran_last_counts);
    RUN(a_stopped_image_on_trial_is_confirmed_or_marked_invalid_as_it_is);
    RUN(a_trial_that_was_stopped_is_given_again_and_nothing_else_changes);
    RUN(a_stopped_chip_reads_images_only_where_the_last_one_is_gone);
    RUN(a_table_that_lies_is_an_error);
    RUN(an_update_is_installed_booted_and_confirmed);
    RUN(an_update_that_is_not_confirmed_is_rolled_back);
    RUN(an_aborted_installation_never_boots);
    RUN(a_damaged_image_is_found_at_commit);
    RUN(without_activate_the_boot_choice_stays);
    RUN(only_one_sink_writes_a_slot_at_a_time);
    RUN(slots_that_may_not_be_written_are_refused);
    RUN(without_rollback_nothing_is_tracked);
    RUN(set_boot_to_factory_erases_otadata);
    RUN(the_secure_version_rises_when_an_image_is_confirmed);
    RUN(an_image_with_too_small_a_secure_version_is_refused_and_erased);
    RUN(a_power_cut_anywhere_leaves_the_old_or_the_new_image);
    RUN(what_was_promised_survives_a_power_cut_right_after);
    RUN(what_set_boot_verified_is_on_the_medium_before_the_entry_is);
    RUN(the_old_entry_is_gone_for_good_when_a_sink_is_open);
    RUN(any_operation_may_fail_and_leaves_the_old_or_the_new_image);
    flash_emu_free(&emu);
    return DONE();
}
