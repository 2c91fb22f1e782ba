/* What differs from chip to chip on the way to its flash: ids, registers, eFuse words, limits. Data only.
 *
 * Names and ids are those of esp/esp_image.h, which knows the chips' images; a test compares the two.
 * Source: esp-serial-protocol.md 3, 4 (registers), 5, 7; bits of the revision: ESP-IDF esp_efuse_table.csv of each chip. */
#ifndef OTA_FLASHER_CHIP_H
#define OTA_FLASHER_CHIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    OTA_CHIP_ESP32 = 0,
    OTA_CHIP_ESP32S2 = 2,
    OTA_CHIP_ESP32C3 = 5,
    OTA_CHIP_ESP32S3 = 9,
    OTA_CHIP_ESP32C2 = 12,
    OTA_CHIP_ESP32C6 = 13,
    OTA_CHIP_ESP32H2 = 16,
    OTA_CHIP_ESP32P4 = 18,
    OTA_CHIP_ESP32C61 = 20,
    OTA_CHIP_ESP32C5 = 23,
};

#define OTA_CHIP_MAGIC_REG 0x40001000u /* tells chips apart that do not know GET_SECURITY_INFO; unreadable on the P4 */
#define OTA_CHIP_MAGICS_MAX 4
#define OTA_CHIP_FIELDS_MAX 4
#define OTA_CHIP_REVISION_UNKNOWN UINT32_MAX

/* Bits of a revision: `bits` bits from bit `shift` of eFuse register `reg`, to be put at bit `to` of the result. */
typedef struct ota_chip_field {
    uint32_t reg; /* 0: no such field */
    uint8_t shift, bits, to;
    bool is_major;
} ota_chip_field;

typedef struct ota_chip {
    uint16_t id;                          /* as in image headers and GET_SECURITY_INFO */
    uint16_t usb_pid;                     /* of the ROM's USB-OTG CDC device (VID 303A); 0: it has none */
    const char *name;                     /* "esp32c3" */
    const char *title;                    /* "ESP32-C3" */
    uint32_t magics[OTA_CHIP_MAGICS_MAX]; /* values of OTA_CHIP_MAGIC_REG, ended by 0 */
    uint32_t spi_base;                    /* of the SPI controller of the flash, and offsets from it */
    uint8_t spi_usr, spi_usr1, spi_usr2, spi_mosi_dlen, spi_miso_dlen, spi_w0;
    uint8_t begin_words;       /* of FLASH_BEGIN and FLASH_DEFL_BEGIN to the ROM: 4 or 5 */
    bool has_usb_jtag;         /* USB-Serial-JTAG, PID 0x1001 */
    bool has_watchdog_reset;   /* the RTC watchdog can reset the whole chip without freezing it */
    bool has_security_info;    /* knows GET_SECURITY_INFO */
    uint32_t large_needs_stub; /* flash beyond this many bytes is reached with a stub only (the ROM wraps addresses) */
    uint32_t uart_div;         /* divider register of UART 0; 0: not used */
    uint32_t wdt_config0, wdt_config1, wdt_protect;      /* RTC watchdog; 0: none */
    uint32_t swd_config, swd_protect, swd_key, swd_auto; /* super watchdog: registers, key, auto-feed bit; 0: none */
    uint32_t mac_lo;                              /* eFuse word with MAC bytes 2..5; the next one holds bytes 0 and 1 */
    uint32_t strap_reg;                           /* boot straps, bit 3: GPIO0 was high; 0: not looked at */
    uint32_t force_boot_reg;                      /* bit 0 forces download mode at the next reset; 0: none */
    ota_chip_field revision[OTA_CHIP_FIELDS_MAX]; /* minor and major of the wafer version; ended by reg 0 */
} ota_chip;

#define OTA_CHIP_WDT_KEY 0x50D83AA1u

/* All chips, `*count` rows that live for ever. */
const ota_chip *ota_chips(size_t *count);
/* The chip of an id, a name ("esp32c3", "ESP32-C3") or a value of the magic register; NULL: not known. */
const ota_chip *ota_chip_by_id(uint32_t id);
const ota_chip *ota_chip_by_name(const char *name);
const ota_chip *ota_chip_by_magic(uint32_t magic);

/* Bytes of flash from its JEDEC id (vendor | type << 8 | size code << 16); 0: the id does not say. */
uint64_t ota_chip_flash_size(uint32_t flash_id);

/* The revision, major * 100 + minor, from the values of the registers of chip->revision. */
uint32_t ota_chip_revision(const ota_chip *chip, const uint32_t values[OTA_CHIP_FIELDS_MAX]);

/* MAC address of the two eFuse words. */
void ota_chip_mac(uint32_t lo, uint32_t hi, uint8_t mac[6]);

#endif
