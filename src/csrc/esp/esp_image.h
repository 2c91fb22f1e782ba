/* ESP app and boot loader images: parse, check, and the constants of the chips they are for. No I/O.
 *
 * Offsets are bytes from the start of the image, numbers are little-endian, revisions are major * 100 + minor.
 * Source: ESP-IDF esp_app_format.h, esp_app_desc.h, esp_image_format.c; esptool elf2image. */
#ifndef OTA_ESP_ESP_IMAGE_H
#define OTA_ESP_ESP_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    OTA_ESP_IMAGE_MAGIC = 0xE9,
    OTA_ESP_IMAGE_HEADER_SIZE = 24,
    OTA_ESP_SEGMENT_HEADER_SIZE = 8,
    OTA_ESP_SEGMENT_MAX = 16,       /* segments in an image */
    OTA_ESP_DESCRIPTOR_OFFSET = 32, /* the app or boot loader descriptor opens the data of segment 0 */
    OTA_ESP_APP_DESCRIPTOR_SIZE = 256,
    OTA_ESP_BOOTLOADER_DESCRIPTOR_SIZE = 80,
    OTA_ESP_IMAGE_START_SIZE = 288, /* image header, first segment header and app descriptor */
    OTA_ESP_IMAGE_HASH_SIZE = 32,
    OTA_ESP_IMAGE_SIZE_MIN = 48, /* header, one empty segment, padding, checksum; without hash */
};

/* ---- Chips ------------------------------------------------------------------------------------------------------- */

#define OTA_ESP_CHIP_ANY 0xFFFFFFFFu
#define OTA_ESP_UNSET 0xFFFFFFFFu /* a number of the rules below that is not checked */

/* Addresses [low, high) where the flash can be mapped; low == high: not used. */
typedef struct ota_esp_address_range {
    uint32_t low, high;
} ota_esp_address_range;

typedef struct ota_esp_chip {
    uint16_t id;                          /* chip_id of the image header */
    const char *name;                     /* "esp32c3" */
    const char *title;                    /* "ESP32-C3" */
    uint32_t bootloader_offset;           /* where the boot ROM looks for the second-stage boot loader in flash */
    ota_esp_address_range mapped[2];      /* code and constants run from flash here */
    uint8_t page_min_log2, page_max_log2; /* MMU page sizes an app may ask for; the default is 64 KiB (16) */
    bool large_segments;                  /* 32-bit flash addresses: a segment may be 16 MiB or more */
} ota_esp_chip;

/* The chip of an id or of a name in lower case ("esp32c3", "esp32-c3" too); NULL: not known. Rows live for ever. */
const ota_esp_chip *ota_esp_chip_by_id(uint32_t id);
const ota_esp_chip *ota_esp_chip_by_name(const char *name);
/* All chips, `*count` rows. */
const ota_esp_chip *ota_esp_chips(size_t *count);

/* ---- Records ----------------------------------------------------------------------------------------------------- */

/* The image header, 24 bytes. */
typedef struct ota_esp_image_header {
    uint8_t segment_count; /* 1..16; 0 only in wrapped compressed images */
    uint8_t spi_mode;      /* 0 QIO, 1 QOUT, 2 DIO, 3 DOUT, 4 FAST_READ, 5 SLOW_READ; of use in boot loaders only */
    uint8_t spi_speed;     /* low nibble of byte 3 */
    uint8_t spi_size;      /* high nibble of byte 3: 1 MiB << n */
    uint32_t entry_addr;
    uint8_t wp_pin; /* 0xEE: disabled */
    uint8_t spi_pin_drv[3];
    uint16_t chip_id;
    uint8_t min_chip_rev; /* legacy, ignored by devices */
    uint16_t min_chip_rev_full;
    uint16_t max_chip_rev_full; /* 0 and 65535: no limit */
    uint8_t hash_appended;      /* 0 or 1 */
} ota_esp_image_header;

typedef struct ota_esp_segment {
    uint32_t header_offset, data_offset; /* in the image */
    uint32_t load_addr;
    uint32_t size; /* of the data, bytes, a multiple of 4 */
    bool mapped;   /* lies in an address range of the flash: run in place, page rule applies */
} ota_esp_segment;

/* The app descriptor, 256 bytes in the image. Strings are bounded: what fills its field without a NUL is cut at the field's
 * end, and always NUL-terminated here. They are bytes as they came, UTF-8 or not. */
typedef struct ota_esp_app_descriptor {
    uint32_t secure_version;
    char version[33];
    char project_name[33];
    char time[17]; /* "12:34:56"; empty in reproducible builds */
    char date[17]; /* "Jan  2 2026"; empty in reproducible builds */
    char idf_version[33];
    uint8_t elf_sha256[32];
    uint16_t min_efuse_block_rev_full, max_efuse_block_rev_full; /* 0 and 65535: not set */
    uint8_t mmu_page_size_log2;                                  /* 0 or out of range: the chip's default */
    uint8_t spi_flash_mode;                                      /* 0 unknown, 1 QIO, 2 QOUT, 3 DIO, 4 DOUT, 5 OPI */
} ota_esp_app_descriptor;

/* The boot loader descriptor, 80 bytes; boot loaders before IDF 5.2 have none. */
typedef struct ota_esp_bootloader_descriptor {
    uint8_t secure_version;
    uint32_t version;
    char idf_version[33];
    char date_time[25];
} ota_esp_bootloader_descriptor;

/* Reads a header. ERR_INCOMPLETE: len < 24; ERR_IMAGE_MAGIC: the first byte is not 0xE9; ERR_UNSUPPORTED: a compressed
 * image in its wrapper ("ESP\0", or segment_count 0). More than 16 segments or an odd hash_appended: ERR_IMAGE_STRUCTURE. */
ota_status ota_esp_image_header_parse(const uint8_t *data, size_t len, ota_esp_image_header *out, ota_error *error);
/* Writes the 24 bytes of a header. */
void ota_esp_image_header_build(const ota_esp_image_header *header, uint8_t out[OTA_ESP_IMAGE_HEADER_SIZE]);

/* Reads an app descriptor from its 256 bytes (offset 32 of an image). ERR_INCOMPLETE: len < 256; ERR_IMAGE_DESCRIPTOR: its
 * magic number is wrong. Looks at nothing of the image around it. */
ota_status ota_esp_app_descriptor_parse(const uint8_t *data, size_t len, ota_esp_app_descriptor *out, ota_error *error);
/* Writes the 256 bytes; strings are cut to their fields, a full field has no NUL. */
void ota_esp_app_descriptor_build(const ota_esp_app_descriptor *descriptor, uint8_t out[OTA_ESP_APP_DESCRIPTOR_SIZE]);

/* The same for the 80 bytes of a boot loader descriptor. */
ota_status ota_esp_bootloader_descriptor_parse(const uint8_t *data, size_t len, ota_esp_bootloader_descriptor *out,
                                               ota_error *error);

/* ---- What a device accepts --------------------------------------------------------------------------------------- */

typedef enum ota_esp_image_kind {
    OTA_ESP_IMAGE_APP = 0,        /* an app descriptor has to be there */
    OTA_ESP_IMAGE_BOOTLOADER = 1, /* no descriptor asked for, max_chip_rev_full not looked at */
    OTA_ESP_IMAGE_ANY = 2,        /* no descriptor asked for; everything else as for an app */
} ota_esp_image_kind;

/* The device an image is checked for. Zeroed rules mean an ESP32 of revision 0: start from OTA_ESP_IMAGE_RULES_NONE. */
typedef struct ota_esp_image_rules {
    uint32_t chip_id;              /* OTA_ESP_CHIP_ANY: not checked */
    uint32_t chip_revision;        /* OTA_ESP_UNSET: not checked */
    uint32_t efuse_block_revision; /* OTA_ESP_UNSET: not checked; never checked for the ESP32 */
    bool ignore_max_revision;      /* the eFuse "disable wafer version major" */
    uint64_t slot_size;            /* bytes; the image must fit; 0: not checked */
    uint8_t spi_flash_mode;        /* of the running app's descriptor; 0: not checked */
    bool bytes_after_allowed;      /* bytes behind the image (padding, 0xFF) are accepted, as a device does */
    uint8_t kind;                  /* ota_esp_image_kind */
} ota_esp_image_rules;

#define OTA_ESP_IMAGE_RULES_NONE                                                                                       \
    ((ota_esp_image_rules){.chip_id = OTA_ESP_CHIP_ANY,                                                                \
                           .chip_revision = OTA_ESP_UNSET,                                                             \
                           .efuse_block_revision = OTA_ESP_UNSET,                                                      \
                           .bytes_after_allowed = true})

/* Chip and revision as a device checks them before it activates or loads an image: ERR_IMAGE_CHIP, ERR_IMAGE_REVISION. */
ota_status ota_esp_image_rules_check_header(const ota_esp_image_rules *rules, const ota_esp_image_header *header,
                                            ota_error *error);
/* eFuse block revision and SPI flash mode: ERR_IMAGE_REVISION, ERR_IMAGE_FLASH_MODE. */
ota_status ota_esp_image_rules_check_descriptor(const ota_esp_image_rules *rules, const ota_esp_image_header *header,
                                                const ota_esp_app_descriptor *descriptor, ota_error *error);

/* ---- Checker ----------------------------------------------------------------------------------------------------- */

typedef enum ota_esp_image_state {
    OTA_ESP_IMAGE_STATE_HEADER = 0,
    OTA_ESP_IMAGE_STATE_SEGMENT_HEADER,
    OTA_ESP_IMAGE_STATE_SEGMENT_DATA,
    OTA_ESP_IMAGE_STATE_PADDING, /* zeros and the checksum byte */
    OTA_ESP_IMAGE_STATE_HASH,
    OTA_ESP_IMAGE_STATE_COMPLETE, /* bytes behind the image */
    OTA_ESP_IMAGE_STATE_FAILED,
} ota_esp_image_state;

/* Checks an image as its bytes pass, in pieces of any size. Owned by the caller; read-only to it. Everything found so far
 * can be looked at after each update, also after an error. */
typedef struct ota_esp_image_check {
    ota_esp_image_rules rules;
    ota_esp_image_state state;
    ota_error error;     /* the first one */
    uint64_t offset;     /* bytes seen, those behind the image included; after an error, where it is */
    uint64_t image_size; /* by the headers, hash included; 0 until the last segment header was seen */
    uint64_t bytes_after;

    bool has_header, has_descriptor, has_bootloader_descriptor;
    ota_esp_image_header header;
    ota_esp_app_descriptor descriptor;
    ota_esp_bootloader_descriptor bootloader_descriptor;
    const ota_esp_chip *chip; /* NULL: id not known, page rule not checked */
    uint8_t segment_count;    /* segments[] filled so far */
    ota_esp_segment segments[OTA_ESP_SEGMENT_MAX];

    uint8_t checksum_stored, checksum_computed; /* valid from state HASH or COMPLETE on */
    uint8_t hash_stored[OTA_ESP_IMAGE_HASH_SIZE], hash_computed[OTA_ESP_IMAGE_HASH_SIZE]; /* computed: at COMPLETE */

    /* Private. */
    uint8_t gathered[OTA_ESP_APP_DESCRIPTOR_SIZE];
    uint32_t gathered_len;
    uint32_t segment_left;
    uint8_t xor_sum;
    void *sha256; /* EVP_MD_CTX */
} ota_esp_image_check;

/* Starts. ERR_NO_MEMORY when libcrypto has no SHA-256 context to give. */
ota_status ota_esp_image_check_begin(ota_esp_image_check *check, const ota_esp_image_rules *rules, ota_error *error);

/* The next `len` bytes. OTA_OK: go on; OTA_DONE: the image is complete and right (more bytes are counted, and refused with
 * ERR_SIZE where the rules say so). Errors are found as early as the bytes allow and repeated from then on:
 *   ERR_IMAGE_MAGIC, ERR_UNSUPPORTED (compressed), ERR_IMAGE_CHIP, ERR_IMAGE_REVISION, ERR_IMAGE_FLASH_MODE,
 *   ERR_IMAGE_DESCRIPTOR, ERR_IMAGE_STRUCTURE, ERR_TOO_LARGE (slot), ERR_IMAGE_CHECKSUM, ERR_IMAGE_HASH. */
ota_status ota_esp_image_check_update(ota_esp_image_check *check, const uint8_t *data, size_t len, ota_error *error);

/* End of input: OTA_OK when the image was complete, ERR_INCOMPLETE when it was not, or the earlier error. */
ota_status ota_esp_image_check_finish(ota_esp_image_check *check, ota_error *error);

/* Frees what begin took; what was found stays readable. Harmless on a zeroed struct and when called twice. */
void ota_esp_image_check_end(ota_esp_image_check *check);

/* Name of a state, for messages and dumps: "segment data". */
const char *ota_esp_image_state_name(ota_esp_image_state state);

#endif
