/* zstd (RFC 8878): several frames and skippable frames. The head of each frame is gathered here first, so that a window
 * above the limit is refused with both figures before the library allocates it, and old formats the library may know are
 * not taken for zstd. */
#include <stdlib.h>
#include <string.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "base/bytes.h"
#include "transform/decoder.h"

#define HEAD_MAX                                                                                                       \
    17 /* magic 4, descriptor 1, dictionary id 4, content size 8: a single-segment frame has no window byte */

typedef struct zstd_decoder {
    ota_decoder base;
    ZSTD_DCtx *dctx;
    uint64_t max_window;
    uint8_t head[HEAD_MAX];
    size_t head_len; /* bytes gathered */
    bool inside;     /* the head was given to the library, the frame is not over */
    uint64_t frames; /* complete ones */
} zstd_decoder;

static bool is_skippable(const uint8_t *head) {
    return (head[0] & 0xF0) == 0x50;
}

static bool magic_possible(const uint8_t *head, size_t len) {
    static const uint8_t frame[4] = {0x28, 0xB5, 0x2F, 0xFD}, skippable[4] = {0x50, 0x2A, 0x4D, 0x18};
    const uint8_t *magic = is_skippable(head) ? skippable : frame;
    const size_t skip = is_skippable(head) ? 1 : 0; /* its low nibble is free */
    if (len > 4) {
        len = 4;
    }
    return len <= skip || memcmp(head + skip, magic + skip, len - skip) == 0;
}

/* Bytes of the head to gather, as far as `len` bytes tell. RFC 8878, 3.1.1.1. */
static size_t head_size(const uint8_t *head, size_t len) {
    static const uint8_t dictionary_size[4] = {0, 1, 2, 4}, content_size[4] = {1, 2, 4, 8};
    if (len < 4 || is_skippable(head)) {
        return 4;
    }
    if (len < 5) {
        return 5;
    }
    const bool single_segment = head[4] & 0x20;
    return single_segment ? 5u + dictionary_size[head[4] & 3] + content_size[head[4] >> 6] : 6u;
}

/* Bytes of window the frame asks for. */
static uint64_t window_size(const uint8_t *head) {
    static const uint8_t dictionary_size[4] = {0, 1, 2, 4};
    if ((head[4] & 0x20) == 0) {
        const uint64_t base = 1ull << (10 + (head[5] >> 3));
        return base + base / 8 * (head[5] & 7);
    }
    const uint8_t *content = head + 5 + dictionary_size[head[4] & 3];
    switch (head[4] >> 6) {
    case 0:
        return content[0];
    case 1:
        return 256u + ota_load_u16le(content);
    case 2:
        return ota_load_u32le(content);
    default:
        return ota_load_u64le(content);
    }
}

static ota_status library_error(size_t result, uint64_t offset, ota_error *error) {
    const ZSTD_ErrorCode code = ZSTD_getErrorCode(result);
    return ota_error_set(error, code == ZSTD_error_memory_allocation ? OTA_ERR_NO_MEMORY : OTA_ERR_COMPRESSED_DATA,
                         OTA_STAGE_TRANSFORM, offset, code, "zstd: %s", ZSTD_getErrorString(code));
}

/* Gathers the head of a frame; when it is whole and allowed, hands it to the library. */
static ota_status begin_frame(zstd_decoder *self, ota_bytes_in *in, ota_error *error) {
    const size_t start = in->pos;
    while (self->head_len < head_size(self->head, self->head_len)) {
        if (in->pos == in->len) {
            return OTA_OK;
        }
        self->head[self->head_len++] = in->data[in->pos++];
        if (!magic_possible(self->head, self->head_len)) {
            return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM,
                                 self->base.transform.bytes_in + (in->pos - start) - self->head_len, 0,
                                 self->frames
                                     ? "there are bytes behind the last complete zstd frame that begin no other"
                                     : "the data does not begin with a zstd frame");
        }
    }
    const uint64_t offset = self->base.transform.bytes_in + (in->pos - start);
    if (!is_skippable(self->head) && window_size(self->head) > self->max_window) {
        return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, 0,
                             "the zstd frame wants a window of %llu bytes, at most %llu are allowed",
                             (unsigned long long)window_size(self->head), (unsigned long long)self->max_window);
    }
    uint8_t nothing = 0;
    ZSTD_outBuffer no_output = {.dst = &nothing, .size = 0, .pos = 0};
    ZSTD_inBuffer head = {.src = self->head, .size = self->head_len, .pos = 0};
    while (head.pos < head.size) {
        const size_t before = head.pos;
        const size_t result = ZSTD_decompressStream(self->dctx, &no_output, &head);
        if (ZSTD_isError(result)) {
            return library_error(result, offset, error);
        }
        if (head.pos == before) {
            return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, 0,
                                 "zstd does not take the head of a frame");
        }
    }
    self->inside = true;
    return OTA_OK;
}

static ota_status zstd_code(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, ota_error *error) {
    zstd_decoder *self = (zstd_decoder *)decoder;
    const size_t start = in->pos;
    if (!self->inside) {
        const ota_status status = begin_frame(self, in, error);
        if (status < 0 || !self->inside) {
            return status;
        }
    }
    ZSTD_inBuffer zin = {.src = in->data, .size = in->len, .pos = in->pos};
    ZSTD_outBuffer zout = {.dst = out->data, .size = out->capacity, .pos = out->pos};
    const size_t result = ZSTD_decompressStream(self->dctx, &zout, &zin);
    in->pos = zin.pos;
    out->pos = zout.pos;
    if (ZSTD_isError(result)) {
        return library_error(result, decoder->transform.bytes_in + (in->pos - start), error);
    }
    if (result == 0) { /* the frame is over and all its bytes are out */
        self->inside = false;
        self->head_len = 0;
        self->frames++;
        return OTA_DONE;
    }
    return OTA_OK;
}

static void zstd_free(ota_decoder *decoder) {
    zstd_decoder *self = (zstd_decoder *)decoder;
    ZSTD_freeDCtx(self->dctx);
    free(self);
}

ota_status ota_zstd_new(uint64_t max_memory, ota_decoder **out, ota_error *error) {
    static const ota_decoder_ops ops = {.code = zstd_code, .free = zstd_free};
    zstd_decoder *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, 0, "no memory for a zstd decoder");
    }
    self->base.ops = &ops;
    self->max_window = max_memory;
    self->dctx = ZSTD_createDCtx();
    if (self->dctx == NULL) {
        free(self);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, 0, "no memory for a zstd decoder");
    }
    /* The library's own limit is a power of two: the next one, as ours is the exact one. */
    const ZSTD_bounds bounds = ZSTD_dParam_getBounds(ZSTD_d_windowLogMax);
    int window_log = bounds.lowerBound;
    while (window_log < bounds.upperBound && 1ull << window_log < max_memory) {
        window_log++;
    }
    ZSTD_DCtx_setParameter(self->dctx, ZSTD_d_windowLogMax, window_log);
    *out = &self->base;
    return OTA_OK;
}
