/* May these bytes be trusted? Update with every byte in order, then finish: OTA_OK is yes, everything else is no. */
#ifndef OTA_VERIFY_VERIFY_H
#define OTA_VERIFY_VERIFY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "esp/esp_image.h"

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
/* At any time before finish: the digest of the bytes so far; updates go on. */
ota_status ota_verify_digest_peek(const ota_verify *verify, uint8_t value[OTA_DIGEST_MAX], size_t *len);

/* ---- Size: verify_size.c ----------------------------------------------------------------------------------------- */
/* Exactly `expected` bytes; too many are found as soon as they come. */
ota_status ota_verify_size_new(uint64_t expected, ota_verify **out, ota_error *error);

/* ---- ESP app image: verify_image.c ------------------------------------------------------------------------------- */
/* The device the image is for; start from OTA_ESP_IMAGE_RULES_NONE (bytes behind the image accepted, nothing of the chip
 * checked). */
typedef ota_esp_image_rules ota_image_rules;

/* Structure, chip, revision, app descriptor, checksum and appended hash of an app image as it passes. What the first 288
 * bytes tell (magic, chip, revision, descriptor) is checked as soon as they are there. */
ota_status ota_verify_image_new(const ota_image_rules *rules, ota_verify **out, ota_error *error);
/* After finish: length of the image by its headers, hash included. */
uint64_t ota_verify_image_size(const ota_verify *verify);

#endif
