/* sources: esp/esp_partition_table.c base/status.c base/bytes.c */
/* libs: libcrypto zlib */
/* corpus: vectors/partition_table/?*.bin vectors/partition_table/?*.csv */
/* Any bytes taken for a partition table, and for the CSV of one: what is accepted can be written and read again. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_partition_table.h"
#include "must.h"

static void same_rows(const ota_esp_partition_table *a, const ota_esp_partition_table *b) {
    MUST(a->count == b->count && a->has_md5 == b->has_md5);
    for (uint32_t i = 0; i < a->count; i++) {
        const ota_esp_partition *x = &a->rows[i], *y = &b->rows[i];
        MUST(x->type == y->type && x->subtype == y->subtype && x->flags == y->flags);
        MUST(x->offset == y->offset && x->size == y->size);
        MUST(memcmp(x->label, y->label, sizeof x->label) == 0);
    }
}

static void use(ota_esp_partition_table *table) {
    uint8_t bytes[OTA_ESP_PARTITION_TABLE_SIZE];
    static ota_esp_partition_table again;
    char small[40];
    if (ota_esp_partition_table_build(table, bytes, NULL) >= 0) {
        MUST(ota_esp_partition_table_parse(bytes, sizeof bytes, 0, &again, NULL) >= 0);
        same_rows(table, &again);
    }
    size_t len = ota_esp_partition_table_to_csv(table, NULL, 0);
    char *text = malloc(len + 1);
    MUST(text != NULL);
    MUST(ota_esp_partition_table_to_csv(table, text, len + 1) == len && strlen(text) == len);
    free(text);
    MUST(ota_esp_partition_table_to_csv(table, small, sizeof small) == len);
    MUST(memchr(small, 0, sizeof small) != NULL);
    (void)ota_esp_partition_table_check(table, NULL, NULL);
    ota_esp_layout layout;
    if (ota_esp_layout_find(table, &layout, NULL) >= 0) {
        MUST(layout.slot_count <= OTA_ESP_OTA_SLOTS_MAX);
        for (uint32_t i = 0; i < layout.slot_count; i++) {
            MUST(layout.slots[i] >= table->rows && layout.slots[i] < table->rows + table->count);
        }
    }
}

static const char *lookup(void *user, const char *name) {
    (void)user;
    return name[0] == 'A' ? "0x10000" : NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static ota_esp_partition_table table;
    ota_error error = {0};
    uint64_t flash_size = size % 2 ? 4u << 20 : 0;
    if (ota_esp_partition_table_parse(data, size, flash_size, &table, &error) >= 0) {
        use(&table);
    } else {
        MUST(error.status != OTA_OK && error.text[0] != '\0');
    }
    ota_esp_csv_options options = {
        .bootloader_offset = 0x1000, .recovery_bootloader_offset = 0x3F0000, .lookup = lookup};
    memset(&error, 0, sizeof error);
    if (ota_esp_partition_table_from_csv((const char *)data, size, size % 3 ? &options : NULL, &table, &error) >= 0) {
        use(&table);
    } else {
        MUST(error.status != OTA_OK && error.offset <= size);
    }
    return 0;
}
