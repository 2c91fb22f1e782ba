/* sources: esp/esp_otadata.c base/bytes.c base/status.c */
/* libs: zlib */
/* Entries, the boot loader's decision, and the plans. What real boot loaders did and firmware's own operations are compared
 * in tests/conformance; here are the properties that must hold from every state otadata can be in. */
#include "esp/esp_otadata.h"

#include "check.h"

enum {
    NEW = OTA_ESP_STATE_NEW,
    PENDING = OTA_ESP_STATE_PENDING_VERIFY,
    VALID = OTA_ESP_STATE_VALID,
    INVALID = OTA_ESP_STATE_INVALID,
    ABORTED = OTA_ESP_STATE_ABORTED,
};

#define UNDEFINED OTA_ESP_STATE_UNDEFINED
#define FACTORY OTA_ESP_SLOT_FACTORY
#define TEST_APP OTA_ESP_SLOT_TEST
#define NONE OTA_ESP_SLOT_NONE

static ota_error error;

/* ---- A chip with images ------------------------------------------------------------------------------------------- */

static ota_esp_slot_facts images[18]; /* slot + 2 */
static unsigned probes, full_probes;
static ota_status probe_status;

static ota_status probe(void *user, int slot, bool full, ota_esp_slot_facts *facts, ota_error *into) {
    (void)user;
    probes++;
    full_probes += full;
    *facts = images[slot + 2];
    return probe_status < 0 ? ota_error_set(into, probe_status, OTA_STAGE_TARGET, 7, 5, "cannot read") : OTA_OK;
}

static ota_esp_boot_config chip(uint32_t slot_count) {
    for (size_t i = 0; i < sizeof images / sizeof images[0]; i++) {
        images[i] = (ota_esp_slot_facts){.verifies = true, .described = true};
    }
    probes = full_probes = 0;
    probe_status = OTA_OK;
    memset(&error, 0, sizeof error);
    return (ota_esp_boot_config){.slot_count = slot_count, .has_otadata = true, .rollback = true, .probe = probe};
}

static ota_esp_otadata_entry blank(void) {
    ota_esp_otadata_entry entry;
    memset(&entry, 0xFF, sizeof entry);
    return entry;
}

static ota_esp_otadata_entry entry(uint32_t seq, uint32_t state) {
    return ota_esp_otadata_entry_make(seq, state);
}

static ota_esp_otadata_entry bad_crc(uint32_t seq, uint32_t state) {
    ota_esp_otadata_entry made = entry(seq, state);
    made.crc ^= 1;
    return made;
}

static int boots(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config) {
    ota_esp_boot_decision decision;
    CHECK_EQ(ota_esp_boot_decide(entries, config, &decision, &error), OTA_OK);
    return decision.slot;
}

/* ---- Entries ------------------------------------------------------------------------------------------------------ */

TEST(an_entry_is_what_it_was_built_from) {
    uint8_t bytes[32], again[32];
    for (int i = 0; i < 32; i++) {
        bytes[i] = (uint8_t)(i * 7 + 1);
    }
    ota_esp_otadata_entry parsed;
    ota_esp_otadata_entry_parse(bytes, &parsed);
    CHECK_EQ(parsed.seq, 0x160F0801);
    CHECK_EQ(parsed.label[0], bytes[4]);
    CHECK_EQ(parsed.state, bytes[24] | bytes[25] << 8 | bytes[26] << 16 | (uint32_t)bytes[27] << 24);
    ota_esp_otadata_entry_build(&parsed, again);
    CHECK_MEM(again, bytes, sizeof bytes);
}

TEST(the_crc_is_the_one_of_firmware) {
    CHECK_EQ(ota_esp_otadata_crc(1), 0x4743989A);
    CHECK_EQ(ota_esp_otadata_crc(2), 0x55F63774);
    CHECK_EQ(ota_esp_otadata_crc(3), 0xED4A5011);
    CHECK_EQ(ota_esp_otadata_crc(0), 0xFFFFFFFF); /* a sector whose first word alone is zeroed is live */
    CHECK_EQ(ota_esp_otadata_crc(0xFFFFFFFF), 0x2144DF1C);
}

TEST(dead_and_live_are_told_apart) {
    ota_esp_otadata_entry erased = blank();
    CHECK(ota_esp_otadata_blank(&erased) && ota_esp_otadata_dead(&erased) && !ota_esp_otadata_live(&erased));
    const uint32_t living[] = {NEW, PENDING, VALID, UNDEFINED, 5, 0x80000000};
    for (size_t i = 0; i < sizeof living / sizeof living[0]; i++) {
        ota_esp_otadata_entry one = entry(1, living[i]);
        CHECK(ota_esp_otadata_live(&one) && !ota_esp_otadata_dead(&one) && !ota_esp_otadata_blank(&one));
        one = bad_crc(1, living[i]);
        CHECK(!ota_esp_otadata_live(&one) && !ota_esp_otadata_dead(&one));
    }
    const uint32_t dying[] = {INVALID, ABORTED};
    for (size_t i = 0; i < 2; i++) {
        ota_esp_otadata_entry one = bad_crc(1, dying[i]);
        CHECK(ota_esp_otadata_dead(&one) && !ota_esp_otadata_live(&one));
    }
    memset(&erased, 0xFF, sizeof erased);
    erased.seq = 0; /* the trap: never zero the first word only */
    CHECK(ota_esp_otadata_live(&erased));
    CHECK_EQ(ota_esp_otadata_slot(&erased, 2), 1);
    memset(&erased, 0, sizeof erased);
    CHECK(!ota_esp_otadata_live(&erased));
}

TEST(the_larger_sequence_is_active_and_a_tie_goes_to_sector_0) {
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, VALID)};
    CHECK_EQ(ota_esp_otadata_active(both), 1);
    both[0] = entry(3, NEW);
    CHECK_EQ(ota_esp_otadata_active(both), 0);
    both[1] = entry(3, VALID);
    CHECK_EQ(ota_esp_otadata_active(both), 0);
    both[0] = bad_crc(9, VALID);
    CHECK_EQ(ota_esp_otadata_active(both), 1);
    both[1] = entry(3, ABORTED);
    CHECK_EQ(ota_esp_otadata_active(both), -1);
}

TEST(slots_and_states_have_names) {
    ota_esp_otadata_entry one = entry(5, VALID);
    CHECK_EQ(ota_esp_otadata_slot(&one, 3), 1);
    CHECK_EQ(ota_esp_otadata_slot(&one, 0), NONE);
    CHECK(strcmp(ota_esp_slot_name(15), "ota_15") == 0);
    CHECK(strcmp(ota_esp_slot_name(16), "none") == 0);
    CHECK(strcmp(ota_esp_slot_name(FACTORY), "factory") == 0);
    CHECK(strcmp(ota_esp_slot_name(TEST_APP), "test") == 0);
    CHECK(strcmp(ota_esp_slot_name(NONE), "none") == 0);
    CHECK(strcmp(ota_esp_otadata_state_name(ABORTED), "ABORTED") == 0);
    CHECK(strcmp(ota_esp_otadata_state_name(5), "UNDEFINED") == 0);
}

TEST(otadata_has_two_sectors) {
    static uint8_t bytes[OTA_ESP_OTADATA_SIZE];
    ota_esp_otadata_entry both[2], first = entry(1, VALID), second = entry(2, NEW);
    memset(bytes, 0xFF, sizeof bytes);
    ota_esp_otadata_entry_build(&first, bytes);
    ota_esp_otadata_entry_build(&second, bytes + 4096);
    CHECK_EQ(ota_esp_otadata_parse(bytes, sizeof bytes, both, &error), OTA_OK);
    CHECK_EQ(both[0].seq, 1);
    CHECK_EQ(both[1].seq, 2);
    for (size_t len = 0; len < sizeof bytes; len += 511) {
        ota_error own = {0};
        CHECK_EQ(ota_esp_otadata_parse(bytes, len, both, &own), OTA_ERR_OTADATA);
        CHECK_EQ(own.offset, len);
    }
}

/* ---- Boot --------------------------------------------------------------------------------------------------------- */

TEST(without_otadata_factory_comes_first_then_every_slot) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(2, VALID), blank()};
    config.has_otadata = false;
    config.has_factory = true;
    CHECK_EQ(boots(both, &config), FACTORY);
    images[FACTORY + 2].verifies = false;
    CHECK_EQ(boots(both, &config), 0);
}

TEST(a_bad_image_falls_back_downwards_then_to_factory_then_upwards_then_to_test) {
    ota_esp_boot_config config = chip(4);
    ota_esp_otadata_entry both[2] = {entry(3, VALID), blank()}; /* ota_2 */
    static const int order[] = {2, 1, 0, FACTORY, 3, TEST_APP, NONE};
    config.has_factory = config.has_test = true;
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
        CHECK_EQ(boots(both, &config), order[i]);
        if (order[i] != NONE) {
            images[order[i] + 2].verifies = false;
        }
    }
    ota_esp_boot_decision decision;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_OK);
    CHECK_EQ(decision.steps[decision.step_count - 1].kind, OTA_ESP_BOOT_NOTHING);
    CHECK_EQ(decision.plan.count, 0);
}

TEST(sequence_0_and_unknown_states_boot) {
    ota_esp_boot_config config = chip(3);
    ota_esp_otadata_entry both[2] = {entry(0, 77), blank()};
    CHECK_EQ(boots(both, &config), (int)(0xFFFFFFFFu % 3));
}

TEST(both_entries_can_change_in_one_boot) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(3, NEW), bad_crc(2, PENDING)};
    ota_esp_boot_decision decision;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_OK);
    CHECK_EQ(decision.slot, 0);
    CHECK_EQ(decision.plan.count, 4);
    CHECK_EQ(decision.after[0].state, PENDING);
    CHECK_EQ(decision.after[1].state, ABORTED);
    CHECK(!ota_esp_otadata_crc_ok(&decision.after[1])); /* kept as it was */
}

TEST(first_use_with_wrong_crcs_takes_three_writes_at_most) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {bad_crc(1, PENDING), bad_crc(2, PENDING)};
    ota_esp_boot_decision decision;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_OK);
    CHECK_EQ(decision.slot, 0);
    CHECK(decision.first_use);
    CHECK_EQ(decision.plan.count, 6);
    CHECK_EQ(decision.after[0].seq, 1);
    CHECK_EQ(decision.after[0].state, VALID);
}

TEST(a_probe_that_fails_ends_the_decision) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), blank()};
    ota_esp_boot_decision decision;
    probe_status = OTA_ERR_SYSTEM;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, 5);
    CHECK_EQ(decision.slot, NONE);
    config = chip(2);
    config.rollback = false;
    config.anti_rollback = true;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_ERR_ARGUMENT);
    config = chip(17);
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_ERR_ARGUMENT);
}

TEST(only_slots_that_are_tried_are_read_in_full) {
    ota_esp_boot_config config = chip(4);
    ota_esp_otadata_entry both[2] = {entry(2, VALID), blank()};
    CHECK_EQ(boots(both, &config), 1);
    CHECK_EQ(probes, 1);
    CHECK_EQ(full_probes, 1);
}

TEST(the_efuse_rises_with_a_valid_entry_and_closes_the_way_back) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, VALID)};
    ota_esp_boot_decision decision;
    config.anti_rollback = true;
    images[1 + 2].secure_version = 3;
    CHECK_EQ(ota_esp_boot_decide(both, &config, &decision, &error), OTA_OK);
    CHECK_EQ(decision.slot, 1);
    CHECK(decision.plan.raise_secure_version);
    CHECK_EQ(decision.plan.secure_version, 3);
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, NULL, &error), OTA_OK);
    config.secure_version = 3;
    ota_error own = {0};
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, NULL, &own), OTA_ERR_ROLLBACK);
    images[1 + 2].verifies = false; /* the eFuse rose before the image was looked at: ota_0 is too old now */
    config.secure_version = 0;
    CHECK_EQ(boots(both, &config), NONE);
}

TEST(every_step_has_a_sentence) {
    char text[160], unknown[160];
    ota_esp_boot_step step = {.entry = 1, .slot = 0, .value = 2};
    step.kind = (ota_esp_boot_step_kind)999;
    ota_esp_boot_step_text(&step, unknown, sizeof unknown);
    for (int kind = OTA_ESP_BOOT_NO_OTADATA; kind <= OTA_ESP_BOOT_NOTHING; kind++) {
        step.kind = (ota_esp_boot_step_kind)kind;
        CHECK(strcmp(ota_esp_boot_step_text(&step, text, sizeof text), unknown) != 0);
        CHECK_EQ(strlen(ota_esp_boot_step_text(&step, text, 8)), 7);
    }
}

/* ---- Plans -------------------------------------------------------------------------------------------------------- */

TEST(an_update_goes_to_the_slot_after_the_running_one) {
    CHECK_EQ(ota_esp_next_slot(2, 0), 1);
    CHECK_EQ(ota_esp_next_slot(2, 1), 0);
    CHECK_EQ(ota_esp_next_slot(3, 1), 2);
    CHECK_EQ(ota_esp_next_slot(3, FACTORY), 0);
    CHECK_EQ(ota_esp_next_slot(3, TEST_APP), 0);
    CHECK_EQ(ota_esp_next_slot(3, NONE), 0);
    CHECK_EQ(ota_esp_next_slot(1, 0), 0);
    CHECK_EQ(ota_esp_next_slot(0, FACTORY), NONE);
}

TEST(begin_refuses_what_firmware_refuses) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, PENDING), blank()};
    ota_esp_plan plan;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_begin(both, &config, 0, 0, &plan, &own), OTA_ERR_SLOT_RUNNING);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_begin(both, &config, 0, FACTORY, &plan, &own), OTA_ERR_ARGUMENT);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_begin(both, &config, 0, 2, &plan, &own), OTA_ERR_ARGUMENT);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_begin(both, &config, 0, 1, &plan, &own), OTA_ERR_PENDING_VERIFY);
    config.rollback = false;
    CHECK_EQ(ota_esp_plan_begin(both, &config, 0, 1, &plan, &error), OTA_OK);
}

TEST(an_image_marked_invalid_is_left_before_anything_is_installed) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, INVALID)};
    ota_esp_plan plan;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_begin(both, &config, 1, 0, &plan, &own), OTA_ERR_STATE);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 1, 0, &plan, &own), OTA_ERR_STATE);
    both[0] = entry(1, ABORTED); /* nothing to go back to, and ota_0 is broken: it runs on */
    images[0 + 2].verifies = false;
    CHECK_EQ(boots(both, &config), 1);
    CHECK_EQ(ota_esp_plan_begin(both, &config, 1, 0, &plan, &error), OTA_OK);
    ota_esp_plan_apply(&plan, both);
    CHECK_EQ(boots(both, &config), 1);
    CHECK_EQ(ota_esp_otadata_active(both), 0);
}

TEST(the_entry_of_the_running_slot_exists_before_new_is_written) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {blank(), blank()};
    ota_esp_plan plan;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 1, 0, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 4);
    CHECK_EQ(plan.ops[1].entry.seq, 2);
    CHECK_EQ(plan.ops[1].entry.state, VALID);
    CHECK_EQ(plan.ops[3].entry.seq, 3);
    CHECK_EQ(plan.ops[3].entry.state, NEW);
    CHECK(plan.ops[1].sector != plan.ops[3].sector);
}

TEST(a_slot_that_is_active_gets_the_next_sequence_in_the_other_sector) {
    ota_esp_boot_config config = chip(3);
    ota_esp_otadata_entry both[2] = {blank(), entry(5, VALID)}; /* ota_1 */
    ota_esp_plan plan;
    const int running[] = {1, NONE};
    for (size_t i = 0; i < 2; i++) {
        CHECK_EQ(ota_esp_plan_set_boot(both, &config, running[i], 1, &plan, &error), OTA_OK);
        CHECK_EQ(plan.count, 2);
        CHECK_EQ(plan.ops[1].sector, 0);
        CHECK_EQ(plan.ops[1].entry.seq, 8);
        CHECK_EQ(plan.ops[1].entry.state, NEW);
    }
}

TEST(choosing_a_slot_twice_changes_nothing) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), blank()};
    ota_esp_plan plan;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 2);
    ota_esp_plan_apply(&plan, both);
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 0);
}

TEST(choosing_the_running_slot_takes_the_choice_back) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, NEW)};
    ota_esp_plan plan;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 0, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 1);
    ota_esp_plan_apply(&plan, both);
    CHECK_EQ(boots(both, &config), 0);
    CHECK_EQ(both[0].state, VALID);
}

TEST(going_back_to_factory_erases_the_active_entry_last) {
    ota_esp_boot_config config = chip(2);
    ota_esp_plan plan;
    for (int active = 0; active < 2; active++) {
        ota_esp_otadata_entry both[2] = {entry(active ? 1 : 3, VALID), entry(2, VALID)};
        ota_error own = {0};
        config.has_factory = false;
        CHECK_EQ(ota_esp_plan_set_boot(both, &config, 1 - active, FACTORY, &plan, &own), OTA_ERR_ARGUMENT);
        config.has_factory = true;
        CHECK_EQ(ota_esp_plan_set_boot(both, &config, 1 - active, FACTORY, &plan, &error), OTA_OK);
        CHECK_EQ(plan.count, 2);
        CHECK_EQ(plan.ops[1].sector, active);
        ota_esp_plan_apply(&plan, both);
        CHECK_EQ(boots(both, &config), FACTORY);
    }
}

TEST(an_image_too_old_is_not_chosen) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), blank()};
    ota_esp_plan plan;
    config.anti_rollback = true;
    config.secure_version = 2;
    images[0 + 2].secure_version = 2;
    images[1 + 2].secure_version = 1;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &own), OTA_ERR_SECURE_VERSION);
    CHECK_EQ(plan.count, 0);
    images[1 + 2].secure_version = 2;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &error), OTA_OK);
    images[1 + 2].described = false;
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &own), OTA_ERR_SECURE_VERSION);
}

TEST(test_is_never_chosen_and_needs_no_otadata_to_be_refused) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), blank()};
    ota_esp_plan plan;
    config.has_test = true;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, TEST_APP, &plan, &own), OTA_ERR_ARGUMENT);
    config.has_otadata = false;
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, FACTORY, 1, &plan, &own), OTA_ERR_NOT_FOUND);
}

TEST(sequence_numbers_run_out_with_a_clear_error) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(0xFFFFFFFE, VALID), blank()};
    ota_esp_plan plan;
    ota_error own = {0};
    CHECK_EQ(ota_esp_otadata_slot(&both[0], 2), 1);
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 1, 0, &plan, &own), OTA_ERR_OTADATA);
    CHECK(strstr(own.text, "used up") != NULL);
    both[0] = entry(0xFFFFFFFD, VALID);
    CHECK_EQ(ota_esp_plan_set_boot(both, &config, 0, 1, &plan, &error), OTA_OK);
    CHECK_EQ(plan.ops[1].entry.seq, 0xFFFFFFFE);
}

TEST(only_the_slot_the_active_entry_names_is_confirmed) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, PENDING)}; /* ota_1 is broken, ota_0 runs */
    ota_esp_plan plan;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_mark_valid(both, &config, 0, &plan, &own), OTA_ERR_STATE);
    CHECK(strstr(own.text, "ota_1") != NULL && strstr(own.text, "ota_0") != NULL);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_mark_invalid(both, &config, 0, &plan, &own), OTA_ERR_STATE);
    CHECK_EQ(plan.count, 0);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_plan_mark_valid(both, &config, FACTORY, &plan, &own), OTA_ERR_STATE);
    CHECK_EQ(ota_esp_plan_mark_valid(both, &config, 1, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 2);
    CHECK_EQ(plan.ops[1].entry.state, VALID);
    CHECK_EQ(plan.ops[1].entry.seq, 2);
    ota_esp_plan_apply(&plan, both);
    CHECK_EQ(ota_esp_plan_mark_valid(both, &config, 1, &plan, &error), OTA_OK);
    CHECK_EQ(plan.count, 0);
}

TEST(confirming_raises_the_efuse) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, PENDING)};
    ota_esp_plan plan;
    config.anti_rollback = true;
    images[1 + 2].secure_version = 4;
    CHECK_EQ(ota_esp_plan_mark_valid(both, &config, 1, &plan, &error), OTA_OK);
    CHECK(plan.raise_secure_version);
    CHECK_EQ(plan.secure_version, 4);
}

TEST(rolling_back_needs_something_to_roll_back_to) {
    ota_esp_boot_config config = chip(2);
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, PENDING)};
    ota_esp_plan plan;
    int to = NONE;
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, &to, &error), OTA_OK);
    CHECK_EQ(to, 0);
    images[0 + 2].verifies = false;
    ota_error own = {0};
    CHECK_EQ(ota_esp_plan_mark_invalid(both, &config, 1, &plan, &own), OTA_ERR_ROLLBACK);
    CHECK_EQ(plan.count, 0);
    config.has_factory = true; /* of no use: the other entry is live */
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, &to, &own), OTA_ERR_ROLLBACK);
    both[0] = entry(1, ABORTED);
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, &to, &error), OTA_OK);
    CHECK_EQ(to, FACTORY);
    config.anti_rollback = true;
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, &to, &own), OTA_ERR_ROLLBACK);
    config = chip(2);
    both[0] = entry(4, PENDING); /* the other entry names the running slot too */
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_can_rollback(both, &config, 1, &to, &own), OTA_ERR_ROLLBACK);
    CHECK_EQ(to, NONE);
}

TEST(the_state_of_a_slot_is_that_of_its_entry) {
    ota_esp_otadata_entry both[2] = {entry(1, VALID), entry(2, ABORTED)};
    uint32_t state;
    ota_error own = {0};
    CHECK_EQ(ota_esp_slot_state(both, 2, 0, &state, &error), OTA_OK);
    CHECK_EQ(state, VALID);
    CHECK_EQ(ota_esp_slot_state(both, 2, 1, &state, &error), OTA_OK);
    CHECK_EQ(state, ABORTED);
    CHECK_EQ(ota_esp_slot_state(both, 3, 2, &state, &own), OTA_ERR_NOT_FOUND);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_slot_state(both, 2, FACTORY, &state, &own), OTA_ERR_UNSUPPORTED);
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_slot_state(both, 2, 2, &state, &own), OTA_ERR_UNSUPPORTED);
    both[1] = entry(3, PENDING); /* both name ota_0: the active one counts */
    CHECK_EQ(ota_esp_slot_state(both, 2, 0, &state, &error), OTA_OK);
    CHECK_EQ(state, PENDING);
}

TEST(the_last_image_rolled_back_is_the_one_with_the_smaller_sequence) {
    ota_esp_otadata_entry both[2] = {entry(3, ABORTED), entry(2, INVALID)};
    CHECK_EQ(ota_esp_last_invalid(both, 2), 1);
    both[1] = entry(2, VALID);
    CHECK_EQ(ota_esp_last_invalid(both, 2), 0);
    both[0] = bad_crc(3, ABORTED);
    CHECK_EQ(ota_esp_last_invalid(both, 2), NONE);
}

/* ---- From every state --------------------------------------------------------------------------------------------- */

/* Both entries with the first `done` bytes of operation `index` carried out. */
static void cut(const ota_esp_plan *plan, uint32_t index, size_t done, ota_esp_otadata_entry entries[2]) {
    ota_esp_plan before = *plan;
    before.count = index;
    ota_esp_plan_apply(&before, entries);
    const ota_esp_op *op = &plan->ops[index];
    uint8_t sector[32], programmed[32];
    ota_esp_otadata_entry_build(&entries[op->sector], sector);
    ota_esp_otadata_entry_build(&op->entry, programmed);
    for (size_t i = 0; i < done; i++) {
        sector[i] = op->kind == OTA_ESP_OP_ERASE ? 0xFF : (uint8_t)(sector[i] & programmed[i]);
    }
    ota_esp_otadata_entry_parse(sector, &entries[op->sector]);
}

static unsigned updates, refused, given_up;

/* Cuts a plan at every byte: what boots is `a` or `b`; or, where even without the plan a restart would have left the running
 * image `a` (it runs by a fallback), at least something. */
static void check_cuts(const ota_esp_plan *plan, const ota_esp_otadata_entry before[2],
                       const ota_esp_boot_config *config, int a, int b) {
    const bool stable = boots(before, config) == a;
    for (uint32_t index = 0; index < plan->count; index++) {
        for (size_t done = 0; done <= 32; done += done == 4 || done == 24 ? 3 : 1) {
            ota_esp_otadata_entry entries[2] = {before[0], before[1]};
            cut(plan, index, done, entries);
            int slot = boots(entries, config);
            CHECK(stable ? slot == a || slot == b : slot != NONE);
            if (slot == NONE || (stable && slot != a && slot != b)) {
                printf("  cut %u.%zu: %s boots, not %s or %s\n", index, done, ota_esp_slot_name(slot),
                       ota_esp_slot_name(a), ota_esp_slot_name(b));
                return;
            }
        }
    }
}

/* An update begun from whatever `before` is: the running image boots until the new one is chosen, the new one boots then,
 * and with rollback the old one again when it is not confirmed. At every power cut one of the two. */
static void update_from(const ota_esp_otadata_entry before[2], const ota_esp_boot_config *config) {
    ota_esp_boot_decision decision;
    ota_esp_plan plan;
    ota_error own = {0};
    CHECK_EQ(ota_esp_boot_decide(before, config, &decision, &own), OTA_OK);
    int running = decision.slot, slot = ota_esp_next_slot(config->slot_count, running);
    if (running == NONE || slot == running) {
        return;
    }
    ota_esp_otadata_entry entries[2] = {decision.after[0], decision.after[1]};
    ota_status status = ota_esp_plan_begin(entries, config, running, slot, &plan, &own);
    if (status == OTA_ERR_STATE) { /* it runs by a fallback, was marked invalid, and a restart leads elsewhere */
        uint32_t state = UNDEFINED;
        CHECK_EQ(ota_esp_slot_state(entries, config->slot_count, running, &state, NULL), OTA_OK);
        CHECK_EQ(state, INVALID);
        CHECK(boots(entries, config) != running);
        given_up++;
        return;
    }
    if (status == OTA_ERR_PENDING_VERIFY) {
        refused++;
        own.status = OTA_OK;
        CHECK_EQ(ota_esp_plan_mark_valid(entries, config, running, &plan, &own), OTA_OK);
        ota_esp_plan_apply(&plan, entries);
        CHECK_EQ(ota_esp_plan_begin(entries, config, running, slot, &plan, &own), OTA_OK);
    }
    CHECK_EQ(own.status, OTA_OK);
    check_cuts(&plan, entries, config, running, running);
    ota_esp_plan_apply(&plan, entries);
    ota_esp_slot_facts held = images[slot + 2];
    images[slot + 2].verifies = false; /* half written */
    CHECK_EQ(boots(entries, config), running);
    images[slot + 2].verifies = true; /* complete, not chosen */
    CHECK_EQ(boots(entries, config), running);

    CHECK_EQ(ota_esp_plan_set_boot(entries, config, running, slot, &plan, &own), OTA_OK);
    check_cuts(&plan, entries, config, running, slot);
    ota_esp_plan_apply(&plan, entries);
    ota_esp_otadata_entry chosen[2] = {entries[0], entries[1]};
    CHECK_EQ(ota_esp_plan_set_boot(entries, config, running, slot, &plan, &own), OTA_OK);
    CHECK_EQ(ota_esp_boot_decide(chosen, config, &decision, &own), OTA_OK);
    CHECK_EQ(decision.slot, slot);
    check_cuts(&decision.plan, chosen, config, slot, running);
    if (config->rollback) {
        memcpy(entries, decision.after, sizeof entries);
        CHECK_EQ(ota_esp_can_rollback(entries, config, slot, NULL, &own), OTA_OK);
        CHECK_EQ(boots(entries, config), running); /* never confirmed */
        CHECK_EQ(ota_esp_plan_mark_invalid(entries, config, slot, &plan, &own), OTA_OK);
        check_cuts(&plan, entries, config, running, running);
        ota_esp_plan_apply(&plan, entries);
        CHECK_EQ(boots(entries, config), running);
        memcpy(entries, decision.after, sizeof entries);
        CHECK_EQ(ota_esp_plan_mark_valid(entries, config, slot, &plan, &own), OTA_OK);
        check_cuts(&plan, entries, config, running, slot);
        ota_esp_plan_apply(&plan, entries);
        CHECK_EQ(boots(entries, config), slot);
        CHECK_EQ(boots(entries, config), slot);
    }
    images[slot + 2] = held;
    updates++;
    CHECK_EQ(own.status, OTA_OK);
}

static size_t every_entry(ota_esp_otadata_entry out[40]) {
    static const uint32_t states[] = {NEW, PENDING, VALID, INVALID, ABORTED, UNDEFINED};
    size_t count = 0;
    out[count++] = blank();
    for (uint32_t seq = 1; seq <= 4; seq++) {
        for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
            out[count++] = entry(seq, states[i]);
        }
    }
    out[count++] = entry(0, VALID);
    out[count++] = bad_crc(3, VALID);
    out[count++] = bad_crc(3, PENDING);
    out[count++] = bad_crc(3, ABORTED);
    return count;
}

TEST(an_update_from_every_state_never_loses_the_running_image) {
    ota_esp_otadata_entry all[40], both[2];
    const size_t count = every_entry(all);
    for (uint32_t slots = 1; slots <= 3; slots++) {
        for (unsigned options = 0; options < 4; options++) {
            for (unsigned good = 0; good < 1u << (slots + 1); good++) {
                ota_esp_boot_config config = chip(slots);
                config.rollback = options & 1;
                config.has_factory = options & 2;
                if (!config.has_factory && (good & 1)) {
                    continue;
                }
                for (uint32_t slot = 0; slot <= slots; slot++) { /* factory, ota_0, .. */
                    images[slot + 1].verifies = good >> slot & 1;
                }
                for (size_t i = 0; i < count; i++) {
                    for (size_t k = 0; k < count; k++) {
                        both[0] = all[i];
                        both[1] = all[k];
                        int failed = check_failures;
                        update_from(both, &config);
                        if (check_failures != failed) {
                            printf("  from seq %x %s%s / seq %x %s%s, %u slots, rollback %d, factory %d, images %x\n",
                                   both[0].seq, ota_esp_otadata_state_name(both[0].state),
                                   ota_esp_otadata_crc_ok(&both[0]) ? "" : " BADCRC", both[1].seq,
                                   ota_esp_otadata_state_name(both[1].state),
                                   ota_esp_otadata_crc_ok(&both[1]) ? "" : " BADCRC", slots, config.rollback,
                                   config.has_factory, good);
                            return;
                        }
                    }
                }
            }
        }
    }
    printf("  %u updates, %u of them had to confirm first\n", updates, refused);
    CHECK(updates > 10000);
    CHECK(refused > 1000);
    CHECK(given_up > 0 && given_up < 100);
}

int main(void) {
    RUN(an_entry_is_what_it_was_built_from);
    RUN(the_crc_is_the_one_of_firmware);
    RUN(dead_and_live_are_told_apart);
    RUN(the_larger_sequence_is_active_and_a_tie_goes_to_sector_0);
    RUN(slots_and_states_have_names);
    RUN(otadata_has_two_sectors);
    RUN(without_otadata_factory_comes_first_then_every_slot);
    RUN(a_bad_image_falls_back_downwards_then_to_factory_then_upwards_then_to_test);
    RUN(sequence_0_and_unknown_states_boot);
    RUN(both_entries_can_change_in_one_boot);
    RUN(first_use_with_wrong_crcs_takes_three_writes_at_most);
    RUN(a_probe_that_fails_ends_the_decision);
    RUN(only_slots_that_are_tried_are_read_in_full);
    RUN(the_efuse_rises_with_a_valid_entry_and_closes_the_way_back);
    RUN(every_step_has_a_sentence);
    RUN(an_update_goes_to_the_slot_after_the_running_one);
    RUN(begin_refuses_what_firmware_refuses);
    RUN(an_image_marked_invalid_is_left_before_anything_is_installed);
    RUN(the_entry_of_the_running_slot_exists_before_new_is_written);
    RUN(a_slot_that_is_active_gets_the_next_sequence_in_the_other_sector);
    RUN(choosing_a_slot_twice_changes_nothing);
    RUN(choosing_the_running_slot_takes_the_choice_back);
    RUN(going_back_to_factory_erases_the_active_entry_last);
    RUN(an_image_too_old_is_not_chosen);
    RUN(test_is_never_chosen_and_needs_no_otadata_to_be_refused);
    RUN(sequence_numbers_run_out_with_a_clear_error);
    RUN(only_the_slot_the_active_entry_names_is_confirmed);
    RUN(confirming_raises_the_efuse);
    RUN(rolling_back_needs_something_to_roll_back_to);
    RUN(the_state_of_a_slot_is_that_of_its_entry);
    RUN(the_last_image_rolled_back_is_the_one_with_the_smaller_sequence);
    RUN(an_update_from_every_state_never_loses_the_running_image);
    return DONE();
}
