/* sources: flasher/chip.c esp/esp_image.c base/status.c base/bytes.c
 * libs: libcrypto zlib */
#include "check.h"
#include "esp/esp_image.h"
#include "flasher/chip.h"

TEST(names_and_ids_are_those_of_images) {
    size_t count;
    const ota_chip *chips = ota_chips(&count);
    CHECK_EQ(count, 10);
    for (size_t i = 0; i < count; i++) {
        const ota_esp_chip *image = ota_esp_chip_by_id(chips[i].id);
        CHECK(image != NULL && strcmp(image->name, chips[i].name) == 0 && strcmp(image->title, chips[i].title) == 0);
        CHECK(ota_chip_by_id(chips[i].id) == &chips[i]);
        CHECK(ota_chip_by_name(chips[i].name) == &chips[i]);
        CHECK(ota_chip_by_name(chips[i].title) == &chips[i]);
        for (size_t j = 0; j < OTA_CHIP_MAGICS_MAX && chips[i].magics[j] != 0; j++) {
            CHECK(ota_chip_by_magic(chips[i].magics[j]) == &chips[i]);
        }
    }
    CHECK(ota_chip_by_id(99) == NULL);
    CHECK(ota_chip_by_name("esp8266") == NULL);
    CHECK(ota_chip_by_name("") == NULL);
    CHECK(ota_chip_by_magic(0) == NULL);
}

TEST(registers_are_those_of_the_sheet) {
    const ota_chip *h2 = ota_chip_by_id(OTA_CHIP_ESP32H2), *c6 = ota_chip_by_id(OTA_CHIP_ESP32C6);
    CHECK_EQ(h2->wdt_protect, 0x600B1C1C);
    CHECK_EQ(h2->swd_config, 0x600B1C20);
    CHECK_EQ(h2->swd_protect, 0x600B1C24);
    CHECK_EQ(c6->wdt_protect, 0x600B1C18);
    CHECK_EQ(c6->swd_config, 0x600B1C1C);
    CHECK_EQ(c6->swd_protect, 0x600B1C20);
    const ota_chip *p4 = ota_chip_by_id(OTA_CHIP_ESP32P4);
    CHECK_EQ(p4->wdt_config1, 0x50116004);
    CHECK_EQ(p4->swd_config, 0x5011601C);
    CHECK_EQ(p4->swd_protect, 0x50116020);
    CHECK(!c6->has_watchdog_reset && !h2->has_watchdog_reset && p4->has_watchdog_reset);
}

TEST(flash_sizes_follow_from_ids) {
    CHECK_EQ(ota_chip_flash_size(0x1640EF), 4 << 20);
    CHECK_EQ(ota_chip_flash_size(0x1240EF), 256 << 10);
    CHECK_EQ(ota_chip_flash_size(0x1940EF), 32 << 20);
    CHECK_EQ(ota_chip_flash_size(0x1C40EF), 256 << 20);
    CHECK_EQ(ota_chip_flash_size(0x2040EF), 64 << 20);
    CHECK_EQ(ota_chip_flash_size(0x2240EF), 256 << 20);
    CHECK_EQ(ota_chip_flash_size(0x3240EF), 256 << 10);
    CHECK_EQ(ota_chip_flash_size(0x3A40EF), 64 << 20);
    CHECK_EQ(ota_chip_flash_size(0x01471F), 4 << 20); /* Adesto AT25SF321B */
    CHECK_EQ(ota_chip_flash_size(0x01451F), 1 << 20);
    CHECK_EQ(ota_chip_flash_size(0xFFFFFF), 0);
    CHECK_EQ(ota_chip_flash_size(0), 0);
}

TEST(mac_and_revision_come_from_efuses) {
    uint8_t mac[6];
    ota_chip_mac(0x33445566, 0xABCD1122, mac);
    CHECK_MEM(mac, "\x11\x22\x33\x44\x55\x66", 6);
    uint32_t esp32[4] = {1u << 15, 1u << 20 | 3u << 24, 0, 1u << 20 | 3u << 24};
    CHECK_EQ(ota_chip_revision(ota_chip_by_id(OTA_CHIP_ESP32), esp32), 203);
    uint32_t none[4] = {0};
    CHECK_EQ(ota_chip_revision(ota_chip_by_id(OTA_CHIP_ESP32), none), 0);
    uint32_t c3[4] = {4u << 18, 1u << 23 | 1u << 24, 1u << 23 | 1u << 24};
    CHECK_EQ(ota_chip_revision(ota_chip_by_id(OTA_CHIP_ESP32C3), c3), 112);
    uint32_t c6[4] = {2u << 18 | 1u << 22, 2u << 18 | 1u << 22};
    CHECK_EQ(ota_chip_revision(ota_chip_by_id(OTA_CHIP_ESP32C6), c6), 102);
    uint32_t p4[4] = {0x11 | 0 << 23, 0x11, 1u << 23};
    CHECK_EQ(ota_chip_revision(ota_chip_by_id(OTA_CHIP_ESP32P4), p4), 501);
}

int main(void) {
    RUN(names_and_ids_are_those_of_images);
    RUN(registers_are_those_of_the_sheet);
    RUN(flash_sizes_follow_from_ids);
    RUN(mac_and_revision_come_from_efuses);
    return DONE();
}
