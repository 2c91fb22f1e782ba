/* SHA-256 or MD5 of the stream with libcrypto. Computes, and compares with what was announced when something was. */
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "verify/verify.h"

typedef enum digest_state {
    DIGEST_OPEN,
    DIGEST_FINISHED, /* value is there */
    DIGEST_FAILED,   /* the first error repeats */
} digest_state;

typedef struct digest_verify {
    ota_verify base;
    EVP_MD_CTX *context;
    digest_state state;
    ota_digest_kind kind;
    size_t len; /* of the digest */
    bool compare;
    bool has_value;
    uint8_t expected[OTA_DIGEST_MAX];
    uint8_t value[OTA_DIGEST_MAX];
    ota_error error;
} digest_verify;

static const char *kind_name(ota_digest_kind kind) {
    return kind == OTA_DIGEST_SHA256 ? "SHA-256" : "MD5";
}

static ota_status repeat(const digest_verify *self, ota_error *error) {
    if (error != NULL && error->status == OTA_OK) {
        *error = self->error;
    }
    return self->error.status;
}

static ota_status library_failed(digest_verify *self, ota_error *error) {
    self->state = DIGEST_FAILED;
    ota_error_set(&self->error, OTA_ERR_UNSUPPORTED, OTA_STAGE_VERIFY, self->base.offset, 0,
                  "libcrypto could not compute the %s digest", kind_name(self->kind));
    return repeat(self, error);
}

static ota_status digest_update(ota_verify *verify, const uint8_t *data, size_t len, ota_error *error) {
    digest_verify *self = (digest_verify *)verify;
    switch (self->state) {
    case DIGEST_FAILED:
        return repeat(self, error);
    case DIGEST_FINISHED:
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_VERIFY, verify->offset, 0,
                             "bytes came after the %s digest was finished", kind_name(self->kind));
    case DIGEST_OPEN:
        break;
    }
    if (len > 0 && EVP_DigestUpdate(self->context, data, len) != 1) {
        return library_failed(self, error);
    }
    verify->offset += len;
    return OTA_OK;
}

static void to_hex(char *text, const uint8_t *bytes, size_t len) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < len; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    text[2 * len] = '\0';
}

static ota_status digest_finish(ota_verify *verify, ota_error *error) {
    digest_verify *self = (digest_verify *)verify;
    switch (self->state) {
    case DIGEST_FAILED:
        return repeat(self, error);
    case DIGEST_FINISHED:
        return OTA_OK;
    case DIGEST_OPEN:
        break;
    }
    if (EVP_DigestFinal_ex(self->context, self->value, NULL) != 1) {
        return library_failed(self, error);
    }
    self->has_value = true;
    if (self->compare && memcmp(self->value, self->expected, self->len) != 0) {
        char expected[2 * OTA_DIGEST_MAX + 1], found[2 * OTA_DIGEST_MAX + 1];
        to_hex(expected, self->expected, self->len);
        to_hex(found, self->value, self->len);
        self->state = DIGEST_FAILED;
        ota_error_set(&self->error, self->kind == OTA_DIGEST_SHA256 ? OTA_ERR_SHA256 : OTA_ERR_MD5, OTA_STAGE_VERIFY,
                      verify->offset, 0, "%s differs: expected %s, found %s", kind_name(self->kind), expected, found);
        return repeat(self, error);
    }
    self->state = DIGEST_FINISHED;
    return OTA_OK;
}

static void digest_free(ota_verify *verify) {
    digest_verify *self = (digest_verify *)verify;
    EVP_MD_CTX_free(self->context);
    free(self);
}

static const ota_verify_ops digest_ops = {.update = digest_update, .finish = digest_finish, .free = digest_free};

ota_status ota_verify_digest_new(ota_digest_kind kind, const uint8_t *expected, ota_verify **out, ota_error *error) {
    *out = NULL;
    if (kind != OTA_DIGEST_SHA256 && kind != OTA_DIGEST_MD5) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_VERIFY, 0, 0, "digest kind %d is not known", (int)kind);
    }
    digest_verify *self = calloc(1, sizeof *self);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    if (self == NULL || context == NULL) {
        EVP_MD_CTX_free(context);
        free(self);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_VERIFY, 0, 0, "no memory for a digest");
    }
    self->base.ops = &digest_ops;
    self->context = context;
    self->kind = kind;
    self->len = kind == OTA_DIGEST_SHA256 ? 32 : 16;
    if (expected != NULL) {
        self->compare = true;
        memcpy(self->expected, expected, self->len);
    }
    if (EVP_DigestInit_ex(context, kind == OTA_DIGEST_SHA256 ? EVP_sha256() : EVP_md5(), NULL) != 1) {
        const ota_status status = library_failed(self, error); /* MD5 under a FIPS provider */
        digest_free(&self->base);
        return status;
    }
    *out = &self->base;
    return OTA_OK;
}

ota_status ota_verify_digest_value(const ota_verify *verify, uint8_t value[OTA_DIGEST_MAX], size_t *len) {
    if (verify->ops != &digest_ops) {
        return OTA_ERR_ARGUMENT;
    }
    const digest_verify *self = (const digest_verify *)verify;
    if (!self->has_value) {
        return OTA_ERR_STATE;
    }
    memcpy(value, self->value, self->len);
    *len = self->len;
    return OTA_OK;
}

ota_status ota_verify_digest_peek(const ota_verify *verify, uint8_t value[OTA_DIGEST_MAX], size_t *len) {
    const digest_verify *self = (const digest_verify *)verify;
    if (self->has_value) {
        return ota_verify_digest_value(verify, value, len);
    }
    if (self->state != DIGEST_OPEN) {
        return self->error.status;
    }
    EVP_MD_CTX *copy = EVP_MD_CTX_new();
    bool done =
        copy != NULL && EVP_MD_CTX_copy_ex(copy, self->context) == 1 && EVP_DigestFinal_ex(copy, value, NULL) == 1;
    EVP_MD_CTX_free(copy);
    *len = self->len;
    return done ? OTA_OK : OTA_ERR_NO_MEMORY;
}
