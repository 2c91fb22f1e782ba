/* An ESP app image as a verifier: esp_image's checker behind the verifier's table. What the first 288 bytes tell is known
 * before the sink sees its first byte, when the pipeline feeds verifiers first. */
#include <stdlib.h>

#include "esp/esp_image.h"
#include "verify/verify.h"

typedef struct image_verify {
    ota_verify base;
    ota_esp_image_check check;
} image_verify;

static ota_status image_update(ota_verify *verify, const uint8_t *data, size_t len, ota_error *error) {
    image_verify *self = (image_verify *)verify;
    ota_status status = ota_esp_image_check_update(&self->check, data, len, error);
    verify->offset = self->check.offset;
    return status < 0 ? status : OTA_OK; /* bytes may follow a complete image */
}

static ota_status image_finish(ota_verify *verify, ota_error *error) {
    return ota_esp_image_check_finish(&((image_verify *)verify)->check, error);
}

static void image_free(ota_verify *verify) {
    ota_esp_image_check_end(&((image_verify *)verify)->check);
    free(verify);
}

static const ota_verify_ops image_ops = {.update = image_update, .finish = image_finish, .free = image_free};

ota_status ota_verify_image_new(const ota_image_rules *rules, ota_verify **out, ota_error *error) {
    *out = NULL;
    image_verify *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_VERIFY, 0, 0, "no memory for the image check");
    }
    self->base.ops = &image_ops;
    ota_status status = ota_esp_image_check_begin(&self->check, rules, error);
    if (status < 0) {
        image_free(&self->base);
        return status;
    }
    *out = &self->base;
    return OTA_OK;
}

uint64_t ota_verify_image_size(const ota_verify *verify) {
    return verify->ops == &image_ops ? ((const image_verify *)verify)->check.image_size : 0;
}
