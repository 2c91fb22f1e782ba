/* The table of chips; see chip.h. */
#include "flasher/chip.h"

#include "base/bytes.h"

/* SPI controllers of the ESP32 and of all later chips: offsets of user, user1, user2, mosi_dlen, miso_dlen, w0. */
#define SPI_OLD                                                                                                        \
    .spi_usr = 0x1C, .spi_usr1 = 0x20, .spi_usr2 = 0x24, .spi_mosi_dlen = 0x28, .spi_miso_dlen = 0x2C, .spi_w0 = 0x80
#define SPI_NEW                                                                                                        \
    .spi_usr = 0x18, .spi_usr1 = 0x1C, .spi_usr2 = 0x20, .spi_mosi_dlen = 0x24, .spi_miso_dlen = 0x28, .spi_w0 = 0x58
/* The watchdogs of the low-power domain of C6 and its like. */
#define WDT_LP(base, protect)                                                                                          \
    .wdt_config0 = (base), .wdt_config1 = (base) + 4, .wdt_protect = (base) + (protect),                               \
    .swd_config = (base) + (protect) + 4, .swd_protect = (base) + (protect) + 8, .swd_key = OTA_CHIP_WDT_KEY,          \
    .swd_auto = 1u << 18

static const ota_chip chips[] = {
    {
        .id = OTA_CHIP_ESP32,
        .name = "esp32",
        .title = "ESP32",
        .magics = {0x00F01D83},
        .spi_base = 0x3FF42000,
        SPI_OLD,
        .begin_words = 4,
        .uart_div = 0x3FF40014,
        .mac_lo = 0x3FF5A004,
        /* Major: bit 15 of word 3, bit 20 of word 5, bit 31 of APB_CTRL_DATE make 0, 1, 3, 7 (fields of one bit each, which
         * ota_chip_revision turns into 0..3). */
        .revision = {{0x3FF5A00C, 15, 1, 0, true},
                     {0x3FF5A014, 20, 1, 1, true},
                     {0x3FF6607C, 31, 1, 2, true},
                     {0x3FF5A014, 24, 2, 0, false}},
    },
    {
        .id = OTA_CHIP_ESP32S2,
        .usb_pid = 0x0002,
        .name = "esp32s2",
        .title = "ESP32-S2",
        .magics = {0x000007C6},
        .spi_base = 0x3F402000,
        SPI_NEW,
        .begin_words = 5,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .uart_div = 0x3F400014,
        .wdt_config0 = 0x3F408094,
        .wdt_config1 = 0x3F408098,
        .wdt_protect = 0x3F4080AC,
        .mac_lo = 0x3F41A044,
        .strap_reg = 0x3F404038,
        .force_boot_reg = 0x3F408128,
        .revision = {{0x3F41A050, 18, 2, 0, true}, {0x3F41A050, 20, 1, 3, false}, {0x3F41A054, 4, 3, 0, false}},
    },
    {
        .id = OTA_CHIP_ESP32C3,
        .name = "esp32c3",
        .title = "ESP32-C3",
        .magics = {0x6921506F, 0x1B31506F, 0x4881606F, 0x4361606F},
        .spi_base = 0x60002000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .uart_div = 0x60000014,
        .wdt_config0 = 0x60008090,
        .wdt_config1 = 0x60008094,
        .wdt_protect = 0x600080A8,
        .swd_config = 0x600080AC,
        .swd_protect = 0x600080B0,
        .swd_key = 0x8F1D312A,
        .swd_auto = 1u << 31,
        .mac_lo = 0x60008844,
        .revision = {{0x60008850, 18, 3, 0, false}, {0x60008858, 23, 1, 3, false}, {0x60008858, 24, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32S3,
        .usb_pid = 0x0009,
        .name = "esp32s3",
        .title = "ESP32-S3",
        .magics = {0x00000009},
        .spi_base = 0x60002000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .large_needs_stub = 16u << 20,
        .uart_div = 0x60000014,
        .wdt_config0 = 0x60008098,
        .wdt_config1 = 0x6000809C,
        .wdt_protect = 0x600080B0,
        .swd_config = 0x600080B4,
        .swd_protect = 0x600080B8,
        .swd_key = 0x8F1D312A,
        .swd_auto = 1u << 31,
        .mac_lo = 0x60007044,
        .strap_reg = 0x60004038,
        .force_boot_reg = 0x6000812C,
        .revision = {{0x60007050, 18, 3, 0, false}, {0x60007058, 23, 1, 3, false}, {0x60007058, 24, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32C2,
        .name = "esp32c2",
        .title = "ESP32-C2",
        .magics = {0x6F51306F, 0x7C41A06F, 0x0C21E06F},
        .spi_base = 0x60002000,
        SPI_NEW,
        .begin_words = 5,
        .has_security_info = true,
        .uart_div = 0x60000014,
        .wdt_config0 = 0x60008084,
        .wdt_config1 = 0x60008088,
        .wdt_protect = 0x6000809C,
        .mac_lo = 0x60008840,
        .revision = {{0x60008844, 16, 4, 0, false}, {0x60008844, 20, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32C6,
        .name = "esp32c6",
        .title = "ESP32-C6",
        .magics = {0x2CE0806F},
        .spi_base = 0x60003000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .uart_div = 0x60000014,
        WDT_LP(0x600B1C00, 0x18),
        .mac_lo = 0x600B0844,
        .revision = {{0x600B0850, 18, 4, 0, false}, {0x600B0850, 22, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32H2,
        .name = "esp32h2",
        .title = "ESP32-H2",
        .magics = {0xD7B73E80},
        .spi_base = 0x60003000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .uart_div = 0x60000014,
        WDT_LP(0x600B1C00, 0x1C),
        .mac_lo = 0x600B0844,
        .revision = {{0x600B0850, 18, 3, 0, false}, {0x600B0850, 21, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32P4,
        .usb_pid = 0x0012,
        .name = "esp32p4",
        .title = "ESP32-P4",
        .spi_base = 0x5008D000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .large_needs_stub = 16u << 20,
        WDT_LP(0x50116000, 0x18),
        .mac_lo = 0x5012D044,
        .revision = {{0x5012D04C, 0, 4, 0, false}, {0x5012D04C, 4, 2, 0, true}, {0x5012D04C, 23, 1, 2, true}},
    },
    {
        .id = OTA_CHIP_ESP32C61,
        .name = "esp32c61",
        .title = "ESP32-C61",
        .magics = {0x7211606F},
        .spi_base = 0x60003000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .large_needs_stub = 16u << 20,
        .uart_div = 0x60000014,
        WDT_LP(0x600B1C00, 0x18),
        .mac_lo = 0x600B4844,
        .revision = {{0x600B484C, 0, 4, 0, false}, {0x600B484C, 4, 2, 0, true}},
    },
    {
        .id = OTA_CHIP_ESP32C5,
        .name = "esp32c5",
        .title = "ESP32-C5",
        .magics = {0x1101406F, 0x5FD1406F},
        .spi_base = 0x60003000,
        SPI_NEW,
        .begin_words = 5,
        .has_usb_jtag = true,
        .has_security_info = true,
        .has_watchdog_reset = true,
        .large_needs_stub = 16u << 20,
        .uart_div = 0x60000014,
        WDT_LP(0x600B1C00, 0x18),
        .mac_lo = 0x600B4844,
        .revision = {{0x600B484C, 0, 4, 0, false}, {0x600B484C, 4, 2, 0, true}},
    },
};

#define COUNT (sizeof chips / sizeof chips[0])

const ota_chip *ota_chips(size_t *count) {
    *count = COUNT;
    return chips;
}

const ota_chip *ota_chip_by_id(uint32_t id) {
    for (size_t i = 0; i < COUNT; i++) {
        if (chips[i].id == id) {
            return &chips[i];
        }
    }
    return NULL;
}

const ota_chip *ota_chip_by_name(const char *name) {
    for (size_t i = 0; i < COUNT; i++) {
        if (ota_same_chip_name(name, chips[i].name)) {
            return &chips[i];
        }
    }
    return NULL;
}

const ota_chip *ota_chip_by_magic(uint32_t magic) {
    for (size_t i = 0; i < COUNT; i++) {
        for (size_t j = 0; j < OTA_CHIP_MAGICS_MAX && chips[i].magics[j] != 0; j++) {
            if (chips[i].magics[j] == magic) {
                return &chips[i];
            }
        }
    }
    return NULL;
}

uint64_t ota_chip_flash_size(uint32_t flash_id) {
    uint32_t vendor = flash_id & 0xFF, type = flash_id >> 8 & 0xFF, code = flash_id >> 16 & 0xFF;
    if (vendor == 0x1F) { /* Adesto: 4 is 512 KiB, 5 is 1 MiB, ... */
        code = type & 0x1F;
        return code >= 4 && code <= 8 ? 1ull << (code + 15) : 0;
    }
    if (code >= 0x12 && code <= 0x1C) {
        return 1ull << code;
    }
    if (code >= 0x20 && code <= 0x22) {
        return 1ull << (code - 0x20 + 26);
    }
    if (code >= 0x32 && code <= 0x3A) {
        return 1ull << (code - 0x32 + 18);
    }
    return 0;
}

void ota_chip_mac(uint32_t lo, uint32_t hi, uint8_t mac[6]) {
    mac[0] = (uint8_t)(hi >> 8);
    mac[1] = (uint8_t)hi;
    mac[2] = (uint8_t)(lo >> 24);
    mac[3] = (uint8_t)(lo >> 16);
    mac[4] = (uint8_t)(lo >> 8);
    mac[5] = (uint8_t)lo;
}

uint32_t ota_chip_revision(const ota_chip *chip, const uint32_t values[OTA_CHIP_FIELDS_MAX]) {
    uint32_t major = 0, minor = 0;
    for (size_t i = 0; i < OTA_CHIP_FIELDS_MAX && chip->revision[i].reg != 0; i++) {
        const ota_chip_field *field = &chip->revision[i];
        uint32_t part = (values[i] >> field->shift & ((1u << field->bits) - 1)) << field->to;
        *(field->is_major ? &major : &minor) |= part;
    }
    if (chip->id == OTA_CHIP_ESP32) { /* 0, 1, 3, 7 stand for 0, 1, 2, 3 */
        major = major == 7 ? 3 : major == 3 ? 2 : major == 1 ? 1 : 0;
    }
    return major * 100 + minor;
}
