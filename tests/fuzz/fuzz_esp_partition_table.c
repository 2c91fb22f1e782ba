/* sources: esp/esp_partition_table.c base/bytes.c base/status.c */
/* libs: libcrypto zlib */
/* corpus: vectors/partition_table/two_ota.bin vectors/partition_table/odd.bin vectors/partition_table/two_ota.csv
 *         vectors/partition_table/odd.csv vectors/partition_table/gateway_2mb.csv */
/* Any bytes as a binary table and as CSV: an error with a sentence, or a table that is built and written again as it is. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_partition_table.h"

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static ota_esp_partition_table table, again;
static uint8_t binary[OTA_ESP_PARTITION_TABLE_SIZE];
static char text[96 * 128];

static const char *lookup(void *user, const char *name) {
    (void)user;
    return name[0] == 'S' ? "0x1000" : NULL;
}

static void use(void) {
    ota_error error = {0};
    ota_esp_layout layout;
    REQUIRE(ota_esp_partition_table_build(&table, binary, &error) == OTA_OK);
    REQUIRE(ota_esp_partition_table_parse(binary, sizeof binary, 0, &again, &error) == OTA_OK);
    REQUIRE(again.count == table.count);
    REQUIRE(memcmp(again.rows, table.rows, table.count * sizeof table.rows[0]) == 0);
    if (ota_esp_layout_find(&table, &layout, &error) == OTA_OK) {
        REQUIRE(layout.slot_count <= OTA_ESP_OTA_SLOTS_MAX);
    }
    REQUIRE(ota_esp_partition_table_to_csv(&table, text, sizeof text) < sizeof text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ota_error error = {0};
    if (ota_esp_partition_table_parse(data, size, 0, &table, &error) == OTA_OK) {
        use();
        ota_error none = {0};
        ota_esp_partition_table_check(&table, NULL, &none);
    } else {
        REQUIRE(error.status == OTA_ERR_PARTITION_TABLE && error.text[0] != '\0');
    }
    ota_esp_csv_options options = {
        .bootloader_offset = 0x1000, .recovery_bootloader_offset = 0x10000, .lookup = lookup};
    ota_error csv = {0};
    if (ota_esp_partition_table_from_csv((const char *)data, size, &options, &table, &csv) == OTA_OK) {
        REQUIRE(ota_esp_partition_table_check(&table, &options, &csv) == OTA_OK);
        use();
    } else {
        REQUIRE(csv.status == OTA_ERR_PARTITION_TABLE && csv.text[0] != '\0' && csv.offset <= size);
    }
    return 0;
}
