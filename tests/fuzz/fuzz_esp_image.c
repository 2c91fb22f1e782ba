/* sources: esp/esp_image.c base/bytes.c base/status.c */
/* libs: libcrypto zlib */
/* corpus: vectors/images/esp32s3_app_min.bin vectors/images/esp32_app_rev3_secver2_nohash.bin
 *         vectors/images/esp32c3_bootloader_like.bin */
/* Any bytes through the image checker, whole and in slices whose sizes the bytes themselves decide: the same end, and every
 * right image has the size its headers say. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_image.h"

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static ota_status run(ota_esp_image_check *check, const ota_esp_image_rules *rules, const uint8_t *data, size_t size,
                      uint32_t seed) {
    ota_error error = {0};
    REQUIRE(ota_esp_image_check_begin(check, rules, &error) == OTA_OK);
    for (size_t at = 0; at < size;) {
        seed = seed * 1664525u + 1013904223u;
        size_t take = seed == 1013904223u ? size : 1 + (seed >> 16) % 64;
        take = take < size - at ? take : size - at;
        ota_status status = ota_esp_image_check_update(check, data + at, take, &error);
        REQUIRE(status >= 0 || status == error.status);
        at += take;
    }
    ota_status status = ota_esp_image_check_finish(check, &error);
    REQUIRE(status == error.status);
    ota_esp_image_check_end(check);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    for (int kind = OTA_ESP_IMAGE_APP; kind <= OTA_ESP_IMAGE_ANY; kind++) {
        ota_esp_image_rules rules = OTA_ESP_IMAGE_RULES_NONE;
        ota_esp_image_check whole, sliced;
        rules.kind = (uint8_t)kind;
        rules.slot_size = size > 100 && data[size - 1] & 1 ? size - 50 : 0;
        ota_status status = run(&whole, &rules, data, size, 0);
        REQUIRE(run(&sliced, &rules, data, size, 1 + (uint32_t)size) == status);
        REQUIRE(whole.state == sliced.state && whole.offset == sliced.offset);
        REQUIRE(memcmp(&whole.error, &sliced.error, sizeof whole.error) == 0);
        if (status == OTA_OK) {
            REQUIRE(whole.image_size + whole.bytes_after == size);
            REQUIRE(whole.segment_count == whole.header.segment_count);
        }
    }
    ota_error error = {0};
    ota_esp_image_header header;
    ota_esp_app_descriptor descriptor;
    ota_esp_bootloader_descriptor bootloader;
    ota_esp_image_header_parse(data, size, &header, &error);
    ota_esp_app_descriptor_parse(data, size, &descriptor, &error);
    ota_esp_bootloader_descriptor_parse(data, size, &bootloader, &error);
    return 0;
}
