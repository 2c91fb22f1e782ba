/* The two select entries of otadata: what they say, what a boot loader makes of them, how they are changed.
 *
 *     state of an entry     becomes           by
 *     (none)                NEW               set_boot, with rollback
 *     (none)                UNDEFINED         set_boot, without rollback: boots for ever
 *     NEW                   PENDING_VERIFY    boot loader, before it looks at the image
 *     PENDING_VERIFY        VALID             mark_valid
 *     PENDING_VERIFY        INVALID           mark_invalid
 *     PENDING_VERIFY        ABORTED           boot loader, at the next power-on
 *     (none)                VALID             boot loader at first use; plan_begin for a running slot without an entry
 *
 * Leaves to others: reading and writing flash, verifying images, and the eFuses. */
#include "esp/esp_otadata.h"

#include <stdio.h>
#include <string.h>

#include "base/bytes.h"

#define SECTOR 4096u

/* ---- Entries ----------------------------------------------------------------------------------------------------- */

void ota_esp_otadata_entry_parse(const uint8_t data[OTA_ESP_OTADATA_ENTRY_SIZE], ota_esp_otadata_entry *out) {
    out->seq = ota_load_u32le(data);
    memcpy(out->label, data + 4, sizeof out->label);
    out->state = ota_load_u32le(data + 24);
    out->crc = ota_load_u32le(data + 28);
}

void ota_esp_otadata_entry_build(const ota_esp_otadata_entry *entry, uint8_t out[OTA_ESP_OTADATA_ENTRY_SIZE]) {
    ota_store_u32le(out, entry->seq);
    memcpy(out + 4, entry->label, sizeof entry->label);
    ota_store_u32le(out + 24, entry->state);
    ota_store_u32le(out + 28, entry->crc);
}

ota_status ota_esp_otadata_parse(const uint8_t *data, size_t len, ota_esp_otadata_entry out[2], ota_error *error) {
    if (len < OTA_ESP_OTADATA_SIZE) {
        return ota_error_set(error, OTA_ERR_OTADATA, OTA_STAGE_TARGET, len, 0,
                             "otadata has two sectors, 0x%x bytes, here are 0x%zx", OTA_ESP_OTADATA_SIZE, len);
    }
    ota_esp_otadata_entry_parse(data, &out[0]);
    ota_esp_otadata_entry_parse(data + SECTOR, &out[1]);
    return OTA_OK;
}

uint32_t ota_esp_otadata_crc(uint32_t seq) {
    uint8_t bytes[4];
    ota_store_u32le(bytes, seq);
    return ota_crc32(0xFFFFFFFFu, bytes, sizeof bytes);
}

ota_esp_otadata_entry ota_esp_otadata_entry_make(uint32_t seq, uint32_t state) {
    ota_esp_otadata_entry entry = {.seq = seq, .state = state, .crc = ota_esp_otadata_crc(seq)};
    memset(entry.label, 0xFF, sizeof entry.label);
    return entry;
}

bool ota_esp_otadata_crc_ok(const ota_esp_otadata_entry *entry) {
    return entry->crc == ota_esp_otadata_crc(entry->seq);
}

bool ota_esp_otadata_blank(const ota_esp_otadata_entry *entry) {
    for (size_t i = 0; i < sizeof entry->label; i++) {
        if (entry->label[i] != 0xFF) {
            return false;
        }
    }
    return entry->seq == OTA_ESP_SEQ_UNUSED && entry->state == OTA_ESP_STATE_UNDEFINED && entry->crc == 0xFFFFFFFFu;
}

bool ota_esp_otadata_dead(const ota_esp_otadata_entry *entry) {
    return entry->seq == OTA_ESP_SEQ_UNUSED || entry->state == OTA_ESP_STATE_INVALID ||
           entry->state == OTA_ESP_STATE_ABORTED;
}

bool ota_esp_otadata_live(const ota_esp_otadata_entry *entry) {
    return !ota_esp_otadata_dead(entry) && ota_esp_otadata_crc_ok(entry);
}

int ota_esp_otadata_slot(const ota_esp_otadata_entry *entry, uint32_t slot_count) {
    return slot_count == 0 ? OTA_ESP_SLOT_NONE : (int)((entry->seq - 1) % slot_count);
}

/* The one with the larger seq of those that count, the first on a tie; -1: none counts. */
static int newest(const ota_esp_otadata_entry entries[2], bool first_counts, bool second_counts) {
    if (first_counts && second_counts) {
        return entries[1].seq > entries[0].seq ? 1 : 0;
    }
    return first_counts ? 0 : second_counts ? 1 : -1;
}

int ota_esp_otadata_active(const ota_esp_otadata_entry entries[2]) {
    return newest(entries, ota_esp_otadata_live(&entries[0]), ota_esp_otadata_live(&entries[1]));
}

const char *ota_esp_otadata_state_name(uint32_t state) {
    static const char *const names[] = {"NEW", "PENDING_VERIFY", "VALID", "INVALID", "ABORTED"};
    return state < sizeof names / sizeof names[0] ? names[state] : "UNDEFINED";
}

const char *ota_esp_slot_name(int slot) {
    static const char *const names[] = {"ota_0", "ota_1", "ota_2",  "ota_3",  "ota_4",  "ota_5",  "ota_6",  "ota_7",
                                        "ota_8", "ota_9", "ota_10", "ota_11", "ota_12", "ota_13", "ota_14", "ota_15"};
    if (slot >= 0 && slot < (int)(sizeof names / sizeof names[0])) {
        return names[slot];
    }
    return slot == OTA_ESP_SLOT_FACTORY ? "factory" : slot == OTA_ESP_SLOT_TEST ? "test" : "none";
}

/* ---- Plans ------------------------------------------------------------------------------------------------------- */

static void plan_erase(ota_esp_plan *plan, int sector) {
    plan->ops[plan->count++] = (ota_esp_op){.kind = OTA_ESP_OP_ERASE, .sector = (uint8_t)sector};
}

/* Erase, then program: nothing else of a sector is kept. */
static void plan_write(ota_esp_plan *plan, int sector, const ota_esp_otadata_entry *entry) {
    plan_erase(plan, sector);
    plan->ops[plan->count++] = (ota_esp_op){.kind = OTA_ESP_OP_PROGRAM, .sector = (uint8_t)sector, .entry = *entry};
}

void ota_esp_plan_apply(const ota_esp_plan *plan, ota_esp_otadata_entry entries[2]) {
    for (uint32_t i = 0; i < plan->count; i++) {
        const ota_esp_op *op = &plan->ops[i];
        if (op->kind == OTA_ESP_OP_ERASE) {
            memset(&entries[op->sector], 0xFF, sizeof entries[0]);
        } else {
            entries[op->sector] = op->entry;
        }
    }
}

/* ---- Boot -------------------------------------------------------------------------------------------------------- */

static void add_step(ota_esp_boot_decision *decision, ota_esp_boot_step_kind kind, int entry, int slot,
                     uint32_t value) {
    if (decision->step_count < OTA_ESP_BOOT_STEPS_MAX) {
        decision->steps[decision->step_count++] =
            (ota_esp_boot_step){.kind = kind, .entry = entry, .slot = slot, .value = value};
    }
}

static void rewrite(ota_esp_boot_decision *decision, int sector) {
    plan_write(&decision->plan, sector, &decision->after[sector]);
}

/* eFuse secure version as raised so far. */
static uint32_t secure_version(const ota_esp_boot_decision *decision, const ota_esp_boot_config *config) {
    return decision->plan.raise_secure_version ? decision->plan.secure_version : config->secure_version;
}

static void raise_secure_version(ota_esp_boot_decision *decision, const ota_esp_boot_config *config,
                                 const ota_esp_slot_facts *facts) {
    if (facts->described && facts->secure_version > secure_version(decision, config)) {
        decision->plan.raise_secure_version = true;
        decision->plan.secure_version = facts->secure_version;
        add_step(decision, OTA_ESP_BOOT_EFUSE, -1, OTA_ESP_SLOT_NONE, facts->secure_version);
    }
}

/* `*enough`: the slot's image may run by its secure version. True without anti-rollback. */
static ota_status secure_enough(const ota_esp_boot_decision *decision, const ota_esp_boot_config *config, int slot,
                                bool *enough, ota_esp_slot_facts *facts, ota_error *error) {
    *enough = true;
    if (!config->anti_rollback) {
        return OTA_OK;
    }
    memset(facts, 0, sizeof *facts);
    ota_status status = config->probe(config->user, slot, false, facts, error);
    if (status < 0) {
        return status;
    }
    *enough = facts->described && facts->secure_version >= secure_version(decision, config);
    return OTA_OK;
}

static bool never_written(const ota_esp_otadata_entry *entry) {
    return entry->seq == OTA_ESP_SEQ_UNUSED || !ota_esp_otadata_crc_ok(entry);
}

/* Takes the active entry of those whose image is new enough. */
static ota_status choose_active(const ota_esp_boot_config *config, ota_esp_boot_decision *decision, ota_error *error) {
    bool counts[2];
    ota_esp_slot_facts facts[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        counts[i] = ota_esp_otadata_live(&decision->after[i]);
        if (counts[i] && config->anti_rollback) {
            int slot = ota_esp_otadata_slot(&decision->after[i], config->slot_count);
            ota_status status = secure_enough(decision, config, slot, &counts[i], &facts[i], error);
            if (status < 0) {
                return status;
            }
            if (!counts[i]) {
                add_step(decision, OTA_ESP_BOOT_SECURE_VERSION, i, slot, config->secure_version);
            }
        }
    }
    int active = newest(decision->after, counts[0], counts[1]);
    decision->active = active;
    if (active < 0) {
        add_step(decision, OTA_ESP_BOOT_NO_ACTIVE, -1, OTA_ESP_SLOT_FACTORY, 0);
        return OTA_OK;
    }
    ota_esp_otadata_entry *entry = &decision->after[active];
    decision->start = ota_esp_otadata_slot(entry, config->slot_count);
    add_step(decision, OTA_ESP_BOOT_ACTIVE, active, decision->start, entry->state);
    if (config->rollback && entry->state == OTA_ESP_STATE_NEW) {
        entry->state = OTA_ESP_STATE_PENDING_VERIFY;
        rewrite(decision, active);
        add_step(decision, OTA_ESP_BOOT_PENDING, active, decision->start, 0);
    }
    if (config->anti_rollback && entry->state == OTA_ESP_STATE_VALID) {
        raise_secure_version(decision, config, &facts[active]);
    }
    return OTA_OK;
}

/* Where to start the search: steps 1 to 5 of the boot loader. */
static ota_status choose_start(const ota_esp_boot_config *config, ota_esp_boot_decision *decision, ota_error *error) {
    ota_esp_otadata_entry *entries = decision->after;
    decision->start = OTA_ESP_SLOT_FACTORY;
    if (!config->has_otadata) {
        add_step(decision, OTA_ESP_BOOT_NO_OTADATA, -1, OTA_ESP_SLOT_FACTORY, 0);
        return OTA_OK;
    }
    if (config->rollback) {
        for (int i = 0; i < 2; i++) {
            if (entries[i].state == OTA_ESP_STATE_PENDING_VERIFY) { /* the CRC is neither checked nor put right */
                entries[i].state = OTA_ESP_STATE_ABORTED;
                rewrite(decision, i);
                add_step(decision, OTA_ESP_BOOT_ABORTED, i, ota_esp_otadata_slot(&entries[i], config->slot_count), 0);
            }
        }
    }
    bool unwritten = never_written(&entries[0]) && never_written(&entries[1]);
    if (config->anti_rollback) {
        if (unwritten || config->slot_count == 0) {
            decision->first_use = unwritten;
            add_step(decision, unwritten ? OTA_ESP_BOOT_FIRST_USE : OTA_ESP_BOOT_BOTH_DEAD, -1, OTA_ESP_SLOT_FACTORY,
                     0);
            return OTA_OK;
        }
        return choose_active(config, decision, error);
    }
    if ((ota_esp_otadata_dead(&entries[0]) && ota_esp_otadata_dead(&entries[1])) || config->slot_count == 0) {
        if (!config->has_factory) {
            decision->start = 0;
            decision->first_use = unwritten;
        }
        add_step(decision, decision->first_use ? OTA_ESP_BOOT_FIRST_USE : OTA_ESP_BOOT_BOTH_DEAD, -1, decision->start,
                 0);
        return OTA_OK;
    }
    return choose_active(config, decision, error);
}

static bool exists(const ota_esp_boot_config *config, int slot) {
    return slot == OTA_ESP_SLOT_FACTORY ? config->has_factory
           : slot == OTA_ESP_SLOT_TEST  ? config->has_test
                                        : slot >= 0 && (uint32_t)slot < config->slot_count;
}

/* Sets decision->slot when the slot's image may and can boot. */
static ota_status try_slot(const ota_esp_boot_config *config, ota_esp_boot_decision *decision, int slot,
                           ota_error *error) {
    if (!exists(config, slot)) {
        return OTA_OK;
    }
    ota_esp_slot_facts facts = {0};
    bool enough;
    ota_status status = secure_enough(decision, config, slot, &enough, &facts, error);
    if (status < 0) {
        return status;
    }
    if (!enough && facts.described) {
        add_step(decision, OTA_ESP_BOOT_SECURE_VERSION, -1, slot, secure_version(decision, config));
        return OTA_OK;
    }
    memset(&facts, 0, sizeof facts);
    status = enough ? config->probe(config->user, slot, true, &facts, error) : OTA_OK;
    if (status < 0) {
        return status;
    }
    if (!facts.verifies) {
        add_step(decision, OTA_ESP_BOOT_NOT_BOOTABLE, -1, slot, 0);
        return OTA_OK;
    }
    decision->slot = slot;
    add_step(decision, OTA_ESP_BOOT_BOOTS, -1, slot, 0);
    if (decision->first_use && slot >= 0) {
        decision->after[0] = ota_esp_otadata_entry_make((uint32_t)slot + 1, OTA_ESP_STATE_VALID);
        rewrite(decision, 0);
        add_step(decision, OTA_ESP_BOOT_RECORDED, 0, slot, 0);
        if (config->anti_rollback) {
            raise_secure_version(decision, config, &facts);
        }
    }
    return OTA_OK;
}

static bool is_config_right(const ota_esp_boot_config *config) {
    return config->slot_count <= 16 && config->probe != NULL && (config->rollback || !config->anti_rollback);
}

static ota_status config_error(ota_error *error) {
    return ota_error_set(
        error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
        "a boot configuration needs a probe, at most 16 slots, and rollback where it has anti-rollback");
}

ota_status ota_esp_boot_decide(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                               ota_esp_boot_decision *decision, ota_error *error) {
    memset(decision, 0, sizeof *decision);
    decision->slot = OTA_ESP_SLOT_NONE;
    decision->active = -1;
    memcpy(decision->after, entries, sizeof decision->after);
    if (!is_config_right(config)) {
        return config_error(error);
    }
    ota_status status = choose_start(config, decision, error);
    /* Downwards to the factory app, then upwards, then the test app: whatever the entries say of those slots. */
    for (int slot = decision->start; status >= 0 && decision->slot == OTA_ESP_SLOT_NONE && slot >= OTA_ESP_SLOT_FACTORY;
         slot--) {
        status = try_slot(config, decision, slot, error);
    }
    for (int slot = decision->start + 1;
         status >= 0 && decision->slot == OTA_ESP_SLOT_NONE && slot < (int)config->slot_count; slot++) {
        status = try_slot(config, decision, slot, error);
    }
    if (status >= 0 && decision->slot == OTA_ESP_SLOT_NONE) {
        status = try_slot(config, decision, OTA_ESP_SLOT_TEST, error);
    }
    if (status < 0) {
        return status;
    }
    if (decision->slot == OTA_ESP_SLOT_NONE) {
        add_step(decision, OTA_ESP_BOOT_NOTHING, -1, OTA_ESP_SLOT_NONE, 0);
    }
    return OTA_OK;
}

const char *ota_esp_boot_step_text(const ota_esp_boot_step *step, char *out, size_t size) {
    const char *slot = ota_esp_slot_name(step->slot);
    switch (step->kind) {
    case OTA_ESP_BOOT_NO_OTADATA:
        snprintf(out, size, "there is no otadata partition: %s comes first", slot);
        return out;
    case OTA_ESP_BOOT_ABORTED:
        snprintf(out, size, "entry %d (%s) was never confirmed: PENDING_VERIFY becomes ABORTED", step->entry, slot);
        return out;
    case OTA_ESP_BOOT_FIRST_USE:
        snprintf(out, size, "otadata was never written, or both CRCs are wrong: %s comes first",
                 step->slot == OTA_ESP_SLOT_FACTORY ? "the lowest slot" : slot);
        return out;
    case OTA_ESP_BOOT_BOTH_DEAD:
        snprintf(out, size, "no entry can be used: %s comes first", slot);
        return out;
    case OTA_ESP_BOOT_SECURE_VERSION:
        if (step->entry >= 0) {
            snprintf(out, size, "entry %d is passed over: the secure version in %s is below %u, or unreadable",
                     step->entry, slot, step->value);
        } else {
            snprintf(out, size, "the secure version in %s is below %u", slot, step->value);
        }
        return out;
    case OTA_ESP_BOOT_ACTIVE:
        snprintf(out, size, "entry %d is the active one: %s, %s", step->entry, slot,
                 ota_esp_otadata_state_name(step->value));
        return out;
    case OTA_ESP_BOOT_NO_ACTIVE:
        snprintf(out, size, "no entry is usable: every slot is tried");
        return out;
    case OTA_ESP_BOOT_PENDING:
        snprintf(out, size, "first boot of %s: entry %d becomes PENDING_VERIFY", slot, step->entry);
        return out;
    case OTA_ESP_BOOT_EFUSE:
        snprintf(out, size, "the secure version in the eFuses rises to %u", step->value);
        return out;
    case OTA_ESP_BOOT_NOT_BOOTABLE:
        snprintf(out, size, "%s holds no image that boots", slot);
        return out;
    case OTA_ESP_BOOT_BOOTS:
        snprintf(out, size, "%s boots", slot);
        return out;
    case OTA_ESP_BOOT_RECORDED:
        snprintf(out, size, "entry %d is written for %s, VALID", step->entry, slot);
        return out;
    case OTA_ESP_BOOT_NOTHING:
        snprintf(out, size, "nothing boots");
        return out;
    }
    snprintf(out, size, "?");
    return out;
}

/* ---- Changes an update makes -------------------------------------------------------------------------------------- */

int ota_esp_next_slot(uint32_t slot_count, int running) {
    if (slot_count == 0) {
        return OTA_ESP_SLOT_NONE;
    }
    return running >= 0 && (uint32_t)running + 1 < slot_count ? running + 1 : 0;
}

static ota_status not_a_slot(int slot, ota_status status, ota_error *error) {
    return ota_error_set(error, status, OTA_STAGE_TARGET, 0, 0, "%s is not an OTA slot of this table",
                         ota_esp_slot_name(slot));
}

static bool is_ota_slot(uint32_t slot_count, int slot) {
    return slot >= 0 && (uint32_t)slot < slot_count;
}

ota_status ota_esp_slot_state(const ota_esp_otadata_entry entries[2], uint32_t slot_count, int slot, uint32_t *state,
                              ota_error *error) {
    *state = OTA_ESP_STATE_UNDEFINED;
    if (!is_ota_slot(slot_count, slot)) {
        return not_a_slot(slot, OTA_ERR_UNSUPPORTED, error);
    }
    int active = ota_esp_otadata_active(entries);
    for (int i = -1; i < 2; i++) { /* the active one first: both may name the slot */
        int index = i < 0 ? active : i;
        if (index >= 0 && ota_esp_otadata_crc_ok(&entries[index]) &&
            ota_esp_otadata_slot(&entries[index], slot_count) == slot) {
            *state = entries[index].state;
            return OTA_OK;
        }
    }
    return ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, 0, "otadata has no entry for %s",
                         ota_esp_slot_name(slot));
}

/* Smallest seq that names `slot` and is above `floor`; 0 when there is none below 2^32 - 1. */
static uint32_t seq_above(uint32_t floor, int slot, uint32_t slot_count) {
    uint64_t first = (uint64_t)slot + 1, above = (uint64_t)floor + 1;
    uint64_t seq = above <= first ? first : first + (above - first + slot_count - 1) / slot_count * slot_count;
    return seq < OTA_ESP_SEQ_UNUSED ? (uint32_t)seq : 0;
}

/* Index of the live entry that names `slot`, the active one before the other; -1: none. */
static int entry_of(const ota_esp_otadata_entry entries[2], uint32_t slot_count, int slot) {
    int active = ota_esp_otadata_active(entries);
    if (active >= 0 && ota_esp_otadata_slot(&entries[active], slot_count) == slot) {
        return active;
    }
    int other = 1 - active;
    if (active >= 0 && ota_esp_otadata_live(&entries[other]) &&
        ota_esp_otadata_slot(&entries[other], slot_count) == slot) {
        return other;
    }
    return -1;
}

static ota_status seq_exhausted(ota_error *error) {
    return ota_error_set(error, OTA_ERR_OTADATA, OTA_STAGE_TARGET, 0, 0,
                         "the sequence numbers of otadata are used up: erase it");
}

/* ERR_STATE when the running image was marked invalid and a restart would leave it: nothing is installed until then. Where it
 * runs all the same, because nothing else does, it is what an update has to go back to. */
static ota_status check_not_given_up(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                     int running, ota_error *error) {
    for (int i = 0; i < 2; i++) {
        if (ota_esp_otadata_crc_ok(&entries[i]) && entries[i].state == OTA_ESP_STATE_INVALID &&
            ota_esp_otadata_slot(&entries[i], config->slot_count) == running) {
            ota_esp_boot_decision decision;
            ota_status status = ota_esp_boot_decide(entries, config, &decision, error);
            if (status < 0) {
                return status;
            }
            if (decision.slot != running) {
                return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0,
                                     "the image running in %s was marked invalid: restart first",
                                     ota_esp_slot_name(running));
            }
        }
    }
    return OTA_OK;
}

/* The sector an entry for the running slot goes to: one that can be lost without another image booting, if there is one;
 * else not that of the active entry. */
static ota_status choose_sector(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                int *sector, ota_error *error) {
    const int preferred = ota_esp_otadata_active(entries) == 0 ? 1 : 0;
    for (int i = 0; i < 2; i++) {
        ota_esp_otadata_entry without[2] = {entries[0], entries[1]};
        ota_esp_boot_decision decision;
        *sector = i == 0 ? preferred : 1 - preferred;
        memset(&without[*sector], 0xFF, sizeof without[0]);
        ota_status status = ota_esp_boot_decide(without, config, &decision, error);
        if (status < 0 || decision.slot == running) {
            return status;
        }
    }
    *sector = preferred;
    return OTA_OK;
}

/* Sees to it that the running OTA slot has a live entry, because nothing else leads back to it for sure (trap: a NEW entry in
 * slot 0 alone boots slot 0 for ever). `entries` is brought up to date; the entry lies in `*sector`. */
static ota_status ensure_running_entry(ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                       ota_esp_plan *plan, int *sector, ota_error *error) {
    *sector = entry_of(entries, config->slot_count, running);
    if (*sector >= 0) {
        return OTA_OK;
    }
    ota_status status = check_not_given_up(entries, config, running, error);
    if (status < 0) {
        return status;
    }
    status = choose_sector(entries, config, running, sector, error);
    if (status < 0) {
        return status;
    }
    const ota_esp_otadata_entry *other = &entries[1 - *sector];
    uint32_t seq =
        ota_esp_otadata_live(other) ? seq_above(other->seq, running, config->slot_count) : (uint32_t)running + 1;
    if (seq == 0) {
        return seq_exhausted(error);
    }
    entries[*sector] = ota_esp_otadata_entry_make(seq, OTA_ESP_STATE_VALID);
    plan_write(plan, *sector, &entries[*sector]);
    return OTA_OK;
}

static bool names_slot(const ota_esp_otadata_entry *entry, uint32_t slot_count, int slot) {
    return ota_esp_otadata_slot(entry, slot_count) == slot;
}

/* Whether an entry has to go before `slot` is erased; `kept` is the one of the running slot, -1 where it has none. */
static bool in_the_way(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int sector, int kept,
                       int running, int slot) {
    const ota_esp_otadata_entry *entry = &entries[sector];
    if (sector == kept || !ota_esp_otadata_crc_ok(entry) || names_slot(entry, config->slot_count, running)) {
        return false;
    }
    bool live = ota_esp_otadata_live(entry);
    if (running != OTA_ESP_SLOT_FACTORY && !is_ota_slot(config->slot_count, running)) {
        return live && names_slot(entry, config->slot_count, slot); /* who runs is not known: only what must go */
    }
    if (kept < 0) {
        return live;
    }
    return config->rollback || ota_esp_otadata_active(entries) == sector;
}

ota_status ota_esp_plan_begin(const ota_esp_otadata_entry before[2], const ota_esp_boot_config *config, int running,
                              int slot, ota_esp_plan *plan, ota_error *error) {
    memset(plan, 0, sizeof *plan);
    if (!is_config_right(config)) {
        return config_error(error);
    }
    if (!is_ota_slot(config->slot_count, slot)) {
        return not_a_slot(slot, OTA_ERR_ARGUMENT, error);
    }
    if (slot == running) {
        return ota_error_set(error, OTA_ERR_SLOT_RUNNING, OTA_STAGE_TARGET, 0, 0, "%s is running",
                             ota_esp_slot_name(slot));
    }
    if (!config->has_otadata) {
        return OTA_OK;
    }
    ota_esp_otadata_entry entries[2] = {before[0], before[1]};
    int kept = -1;
    if (is_ota_slot(config->slot_count, running)) {
        uint32_t state;
        if (config->rollback && ota_esp_slot_state(entries, config->slot_count, running, &state, NULL) == OTA_OK &&
            state == OTA_ESP_STATE_PENDING_VERIFY) {
            return ota_error_set(error, OTA_ERR_PENDING_VERIFY, OTA_STAGE_TARGET, 0, 0,
                                 "the image running in %s is not confirmed yet", ota_esp_slot_name(running));
        }
        ota_status status = ensure_running_entry(entries, config, running, plan, &kept, error);
        if (status < 0) {
            return status;
        }
    }
    /* The active one last: until it goes, what it leads to is what runs now. */
    const int first = ota_esp_otadata_active(entries) == 0 ? 1 : 0;
    for (int i = 0; i < 2; i++) {
        int sector = i == 0 ? first : 1 - first;
        if (in_the_way(entries, config, sector, kept, running, slot)) {
            memset(&entries[sector], 0xFF, sizeof entries[sector]);
            plan_erase(plan, sector);
        }
    }
    return OTA_OK;
}

/* Back to the factory app: no entry is left, the active one goes last so that nothing but the image of now or the factory
 * app boots in between. */
static void plan_factory(const ota_esp_otadata_entry entries[2], ota_esp_plan *plan) {
    int active = ota_esp_otadata_active(entries);
    int first = active == 0 ? 1 : 0;
    plan_erase(plan, first);
    plan_erase(plan, 1 - first);
}

/* An OTA slot, checked. `running` has its own entry afterwards where it is an OTA slot. */
static ota_status plan_ota(ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running, int slot,
                           ota_esp_plan *plan, ota_error *error) {
    uint32_t count = config->slot_count;
    uint32_t state = config->rollback ? OTA_ESP_STATE_NEW : OTA_ESP_STATE_UNDEFINED;
    int kept = -1;
    if (running != slot && is_ota_slot(count, running)) {
        ota_status status = ensure_running_entry(entries, config, running, plan, &kept, error);
        if (status < 0) {
            return status;
        }
    }
    int active = ota_esp_otadata_active(entries);
    int own = running == slot ? entry_of(entries, count, running) : -1;
    if (own >= 0 && own != active) { /* takes the choice of another slot back */
        plan_erase(plan, active);
        return OTA_OK;
    }
    int base = kept >= 0 ? kept : active; /* the entry to stand above, and the sector to leave alone */
    int sector = base < 0 ? 0 : 1 - base;
    if (kept >= 0 && active == sector && names_slot(&entries[active], count, slot) && entries[active].state == state) {
        return OTA_OK; /* chosen already */
    }
    uint32_t seq = base < 0 ? (uint32_t)slot + 1 : seq_above(entries[base].seq, slot, count);
    if (seq == 0) {
        return seq_exhausted(error);
    }
    entries[sector] = ota_esp_otadata_entry_make(seq, state);
    plan_write(plan, sector, &entries[sector]);
    return OTA_OK;
}

ota_status ota_esp_plan_set_boot(const ota_esp_otadata_entry before[2], const ota_esp_boot_config *config, int running,
                                 int slot, ota_esp_plan *plan, ota_error *error) {
    memset(plan, 0, sizeof *plan);
    if (!is_config_right(config)) {
        return config_error(error);
    }
    if (!is_ota_slot(config->slot_count, slot) && !(slot == OTA_ESP_SLOT_FACTORY && config->has_factory)) {
        return not_a_slot(slot, OTA_ERR_ARGUMENT, error);
    }
    if (!config->has_otadata) {
        if (slot == OTA_ESP_SLOT_FACTORY) {
            return OTA_OK;
        }
        return ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, 0,
                             "the table has no otadata partition to choose %s in", ota_esp_slot_name(slot));
    }
    if (config->anti_rollback) {
        ota_esp_slot_facts facts = {0};
        ota_status status = config->probe(config->user, slot, false, &facts, error);
        if (status < 0) {
            return status;
        }
        if (!facts.described || facts.secure_version < config->secure_version) {
            return ota_error_set(error, OTA_ERR_SECURE_VERSION, OTA_STAGE_TARGET, 0, 0,
                                 "the secure version of the image in %s is %s%u, the target needs %u",
                                 ota_esp_slot_name(slot), facts.described ? "" : "unreadable, taken as ",
                                 facts.secure_version, config->secure_version);
        }
    }
    ota_esp_otadata_entry entries[2] = {before[0], before[1]};
    if (slot == OTA_ESP_SLOT_FACTORY) {
        plan_factory(entries, plan);
        return OTA_OK;
    }
    return plan_ota(entries, config, running, slot, plan, error);
}

/* The active entry, when it is the one of the running slot. */
static ota_status running_entry(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                int *active, ota_error *error) {
    *active = ota_esp_otadata_active(entries);
    if (!config->has_otadata || config->slot_count == 0 || *active < 0) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0,
                             "no entry of otadata is active: %s runs without one", ota_esp_slot_name(running));
    }
    int named = ota_esp_otadata_slot(&entries[*active], config->slot_count);
    if (named != running) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0,
                             "the active entry of otadata names %s (%s), but %s runs", ota_esp_slot_name(named),
                             ota_esp_otadata_state_name(entries[*active].state), ota_esp_slot_name(running));
    }
    return OTA_OK;
}

/* In place: the other entry, which is the way back, is not touched. */
static void plan_state(const ota_esp_otadata_entry entries[2], int sector, uint32_t state, ota_esp_plan *plan) {
    ota_esp_otadata_entry entry = entries[sector];
    entry.state = state;
    plan_write(plan, sector, &entry);
}

ota_status ota_esp_plan_retry(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                              ota_esp_plan *plan, ota_error *error) {
    memset(plan, 0, sizeof *plan);
    if (!is_config_right(config)) {
        return config_error(error);
    }
    int active;
    if (running_entry(entries, config, running, &active, NULL) == OTA_OK &&
        entries[active].state == OTA_ESP_STATE_PENDING_VERIFY) {
        plan_state(entries, active, OTA_ESP_STATE_NEW, plan);
    }
    return OTA_OK;
}

ota_status ota_esp_plan_mark_valid(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                   int running, ota_esp_plan *plan, ota_error *error) {
    memset(plan, 0, sizeof *plan);
    if (!is_config_right(config)) {
        return config_error(error);
    }
    int active;
    ota_status status = running_entry(entries, config, running, &active, error);
    if (status < 0) {
        return status;
    }
    if (entries[active].state == OTA_ESP_STATE_VALID) {
        return OTA_OK;
    }
    plan_state(entries, active, OTA_ESP_STATE_VALID, plan);
    if (config->anti_rollback) {
        ota_esp_slot_facts facts = {0};
        status = config->probe(config->user, running, false, &facts, error);
        if (status < 0) {
            return status;
        }
        if (facts.described && facts.secure_version > config->secure_version) {
            plan->raise_secure_version = true;
            plan->secure_version = facts.secure_version;
        }
    }
    return OTA_OK;
}

ota_status ota_esp_can_rollback(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                int *to, ota_error *error) {
    int candidate = OTA_ESP_SLOT_NONE;
    if (to != NULL) {
        *to = OTA_ESP_SLOT_NONE;
    }
    if (!is_config_right(config)) {
        return config_error(error);
    }
    int active;
    ota_status status = running_entry(entries, config, running, &active, error);
    if (status < 0) {
        return status;
    }
    const ota_esp_otadata_entry *other = &entries[1 - active];
    if (ota_esp_otadata_live(other)) {
        candidate = ota_esp_otadata_slot(other, config->slot_count);
    } else if (config->has_factory && !config->anti_rollback) {
        candidate = OTA_ESP_SLOT_FACTORY;
    }
    if (candidate == OTA_ESP_SLOT_NONE || candidate == running) {
        return ota_error_set(error, OTA_ERR_ROLLBACK, OTA_STAGE_TARGET, 0, 0,
                             "no entry of otadata and no factory app leads back from %s", ota_esp_slot_name(running));
    }
    ota_esp_slot_facts facts = {0};
    status = config->probe(config->user, candidate, true, &facts, error);
    if (status < 0) {
        return status;
    }
    if (!facts.verifies) {
        return ota_error_set(error, OTA_ERR_ROLLBACK, OTA_STAGE_TARGET, 0, 0, "the image in %s does not verify",
                             ota_esp_slot_name(candidate));
    }
    if (config->anti_rollback && (!facts.described || facts.secure_version < config->secure_version)) {
        return ota_error_set(error, OTA_ERR_ROLLBACK, OTA_STAGE_TARGET, 0, 0,
                             "the secure version of the image in %s is %u, the target needs %u",
                             ota_esp_slot_name(candidate), facts.secure_version, config->secure_version);
    }
    if (to != NULL) {
        *to = candidate;
    }
    return OTA_OK;
}

ota_status ota_esp_plan_mark_invalid(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                     int running, ota_esp_plan *plan, ota_error *error) {
    memset(plan, 0, sizeof *plan);
    ota_status status = ota_esp_can_rollback(entries, config, running, NULL, error);
    if (status < 0) {
        return status;
    }
    plan_state(entries, ota_esp_otadata_active(entries), OTA_ESP_STATE_INVALID, plan);
    return OTA_OK;
}

int ota_esp_last_invalid(const ota_esp_otadata_entry entries[2], uint32_t slot_count) {
    bool rejected[2];
    for (int i = 0; i < 2; i++) {
        rejected[i] = ota_esp_otadata_crc_ok(&entries[i]) &&
                      (entries[i].state == OTA_ESP_STATE_INVALID || entries[i].state == OTA_ESP_STATE_ABORTED);
    }
    int index = rejected[0] && rejected[1] ? (entries[1].seq < entries[0].seq ? 1 : 0)
                : rejected[0]              ? 0
                : rejected[1]              ? 1
                                           : -1;
    return index < 0 ? OTA_ESP_SLOT_NONE : ota_esp_otadata_slot(&entries[index], slot_count);
}

int ota_esp_last_run(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config) {
    int active = ota_esp_otadata_active(entries);
    int fallback = config->has_factory ? OTA_ESP_SLOT_FACTORY : OTA_ESP_SLOT_NONE;
    if (!config->has_otadata || config->slot_count == 0) {
        return fallback;
    }
    if (active < 0) {
        return config->has_factory ? OTA_ESP_SLOT_FACTORY : 0;
    }
    bool rollback = config->rollback || config->anti_rollback;
    if (!rollback || entries[active].state != OTA_ESP_STATE_NEW) {
        return ota_esp_otadata_slot(&entries[active], config->slot_count);
    }
    const ota_esp_otadata_entry *other = &entries[1 - active];
    return ota_esp_otadata_live(other) ? ota_esp_otadata_slot(other, config->slot_count) : fallback;
}
