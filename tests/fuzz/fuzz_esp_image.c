/* sources: esp/esp_image.c base/status.c base/bytes.c */
/* libs: libcrypto zlib */
/* corpus: vectors/images/?*.bin */
/* Any bytes taken for an image: the check ends, keeps its first error, and whole gives what slices give. */
#include <stdlib.h>
#include <string.h>

#include "esp/esp_image.h"
#include "must.h"

static ota_status check_in(const uint8_t *data, size_t len, size_t slice, ota_esp_image_check *check) {
    ota_esp_image_rules rules = OTA_ESP_IMAGE_RULES_NONE;
    ota_error error = {0};
    rules.kind = len % 3;
    MUST(ota_esp_image_check_begin(check, &rules, &error) >= 0);
    ota_status status = OTA_OK;
    for (size_t at = 0; at < len && status >= 0; at += slice) {
        status = ota_esp_image_check_update(check, data + at, slice < len - at ? slice : len - at, &error);
    }
    ota_status last = ota_esp_image_check_finish(check, &error);
    MUST(status >= 0 || (last == status && error.status == status)); /* the first error is the last word */
    ota_esp_image_check_end(check);
    return last;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ota_esp_image_check whole = {0}, slices = {0};
    size_t slice = size > 0 ? 1u + data[size - 1] % 61u : 1;
    ota_status first = check_in(data, size, SIZE_MAX / 2, &whole);
    ota_status second = check_in(data, size, slice, &slices);
    MUST(first == second);
    MUST(whole.state == slices.state && whole.error.offset == slices.error.offset);
    MUST(whole.image_size == slices.image_size && whole.segment_count == slices.segment_count);
    MUST(first < 0 || (whole.image_size <= size && whole.image_size + whole.bytes_after == size));

    ota_esp_image_header header;
    if (ota_esp_image_header_parse(data, size, &header, NULL) >= 0) {
        uint8_t bytes[OTA_ESP_IMAGE_HEADER_SIZE];
        ota_esp_image_header again;
        ota_esp_image_header_build(&header, bytes);
        MUST(ota_esp_image_header_parse(bytes, sizeof bytes, &again, NULL) >= 0);
        MUST(again.chip_id == header.chip_id && again.entry_addr == header.entry_addr);
        MUST(again.segment_count == header.segment_count);
    }
    ota_esp_app_descriptor descriptor;
    if (ota_esp_app_descriptor_parse(data, size, &descriptor, NULL) >= 0) {
        uint8_t bytes[OTA_ESP_APP_DESCRIPTOR_SIZE];
        ota_esp_app_descriptor again;
        ota_esp_app_descriptor_build(&descriptor, bytes);
        MUST(ota_esp_app_descriptor_parse(bytes, sizeof bytes, &again, NULL) >= 0);
        MUST(strcmp(again.version, descriptor.version) == 0);
        MUST(strcmp(again.project_name, descriptor.project_name) == 0);
    }
    ota_esp_bootloader_descriptor boot;
    (void)ota_esp_bootloader_descriptor_parse(data, size, &boot, NULL);
    return 0;
}
