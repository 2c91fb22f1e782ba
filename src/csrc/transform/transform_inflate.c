/* gzip (RFC 1952; several members, each with its CRC and length) and zlib (RFC 1950; one stream) with zlib's inflate. */
#include <limits.h>
#include <stdlib.h>

#define ZLIB_CONST /* next_in is const */
#include <zlib.h>

#include "transform/decoder.h"

/* Window 32 KiB and inflate's own state, about 9.5 KiB in zlib 1.2.13 on 64 bits. */
#define INFLATE_MEMORY (48u << 10)

typedef struct inflate_decoder {
    ota_decoder base;
    z_stream z;
    bool several;      /* gzip: another member may follow */
    bool stream_ended; /* the bytes so far are whole members */
} inflate_decoder;

static ota_status inflate_error(const inflate_decoder *self, int result, size_t pos, ota_error *error) {
    const uint64_t offset = self->base.transform.bytes_in + pos;
    if (result == Z_MEM_ERROR) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, offset, result, "inflate: out of memory");
    }
    if (result == Z_NEED_DICT) {
        return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, result,
                             "the zlib stream wants a preset dictionary, which nobody has");
    }
    return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, offset, result, "inflate: %s",
                         self->z.msg ? self->z.msg : "damaged data");
}

static ota_status inflate_code(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, ota_error *error) {
    inflate_decoder *self = (inflate_decoder *)decoder;
    const size_t start = in->pos;
    if (self->stream_ended) {
        if (!self->several || in->data[in->pos] != 0x1F) {
            return ota_error_set(error, OTA_ERR_COMPRESSED_DATA, OTA_STAGE_TRANSFORM, decoder->transform.bytes_in, 0,
                                 "there are bytes behind the complete %s stream", self->several ? "gzip" : "zlib");
        }
        inflateReset(&self->z);
        self->stream_ended = false;
    }
    const size_t in_len = in->len - in->pos, room = out->capacity - out->pos;
    const uInt in_given = in_len < UINT_MAX ? (uInt)in_len : UINT_MAX;
    const uInt room_given = room < UINT_MAX ? (uInt)room : UINT_MAX;
    self->z.next_in = in_len ? in->data + in->pos : NULL;
    self->z.avail_in = in_given;
    self->z.next_out = out->data + out->pos;
    self->z.avail_out = room_given;
    const int result = inflate(&self->z, Z_NO_FLUSH);
    in->pos += in_given - self->z.avail_in;
    out->pos += room_given - self->z.avail_out;
    switch (result) {
    case Z_OK:
    case Z_BUF_ERROR: /* no progress; more input or room cures it */
        return OTA_OK;
    case Z_STREAM_END:
        self->stream_ended = true;
        return OTA_DONE;
    default:
        return inflate_error(self, result, in->pos - start, error);
    }
}

static void inflate_free(ota_decoder *decoder) {
    inflate_decoder *self = (inflate_decoder *)decoder;
    inflateEnd(&self->z);
    free(self);
}

ota_status ota_inflate_new(ota_transform_kind kind, uint64_t max_memory, ota_decoder **out, ota_error *error) {
    static const ota_decoder_ops ops = {.code = inflate_code, .free = inflate_free};
    if (max_memory < INFLATE_MEMORY) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TRANSFORM, 0, 0,
                             "a memory limit of %llu bytes is too small for inflate, which takes %u",
                             (unsigned long long)max_memory, INFLATE_MEMORY);
    }
    inflate_decoder *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, 0, "no memory for an inflate decoder");
    }
    self->base.ops = &ops;
    self->several = kind == OTA_TRANSFORM_GZIP;
    const int result = inflateInit2(&self->z, self->several ? 15 + 16 : 15);
    if (result != Z_OK) {
        free(self);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TRANSFORM, 0, result, "inflate does not start: %s",
                             zError(result));
    }
    *out = &self->base;
    return OTA_OK;
}
