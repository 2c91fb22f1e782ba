/* A small ESP32-C3 for tests: 64 KiB of emulated flash with a partition table, otadata, two OTA slots of four sectors and, when
 * wanted, a factory slot; and small app images for it. */
#ifndef OTA_TESTS_SMALL_CHIP_H
#define OTA_TESTS_SMALL_CHIP_H

#include "flash_emu.h"
#include "target/esp_target.h"

enum {
    CHIP_FLASH_SIZE = 0x10000,
    CHIP_TABLE = 0x1000, /* options.table_offset */
    CHIP_OTADATA = 0x2000,
    CHIP_OTA_0 = 0x4000,
    CHIP_OTA_1 = 0x8000,
    CHIP_FACTORY = 0xC000,
    CHIP_SLOT_SIZE = 0x4000,
    CHIP_IMAGE_SIZE = 0x2A30, /* two sectors and a tail */
    CHIP_ID = 5,
};

/* An erased chip with its table. */
void small_chip_init(flash_emu *emu, bool factory);

/* Options for it: an ESP32-C3 of revision 0.3, rollback on, what runs not known. */
ota_esp_target_options small_chip_options(flash_emu *emu);

/* CHIP_IMAGE_SIZE bytes of a right app image. Every version has other bytes all over. */
void small_chip_image(uint8_t *out, const char *version, uint32_t secure_version);

/* Puts an image into a slot of the table above. */
void small_chip_load(flash_emu *emu, uint64_t slot, const char *version, uint32_t secure_version);

/* Writes an otadata entry; seq 0xFFFFFFFF: a blank one. */
void small_chip_entry(flash_emu *emu, int sector, uint32_t seq, uint32_t state);

#endif
