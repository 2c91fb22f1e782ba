/* sources: esp/esp_otadata.c base/bytes.c base/status.c */
/* libs: zlib */
/* Two entries, a chip and its images made of any bytes: the boot loader decides for an image that verifies, and no plan
 * touches the entry of the running slot or makes a chip that boots one that does not. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_otadata.h"

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static ota_status probe(void *user, int slot, bool full, ota_esp_slot_facts *facts, ota_error *error) {
    (void)full;
    (void)error;
    *facts = ((const ota_esp_slot_facts *)user)[slot + 2];
    return OTA_OK;
}

static int boots(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                 ota_esp_boot_decision *decision) {
    ota_error error = {0};
    REQUIRE(ota_esp_boot_decide(entries, config, decision, &error) == OTA_OK);
    REQUIRE(decision->step_count > 0 && decision->plan.count <= OTA_ESP_OPS_MAX);
    char sentence[160];
    for (uint32_t i = 0; i < decision->step_count; i++) {
        REQUIRE(ota_esp_boot_step_text(&decision->steps[i], sentence, sizeof sentence)[0] != '\0');
    }
    ota_esp_otadata_entry after[2] = {entries[0], entries[1]};
    ota_esp_plan_apply(&decision->plan, after);
    REQUIRE(memcmp(after, decision->after, sizeof after) == 0);
    return decision->slot;
}

/* Entries from the bytes, with the right CRC where a bit says so: without it few would ever be live. */
static ota_esp_otadata_entry entry_from(const uint8_t data[32], bool right) {
    ota_esp_otadata_entry entry;
    ota_esp_otadata_entry_parse(data, &entry);
    if (right) {
        entry.seq &= 0x0F;
        entry.state &= 0x07;
        entry.crc = ota_esp_otadata_crc(entry.seq);
    }
    return entry;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 68) {
        ota_esp_otadata_entry both[2];
        ota_error error = {0};
        REQUIRE(ota_esp_otadata_parse(data, size, both, &error) == OTA_ERR_OTADATA);
        return 0;
    }
    ota_esp_slot_facts images[18];
    for (int i = 0; i < 18; i++) {
        uint8_t bits = data[66 + i % 2];
        images[i] = (ota_esp_slot_facts){.verifies = bits >> i % 8 & 1,
                                         .described = bits >> (i + 3) % 8 & 1,
                                         .secure_version = (uint32_t)(bits + i) % 4};
    }
    ota_esp_boot_config config = {.slot_count = data[64] % 17,
                                  .has_factory = data[64] & 0x20,
                                  .has_test = data[64] & 0x40,
                                  .has_otadata = data[64] != 0,
                                  .rollback = data[65] & 3,
                                  .anti_rollback = data[65] & 2,
                                  .secure_version = data[65] >> 6,
                                  .probe = probe,
                                  .user = images};
    ota_esp_otadata_entry entries[2] = {entry_from(data, data[65] & 4), entry_from(data + 32, data[65] & 8)};
    ota_esp_boot_decision decision;
    int running = boots(entries, &config, &decision);
    memcpy(entries, decision.after, sizeof entries);
    if (running == OTA_ESP_SLOT_NONE) {
        return 0;
    }
    REQUIRE(images[running + 2].verifies);
    config.secure_version = decision.plan.raise_secure_version ? decision.plan.secure_version : config.secure_version;
    int slot = ota_esp_next_slot(config.slot_count, running);
    ota_esp_plan plan;
    ota_error error = {0};
    if (ota_esp_plan_begin(entries, &config, running, slot, &plan, &error) == OTA_OK) {
        ota_esp_otadata_entry begun[2] = {entries[0], entries[1]};
        ota_esp_plan_apply(&plan, begun);
        REQUIRE(running == OTA_ESP_SLOT_TEST || boots(begun, &config, &decision) == running);
        if (ota_esp_plan_set_boot(begun, &config, running, slot, &plan, &error) == OTA_OK) {
            ota_esp_plan_apply(&plan, begun);
            int next = boots(begun, &config, &decision);
            REQUIRE(next != OTA_ESP_SLOT_NONE || running == OTA_ESP_SLOT_TEST);
            REQUIRE(next == slot || !images[slot + 2].verifies || !config.has_otadata);
        }
    }
    error.status = OTA_OK;
    if (ota_esp_plan_mark_valid(entries, &config, running, &plan, &error) == OTA_OK) {
        ota_esp_otadata_entry marked[2] = {entries[0], entries[1]};
        ota_esp_plan_apply(&plan, marked);
        REQUIRE(boots(marked, &config, &decision) == running);
    }
    error.status = OTA_OK;
    if (ota_esp_plan_mark_invalid(entries, &config, running, &plan, &error) == OTA_OK) {
        ota_esp_otadata_entry marked[2] = {entries[0], entries[1]};
        ota_esp_plan_apply(&plan, marked);
        REQUIRE(boots(marked, &config, &decision) != running);
    }
    return 0;
}
