/* sources: esp/esp_image.c base/bytes.c base/status.c */
/* libs: libcrypto zlib */
/* The image checker fed whole, byte by byte, in random slices and cut at every length; every byte of an image changed. The
 * images of the vectors are compared in tests/conformance. */
#include "esp/esp_image.h"

#include <openssl/evp.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "check.h"

static ota_error error;

/* ---- Images made here --------------------------------------------------------------------------------------------- */

typedef struct image {
    uint8_t *bytes;
    size_t len, checksum_offset;
} image;

static const ota_esp_image_header plain_header = {
    .spi_mode = 2, .wp_pin = 0xEE, .chip_id = 5, .min_chip_rev_full = 3, .max_chip_rev_full = 199, .hash_appended = 1};
static const ota_esp_app_descriptor plain_descriptor = {
    .version = "1.2.3", .project_name = "checker", .mmu_page_size_log2 = 16, .secure_version = 7};

/* An image of segments of the sizes given, the first one with an app descriptor where it has room for one. */
static image make_with(const ota_esp_image_header *header, const ota_esp_app_descriptor *descriptor,
                       const uint32_t *sizes, uint8_t count) {
    image made = {.len = 24};
    ota_esp_image_header own = *header;
    own.segment_count = count;
    for (uint8_t i = 0; i < count; i++) {
        made.len += 8 + sizes[i];
    }
    made.checksum_offset = made.len + 15 - made.len % 16;
    made.len = made.checksum_offset + 1 + (own.hash_appended ? 32 : 0);
    made.bytes = calloc(1, made.len);
    ota_esp_image_header_build(&own, made.bytes);
    size_t at = 24;
    uint8_t sum = 0xEF;
    for (uint8_t i = 0; i < count; i++) {
        ota_store_u32le(made.bytes + at, i == 0 ? 0x3C000020 : 0x40380000);
        ota_store_u32le(made.bytes + at + 4, sizes[i]);
        at += 8;
        for (uint32_t k = 0; k < sizes[i]; k++) {
            made.bytes[at + k] = (uint8_t)(k * 31 + i + (k >> 8));
        }
        if (i == 0 && sizes[0] >= OTA_ESP_APP_DESCRIPTOR_SIZE) {
            ota_esp_app_descriptor_build(descriptor, made.bytes + at);
        }
        for (uint32_t k = 0; k < sizes[i]; k++) {
            sum ^= made.bytes[at + k];
        }
        at += sizes[i];
    }
    made.bytes[made.checksum_offset] = sum;
    if (own.hash_appended) {
        EVP_Digest(made.bytes, made.checksum_offset + 1, made.bytes + made.checksum_offset + 1, NULL, EVP_sha256(),
                   NULL);
    }
    return made;
}

static image make(void) {
    static const uint32_t sizes[] = {300, 0, 132};
    return make_with(&plain_header, &plain_descriptor, sizes, 3);
}

static ota_esp_image_rules rules_of(ota_esp_image_kind kind) {
    ota_esp_image_rules rules = OTA_ESP_IMAGE_RULES_NONE;
    rules.kind = (uint8_t)kind;
    return rules;
}

/* Feeds pieces of `piece` bytes, or of random sizes up to 97 where it is 0, and says how that ended. The bytes lie in an
 * allocation of exactly their size, so that ASan sees every read beyond. */
static ota_status feed(ota_esp_image_check *check, const ota_esp_image_rules *rules, const uint8_t *bytes, size_t len,
                       size_t piece, unsigned *seed) {
    ota_error own = {0};
    CHECK_EQ(ota_esp_image_check_begin(check, rules, &own), OTA_OK);
    for (size_t at = 0; at < len;) {
        size_t take = piece != 0 ? piece : 1 + (size_t)rand_r(seed) % 97;
        take = take < len - at ? take : len - at;
        uint8_t *copy = malloc(take);
        memcpy(copy, bytes + at, take);
        ota_status status = ota_esp_image_check_update(check, copy, take, &own);
        free(copy);
        CHECK(status == OTA_OK || status == OTA_DONE || status == own.status);
        at += take;
    }
    ota_status status = ota_esp_image_check_finish(check, &own);
    CHECK_EQ(status, own.status);
    CHECK_EQ(check->error.status, status);
    ota_esp_image_check_end(check);
    return status;
}

static ota_status check_whole(const ota_esp_image_rules *rules, const uint8_t *bytes, size_t len) {
    ota_esp_image_check check;
    return feed(&check, rules, bytes, len, len ? len : 1, NULL);
}

/* Everything a caller may look at, private parts left out. */
static bool same(const ota_esp_image_check *a, const ota_esp_image_check *b) {
    return a->state == b->state && a->offset == b->offset && a->image_size == b->image_size &&
           a->bytes_after == b->bytes_after && a->has_header == b->has_header &&
           a->has_descriptor == b->has_descriptor && a->has_bootloader_descriptor == b->has_bootloader_descriptor &&
           a->chip == b->chip && a->segment_count == b->segment_count &&
           memcmp(&a->header, &b->header, sizeof a->header) == 0 &&
           memcmp(&a->descriptor, &b->descriptor, sizeof a->descriptor) == 0 &&
           memcmp(a->segments, b->segments, sizeof a->segments) == 0 && a->checksum_stored == b->checksum_stored &&
           a->checksum_computed == b->checksum_computed && memcmp(a->hash_stored, b->hash_stored, 32) == 0 &&
           memcmp(a->hash_computed, b->hash_computed, 32) == 0 && memcmp(&a->error, &b->error, sizeof a->error) == 0;
}

/* ---- Records ------------------------------------------------------------------------------------------------------ */

TEST(a_header_is_what_it_was_built_from) {
    uint8_t bytes[24], again[24];
    ota_esp_image_header header = {.segment_count = 16,
                                   .spi_mode = 3,
                                   .spi_speed = 0xF,
                                   .spi_size = 4,
                                   .entry_addr = 0x40380123,
                                   .wp_pin = 0xEE,
                                   .spi_pin_drv = {1, 2, 3},
                                   .chip_id = 0x1234,
                                   .min_chip_rev = 9,
                                   .min_chip_rev_full = 301,
                                   .max_chip_rev_full = 65535,
                                   .hash_appended = 1};
    ota_esp_image_header parsed;
    ota_esp_image_header_build(&header, bytes);
    CHECK_EQ(ota_esp_image_header_parse(bytes, sizeof bytes, &parsed, &error), OTA_OK);
    ota_esp_image_header_build(&parsed, again);
    CHECK_MEM(again, bytes, sizeof bytes);
    CHECK_EQ(parsed.spi_size, 4);
    CHECK_EQ(parsed.spi_speed, 0xF);
    CHECK_EQ(parsed.max_chip_rev_full, 65535);
}

TEST(a_header_that_is_none_is_refused) {
    uint8_t bytes[24];
    ota_esp_image_header parsed;
    ota_esp_image_header one = plain_header;
    one.segment_count = 1;
    ota_esp_image_header_build(&one, bytes);
    for (size_t len = 0; len < sizeof bytes; len++) {
        ota_error own = {0};
        CHECK_EQ(ota_esp_image_header_parse(bytes, len, &parsed, &own), OTA_ERR_INCOMPLETE);
    }
    struct {
        size_t at;
        uint8_t value;
        ota_status status;
    } wrong[] = {{0, 0xEA, OTA_ERR_IMAGE_MAGIC},
                 {0, 'E', OTA_ERR_IMAGE_MAGIC},
                 {1, 0, OTA_ERR_UNSUPPORTED},
                 {1, 17, OTA_ERR_IMAGE_STRUCTURE},
                 {23, 2, OTA_ERR_IMAGE_STRUCTURE}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        ota_error own = {0};
        uint8_t kept = bytes[wrong[i].at];
        bytes[wrong[i].at] = wrong[i].value;
        CHECK_EQ(ota_esp_image_header_parse(bytes, sizeof bytes, &parsed, &own), wrong[i].status);
        CHECK_EQ(own.offset, wrong[i].at);
        CHECK_EQ(own.stage, OTA_STAGE_HEADER);
        bytes[wrong[i].at] = kept;
    }
    ota_error own = {0};
    CHECK_EQ(ota_esp_image_header_parse((const uint8_t *)"ESP\0", 4, &parsed, &own), OTA_ERR_UNSUPPORTED);
    CHECK(strstr(own.text, "compressed") != NULL);
}

TEST(strings_that_fill_their_field_are_bounded) {
    uint8_t bytes[256], again[256];
    ota_esp_app_descriptor descriptor = plain_descriptor, parsed;
    memset(descriptor.version, 'v', 32);
    memset(descriptor.project_name, 'p', 32);
    memset(descriptor.time, 't', 16);
    memset(descriptor.date, 'd', 16);
    memset(descriptor.idf_version, 'i', 32);
    ota_esp_app_descriptor_build(&descriptor, bytes);
    CHECK_EQ(bytes[16 + 31], 'v');
    CHECK_EQ(bytes[16 + 32], 'p');
    CHECK_EQ(ota_esp_app_descriptor_parse(bytes, sizeof bytes, &parsed, &error), OTA_OK);
    CHECK_EQ(strlen(parsed.version), 32);
    CHECK_EQ(strlen(parsed.project_name), 32);
    CHECK_EQ(strlen(parsed.time), 16);
    CHECK_EQ(strlen(parsed.date), 16);
    CHECK_EQ(strlen(parsed.idf_version), 32);
    ota_esp_app_descriptor_build(&parsed, again);
    CHECK_MEM(again, bytes, sizeof bytes);
    bytes[16] = 0; /* what follows the first NUL is not part of the string */
    CHECK_EQ(ota_esp_app_descriptor_parse(bytes, sizeof bytes, &parsed, &error), OTA_OK);
    CHECK_EQ(parsed.version[0], 0);
    CHECK_EQ(parsed.version[1], 0);
    for (size_t len = 0; len < sizeof bytes; len++) {
        ota_error own = {0};
        CHECK_EQ(ota_esp_app_descriptor_parse(bytes, len, &parsed, &own), OTA_ERR_INCOMPLETE);
    }
}

TEST(a_boot_loader_descriptor_is_read) {
    uint8_t bytes[80] = {0x50, 0, 0, 2, 5, 0, 0, 0, 'v', '6'};
    ota_esp_bootloader_descriptor parsed;
    memset(bytes + 40, 'd', 24);
    CHECK_EQ(ota_esp_bootloader_descriptor_parse(bytes, sizeof bytes, &parsed, &error), OTA_OK);
    CHECK_EQ(parsed.secure_version, 2);
    CHECK_EQ(parsed.version, 5);
    CHECK(strcmp(parsed.idf_version, "v6") == 0);
    CHECK_EQ(strlen(parsed.date_time), 24);
    ota_error own = {0};
    CHECK_EQ(ota_esp_bootloader_descriptor_parse(bytes, 79, &parsed, &own), OTA_ERR_INCOMPLETE);
    bytes[0] = 0x51;
    own.status = OTA_OK;
    CHECK_EQ(ota_esp_bootloader_descriptor_parse(bytes, sizeof bytes, &parsed, &own), OTA_ERR_IMAGE_DESCRIPTOR);
}

TEST(chips_are_found_by_id_and_by_name) {
    size_t count = 0;
    const ota_esp_chip *all = ota_esp_chips(&count);
    CHECK_EQ(count, 14);
    for (size_t i = 0; i < count; i++) {
        CHECK(ota_esp_chip_by_id(all[i].id) == &all[i]);
        CHECK(ota_esp_chip_by_name(all[i].name) == &all[i]);
        CHECK(ota_esp_chip_by_name(all[i].title) == &all[i]);
        CHECK(all[i].bootloader_offset % 0x1000 == 0);
    }
    CHECK(ota_esp_chip_by_id(4) == NULL);
    CHECK(ota_esp_chip_by_id(0xFFFF) == NULL);
    CHECK(ota_esp_chip_by_name("esp8266") == NULL);
    CHECK(ota_esp_chip_by_name("") == NULL);
}

/* ---- Rules -------------------------------------------------------------------------------------------------------- */

TEST(revisions_are_compared_as_devices_do) {
    ota_esp_image_header header = {.chip_id = 5, .min_chip_rev_full = 101, .max_chip_rev_full = 199};
    ota_esp_image_rules rules = OTA_ESP_IMAGE_RULES_NONE;
    struct {
        uint32_t revision;
        uint16_t max;
        bool bootloader, ignore;
        ota_status status;
    } cases[] = {
        {OTA_ESP_UNSET, 199, false, false, OTA_OK},
        {101, 199, false, false, OTA_OK},
        {100, 199, false, false, OTA_ERR_IMAGE_REVISION},
        {199, 199, false, false, OTA_OK},
        {200, 199, false, false, OTA_ERR_IMAGE_REVISION},
        {200, 199, false, true, OTA_OK},
        {200, 199, true, false, OTA_OK},
        {100, 199, true, false, OTA_ERR_IMAGE_REVISION},
        {999, 0, false, false, OTA_OK},
        {999, 65535, false, false, OTA_OK},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_error own = {0};
        rules.chip_revision = cases[i].revision;
        rules.kind = cases[i].bootloader ? OTA_ESP_IMAGE_BOOTLOADER : OTA_ESP_IMAGE_APP;
        rules.ignore_max_revision = cases[i].ignore;
        header.max_chip_rev_full = cases[i].max;
        CHECK_EQ(ota_esp_image_rules_check_header(&rules, &header, &own), cases[i].status);
    }
    rules = OTA_ESP_IMAGE_RULES_NONE;
    rules.chip_id = 9;
    ota_error own = {0};
    CHECK_EQ(ota_esp_image_rules_check_header(&rules, &header, &own), OTA_ERR_IMAGE_CHIP);
    CHECK(strstr(own.text, "ESP32-C3") != NULL && strstr(own.text, "ESP32-S3") != NULL);
}

TEST(efuse_block_and_flash_mode_are_compared_where_both_are_stated) {
    ota_esp_image_header header = {.chip_id = 5};
    ota_esp_app_descriptor descriptor = {
        .min_efuse_block_rev_full = 1, .max_efuse_block_rev_full = 99, .spi_flash_mode = 3};
    ota_esp_image_rules rules = OTA_ESP_IMAGE_RULES_NONE;
    struct {
        uint16_t chip;
        uint32_t block;
        uint8_t mode;
        ota_status status;
    } cases[] = {
        {5, OTA_ESP_UNSET, 0, OTA_OK},
        {5, 0, 0, OTA_ERR_IMAGE_REVISION},
        {5, 1, 0, OTA_OK},
        {5, 99, 0, OTA_OK},
        {5, 100, 0, OTA_ERR_IMAGE_REVISION},
        {0, 100, 0, OTA_OK},
        {5, 1, 2, OTA_ERR_IMAGE_FLASH_MODE},
        {5, 1, 3, OTA_OK},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_error own = {0};
        header.chip_id = cases[i].chip;
        rules.efuse_block_revision = cases[i].block;
        rules.spi_flash_mode = cases[i].mode;
        CHECK_EQ(ota_esp_image_rules_check_descriptor(&rules, &header, &descriptor, &own), cases[i].status);
    }
    descriptor = (ota_esp_app_descriptor){.max_efuse_block_rev_full = 65535};
    rules.efuse_block_revision = 999;
    rules.spi_flash_mode = 2;
    CHECK_EQ(ota_esp_image_rules_check_descriptor(&rules, &header, &descriptor, &error), OTA_OK);
}

/* ---- Checker ------------------------------------------------------------------------------------------------------ */

TEST(an_image_is_right_in_any_slices) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_check whole, sliced;
    unsigned seed = 1;
    CHECK_EQ(feed(&whole, &rules, made.bytes, made.len, made.len, NULL), OTA_OK);
    CHECK_EQ(whole.state, OTA_ESP_IMAGE_STATE_COMPLETE);
    CHECK_EQ(whole.image_size, made.len);
    CHECK_EQ(whole.segment_count, 3);
    CHECK_EQ(whole.segments[2].size, 132);
    CHECK(whole.segments[0].mapped && !whole.segments[2].mapped);
    CHECK(strcmp(whole.descriptor.project_name, "checker") == 0);
    CHECK_EQ(whole.checksum_stored, made.bytes[made.checksum_offset]);
    CHECK_EQ(feed(&sliced, &rules, made.bytes, made.len, 1, NULL), OTA_OK);
    CHECK(same(&whole, &sliced));
    for (int round = 0; round < 200; round++) {
        CHECK_EQ(feed(&sliced, &rules, made.bytes, made.len, 0, &seed), OTA_OK);
        CHECK(same(&whole, &sliced));
    }
    free(made.bytes);
}

TEST(an_image_cut_anywhere_is_incomplete) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    for (size_t len = 0; len < made.len; len++) {
        ota_esp_image_check whole, sliced;
        CHECK_EQ(feed(&whole, &rules, made.bytes, len, len ? len : 1, NULL), OTA_ERR_INCOMPLETE);
        CHECK_EQ(whole.error.offset, len);
        CHECK_EQ(feed(&sliced, &rules, made.bytes, len, 5, NULL), OTA_ERR_INCOMPLETE);
        CHECK(same(&whole, &sliced));
    }
    free(made.bytes);
}

TEST(every_changed_byte_is_noticed_and_in_the_same_way_in_any_slices) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    unsigned seed = 2, statuses[100] = {0};
    rules.bytes_after_allowed = false; /* hash_appended set to 0 makes the hash bytes after a right image */
    for (size_t at = 0; at < made.len; at++) {
        static const uint8_t bits[] = {0x01, 0x10, 0x80, 0xFF};
        for (size_t i = 0; i < sizeof bits; i++) {
            ota_esp_image_check whole, sliced;
            made.bytes[at] ^= bits[i];
            ota_status status = feed(&whole, &rules, made.bytes, made.len, made.len, NULL);
            CHECK(status < 0); /* the hash covers everything before it */
            statuses[-status]++;
            CHECK_EQ(feed(&sliced, &rules, made.bytes, made.len, 1, NULL), status);
            CHECK(same(&whole, &sliced));
            CHECK_EQ(feed(&sliced, &rules, made.bytes, made.len, 0, &seed), status);
            CHECK(same(&whole, &sliced));
            made.bytes[at] ^= bits[i];
        }
    }
    CHECK(statuses[-OTA_ERR_IMAGE_MAGIC] > 0);
    CHECK(statuses[-OTA_ERR_IMAGE_STRUCTURE] > 0);
    CHECK(statuses[-OTA_ERR_IMAGE_DESCRIPTOR] > 0);
    CHECK(statuses[-OTA_ERR_IMAGE_CHECKSUM] > 1000);
    CHECK(statuses[-OTA_ERR_INCOMPLETE] > 0);
    CHECK_EQ(statuses[-OTA_ERR_SIZE], 1);
    CHECK(statuses[-OTA_ERR_IMAGE_HASH] > 32 * 4);
    free(made.bytes);
}

TEST(garbage_never_reads_beyond_its_bytes) {
    unsigned seed = 3;
    uint8_t bytes[600];
    image made = make();
    for (int round = 0; round < 3000; round++) {
        size_t len = (size_t)rand_r(&seed) % sizeof bytes;
        memcpy(bytes, made.bytes, len < made.len ? len : made.len);
        size_t from = (size_t)rand_r(&seed) % 60; /* keeps the first bytes, so that deeper states are reached */
        for (size_t i = from; i < len; i++) {
            bytes[i] = rand_r(&seed) % 4 ? bytes[i] : (uint8_t)rand_r(&seed);
        }
        for (int kind = OTA_ESP_IMAGE_APP; kind <= OTA_ESP_IMAGE_ANY; kind++) {
            ota_esp_image_rules rules = rules_of((ota_esp_image_kind)kind);
            ota_esp_image_check whole, sliced;
            ota_status status = feed(&whole, &rules, bytes, len, len ? len : 1, NULL);
            CHECK_EQ(feed(&sliced, &rules, bytes, len, 0, &seed), status);
            CHECK(same(&whole, &sliced));
        }
    }
    free(made.bytes);
}

TEST(the_checksum_may_need_no_padding_or_fifteen_bytes) {
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    for (uint32_t size = 256; size < 256 + 64; size += 4) {
        for (int hash = 0; hash < 2; hash++) {
            ota_esp_image_header header = plain_header;
            header.hash_appended = (uint8_t)hash;
            image made = make_with(&header, &plain_descriptor, &size, 1);
            CHECK_EQ(made.len % 16, 0);
            CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_OK);
            CHECK_EQ(check_whole(&rules, made.bytes, made.len - 1), OTA_ERR_INCOMPLETE);
            made.bytes[made.checksum_offset] ^= 4;
            CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_CHECKSUM);
            free(made.bytes);
        }
    }
}

TEST(without_appended_hash_the_checksum_alone_decides) {
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_header header = plain_header;
    ota_esp_image_check check;
    const uint32_t size = 260;
    header.hash_appended = 0;
    image made = make_with(&header, &plain_descriptor, &size, 1);
    CHECK_EQ(feed(&check, &rules, made.bytes, made.len, made.len, NULL), OTA_OK);
    CHECK_EQ(check.image_size, made.checksum_offset + 1);
    made.bytes[made.checksum_offset - 1] ^= 1; /* padding: nothing covers it, and no device looks */
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_OK);
    free(made.bytes);
}

TEST(bytes_behind_the_image_are_counted_or_refused) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_check check;
    uint8_t behind[100];
    memset(behind, 0xFF, sizeof behind);
    CHECK_EQ(ota_esp_image_check_begin(&check, &rules, &error), OTA_OK);
    CHECK_EQ(ota_esp_image_check_update(&check, made.bytes, made.len, &error), OTA_DONE);
    CHECK_EQ(ota_esp_image_check_update(&check, behind, sizeof behind, &error), OTA_DONE);
    CHECK_EQ(check.bytes_after, sizeof behind);
    CHECK_EQ(ota_esp_image_check_finish(&check, &error), OTA_OK);
    ota_esp_image_check_end(&check);
    ota_esp_image_check_end(&check); /* harmless */
    rules.bytes_after_allowed = false;
    CHECK_EQ(ota_esp_image_check_begin(&check, &rules, &error), OTA_OK);
    CHECK_EQ(ota_esp_image_check_update(&check, made.bytes, made.len, &error), OTA_DONE);
    ota_error own = {0};
    CHECK_EQ(ota_esp_image_check_update(&check, behind, 1, &own), OTA_ERR_SIZE);
    CHECK_EQ(own.offset, made.len);
    ota_error repeated = {0};
    CHECK_EQ(ota_esp_image_check_finish(&check, &repeated), OTA_ERR_SIZE);
    CHECK(strcmp(own.text, repeated.text) == 0);
    ota_esp_image_check_end(&check);
    free(made.bytes);
}

TEST(what_the_first_288_bytes_tell_is_told_by_then) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_check check;
    struct {
        size_t at;
        uint8_t value;
        size_t seen;
        ota_status status;
    } cases[] = {{0, 0, 1, OTA_ERR_IMAGE_MAGIC},
                 {12, 9, 24, OTA_ERR_IMAGE_CHIP},
                 {15, 5, 24, OTA_ERR_IMAGE_REVISION},
                 {28, 0xFC, 32, OTA_ERR_IMAGE_DESCRIPTOR}, /* segment 0 of 252 bytes */
                 {32, 0, 288, OTA_ERR_IMAGE_DESCRIPTOR}};
    rules.chip_id = 5;
    rules.chip_revision = 4;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint8_t start[288];
        memcpy(start, made.bytes, sizeof start);
        start[cases[i].at] = cases[i].value;
        if (cases[i].at == 28) {
            start[29] = 0;
        }
        ota_error own = {0};
        CHECK_EQ(ota_esp_image_check_begin(&check, &rules, &own), OTA_OK);
        CHECK_EQ(ota_esp_image_check_update(&check, start, cases[i].seen - 1, &own), OTA_OK);
        CHECK_EQ(ota_esp_image_check_update(&check, start + cases[i].seen - 1, 1, &own), cases[i].status);
        ota_esp_image_check_end(&check);
    }
    free(made.bytes);
}

TEST(segment_rules_are_kept) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_store_u32le(made.bytes + 28, 302);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_STRUCTURE);
    ota_store_u32le(made.bytes + 28, 0x1000000);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_STRUCTURE);
    made.bytes[12] = 9; /* the ESP32-S3 takes segments of 16 MiB and more */
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_INCOMPLETE);
    ota_store_u32le(made.bytes + 28, 0xFFFFFFFC); /* but not what offsets of 32 bits cannot reach */
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_STRUCTURE);
    free(made.bytes);
}

TEST(sixteen_segments_are_the_most) {
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    uint32_t sizes[17];
    for (int i = 0; i < 17; i++) {
        sizes[i] = i == 0 ? 256 : 4;
    }
    image made = make_with(&plain_header, &plain_descriptor, sizes, 16);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_OK);
    free(made.bytes);
    made = make_with(&plain_header, &plain_descriptor, sizes, 17);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_STRUCTURE);
    free(made.bytes);
}

TEST(the_smallest_image_of_any_kind_has_48_bytes) {
    ota_esp_image_header header = plain_header;
    const uint32_t size = 0;
    header.hash_appended = 0;
    image made = make_with(&header, &plain_descriptor, &size, 1);
    CHECK_EQ(made.len, OTA_ESP_IMAGE_SIZE_MIN);
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_ANY);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_OK);
    rules = rules_of(OTA_ESP_IMAGE_APP);
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_DESCRIPTOR);
    free(made.bytes);
}

TEST(the_slot_bounds_the_image_as_soon_as_it_is_known) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_check check;
    rules.slot_size = made.len;
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_OK);
    rules.slot_size = made.len - 1;
    CHECK_EQ(feed(&check, &rules, made.bytes, made.len, 1, NULL), OTA_ERR_TOO_LARGE);
    CHECK_EQ(check.error.offset, check.segments[2].header_offset);
    rules.slot_size = 100;
    CHECK_EQ(feed(&check, &rules, made.bytes, made.len, 1, NULL), OTA_ERR_TOO_LARGE);
    CHECK_EQ(check.error.offset, 24);
    free(made.bytes);
}

TEST(compressed_images_are_called_that) {
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_ANY);
    const uint8_t wrapper[40] = {'E', 'S', 'P', 0, 3, 1};
    ota_esp_image_check check;
    CHECK_EQ(feed(&check, &rules, wrapper, sizeof wrapper, 1, NULL), OTA_ERR_UNSUPPORTED);
    CHECK(strstr(check.error.text, "compressed") != NULL);
    CHECK_EQ(check_whole(&rules, wrapper, 3), OTA_ERR_INCOMPLETE);
    CHECK_EQ(check_whole(&rules, (const uint8_t *)"ESPx", 4), OTA_ERR_IMAGE_MAGIC);
    image made = make();
    made.bytes[1] = 0;
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_UNSUPPORTED);
    free(made.bytes);
}

TEST(an_image_of_an_unknown_chip_is_checked_without_the_page_rule) {
    image made = make();
    ota_esp_image_rules rules = rules_of(OTA_ESP_IMAGE_APP);
    ota_esp_image_check check;
    made.bytes[24] = 0x24;
    CHECK_EQ(check_whole(&rules, made.bytes, made.len), OTA_ERR_IMAGE_STRUCTURE);
    made.bytes[12] = 77;
    CHECK_EQ(feed(&check, &rules, made.bytes, made.len, made.len, NULL), OTA_ERR_IMAGE_HASH);
    CHECK(check.chip == NULL);
    free(made.bytes);
}

TEST(states_have_names) {
    for (int state = 0; state <= OTA_ESP_IMAGE_STATE_FAILED; state++) {
        CHECK(strcmp(ota_esp_image_state_name((ota_esp_image_state)state), "?") != 0);
    }
}

int main(void) {
    RUN(a_header_is_what_it_was_built_from);
    RUN(a_header_that_is_none_is_refused);
    RUN(strings_that_fill_their_field_are_bounded);
    RUN(a_boot_loader_descriptor_is_read);
    RUN(chips_are_found_by_id_and_by_name);
    RUN(revisions_are_compared_as_devices_do);
    RUN(efuse_block_and_flash_mode_are_compared_where_both_are_stated);
    RUN(an_image_is_right_in_any_slices);
    RUN(an_image_cut_anywhere_is_incomplete);
    RUN(every_changed_byte_is_noticed_and_in_the_same_way_in_any_slices);
    RUN(garbage_never_reads_beyond_its_bytes);
    RUN(the_checksum_may_need_no_padding_or_fifteen_bytes);
    RUN(without_appended_hash_the_checksum_alone_decides);
    RUN(bytes_behind_the_image_are_counted_or_refused);
    RUN(what_the_first_288_bytes_tell_is_told_by_then);
    RUN(segment_rules_are_kept);
    RUN(sixteen_segments_are_the_most);
    RUN(the_smallest_image_of_any_kind_has_48_bytes);
    RUN(the_slot_bounds_the_image_as_soon_as_it_is_known);
    RUN(compressed_images_are_called_that);
    RUN(an_image_of_an_unknown_chip_is_checked_without_the_page_rule);
    RUN(states_have_names);
    return DONE();
}
