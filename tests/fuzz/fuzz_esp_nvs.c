/* sources: esp/esp_nvs.c esp/esp_nvs_flash.c base/status.c base/bytes.c */
/* libs: zlib libcrypto */
/* corpus: vectors/nvs/?*.bin */
/* Any partition: it is read to the end, and a value is stored and read again or refused with nothing changed. Odd lengths of
 * input get the CRCs of their page headers and entries made right first, to reach what lies behind them. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "esp/esp_nvs.h"
#include "must.h"

#define PAGE 4096u

static void mend(uint8_t *data, size_t size) {
    for (size_t page = 0; page + PAGE <= size; page += PAGE) {
        uint8_t *p = data + page;
        if (p[0] != 0xFF) {
            ota_store_u32le(p + 28, ota_crc32(0xFFFFFFFFu, p + 4, 24));
        }
        for (uint32_t i = 0; i < 126; i++) {
            uint8_t *entry = p + 64 + 32 * i;
            if ((p[32 + i / 4] >> 2 * (i % 4) & 3) == 2 && entry[2] > 0 && entry[2] < 127) {
                const bool chunk = entry[1] == 0x21 || entry[1] == 0x41 || entry[1] == 0x42;
                const size_t len = ota_load_u16le(entry + 24);
                if (chunk && 64 + 32 * (i + 1) + len <= PAGE) {
                    entry[2] = (uint8_t)(1 + (len + 31) / 32);
                    ota_store_u32le(entry + 28, ota_crc32(0xFFFFFFFFu, entry + 32, len));
                }
                ota_store_u32le(entry + 4, ota_crc32(ota_crc32(0xFFFFFFFFu, entry, 4), entry + 8, 24));
                i += entry[2] - 1u;
            }
        }
    }
}

static void store(ota_esp_nvs *nvs, uint8_t type, const uint8_t *value, size_t len) {
    const size_t before = ota_esp_nvs_op_count(nvs), items = ota_esp_nvs_item_count(nvs);
    ota_error error = {0};
    const ota_status status = ota_esp_nvs_set(nvs, "rmaker_ota", "key", type, value, len, &error);
    ota_esp_nvs_item item;
    if (status == OTA_OK) {
        MUST(ota_esp_nvs_get(nvs, "rmaker_ota", "key", type, &item, NULL) == OTA_OK);
        MUST(item.len == len && memcmp(item.value, value, len) == 0);
    } else {
        MUST(status == OTA_ERR_NVS || status == OTA_ERR_NVS_FULL || status == OTA_ERR_ARGUMENT);
        MUST(error.status == status && error.text[0] != '\0');
        MUST(ota_esp_nvs_op_count(nvs) == before && ota_esp_nvs_item_count(nvs) == items);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static const ota_esp_nvs_keys keys = {.bytes = "0123456789abcdef0123456789ABCDEFtweak key of the same 32 bytes.."};
    const size_t size = (len + PAGE - 1) / PAGE * PAGE;
    if (len == 0 || size > 16 * PAGE) {
        return 0;
    }
    uint8_t *partition = malloc(size), *copy = malloc(size);
    memset(partition, 0xFF, size);
    memcpy(partition, data, len);
    if (len % 2 == 1) {
        mend(partition, size);
    }
    memcpy(copy, partition, size);
    const ota_esp_nvs_options options = {.keys = len % 7 == 0 ? &keys : NULL, .purge = len % 3 == 0};
    ota_esp_nvs *nvs = NULL;
    ota_error error = {0};
    if (ota_esp_nvs_open(partition, size, &options, &nvs, &error) < 0) {
        MUST(error.status == OTA_ERR_NVS && nvs == NULL);
        free(partition);
        free(copy);
        return 0;
    }
    uint32_t sum = 0;
    size_t value_bytes = 0;
    for (size_t i = 0; i < ota_esp_nvs_item_count(nvs); i++) {
        const ota_esp_nvs_item item = ota_esp_nvs_item_at(nvs, i);
        sum ^= ota_crc32(0, item.value, item.len);
        value_bytes += item.len;
    }
    MUST(value_bytes <= size); /* no value counts twice */
    uint8_t number[4];
    ota_store_u32le(number, sum);
    store(nvs, OTA_ESP_NVS_U32, number, sizeof number);
    store(nvs, OTA_ESP_NVS_BLOB, data, len < 9000 ? len : 9000);
    store(nvs, OTA_ESP_NVS_U32, number, sizeof number);
    ota_esp_nvs_erase(nvs, "a", NULL, NULL);

    for (size_t i = 0; i < ota_esp_nvs_op_count(nvs); i++) {
        const ota_esp_nvs_op op = ota_esp_nvs_op_at(nvs, i);
        MUST(ota_esp_nvs_apply(copy, size, &op, NULL) == OTA_OK);
    }
    size_t image_size = 0;
    MUST(memcmp(ota_esp_nvs_image(nvs, &image_size), copy, size) == 0 && image_size == size);
    free(partition);
    free(copy);
    ota_esp_nvs_free(&nvs);
    return 0;
}
