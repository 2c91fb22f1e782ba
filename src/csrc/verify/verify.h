/* May these bytes be trusted? Update with every byte in order, then finish: OTA_OK is yes, everything else is no. */
#ifndef OTA_VERIFY_VERIFY_H
#define OTA_VERIFY_VERIFY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct ota_verify ota_verify;

typedef struct ota_verify_ops {
    ota_status (*update)(ota_verify *verify, const uint8_t *data, size_t len, ota_error *error);
    ota_status (*finish)(ota_verify *verify, ota_error *error);
    void (*free)(ota_verify *verify);
} ota_verify_ops;

struct ota_verify {
    const ota_verify_ops *ops;
    uint64_t offset; /* bytes seen */
};

void ota_verify_free(ota_verify **verify);

/* ---- Digests: verify_digest.c ------------------------------------------------------------------------------------ */
typedef enum ota_digest_kind {
    OTA_DIGEST_SHA256 = 1, /* 32 bytes */
    OTA_DIGEST_MD5 = 2,    /* 16 bytes */
} ota_digest_kind;

#define OTA_DIGEST_MAX 32

/* `expected` NULL: compute only. */
ota_status ota_verify_digest_new(ota_digest_kind kind, const uint8_t *expected, ota_verify **out, ota_error *error);
/* After finish: the digest, and its length in bytes in `*len`. */
ota_status ota_verify_digest_value(const ota_verify *verify, uint8_t value[OTA_DIGEST_MAX], size_t *len);

/* ---- Size: verify_size.c ----------------------------------------------------------------------------------------- */
/* Exactly `expected` bytes; too many are found as soon as they come. */
ota_status ota_verify_size_new(uint64_t expected, ota_verify **out, ota_error *error);

/* ---- ESP app image: verify_image.c ------------------------------------------------------------------------------- */
typedef struct ota_image_rules {
    uint32_t chip_id;              /* OTA_ESP_CHIP_ANY (0xFFFFFFFF): not checked */
    uint32_t chip_revision;        /* major * 100 + minor; 0xFFFFFFFF: not checked */
    uint32_t efuse_block_revision; /* 0xFFFFFFFF: not checked */
    bool ignore_max_revision;      /* the eFuse "disable wafer version major" */
    uint64_t slot_size;            /* the image must fit; 0: not checked */
    uint8_t spi_flash_mode;        /* of the running app; 0: not checked */
    bool bytes_after_allowed;      /* bytes behind the image (padding, 0xFF) are accepted, as a device does */
} ota_image_rules;

#define OTA_ESP_CHIP_ANY 0xFFFFFFFFu

/* Structure, chip, revision, app descriptor, checksum and appended hash of an app image as it passes. What the first 288
 * bytes tell (magic, chip, revision, descriptor) is checked as soon as they are there. */
ota_status ota_verify_image_new(const ota_image_rules *rules, ota_verify **out, ota_error *error);
/* After finish: length of the image by its headers, hash included. */
uint64_t ota_verify_image_size(const ota_verify *verify);

#endif
