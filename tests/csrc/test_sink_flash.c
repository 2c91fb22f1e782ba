/* sources: sink/sink.c sink/sink_flash.c base/status.c port/fault.c flash_emu.c */
#include "sink/sink.h"

#include <errno.h>
#include <stdlib.h>

#include "check.h"
#include "flash_emu.h"

#define SECTOR OTA_FLASH_SECTOR
#define FLASH_SIZE (80u * SECTOR)
#define SLOT_OFFSET (5u * SECTOR) /* not at a 64 KiB block: runs are cut at blocks of the flash, not of the slot */
#define SLOT_SIZE (64u * SECTOR)
#define IMAGE_SIZE (37u * SECTOR + 1000u) /* over three blocks, with a tail */

static flash_emu emu;
static ota_error error;
static _Alignas(4096) uint8_t image[64 * SECTOR];
static uint8_t held[64 * SECTOR];
static int begun, committed, ended;
static uint64_t erases_at_begin;
static ota_status begin_result, commit_result;

static ota_status begin(void *user, ota_error *err) {
    CHECK(user == &emu);
    begun++;
    erases_at_begin = emu.flash.erases + emu.flash.programs;
    return begin_result < 0 ? ota_error_set(err, begin_result, OTA_STAGE_TARGET, 7, 3, "begin says no") : OTA_OK;
}

static ota_status commit(void *user, ota_error *err) {
    CHECK(user == &emu);
    committed++;
    return commit_result < 0 ? ota_error_set(err, commit_result, OTA_STAGE_TARGET, 7, 3, "commit says no") : OTA_OK;
}

static void end(void *user) {
    CHECK(user == &emu);
    ended++;
}

static void fill(uint8_t *bytes, size_t len, uint32_t seed) {
    for (size_t i = 0; i < len; i++) {
        seed = seed * 1664525u + 1013904223u;
        bytes[i] = (uint8_t)(seed >> 24);
    }
}

static ota_sink *make(bool rewrite_same) {
    ota_sink_flash_options options = {.flash = &emu.flash,
                                      .offset = SLOT_OFFSET,
                                      .size = SLOT_SIZE,
                                      .rewrite_same = rewrite_same,
                                      .begin = begin,
                                      .commit = commit,
                                      .end = end,
                                      .user = &emu};
    ota_sink *sink = NULL;
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_sink_flash_new(&options, &sink, &error), OTA_OK);
    return sink;
}

/* A flash full of other bytes, with a pattern around the slot that must stay. */
static void fresh(bool erased_slot) {
    if (emu.bytes != NULL) {
        flash_emu_free(&emu);
    }
    flash_emu_init(&emu, FLASH_SIZE);
    uint8_t *other = malloc(FLASH_SIZE);
    fill(other, FLASH_SIZE, 99);
    if (erased_slot) {
        memset(other + SLOT_OFFSET, 0xFF, SLOT_SIZE);
    }
    flash_emu_load(&emu, 0, other, FLASH_SIZE);
    free(other);
    fill(image, IMAGE_SIZE, 1);
    begun = committed = ended = 0;
    begin_result = commit_result = OTA_OK;
    memset(&error, 0, sizeof error);
}

static void check_surroundings(uint64_t image_size) {
    uint8_t *other = malloc(FLASH_SIZE);
    fill(other, FLASH_SIZE, 99);
    CHECK_MEM(emu.bytes, other, SLOT_OFFSET);
    uint64_t end = SLOT_OFFSET + SLOT_SIZE;
    CHECK_MEM(emu.bytes + end, other + end, FLASH_SIZE - end);
    CHECK_EQ(emu.clashes, 0);
    CHECK_EQ(emu.refused, 0);
    CHECK(flash_emu_most_programmed(&emu) <= 1);
    CHECK(flash_emu_most_erased(&emu) <= 1);
    uint64_t used = ota_round_up(image_size, SECTOR) / SECTOR;
    for (uint64_t i = SLOT_OFFSET / SECTOR + used; i < FLASH_SIZE / SECTOR; i++) {
        CHECK_EQ(emu.erased[i], 0); /* nothing behind the image is erased */
    }
    free(other);
}

static ota_status feed(ota_sink *sink, uint64_t from, uint64_t to, size_t piece) {
    while (from < to) {
        size_t len = to - from < piece ? (size_t)(to - from) : piece;
        ota_status status = sink->ops->write(sink, image + from, len, &error);
        if (status < 0) {
            return status;
        }
        from += len;
    }
    return OTA_OK;
}

/* A whole installation. The first error, or OTA_OK. */
static ota_status install(ota_sink *sink, uint64_t size, size_t piece) {
    ota_status status = sink->ops->open(sink, size, 0, &error);
    status = status < 0 ? status : feed(sink, 0, size, piece);
    status = status < 0 ? status : sink->ops->finish(sink, &error);
    return status < 0 ? status : sink->ops->commit(sink, &error);
}

TEST(an_image_over_other_bytes_is_erased_and_programmed_once) {
    size_t pieces[] = {SECTOR, 3 * SECTOR, 16 * SECTOR, 256 * SECTOR};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        fresh(false);
        ota_sink *sink = make(false);
        CHECK_EQ(install(sink, IMAGE_SIZE, pieces[i]), OTA_OK);
        CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
        for (uint64_t at = SLOT_OFFSET + IMAGE_SIZE; at < SLOT_OFFSET + 38 * SECTOR; at++) {
            CHECK_EQ(emu.bytes[at], 0xFF); /* the rest of the last sector */
        }
        check_surroundings(IMAGE_SIZE);
        CHECK_EQ(begun, 1);
        CHECK_EQ(committed, 1);
        CHECK_EQ(erases_at_begin, 0);
        CHECK_EQ(sink->counts.bytes_written, IMAGE_SIZE);
        CHECK_EQ(sink->counts.bytes_skipped, 0);
        CHECK_EQ(sink->counts.sectors_erased, 38);
        CHECK_EQ(sink->counts.syncs, 1);
        CHECK_EQ(sink->counts.writes, emu.flash.programs);
        CHECK_EQ(sink->counts.erases, emu.flash.erases);
        CHECK_EQ(sink->counts.reads, emu.flash.reads);
        if (pieces[i] >= 256 * SECTOR) { /* 5..16, 16..32, 32..43: three blocks of the flash */
            CHECK_EQ(emu.flash.erases, 3);
            CHECK_EQ(emu.flash.programs, 3);
            CHECK_EQ(emu.flash.reads, 3);
        }
        ota_sink_free(&sink);
    }
}

TEST(an_erased_slot_is_not_erased_again) {
    fresh(true);
    ota_sink *sink = make(false);
    CHECK_EQ(install(sink, IMAGE_SIZE, 16 * SECTOR), OTA_OK);
    CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
    CHECK_EQ(emu.flash.erases, 0);
    check_surroundings(IMAGE_SIZE);
    ota_sink_free(&sink);
}

TEST(sectors_with_the_right_bytes_are_left_alone) {
    fresh(false);
    flash_emu_load(&emu, SLOT_OFFSET, image, IMAGE_SIZE);
    image[9 * SECTOR + 17] ^= 1;
    ota_sink *sink = make(false);
    CHECK_EQ(install(sink, IMAGE_SIZE, 256 * SECTOR), OTA_OK);
    CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
    CHECK_EQ(sink->counts.bytes_written, SECTOR);
    CHECK_EQ(sink->counts.bytes_skipped, IMAGE_SIZE - SECTOR);
    CHECK_EQ(sink->counts.sectors_erased, 1);
    CHECK_EQ(committed, 1);
    check_surroundings(IMAGE_SIZE);
    ota_sink_free(&sink);
}

TEST(rewrite_same_writes_them_all_the_same) {
    fresh(false);
    flash_emu_load(&emu, SLOT_OFFSET, image, IMAGE_SIZE);
    ota_sink *sink = make(true);
    CHECK_EQ(install(sink, IMAGE_SIZE, 256 * SECTOR), OTA_OK);
    CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
    CHECK_EQ(sink->counts.bytes_written, IMAGE_SIZE);
    CHECK_EQ(sink->counts.bytes_skipped, 0);
    CHECK_EQ(sink->counts.sectors_erased, 38);
    CHECK_EQ(sink->counts.reads, 0);
    check_surroundings(IMAGE_SIZE);
    ota_sink_free(&sink);
}

TEST(a_half_erased_sector_is_erased) {
    fresh(true);
    emu.bytes[SLOT_OFFSET + 2 * SECTOR - 1] = 0xFE;
    image[2 * SECTOR - 1] = 0x01;
    ota_sink *sink = make(false);
    CHECK_EQ(install(sink, IMAGE_SIZE, 256 * SECTOR), OTA_OK);
    CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
    CHECK_EQ(sink->counts.sectors_erased, 1);
    ota_sink_free(&sink);
}

TEST(an_image_of_unknown_size_may_fill_the_slot_and_not_more) {
    fresh(false);
    fill(image, SLOT_SIZE, 3);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, OTA_SIZE_UNKNOWN, 0, &error), OTA_OK);
    CHECK_EQ(feed(sink, 0, SLOT_SIZE, 16 * SECTOR), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, 1, &error), OTA_ERR_TOO_LARGE);
    CHECK_EQ(error.offset, SLOT_SIZE);
    check_surroundings(SLOT_SIZE);
    ota_sink_free(&sink);
}

TEST(an_image_that_cannot_fit_changes_nothing) {
    fresh(false);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, SLOT_SIZE + 1, 0, &error), OTA_ERR_TOO_LARGE);
    CHECK_EQ(begun, 0);
    CHECK_EQ(emu.flash.erases + emu.flash.programs, 0);
    ota_sink_free(&sink);
}

TEST(a_begin_that_refuses_leaves_the_slot_alone_and_sticks) {
    fresh(false);
    begin_result = OTA_ERR_PENDING_VERIFY;
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_ERR_PENDING_VERIFY);
    CHECK_EQ(error.stage, OTA_STAGE_SINK);
    CHECK_EQ(error.device_code, 3);
    ota_error later = {0};
    CHECK_EQ(sink->ops->write(sink, image, SECTOR, &later), OTA_ERR_PENDING_VERIFY);
    CHECK(strcmp(later.text, "begin says no") == 0);
    CHECK_EQ(emu.flash.erases + emu.flash.programs, 0);
    ota_sink_free(&sink);
}

TEST(a_commit_that_refuses_is_told_as_commit) {
    fresh(false);
    commit_result = OTA_ERR_IMAGE_HASH;
    ota_sink *sink = make(false);
    CHECK_EQ(install(sink, IMAGE_SIZE, 16 * SECTOR), OTA_ERR_IMAGE_HASH);
    CHECK_EQ(error.stage, OTA_STAGE_COMMIT);
    CHECK_EQ(committed, 1);
    ota_error later = {0};
    CHECK_EQ(sink->ops->commit(sink, &later), OTA_ERR_IMAGE_HASH);
    CHECK_EQ(committed, 1);
    ota_sink_free(&sink);
}

TEST(nothing_is_committed_before_finish_nor_after_abort) {
    fresh(false);
    ota_sink *sink = make(false);
    ota_error wrong = {0};
    CHECK_EQ(sink->ops->commit(sink, &wrong), OTA_ERR_STATE);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    CHECK_EQ(feed(sink, 0, IMAGE_SIZE, 16 * SECTOR), OTA_OK);
    memset(&wrong, 0, sizeof wrong);
    CHECK_EQ(sink->ops->commit(sink, &wrong), OTA_ERR_STATE);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    sink->ops->abort(sink);
    memset(&wrong, 0, sizeof wrong);
    CHECK_EQ(sink->ops->commit(sink, &wrong), OTA_ERR_STATE);
    CHECK_EQ(committed, 0);
    ota_sink_free(&sink);
}

TEST(the_end_is_told_once_after_a_begin_that_succeeded) {
    fresh(false);
    ota_sink *sink = make(false);
    sink->ops->abort(sink);
    CHECK_EQ(ended, 0);
    CHECK_EQ(install(sink, IMAGE_SIZE, 16 * SECTOR), OTA_OK);
    CHECK_EQ(ended, 1);
    sink->ops->abort(sink);
    CHECK_EQ(ended, 1);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    sink->ops->abort(sink);
    CHECK_EQ(ended, 2);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    ota_sink_free(&sink);
    CHECK_EQ(ended, 3);
    sink = make(false);
    begin_result = OTA_ERR_BUSY;
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_ERR_BUSY);
    ota_sink_free(&sink);
    CHECK_EQ(ended, 3);
}

TEST(an_image_that_ends_early_is_not_finished) {
    fresh(false);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    CHECK_EQ(feed(sink, 0, 4 * SECTOR, SECTOR), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_INCOMPLETE);
    CHECK_EQ(error.offset, 4 * SECTOR);
    ota_sink_free(&sink);
    sink = make(false);
    CHECK_EQ(sink->ops->open(sink, OTA_SIZE_UNKNOWN, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_INCOMPLETE);
    ota_sink_free(&sink);
    sink = make(false);
    CHECK_EQ(sink->ops->open(sink, 100, 0, &error), OTA_OK);
    CHECK_EQ(feed(sink, 0, 200, SECTOR), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_SIZE);
    ota_sink_free(&sink);
}

TEST(only_the_last_piece_may_end_inside_a_sector) {
    fresh(false);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, 100, &error), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, 0, &error), OTA_OK);
    CHECK_EQ(sink->ops->write(sink, image, 100, &error), OTA_ERR_ARGUMENT);
    ota_sink_free(&sink);
}

TEST(a_resume_goes_on_at_a_sector_and_reads_back_what_was_there) {
    fresh(false);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, 0, &error), OTA_OK);
    CHECK_EQ(feed(sink, 0, 20 * SECTOR, 5 * SECTOR), OTA_OK);
    uint64_t durable = 0;
    CHECK_EQ(sink->ops->sync(sink, &durable, &error), OTA_OK);
    CHECK_EQ(durable, 20 * SECTOR);
    CHECK_EQ(feed(sink, 20 * SECTOR, 21 * SECTOR, SECTOR), OTA_OK); /* written, but not in the record */
    sink->ops->abort(sink);
    ota_sink_free(&sink);

    flash_emu_count_anew(&emu);
    sink = make(false);
    CHECK_EQ(sink->ops->read(sink, 0, held, durable, &error), OTA_OK);
    CHECK_MEM(held, image, durable);
    CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, durable, &error), OTA_OK);
    CHECK_EQ(feed(sink, durable, IMAGE_SIZE, 16 * SECTOR), OTA_OK);
    CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
    CHECK_EQ(sink->ops->commit(sink, &error), OTA_OK);
    CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
    CHECK_EQ(emu.programmed[SLOT_OFFSET + durable - 1], 0);
    CHECK_EQ(emu.programmed[SLOT_OFFSET + durable], 0); /* was right already */
    CHECK_EQ(sink->counts.bytes_skipped, SECTOR);
    check_surroundings(IMAGE_SIZE);
    ota_sink_free(&sink);
}

TEST(a_resume_elsewhere_is_refused_before_begin) {
    fresh(false);
    ota_sink *sink = make(false);
    uint64_t offsets[] = {1, SECTOR + 1, SLOT_SIZE + SECTOR, 38 * SECTOR, UINT64_MAX - SECTOR + 1};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        memset(&error, 0, sizeof error);
        CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, offsets[i], &error), OTA_ERR_ARGUMENT);
    }
    CHECK_EQ(begun, 0);
    ota_sink_free(&sink);
}

TEST(reading_outside_the_slot_is_refused) {
    fresh(false);
    ota_sink *sink = make(false);
    CHECK_EQ(sink->ops->read(sink, SLOT_SIZE - 1, held, 1, &error), OTA_OK);
    CHECK_EQ(sink->ops->read(sink, SLOT_SIZE - 1, held, 2, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(sink->ops->read(sink, UINT64_MAX, held, 2, &error), OTA_ERR_ARGUMENT);
    ota_sink_free(&sink);
}

TEST(a_slot_that_is_not_whole_sectors_inside_the_flash_is_refused) {
    fresh(false);
    uint64_t slots[][2] = {
        {1, SECTOR}, {0, SECTOR + 1}, {0, 0}, {FLASH_SIZE, SECTOR}, {UINT64_MAX - SECTOR + 1, SECTOR}};
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        ota_sink_flash_options options = {.flash = &emu.flash, .offset = slots[i][0], .size = slots[i][1]};
        ota_sink *sink = &(ota_sink){0};
        memset(&error, 0, sizeof error);
        CHECK_EQ(ota_sink_flash_new(&options, &sink, &error), OTA_ERR_ARGUMENT);
        CHECK(sink == NULL);
    }
}

TEST(every_failing_operation_ends_the_installation_with_its_errno) {
    int expected = 0;
    for (uint64_t n = 0;; n++) {
        fresh(false);
        ota_fault fault = {.after = n, .count = 1, .errnum = n % 2 ? EIO : ENOSPC, .torn_len = n * 37};
        emu.fault = &fault;
        ota_sink *sink = make(false);
        ota_status status = install(sink, IMAGE_SIZE, 16 * SECTOR);
        if (fault.seen <= n) {
            CHECK_EQ(status, OTA_OK);
            ota_sink_free(&sink);
            break;
        }
        expected++;
        CHECK_EQ(status, n % 2 ? OTA_ERR_SYSTEM : OTA_ERR_NO_SPACE);
        CHECK_EQ(error.device_code, n % 2 ? EIO : ENOSPC);
        CHECK_EQ(error.stage, OTA_STAGE_SINK);
        CHECK_EQ(committed, 0);
        ota_error later = {0};
        CHECK_EQ(sink->ops->write(sink, image, SECTOR, &later), status); /* sticks */
        CHECK_EQ(fault.seen, n + 1);                                     /* and touches nothing any more */
        check_surroundings(IMAGE_SIZE);

        sink->ops->abort(sink);
        memset(&error, 0, sizeof error);
        flash_emu_count_anew(&emu);
        CHECK_EQ(install(sink, IMAGE_SIZE, 16 * SECTOR), OTA_OK); /* the next try works */
        CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
        CHECK_EQ(committed, 1);
        check_surroundings(IMAGE_SIZE);
        ota_sink_free(&sink);
    }
    CHECK(expected > 9);
}

TEST(after_a_power_cut_anywhere_what_was_synced_is_there_and_the_next_try_works) {
    uint64_t torn[] = {0, 1, 2048, 4096, 4097, UINT64_MAX};
    for (int cache = FLASH_EMU_NO_CACHE; cache <= FLASH_EMU_LOSES_SOME; cache++) {
        for (size_t t = 0; t < sizeof torn / sizeof *torn; t++) {
            for (uint64_t n = 0;; n++) {
                fresh(false);
                ota_fault fault = {.after = n, .power_cut = true, .torn_len = torn[t]};
                emu.fault = &fault;
                emu.cache = (flash_emu_cache)cache;
                emu.seed = (uint32_t)n;
                ota_sink *sink = make(false);
                uint64_t durable = 0;
                ota_status status = sink->ops->open(sink, IMAGE_SIZE, 0, &error);
                for (uint64_t at = 0; status == OTA_OK && at < IMAGE_SIZE; at += 10 * SECTOR) {
                    uint64_t end = at + 10 * SECTOR < IMAGE_SIZE ? at + 10 * SECTOR : IMAGE_SIZE;
                    status = feed(sink, at, end, SECTOR * 10);
                    status = status < 0 ? status : sink->ops->sync(sink, &durable, &error);
                }
                status = status < 0 ? status : sink->ops->finish(sink, &error);
                ota_sink_free(&sink);
                emu.fault = NULL; /* power is back */
                CHECK_MEM(emu.bytes + SLOT_OFFSET, image, durable);
                check_surroundings(IMAGE_SIZE);
                if (!fault.lost) {
                    CHECK_EQ(status, OTA_OK);
                    CHECK(n > 12);
                    break;
                }
                CHECK_EQ(status, OTA_ERR_SYSTEM);
                memset(&error, 0, sizeof error);
                flash_emu_count_anew(&emu);
                sink = make(false);
                uint64_t from = ota_round_down(durable, sink->resume_size);
                CHECK_EQ(sink->ops->open(sink, IMAGE_SIZE, from, &error), OTA_OK);
                CHECK_EQ(feed(sink, from, IMAGE_SIZE, 16 * SECTOR), OTA_OK);
                CHECK_EQ(sink->ops->finish(sink, &error), OTA_OK);
                CHECK_MEM(emu.bytes + SLOT_OFFSET, image, IMAGE_SIZE);
                check_surroundings(IMAGE_SIZE);
                ota_sink_free(&sink);
            }
        }
    }
}

int main(void) {
    RUN(an_image_over_other_bytes_is_erased_and_programmed_once);
    RUN(an_erased_slot_is_not_erased_again);
    RUN(sectors_with_the_right_bytes_are_left_alone);
    RUN(rewrite_same_writes_them_all_the_same);
    RUN(a_half_erased_sector_is_erased);
    RUN(an_image_of_unknown_size_may_fill_the_slot_and_not_more);
    RUN(an_image_that_cannot_fit_changes_nothing);
    RUN(a_begin_that_refuses_leaves_the_slot_alone_and_sticks);
    RUN(a_commit_that_refuses_is_told_as_commit);
    RUN(nothing_is_committed_before_finish_nor_after_abort);
    RUN(the_end_is_told_once_after_a_begin_that_succeeded);
    RUN(an_image_that_ends_early_is_not_finished);
    RUN(only_the_last_piece_may_end_inside_a_sector);
    RUN(a_resume_goes_on_at_a_sector_and_reads_back_what_was_there);
    RUN(a_resume_elsewhere_is_refused_before_begin);
    RUN(reading_outside_the_slot_is_refused);
    RUN(a_slot_that_is_not_whole_sectors_inside_the_flash_is_refused);
    RUN(every_failing_operation_ends_the_installation_with_its_errno);
    RUN(after_a_power_cut_anywhere_what_was_synced_is_there_and_the_next_try_works);
    flash_emu_free(&emu);
    return DONE();
}
