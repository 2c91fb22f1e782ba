/* sources: transform/transform.c transform/transform_inflate.c transform/transform_zstd.c transform/transform_xz.c base/status.c base/bytes.c */
/* libs: zlib libzstd liblzma */
/* Any bytes through any decoder, in slices of any size: it ends, keeps its limit, and whole gives what slices give. */
#include <string.h>

#include "must.h"
#include "transform/transform.h"

#define LIMIT (64u << 10)
#define MEMORY (1u << 20)

static uint8_t first[LIMIT], second[LIMIT];

static ota_status decode(ota_transform_kind kind, const uint8_t *data, size_t len, size_t in_max, size_t out_max,
                         uint8_t *decoded, size_t *decoded_len) {
    ota_transform *transform = NULL;
    ota_error error = {0};
    ota_status status = ota_transform_new(kind, LIMIT, MEMORY, &transform, &error);
    MUST(status == OTA_OK);
    size_t at = 0;
    *decoded_len = 0;
    while (status == OTA_OK) {
        uint8_t nothing;
        const size_t room = LIMIT - *decoded_len;
        ota_bytes_in in = {.data = data + at, .len = len - at < in_max ? len - at : in_max};
        ota_bytes_out out = {.data = room ? decoded + *decoded_len : &nothing, .capacity = room ? room : 1};
        out.capacity = out.capacity < out_max ? out.capacity : out_max;
        const int finishing = in.len == 0;
        status = finishing ? transform->ops->finish(transform, &out, &error)
                           : transform->ops->step(transform, &in, &out, &error);
        MUST(in.pos <= in.len && out.pos <= out.capacity && out.pos <= room);
        MUST(status != OTA_OK || in.pos > 0 || out.pos > 0); /* otherwise: an endless loop */
        at += in.pos;
        *decoded_len += out.pos;
    }
    MUST(status > 0 || error.status == status);
    MUST(status != OTA_DONE || (at == len && transform->bytes_out == *decoded_len));
    ota_transform_free(&transform);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3) {
        return 0;
    }
    const ota_transform_kind kind = (ota_transform_kind)(OTA_TRANSFORM_GZIP + data[0] % 4);
    const size_t in_max = 1u + data[1], out_max = 1u + data[2];
    size_t first_len = 0, second_len = 0;
    const ota_status whole = decode(kind, data + 3, size - 3, SIZE_MAX, SIZE_MAX, first, &first_len);
    const ota_status slices = decode(kind, data + 3, size - 3, in_max, out_max, second, &second_len);
    /* Of damaged data the library may or may not give the last good bytes; complete data is the same bytes. */
    MUST((whole == OTA_DONE) == (slices == OTA_DONE));
    MUST(whole != OTA_DONE || (first_len == second_len && memcmp(first, second, first_len) == 0));
    ota_transform_detect(data, size);
    return 0;
}
