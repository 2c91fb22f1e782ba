/* sources: esp/esp_otadata.c base/status.c base/bytes.c */
/* libs: zlib */
/* corpus: vectors/otadata/?*.bin */
/* Any two entries on any chip: the boot loader's decision and every plan end, name slots there are, and do what they say. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_otadata.h"
#include "must.h"

typedef struct chip {
    uint32_t bad; /* bit slot + 2: no image there verifies */
    uint32_t old; /* bit slot + 2: its secure version is 0, otherwise 5 */
} chip;

static ota_status probe(void *user, int slot, bool full, ota_esp_slot_facts *facts, ota_error *error) {
    const chip *self = user;
    (void)full;
    (void)error;
    facts->verifies = !(self->bad >> (slot + 2) & 1);
    facts->described = true;
    facts->secure_version = self->old >> (slot + 2) & 1 ? 0 : 5;
    return OTA_OK;
}

static bool there(const ota_esp_boot_config *config, int slot) {
    return (slot >= 0 && (uint32_t)slot < config->slot_count) ||
           (slot == OTA_ESP_SLOT_FACTORY && config->has_factory) || (slot == OTA_ESP_SLOT_TEST && config->has_test);
}

static void carry_out(const ota_esp_plan *plan, const ota_esp_otadata_entry before[2], ota_esp_otadata_entry after[2]) {
    MUST(plan->count <= OTA_ESP_OPS_MAX);
    for (uint32_t i = 0; i < plan->count; i++) {
        MUST(plan->ops[i].sector <= 1);
    }
    memcpy(after, before, 2 * sizeof *after);
    ota_esp_plan_apply(plan, after);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ota_esp_otadata_entry entries[2], after[2];
    if (ota_esp_otadata_parse(data, size, entries, NULL) < 0) {
        if (size < 68) {
            return 0;
        }
        ota_esp_otadata_entry_parse(data, &entries[0]);
        ota_esp_otadata_entry_parse(data + 32, &entries[1]);
    }
    /* The chip comes from bytes an otadata partition does not use. */
    uint32_t knobs =
        (uint32_t)data[size - 4] << 24 | (uint32_t)data[size - 3] << 16 | data[size - 2] << 8 | data[size - 1];
    chip state = {.bad = knobs >> 3 & 0x3F, .old = knobs >> 9 & 0x3F};
    ota_esp_boot_config config = {.slot_count = knobs >> 16 & 0x1F,
                                  .has_factory = knobs & 1,
                                  .has_test = knobs >> 1 & 1,
                                  .has_otadata = !(knobs >> 24 & 1),
                                  .rollback = knobs >> 2 & 1,
                                  .secure_version = knobs >> 25 & 7,
                                  .probe = probe,
                                  .user = &state};
    config.slot_count = config.slot_count > 16 ? 16 : config.slot_count;
    config.anti_rollback = config.rollback && knobs >> 28 & 1;

    static ota_esp_boot_decision decision;
    char text[160];
    MUST(ota_esp_boot_decide(entries, &config, &decision, NULL) >= 0);
    MUST(decision.slot == OTA_ESP_SLOT_NONE || there(&config, decision.slot));
    MUST(decision.slot == OTA_ESP_SLOT_NONE || !(state.bad >> (decision.slot + 2) & 1));
    MUST(decision.step_count > 0 && decision.step_count <= OTA_ESP_BOOT_STEPS_MAX);
    for (uint32_t i = 0; i < decision.step_count; i++) {
        MUST(ota_esp_boot_step_text(&decision.steps[i], text, sizeof text)[0] != '\0');
    }
    carry_out(&decision.plan, entries, after);
    MUST(memcmp(after, decision.after, sizeof after) == 0);

    int running = decision.slot;
    ota_esp_plan plan;
    int next = ota_esp_next_slot(config.slot_count, running);
    MUST(next == OTA_ESP_SLOT_NONE || there(&config, next));
    if (next != OTA_ESP_SLOT_NONE && ota_esp_plan_begin(after, &config, running, next, &plan, NULL) >= 0) {
        ota_esp_otadata_entry begun[2];
        carry_out(&plan, after, begun);
        int active = config.has_otadata ? ota_esp_otadata_active(begun) : -1;
        /* Else half an image would boot. */
        MUST(active < 0 || ota_esp_otadata_slot(&begun[active], config.slot_count) != next || next == running);
        if (ota_esp_plan_set_boot(begun, &config, running, next, &plan, NULL) >= 0) {
            ota_esp_otadata_entry set[2];
            carry_out(&plan, begun, set);
            active = ota_esp_otadata_active(set);
            MUST(active >= 0 && ota_esp_otadata_slot(&set[active], config.slot_count) == next);
        }
    }
    if (ota_esp_plan_mark_valid(after, &config, running, &plan, NULL) >= 0) {
        ota_esp_otadata_entry marked[2];
        carry_out(&plan, after, marked);
        int active = ota_esp_otadata_active(marked);
        MUST(active >= 0 && marked[active].state == OTA_ESP_STATE_VALID);
    }
    int to = OTA_ESP_SLOT_NONE;
    ota_status can = ota_esp_can_rollback(after, &config, running, &to, NULL);
    ota_status marked = ota_esp_plan_mark_invalid(after, &config, running, &plan, NULL);
    MUST((can >= 0) == (marked >= 0));
    MUST(can < 0 || (there(&config, to) && to != running));
    (void)ota_esp_last_invalid(entries, config.slot_count);
    return 0;
}
