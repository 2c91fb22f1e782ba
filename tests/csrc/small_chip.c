#include "small_chip.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

static void need(bool what) {
    if (!what) {
        puts("the small chip could not be made");
        exit(2);
    }
}

static void row(ota_esp_partition_table *table, uint8_t type, uint8_t subtype, const char *label, uint32_t offset,
                uint32_t size) {
    ota_esp_partition *partition = &table->rows[table->count++];
    *partition = (ota_esp_partition){.type = type, .subtype = subtype, .offset = offset, .size = size};
    snprintf(partition->label, sizeof partition->label, "%s", label);
}

void small_chip_init(flash_emu *emu, bool factory) {
    ota_esp_partition_table table = {.has_md5 = true};
    uint8_t bytes[OTA_ESP_PARTITION_TABLE_SIZE];
    ota_error error = {0};
    flash_emu_init(emu, CHIP_FLASH_SIZE);
    row(&table, OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_OTA, "otadata", CHIP_OTADATA, OTA_ESP_OTADATA_SIZE);
    row(&table, OTA_ESP_PARTITION_APP, OTA_ESP_APP_OTA_0, "ota_0", CHIP_OTA_0, CHIP_SLOT_SIZE);
    row(&table, OTA_ESP_PARTITION_APP, OTA_ESP_APP_OTA_0 + 1, "ota_1", CHIP_OTA_1, CHIP_SLOT_SIZE);
    if (factory) {
        row(&table, OTA_ESP_PARTITION_APP, OTA_ESP_APP_FACTORY, "factory", CHIP_FACTORY, CHIP_SLOT_SIZE);
    }
    need(ota_esp_partition_table_build(&table, bytes, &error) == OTA_OK);
    flash_emu_load(emu, CHIP_TABLE, bytes, sizeof bytes);
}

ota_esp_target_options small_chip_options(flash_emu *emu) {
    ota_esp_target_options options = {.flash = &emu->flash,
                                      .table_offset = CHIP_TABLE,
                                      .rules = OTA_ESP_IMAGE_RULES_NONE,
                                      .rollback = true,
                                      .running = OTA_ESP_SLOT_NONE};
    options.rules.chip_id = CHIP_ID;
    options.rules.chip_revision = 3;
    return options;
}

void small_chip_image(uint8_t *out, const char *version, uint32_t secure_version) {
    const size_t end = CHIP_IMAGE_SIZE - OTA_ESP_IMAGE_HASH_SIZE; /* the checksum is its last byte */
    const size_t data = OTA_ESP_DESCRIPTOR_OFFSET, data_len = end - 16 - data;
    ota_esp_image_header header = {
        .segment_count = 1, .chip_id = CHIP_ID, .max_chip_rev_full = 199, .hash_appended = 1};
    ota_esp_app_descriptor descriptor = {.secure_version = secure_version, .project_name = "small"};
    uint32_t seed = secure_version + 1;
    snprintf(descriptor.version, sizeof descriptor.version, "%s", version);
    for (const char *c = version; *c != '\0'; c++) {
        seed = seed * 31 + (uint8_t)*c;
    }
    memset(out, 0, CHIP_IMAGE_SIZE);
    for (size_t i = data; i < data + data_len; i++) {
        seed = seed * 1664525u + 1013904223u;
        out[i] = (uint8_t)(seed >> 24);
    }
    ota_esp_image_header_build(&header, out);
    ota_store_u32le(out + 24, 0x3C000020u);
    ota_store_u32le(out + 28, (uint32_t)data_len);
    ota_esp_app_descriptor_build(&descriptor, out + data);
    uint8_t checksum = 0xEF;
    for (size_t i = data; i < data + data_len; i++) {
        checksum ^= out[i];
    }
    out[end - 1] = checksum;
    need(EVP_Digest(out, end, out + end, NULL, EVP_sha256(), NULL) == 1);
}

void small_chip_load(flash_emu *emu, uint64_t slot, const char *version, uint32_t secure_version) {
    uint8_t image[CHIP_IMAGE_SIZE];
    small_chip_image(image, version, secure_version);
    flash_emu_load(emu, slot, image, sizeof image);
}

void small_chip_entry(flash_emu *emu, int sector, uint32_t seq, uint32_t state) {
    uint8_t data[OTA_ESP_OTADATA_ENTRY_SIZE];
    ota_esp_otadata_entry entry = ota_esp_otadata_entry_make(seq, state);
    memset(data, 0xFF, sizeof data);
    if (seq != OTA_ESP_SEQ_UNUSED) {
        ota_esp_otadata_entry_build(&entry, data);
    }
    flash_emu_load(emu, CHIP_OTADATA + (uint64_t)sector * OTA_FLASH_SECTOR, data, sizeof data);
}
