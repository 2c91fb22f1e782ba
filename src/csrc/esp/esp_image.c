/* Parses ESP images and checks them as they pass. Knows nothing of where the bytes come from, of signatures (the padding and
 * signature sector behind a signed image count as bytes after it) or of flash encryption.
 *
 *     state            bytes                      next
 *     HEADER           24                         SEGMENT_HEADER
 *     SEGMENT_HEADER   8                          SEGMENT_DATA; for an empty segment as after its data
 *     SEGMENT_DATA     size of the segment        SEGMENT_HEADER, or PADDING after the last one
 *     PADDING          up to the next offset with (offset + 1) % 16 == 0; the last byte is the checksum
 *                                                 HASH, or COMPLETE when there is none
 *     HASH             32                         COMPLETE
 *     COMPLETE         any number                 COMPLETE
 *     FAILED           any number                 FAILED
 *
 * Fed byte by byte or all at once, the checker ends in the same state with the same error. */
#include "esp/esp_image.h"

#include <string.h>

#include <openssl/evp.h>

#include "base/bytes.h"

#define APP_DESCRIPTOR_MAGIC 0xABCD5432u
#define BOOTLOADER_DESCRIPTOR_MAGIC 0x50
#define CHECKSUM_SEED 0xEF
#define SEGMENT_LIMIT 0x1000000u /* 16 MiB: what 24-bit flash addresses reach */
#define PAGE_LOG2_DEFAULT 16
#define CHIP_ID_ESP32 0

/* ---- Chips ------------------------------------------------------------------------------------------------------- */

/* Of the chips whose mapped range is a number of MMU pages (C6, H2), the range with the largest page. */
static const ota_esp_chip chips[] = {
    {0, "esp32", "ESP32", 0x1000, {{0x400D0000, 0x40400000}, {0x3F400000, 0x3F800000}}, 16, 16, false},
    {2, "esp32s2", "ESP32-S2", 0x1000, {{0x40080000, 0x40800000}, {0x3F000000, 0x3FF80000}}, 16, 16, false},
    {5, "esp32c3", "ESP32-C3", 0, {{0x42000000, 0x42800000}, {0x3C000000, 0x3C800000}}, 16, 16, false},
    {9, "esp32s3", "ESP32-S3", 0, {{0x42000000, 0x44000000}, {0x3C000000, 0x3E000000}}, 16, 16, true},
    {12, "esp32c2", "ESP32-C2", 0, {{0x42000000, 0x42400000}, {0x3C000000, 0x3C400000}}, 14, 16, false},
    {13, "esp32c6", "ESP32-C6", 0, {{0x42000000, 0x43000000}, {0, 0}}, 13, 16, false},
    {16, "esp32h2", "ESP32-H2", 0, {{0x42000000, 0x43000000}, {0, 0}}, 13, 16, false},
    {18, "esp32p4", "ESP32-P4", 0x2000, {{0x40000000, 0x44000000}, {0x48000000, 0x4C000000}}, 16, 16, true},
    {20, "esp32c61", "ESP32-C61", 0, {{0x42000000, 0x44000000}, {0, 0}}, 13, 16, true},
    {23, "esp32c5", "ESP32-C5", 0x2000, {{0x42000000, 0x44000000}, {0, 0}}, 16, 16, true},
    {25, "esp32h21", "ESP32-H21", 0, {{0x42000000, 0x43000000}, {0, 0}}, 13, 16, false},
    {28, "esp32h4", "ESP32-H4", 0x2000, {{0x42000000, 0x44000000}, {0, 0}}, 13, 16, true},
    {31, "esp32e22", "ESP32-E22", 0, {{0x3C000000, 0x40000000}, {0, 0}}, 16, 16, false},
    {32, "esp32s31", "ESP32-S31", 0x2000, {{0x40000000, 0x44000000}, {0x50000000, 0x54000000}}, 15, 18, true},
};

const ota_esp_chip *ota_esp_chips(size_t *count) {
    *count = sizeof chips / sizeof chips[0];
    return chips;
}

const ota_esp_chip *ota_esp_chip_by_id(uint32_t id) {
    for (size_t i = 0; i < sizeof chips / sizeof chips[0]; i++) {
        if (chips[i].id == id) {
            return &chips[i];
        }
    }
    return NULL;
}

const ota_esp_chip *ota_esp_chip_by_name(const char *name) {
    for (size_t i = 0; i < sizeof chips / sizeof chips[0]; i++) {
        if (ota_same_chip_name(chips[i].name, name)) {
            return &chips[i];
        }
    }
    return NULL;
}

static const char *chip_title(uint32_t id) {
    const ota_esp_chip *chip = ota_esp_chip_by_id(id);
    return chip ? chip->title : "an unknown chip";
}

static bool is_mapped(const ota_esp_chip *chip, uint32_t address) {
    for (size_t i = 0; i < sizeof chip->mapped / sizeof chip->mapped[0]; i++) {
        if (address >= chip->mapped[i].low && address < chip->mapped[i].high) {
            return true;
        }
    }
    return false;
}

/* ---- Records ----------------------------------------------------------------------------------------------------- */

/* Copies a field of `size` bytes that may lack its NUL. */
static void load_string(char *out, const uint8_t *field, size_t size) {
    size_t len = strnlen((const char *)field, size);
    memcpy(out, field, len);
    memset(out + len, 0, size + 1 - len);
}

static void store_string(uint8_t *field, const char *text, size_t size) {
    size_t len = strnlen(text, size);
    memcpy(field, text, len);
    memset(field + len, 0, size - len);
}

static const char *const not_an_image = "0x%02x where the magic byte 0xe9 of an ESP image should be";
static const char *const compressed =
    "a compressed image in its wrapper (%s), which only a special boot loader unpacks";

/* Looks at the first bytes as far as they are there. OTA_OK: may become an image. */
static ota_status check_start(const uint8_t *data, size_t len, ota_stage stage, ota_error *error) {
    static const uint8_t wrapper[4] = {'E', 'S', 'P', 0};
    if (len == 0) {
        return OTA_OK;
    }
    if (memcmp(data, wrapper, len < sizeof wrapper ? len : sizeof wrapper) == 0) {
        if (len < sizeof wrapper) {
            return OTA_OK;
        }
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, stage, 0, 0, compressed, "it begins with ESP\\0");
    }
    if (data[0] != OTA_ESP_IMAGE_MAGIC) {
        return ota_error_set(error, OTA_ERR_IMAGE_MAGIC, stage, 0, 0, not_an_image, data[0]);
    }
    return OTA_OK;
}

static ota_status parse_header(const uint8_t *data, size_t len, ota_esp_image_header *out, ota_stage stage,
                               ota_error *error) {
    memset(out, 0, sizeof *out);
    ota_status status = check_start(data, len, stage, error);
    if (status < 0) {
        return status;
    }
    if (len < OTA_ESP_IMAGE_HEADER_SIZE) {
        return ota_error_set(error, OTA_ERR_INCOMPLETE, stage, len, 0, "an image header has %d bytes, here are %zu",
                             OTA_ESP_IMAGE_HEADER_SIZE, len);
    }
    out->segment_count = data[1];
    out->spi_mode = data[2];
    out->spi_speed = data[3] & 0x0F;
    out->spi_size = data[3] >> 4;
    out->entry_addr = ota_load_u32le(data + 4);
    out->wp_pin = data[8];
    memcpy(out->spi_pin_drv, data + 9, sizeof out->spi_pin_drv);
    out->chip_id = ota_load_u16le(data + 12);
    out->min_chip_rev = data[14];
    out->min_chip_rev_full = ota_load_u16le(data + 15);
    out->max_chip_rev_full = ota_load_u16le(data + 17);
    out->hash_appended = data[23];
    if (out->segment_count == 0) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, stage, 1, 0, compressed, "its segment count is 0");
    }
    if (out->segment_count > OTA_ESP_SEGMENT_MAX) {
        return ota_error_set(error, OTA_ERR_IMAGE_STRUCTURE, stage, 1, 0,
                             "the image has %u segments, at most %d are possible", out->segment_count,
                             OTA_ESP_SEGMENT_MAX);
    }
    if (out->hash_appended > 1) {
        return ota_error_set(error, OTA_ERR_IMAGE_STRUCTURE, stage, 23, 0, "hash_appended is %u, neither 0 nor 1",
                             out->hash_appended);
    }
    return OTA_OK;
}

ota_status ota_esp_image_header_parse(const uint8_t *data, size_t len, ota_esp_image_header *out, ota_error *error) {
    return parse_header(data, len, out, OTA_STAGE_HEADER, error);
}

void ota_esp_image_header_build(const ota_esp_image_header *header, uint8_t out[OTA_ESP_IMAGE_HEADER_SIZE]) {
    memset(out, 0, OTA_ESP_IMAGE_HEADER_SIZE);
    out[0] = OTA_ESP_IMAGE_MAGIC;
    out[1] = header->segment_count;
    out[2] = header->spi_mode;
    out[3] = (uint8_t)((header->spi_speed & 0x0F) | header->spi_size << 4);
    ota_store_u32le(out + 4, header->entry_addr);
    out[8] = header->wp_pin;
    memcpy(out + 9, header->spi_pin_drv, sizeof header->spi_pin_drv);
    ota_store_u16le(out + 12, header->chip_id);
    out[14] = header->min_chip_rev;
    ota_store_u16le(out + 15, header->min_chip_rev_full);
    ota_store_u16le(out + 17, header->max_chip_rev_full);
    out[23] = header->hash_appended;
}

static bool is_app_descriptor(const uint8_t *data) {
    return ota_load_u32le(data) == APP_DESCRIPTOR_MAGIC;
}

static void load_app_descriptor(const uint8_t *data, ota_esp_app_descriptor *out) {
    memset(out, 0, sizeof *out);
    out->secure_version = ota_load_u32le(data + 4);
    load_string(out->version, data + 16, 32);
    load_string(out->project_name, data + 48, 32);
    load_string(out->time, data + 80, 16);
    load_string(out->date, data + 96, 16);
    load_string(out->idf_version, data + 112, 32);
    memcpy(out->elf_sha256, data + 144, sizeof out->elf_sha256);
    out->min_efuse_block_rev_full = ota_load_u16le(data + 176);
    out->max_efuse_block_rev_full = ota_load_u16le(data + 178);
    out->mmu_page_size_log2 = data[180];
    out->spi_flash_mode = data[181];
}

ota_status ota_esp_app_descriptor_parse(const uint8_t *data, size_t len, ota_esp_app_descriptor *out,
                                        ota_error *error) {
    memset(out, 0, sizeof *out);
    if (len < OTA_ESP_APP_DESCRIPTOR_SIZE) {
        return ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_HEADER, OTA_ESP_DESCRIPTOR_OFFSET + len, 0,
                             "an app descriptor has %d bytes, here are %zu", OTA_ESP_APP_DESCRIPTOR_SIZE, len);
    }
    if (!is_app_descriptor(data)) {
        return ota_error_set(error, OTA_ERR_IMAGE_DESCRIPTOR, OTA_STAGE_HEADER, OTA_ESP_DESCRIPTOR_OFFSET, 0,
                             "0x%08x where the magic number 0x%08x of an app descriptor should be",
                             ota_load_u32le(data), APP_DESCRIPTOR_MAGIC);
    }
    load_app_descriptor(data, out);
    return OTA_OK;
}

void ota_esp_app_descriptor_build(const ota_esp_app_descriptor *descriptor, uint8_t out[OTA_ESP_APP_DESCRIPTOR_SIZE]) {
    memset(out, 0, OTA_ESP_APP_DESCRIPTOR_SIZE);
    ota_store_u32le(out, APP_DESCRIPTOR_MAGIC);
    ota_store_u32le(out + 4, descriptor->secure_version);
    store_string(out + 16, descriptor->version, 32);
    store_string(out + 48, descriptor->project_name, 32);
    store_string(out + 80, descriptor->time, 16);
    store_string(out + 96, descriptor->date, 16);
    store_string(out + 112, descriptor->idf_version, 32);
    memcpy(out + 144, descriptor->elf_sha256, sizeof descriptor->elf_sha256);
    ota_store_u16le(out + 176, descriptor->min_efuse_block_rev_full);
    ota_store_u16le(out + 178, descriptor->max_efuse_block_rev_full);
    out[180] = descriptor->mmu_page_size_log2;
    out[181] = descriptor->spi_flash_mode;
}

static void load_bootloader_descriptor(const uint8_t *data, ota_esp_bootloader_descriptor *out) {
    memset(out, 0, sizeof *out);
    out->secure_version = data[3];
    out->version = ota_load_u32le(data + 4);
    load_string(out->idf_version, data + 8, 32);
    load_string(out->date_time, data + 40, 24);
}

ota_status ota_esp_bootloader_descriptor_parse(const uint8_t *data, size_t len, ota_esp_bootloader_descriptor *out,
                                               ota_error *error) {
    memset(out, 0, sizeof *out);
    if (len < OTA_ESP_BOOTLOADER_DESCRIPTOR_SIZE) {
        return ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_HEADER, OTA_ESP_DESCRIPTOR_OFFSET + len, 0,
                             "a boot loader descriptor has %d bytes, here are %zu", OTA_ESP_BOOTLOADER_DESCRIPTOR_SIZE,
                             len);
    }
    if (data[0] != BOOTLOADER_DESCRIPTOR_MAGIC) {
        return ota_error_set(error, OTA_ERR_IMAGE_DESCRIPTOR, OTA_STAGE_HEADER, OTA_ESP_DESCRIPTOR_OFFSET, 0,
                             "0x%02x where the magic byte 0x50 of a boot loader descriptor should be", data[0]);
    }
    load_bootloader_descriptor(data, out);
    return OTA_OK;
}

/* ---- What a device accepts --------------------------------------------------------------------------------------- */

/* 0 and 65535 mean that no limit was set. */
static bool limit_set(uint16_t limit) {
    return limit != 0 && limit != 0xFFFF;
}

ota_status ota_esp_image_rules_check_header(const ota_esp_image_rules *rules, const ota_esp_image_header *header,
                                            ota_error *error) {
    if (rules->chip_id != OTA_ESP_CHIP_ANY && header->chip_id != rules->chip_id) {
        return ota_error_set(error, OTA_ERR_IMAGE_CHIP, OTA_STAGE_VERIFY, 12, 0,
                             "the image is for %s (chip id %u), the target is %s (chip id %u)",
                             chip_title(header->chip_id), header->chip_id, chip_title(rules->chip_id), rules->chip_id);
    }
    if (rules->chip_revision == OTA_ESP_UNSET) {
        return OTA_OK;
    }
    uint32_t revision = rules->chip_revision;
    uint32_t min = header->min_chip_rev_full, max = header->max_chip_rev_full;
    if (revision < min) {
        return ota_error_set(error, OTA_ERR_IMAGE_REVISION, OTA_STAGE_VERIFY, 15, 0,
                             "the image needs chip revision v%u.%u or newer, the target is v%u.%u", min / 100,
                             min % 100, revision / 100, revision % 100);
    }
    if (rules->kind != OTA_ESP_IMAGE_BOOTLOADER && !rules->ignore_max_revision &&
        limit_set(header->max_chip_rev_full) && revision > max) {
        return ota_error_set(error, OTA_ERR_IMAGE_REVISION, OTA_STAGE_VERIFY, 17, 0,
                             "the image runs on chip revisions up to v%u.%u, the target is v%u.%u", max / 100,
                             max % 100, revision / 100, revision % 100);
    }
    return OTA_OK;
}

ota_status ota_esp_image_rules_check_descriptor(const ota_esp_image_rules *rules, const ota_esp_image_header *header,
                                                const ota_esp_app_descriptor *descriptor, ota_error *error) {
    uint32_t revision = rules->efuse_block_revision;
    if (revision != OTA_ESP_UNSET && header->chip_id != CHIP_ID_ESP32) {
        uint32_t min = descriptor->min_efuse_block_rev_full, max = descriptor->max_efuse_block_rev_full;
        if (limit_set(descriptor->min_efuse_block_rev_full) && revision < min) {
            return ota_error_set(error, OTA_ERR_IMAGE_REVISION, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET + 176, 0,
                                 "the image needs eFuse block revision v%u.%u or newer, the target has v%u.%u",
                                 min / 100, min % 100, revision / 100, revision % 100);
        }
        if (limit_set(descriptor->max_efuse_block_rev_full) && revision > max) {
            return ota_error_set(error, OTA_ERR_IMAGE_REVISION, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET + 178, 0,
                                 "the image knows eFuse block revisions up to v%u.%u, the target has v%u.%u", max / 100,
                                 max % 100, revision / 100, revision % 100);
        }
    }
    if (rules->spi_flash_mode != 0 && descriptor->spi_flash_mode != 0 &&
        rules->spi_flash_mode != descriptor->spi_flash_mode) {
        return ota_error_set(error, OTA_ERR_IMAGE_FLASH_MODE, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET + 181, 0,
                             "the image was built for SPI flash mode %u, the running one for %u",
                             descriptor->spi_flash_mode, rules->spi_flash_mode);
    }
    return OTA_OK;
}

/* ---- Checker ----------------------------------------------------------------------------------------------------- */

const char *ota_esp_image_state_name(ota_esp_image_state state) {
    switch (state) {
    case OTA_ESP_IMAGE_STATE_HEADER:
        return "header";
    case OTA_ESP_IMAGE_STATE_SEGMENT_HEADER:
        return "segment header";
    case OTA_ESP_IMAGE_STATE_SEGMENT_DATA:
        return "segment data";
    case OTA_ESP_IMAGE_STATE_PADDING:
        return "checksum";
    case OTA_ESP_IMAGE_STATE_HASH:
        return "appended hash";
    case OTA_ESP_IMAGE_STATE_COMPLETE:
        return "complete";
    case OTA_ESP_IMAGE_STATE_FAILED:
        return "failed";
    }
    return "?";
}

ota_status ota_esp_image_check_begin(ota_esp_image_check *check, const ota_esp_image_rules *rules, ota_error *error) {
    memset(check, 0, sizeof *check);
    check->rules = *rules;
    check->xor_sum = CHECKSUM_SEED;
    EVP_MD_CTX *sha256 = EVP_MD_CTX_new();
    if (sha256 == NULL || EVP_DigestInit_ex(sha256, EVP_sha256(), NULL) != 1) {
        EVP_MD_CTX_free(sha256);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_VERIFY, 0, 0, "libcrypto gives no SHA-256 context");
    }
    check->sha256 = sha256;
    return OTA_OK;
}

void ota_esp_image_check_end(ota_esp_image_check *check) {
    EVP_MD_CTX_free(check->sha256);
    check->sha256 = NULL;
}

static ota_status repeat_error(const ota_esp_image_check *check, ota_error *error) {
    if (error != NULL && error->status == OTA_OK) {
        *error = check->error;
    }
    return check->error.status;
}

/* The first error has been written to check->error. */
static void fail(ota_esp_image_check *check) {
    check->state = OTA_ESP_IMAGE_STATE_FAILED;
    check->offset = check->error.offset;
}

/* Without an appended hash nobody asks for the digest. */
static void digest(ota_esp_image_check *check, const uint8_t *data, size_t len) {
    if (len > 0 && (!check->has_header || check->header.hash_appended) &&
        EVP_DigestUpdate(check->sha256, data, len) != 1) {
        ota_error_set(&check->error, OTA_ERR_SYSTEM, OTA_STAGE_VERIFY, check->offset, 0, "libcrypto failed to hash");
    }
}

static uint8_t xor_bytes(uint8_t sum, const uint8_t *data, size_t len) {
    uint64_t wide[4] = {0, 0, 0, 0};
    for (; len >= sizeof wide; data += sizeof wide, len -= sizeof wide) {
        uint64_t words[4];
        memcpy(words, data, sizeof words);
        for (int i = 0; i < 4; i++) {
            wide[i] ^= words[i];
        }
    }
    uint64_t folded = wide[0] ^ wide[1] ^ wide[2] ^ wide[3];
    folded ^= folded >> 32;
    folded ^= folded >> 16;
    folded ^= folded >> 8;
    sum ^= (uint8_t)folded;
    for (; len > 0; len--) {
        sum ^= *data++;
    }
    return sum;
}

/* Takes bytes until check->gathered holds `want`; returns how many it took. */
static size_t gather(ota_esp_image_check *check, const uint8_t *data, size_t len, size_t want) {
    size_t take = want - check->gathered_len < len ? want - check->gathered_len : len;
    memcpy(check->gathered + check->gathered_len, data, take);
    check->gathered_len += (uint32_t)take;
    return take;
}

/* MMU page of the image, bytes. */
static uint32_t page_size(const ota_esp_image_check *check) {
    uint8_t log2 = check->has_descriptor ? check->descriptor.mmu_page_size_log2 : 0;
    if (log2 < check->chip->page_min_log2 || log2 > check->chip->page_max_log2) {
        log2 = PAGE_LOG2_DEFAULT;
    }
    return 1u << log2;
}

static void check_page(ota_esp_image_check *check, uint8_t index) {
    const ota_esp_segment *segment = &check->segments[index];
    if (!segment->mapped) {
        return;
    }
    uint32_t page = page_size(check);
    if (segment->data_offset % page != segment->load_addr % page) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_STRUCTURE, OTA_STAGE_VERIFY, segment->header_offset, 0,
                      "segment %u cannot be mapped: load address 0x%08x and offset 0x%x differ in the %u KiB page",
                      index, segment->load_addr, segment->data_offset, page / 1024);
    }
}

/* The data of segment 0 is there as far as a descriptor reaches, or ended before. */
static void take_descriptor(ota_esp_image_check *check) {
    const uint8_t *data = check->gathered;
    uint32_t len = check->gathered_len;
    if (len >= OTA_ESP_APP_DESCRIPTOR_SIZE && is_app_descriptor(data) &&
        check->rules.kind != OTA_ESP_IMAGE_BOOTLOADER) {
        check->has_descriptor = true;
        load_app_descriptor(data, &check->descriptor);
        if (ota_esp_image_rules_check_descriptor(&check->rules, &check->header, &check->descriptor, &check->error) <
            0) {
            return;
        }
    } else if (check->rules.kind == OTA_ESP_IMAGE_APP) {
        if (len < OTA_ESP_APP_DESCRIPTOR_SIZE) {
            ota_error_set(&check->error, OTA_ERR_IMAGE_DESCRIPTOR, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET, 0,
                          "segment 0 has %u bytes, too few for an app descriptor", len);
        } else {
            ota_error_set(&check->error, OTA_ERR_IMAGE_DESCRIPTOR, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET, 0,
                          "0x%08x where the magic number 0x%08x of an app descriptor should be", ota_load_u32le(data),
                          APP_DESCRIPTOR_MAGIC);
        }
        return;
    } else if (len >= OTA_ESP_BOOTLOADER_DESCRIPTOR_SIZE && data[0] == BOOTLOADER_DESCRIPTOR_MAGIC) {
        check->has_bootloader_descriptor = true;
        load_bootloader_descriptor(data, &check->bootloader_descriptor);
    }
    check_page(check, 0);
}

static void take_header(ota_esp_image_check *check) {
    const uint8_t *data = check->gathered;
    if (parse_header(data, OTA_ESP_IMAGE_HEADER_SIZE, &check->header, OTA_STAGE_VERIFY, &check->error) < 0 ||
        ota_esp_image_rules_check_header(&check->rules, &check->header, &check->error) < 0) {
        check->has_header = check->header.segment_count != 0; /* to look at: another chip's image */
        return;
    }
    digest(check, data, OTA_ESP_IMAGE_HEADER_SIZE);
    check->has_header = true;
    check->chip = ota_esp_chip_by_id(check->header.chip_id);
    check->state = OTA_ESP_IMAGE_STATE_SEGMENT_HEADER;
    check->gathered_len = 0;
}

static bool is_last(const ota_esp_image_check *check) {
    return check->segment_count == check->header.segment_count;
}

static void end_segment(ota_esp_image_check *check) {
    check->state = is_last(check) ? OTA_ESP_IMAGE_STATE_PADDING : OTA_ESP_IMAGE_STATE_SEGMENT_HEADER;
    check->gathered_len = 0;
}

static void too_large(ota_esp_image_check *check, uint64_t offset, uint64_t needed) {
    ota_error_set(&check->error, OTA_ERR_TOO_LARGE, OTA_STAGE_VERIFY, offset, 0,
                  "the image needs %s%llu bytes, the slot has %llu", is_last(check) ? "" : "more than ",
                  (unsigned long long)needed, (unsigned long long)check->rules.slot_size);
}

/* Room for `needed` bytes in the slot and within 32-bit offsets? */
static bool fits(const ota_esp_image_check *check, uint64_t needed) {
    return check->rules.slot_size == 0 || needed <= check->rules.slot_size;
}

static void take_segment_header(ota_esp_image_check *check) {
    uint8_t index = check->segment_count++;
    ota_esp_segment *segment = &check->segments[index];
    uint64_t header_offset = check->offset - OTA_ESP_SEGMENT_HEADER_SIZE, data_offset = check->offset;
    segment->header_offset = (uint32_t)header_offset;
    segment->data_offset = (uint32_t)data_offset;
    segment->load_addr = ota_load_u32le(check->gathered);
    segment->size = ota_load_u32le(check->gathered + 4);
    segment->mapped = check->chip != NULL && is_mapped(check->chip, segment->load_addr);
    if (segment->size % 4 != 0) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_STRUCTURE, OTA_STAGE_VERIFY, header_offset, 0,
                      "segment %u has %u bytes, not a multiple of 4", index, segment->size);
        return;
    }
    bool large = check->chip == NULL || check->chip->large_segments;
    if ((!large && segment->size >= SEGMENT_LIMIT) || data_offset + segment->size > UINT32_MAX) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_STRUCTURE, OTA_STAGE_VERIFY, header_offset, 0,
                      "segment %u has %u bytes, more than the chip can address", index, segment->size);
        return;
    }
    uint64_t end = data_offset + segment->size;
    uint64_t size = end - end % 16 + 16 + (check->header.hash_appended ? OTA_ESP_IMAGE_HASH_SIZE : 0);
    if (!fits(check, is_last(check) ? size : end)) {
        too_large(check, header_offset, is_last(check) ? size : end);
        return;
    }
    if (is_last(check)) {
        check->image_size = size;
    }
    if (index == 0 && check->rules.kind == OTA_ESP_IMAGE_APP && segment->size < OTA_ESP_APP_DESCRIPTOR_SIZE) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_DESCRIPTOR, OTA_STAGE_VERIFY, OTA_ESP_DESCRIPTOR_OFFSET, 0,
                      "segment 0 has %u bytes, too few for an app descriptor", segment->size);
        return;
    }
    if (index > 0) { /* the page size of segment 0 is known when its descriptor is */
        check_page(check, index);
    }
    digest(check, check->gathered, OTA_ESP_SEGMENT_HEADER_SIZE);
    check->segment_left = segment->size;
    check->state = OTA_ESP_IMAGE_STATE_SEGMENT_DATA;
    check->gathered_len = 0;
    if (segment->size == 0) {
        if (index == 0) {
            take_descriptor(check);
        }
        end_segment(check);
    }
}

/* Data of a segment: hashed, summed, and gathered as far as a descriptor goes. Returns how many bytes it took. */
static size_t take_segment_data(ota_esp_image_check *check, const uint8_t *data, size_t len) {
    size_t take = check->segment_left < len ? check->segment_left : len;
    bool gathering = check->segment_count == 1 && check->gathered_len < OTA_ESP_APP_DESCRIPTOR_SIZE;
    if (gathering) { /* up to the descriptor's end and no further, so that it is checked before what follows */
        take = gather(check, data, take, OTA_ESP_APP_DESCRIPTOR_SIZE);
    }
    digest(check, data, take);
    check->xor_sum = xor_bytes(check->xor_sum, data, take);
    check->segment_left -= (uint32_t)take;
    check->offset += take;
    if (gathering && (check->gathered_len == OTA_ESP_APP_DESCRIPTOR_SIZE || check->segment_left == 0)) {
        take_descriptor(check);
    }
    if (check->segment_left == 0) {
        end_segment(check);
    }
    return take;
}

static void take_checksum(ota_esp_image_check *check, uint8_t stored) {
    check->checksum_stored = stored;
    check->checksum_computed = check->xor_sum;
    if (stored != check->xor_sum) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_CHECKSUM, OTA_STAGE_VERIFY, check->offset - 1, 0,
                      "the image checksum is 0x%02x, its data gives 0x%02x", stored, check->xor_sum);
        return;
    }
    check->state = check->header.hash_appended ? OTA_ESP_IMAGE_STATE_HASH : OTA_ESP_IMAGE_STATE_COMPLETE;
    check->gathered_len = 0;
    if (check->header.hash_appended && EVP_DigestFinal_ex(check->sha256, check->hash_computed, NULL) != 1) {
        ota_error_set(&check->error, OTA_ERR_SYSTEM, OTA_STAGE_VERIFY, check->offset, 0, "libcrypto failed to hash");
    }
}

static void take_hash(ota_esp_image_check *check) {
    memcpy(check->hash_stored, check->gathered, OTA_ESP_IMAGE_HASH_SIZE);
    if (memcmp(check->hash_stored, check->hash_computed, OTA_ESP_IMAGE_HASH_SIZE) != 0) {
        ota_error_set(&check->error, OTA_ERR_IMAGE_HASH, OTA_STAGE_VERIFY, check->offset - OTA_ESP_IMAGE_HASH_SIZE, 0,
                      "the appended SHA-256 begins with %02x%02x%02x%02x, the image gives %02x%02x%02x%02x",
                      check->hash_stored[0], check->hash_stored[1], check->hash_stored[2], check->hash_stored[3],
                      check->hash_computed[0], check->hash_computed[1], check->hash_computed[2],
                      check->hash_computed[3]);
        return;
    }
    check->state = OTA_ESP_IMAGE_STATE_COMPLETE;
}

/* Takes at least one of `len` bytes, len > 0; returns how many. */
static size_t step(ota_esp_image_check *check, const uint8_t *data, size_t len) {
    size_t take = len;
    switch (check->state) {
    case OTA_ESP_IMAGE_STATE_HEADER:
        take = gather(check, data, len, OTA_ESP_IMAGE_HEADER_SIZE);
        check->offset += take;
        if (check_start(check->gathered, check->gathered_len, OTA_STAGE_VERIFY, &check->error) == OTA_OK &&
            check->gathered_len == OTA_ESP_IMAGE_HEADER_SIZE) {
            take_header(check);
        }
        break;
    case OTA_ESP_IMAGE_STATE_SEGMENT_HEADER:
        take = gather(check, data, len, OTA_ESP_SEGMENT_HEADER_SIZE);
        check->offset += take;
        if (check->gathered_len == OTA_ESP_SEGMENT_HEADER_SIZE) {
            take_segment_header(check);
        }
        break;
    case OTA_ESP_IMAGE_STATE_SEGMENT_DATA:
        take = take_segment_data(check, data, len);
        break;
    case OTA_ESP_IMAGE_STATE_PADDING: {
        size_t left = (size_t)(16 - check->offset % 16);
        take = left < len ? left : len;
        digest(check, data, take);
        check->offset += take;
        if (take == left) {
            take_checksum(check, data[take - 1]);
        }
        break;
    }
    case OTA_ESP_IMAGE_STATE_HASH:
        take = gather(check, data, len, OTA_ESP_IMAGE_HASH_SIZE);
        check->offset += take;
        if (check->gathered_len == OTA_ESP_IMAGE_HASH_SIZE) {
            take_hash(check);
        }
        break;
    case OTA_ESP_IMAGE_STATE_COMPLETE:
        if (!check->rules.bytes_after_allowed) {
            ota_error_set(&check->error, OTA_ERR_SIZE, OTA_STAGE_VERIFY, check->image_size, 0,
                          "bytes follow the end of the image at %llu", (unsigned long long)check->image_size);
            break;
        }
        check->offset += len;
        check->bytes_after += len;
        break;
    case OTA_ESP_IMAGE_STATE_FAILED:
        break;
    }
    return take;
}

ota_status ota_esp_image_check_update(ota_esp_image_check *check, const uint8_t *data, size_t len, ota_error *error) {
    while (len > 0 && check->state != OTA_ESP_IMAGE_STATE_FAILED) {
        size_t take = step(check, data, len);
        data += take;
        len -= take;
        if (check->error.status != OTA_OK) {
            fail(check);
        }
    }
    if (check->state == OTA_ESP_IMAGE_STATE_FAILED) {
        return repeat_error(check, error);
    }
    return check->state == OTA_ESP_IMAGE_STATE_COMPLETE ? OTA_DONE : OTA_OK;
}

ota_status ota_esp_image_check_finish(ota_esp_image_check *check, ota_error *error) {
    if (check->state == OTA_ESP_IMAGE_STATE_COMPLETE) {
        return OTA_OK;
    }
    if (check->state != OTA_ESP_IMAGE_STATE_FAILED) {
        if (check->image_size != 0) {
            ota_error_set(&check->error, OTA_ERR_INCOMPLETE, OTA_STAGE_VERIFY, check->offset, 0,
                          "the image has %llu bytes, only %llu came (%s)", (unsigned long long)check->image_size,
                          (unsigned long long)check->offset, ota_esp_image_state_name(check->state));
        } else {
            ota_error_set(&check->error, OTA_ERR_INCOMPLETE, OTA_STAGE_VERIFY, check->offset, 0,
                          "the image ends after %llu bytes (%s)", (unsigned long long)check->offset,
                          ota_esp_image_state_name(check->state));
        }
        fail(check);
    }
    return repeat_error(check, error);
}
