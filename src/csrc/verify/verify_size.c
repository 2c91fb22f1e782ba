/* Exactly as many bytes as were announced: too many are found as soon as they come, too few at the end. */
#include <stdlib.h>

#include "verify/verify.h"

typedef struct size_verify {
    ota_verify base;
    uint64_t expected;
    bool too_many;
} size_verify;

static ota_status size_error(const size_verify *self, ota_error *error) {
    return ota_error_set(error, OTA_ERR_SIZE, OTA_STAGE_VERIFY, self->base.offset, 0,
                         self->too_many ? "expected %llu bytes, at least %llu came" : "expected %llu bytes, %llu came",
                         (unsigned long long)self->expected, (unsigned long long)self->base.offset);
}

static ota_status size_update(ota_verify *verify, const uint8_t *data, size_t len, ota_error *error) {
    size_verify *self = (size_verify *)verify;
    (void)data;
    if (!self->too_many) {
        verify->offset += len;
        self->too_many = verify->offset > self->expected;
    }
    return self->too_many ? size_error(self, error) : OTA_OK;
}

static ota_status size_finish(ota_verify *verify, ota_error *error) {
    size_verify *self = (size_verify *)verify;
    return verify->offset == self->expected ? OTA_OK : size_error(self, error);
}

static void size_free(ota_verify *verify) {
    free(verify);
}

ota_status ota_verify_size_new(uint64_t expected, ota_verify **out, ota_error *error) {
    static const ota_verify_ops ops = {.update = size_update, .finish = size_finish, .free = size_free};
    *out = NULL;
    size_verify *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_VERIFY, 0, 0, "no memory for the size check");
    }
    self->base.ops = &ops;
    self->expected = expected;
    *out = &self->base;
    return OTA_OK;
}
