/* xz with liblzma: several streams, with padding between and behind them (zero bytes, a multiple of four). */
#include <lzma.h>
#include <stdlib.h>

#include "transform/decoder.h"

/* The limit is meant for the dictionary; liblzma counts its own state too, under 100 KiB in 5.4. */
#define STATE_MEMORY (256ull << 10)

typedef struct xz_decoder {
    ota_decoder base;
    lzma_stream lzma;
    uint64_t max_memory;
    bool stream_ended; /* the bytes so far are whole streams */
    unsigned padding;  /* bytes of padding since then, modulo 4 */
} xz_decoder;

static ota_status start_stream(xz_decoder *self, ota_error *error) {
    /* A check nobody can compute is an error, not a stream without one. */
    const lzma_ret result =
        lzma_stream_decoder(&self->lzma, self->max_memory + STATE_MEMORY, LZMA_TELL_UNSUPPORTED_CHECK);
    if (result != LZMA_OK) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, result, "no memory for an xz decoder");
    }
    self->stream_ended = false;
    self->padding = 0;
    return OTA_OK;
}

static ota_status xz_error(xz_decoder *self, lzma_ret result, uint64_t offset, ota_error *error) {
    const char *text = "damaged data";
    switch (result) {
    case LZMA_MEM_ERROR:
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, offset, result, "xz: out of memory");
    case LZMA_MEMLIMIT_ERROR:
        return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, result,
                             "the xz stream wants %llu bytes of memory, at most %llu are allowed",
                             (unsigned long long)lzma_memusage(&self->lzma),
                             (unsigned long long)(self->max_memory + STATE_MEMORY));
    case LZMA_FORMAT_ERROR:
        text = "the data does not begin with an xz stream";
        break;
    case LZMA_OPTIONS_ERROR:
        text = "unknown options";
        break;
    case LZMA_UNSUPPORTED_CHECK:
        text = "unknown kind of integrity check";
        break;
    default:
        break;
    }
    return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, result, "xz: %s", text);
}

/* Padding behind a complete stream, and what follows it: another stream or nothing. */
static ota_status skip_padding(xz_decoder *self, ota_bytes_in *in, ota_error *error) {
    const size_t start = in->pos;
    while (in->pos < in->len && in->data[in->pos] == 0) {
        in->pos++;
        self->padding = (self->padding + 1) % 4;
    }
    if (in->pos == in->len) {
        return self->padding == 0 ? OTA_DONE : OTA_OK;
    }
    if (self->padding != 0 || in->data[in->pos] != 0xFD) {
        return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM,
                             self->base.transform.bytes_in + (in->pos - start), 0,
                             "there are bytes behind the complete xz stream that are neither padding nor another one");
    }
    return start_stream(self, error);
}

static ota_status xz_code(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, ota_error *error) {
    xz_decoder *self = (xz_decoder *)decoder;
    const size_t start = in->pos;
    if (self->stream_ended) {
        const ota_status status = skip_padding(self, in, error);
        if (status < 0 || self->stream_ended) {
            return status;
        }
    }
    self->lzma.next_in = in->pos < in->len ? in->data + in->pos : NULL;
    self->lzma.avail_in = in->len - in->pos;
    self->lzma.next_out = out->data + out->pos;
    self->lzma.avail_out = out->capacity - out->pos;
    const lzma_ret result = lzma_code(&self->lzma, LZMA_RUN);
    in->pos = in->len - self->lzma.avail_in;
    out->pos = out->capacity - self->lzma.avail_out;
    switch (result) {
    case LZMA_OK:
    case LZMA_BUF_ERROR: /* no progress; more input or room cures it */
        return OTA_OK;
    case LZMA_STREAM_END:
        self->stream_ended = true;
        return OTA_DONE;
    default:
        return xz_error(self, result, decoder->transform.bytes_in + (in->pos - start), error);
    }
}

static void xz_free(ota_decoder *decoder) {
    xz_decoder *self = (xz_decoder *)decoder;
    lzma_end(&self->lzma);
    free(self);
}

ota_status ota_xz_new(uint64_t max_memory, ota_decoder **out, ota_error *error) {
    static const ota_decoder_ops ops = {.code = xz_code, .free = xz_free};
    xz_decoder *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, 0, "no memory for an xz decoder");
    }
    self->base.ops = &ops;
    self->lzma = (lzma_stream)LZMA_STREAM_INIT;
    self->max_memory = max_memory < UINT64_MAX - STATE_MEMORY ? max_memory : UINT64_MAX - STATE_MEMORY;
    const ota_status status = start_stream(self, error);
    if (status < 0) {
        xz_free(&self->base);
        return status;
    }
    *out = &self->base;
    return OTA_OK;
}
