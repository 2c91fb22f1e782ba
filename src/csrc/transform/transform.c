/* Which transform, and the one loop around every decoder (see decoder.h). The decoders themselves only translate between
 * their library and `code`. */
#include "transform/transform.h"

#include <string.h>

#include "transform/decoder.h"

ota_transform_kind ota_transform_detect(const uint8_t *head, size_t len) {
    static const uint8_t xz_magic[6] = {0xFD, '7', 'z', 'X', 'Z', 0x00};
    if (len >= 4 && head[0] == 0x1F && head[1] == 0x8B && head[2] == 8 && (head[3] & 0xE0) == 0) {
        return OTA_TRANSFORM_GZIP; /* deflate, reserved flags 0: RFC 1952, 2.3 */
    }
    if (len >= 4 && (memcmp(head, "\x28\xB5\x2F\xFD", 4) == 0 ||
                     ((head[0] & 0xF0) == 0x50 && memcmp(head + 1, "\x2A\x4D\x18", 3) == 0))) {
        return OTA_TRANSFORM_ZSTD; /* a frame or a skippable frame: RFC 8878, 3.1 */
    }
    if (len >= sizeof xz_magic && memcmp(head, xz_magic, sizeof xz_magic) == 0) {
        return OTA_TRANSFORM_XZ;
    }
    /* RFC 1950, 2.2. Its check lets one in a thousand of all byte pairs pass, so only the usual window of 32 KiB, no
     * preset dictionary and a known type of first block are taken for zlib; the rest must be asked for by name. */
    if (len >= 3 && head[0] == 0x78 && (head[0] << 8 | head[1]) % 31 == 0 && (head[1] & 0x20) == 0 &&
        (head[2] & 0x06) != 0x06) {
        return OTA_TRANSFORM_ZLIB;
    }
    return OTA_TRANSFORM_NONE;
}

static ota_status repeat(const ota_decoder *decoder, ota_error *error) {
    if (error != NULL && error->status == OTA_OK) {
        *error = decoder->error;
    }
    return decoder->error.status;
}

static ota_status fail(ota_decoder *decoder, ota_status status, ota_error *error, const char *text) {
    decoder->state = OTA_DECODER_FAILED;
    ota_error_set(&decoder->error, status, OTA_STAGE_TRANSFORM, decoder->transform.bytes_in, 0, "%s", text);
    return repeat(decoder, error);
}

/* One call of the decoder. At the limit it gets one byte to write to that is not the caller's: nobody may fill it. */
static ota_status call(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, bool *moved, ota_error *error) {
    uint8_t over = 0;
    ota_bytes_out view = {.data = &over, .capacity = 0, .pos = 0};
    const uint64_t left = decoder->max_out == 0 ? UINT64_MAX : decoder->max_out - decoder->transform.bytes_out;
    const size_t room = out->capacity - out->pos;
    if (left == 0) {
        view.capacity = 1;
    } else if (room > 0) {
        view.data = out->data + out->pos;
        view.capacity = room < left ? room : (size_t)left;
    }
    const size_t in_before = in->pos;
    const ota_status status = decoder->ops->code(decoder, in, &view, &decoder->error);
    decoder->transform.bytes_in += in->pos - in_before;
    if (status < 0) {
        decoder->state = OTA_DECODER_FAILED;
        return repeat(decoder, error);
    }
    if (left == 0) {
        if (view.pos > 0) {
            ota_error_set(&decoder->error, OTA_ERR_EXPANSION, OTA_STAGE_TRANSFORM, decoder->transform.bytes_in, 0,
                          "the compressed data holds more than the %llu bytes allowed",
                          (unsigned long long)decoder->max_out);
            decoder->state = OTA_DECODER_FAILED;
            return repeat(decoder, error);
        }
    } else {
        out->pos += view.pos;
        decoder->transform.bytes_out += view.pos;
    }
    *moved = in->pos != in_before || view.pos > 0;
    decoder->state = status == OTA_DONE ? OTA_DECODER_COMPLETE : OTA_DECODER_INSIDE;
    decoder->held_back = status != OTA_DONE && view.pos == view.capacity;
    decoder->no_room = !*moved && view.capacity == 0;
    return OTA_OK;
}

static ota_status run(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, ota_error *error) {
    for (;;) {
        const bool full = out->pos == out->capacity;
        const bool empty = in->pos == in->len;
        const bool limited = decoder->max_out != 0 && decoder->transform.bytes_out == decoder->max_out;
        if (empty && (!decoder->held_back || (full && !limited))) {
            return OTA_OK;
        }
        if (full && !limited && decoder->no_room) {
            return OTA_OK;
        }
        bool moved = false;
        const ota_status status = call(decoder, in, out, &moved, error);
        if (status < 0) {
            return status;
        }
        if (!moved && !empty && !decoder->no_room) {
            return fail(decoder, OTA_ERR_COMPRESSED_DATA, error, "the decoder neither takes input nor gives output");
        }
    }
}

static ota_status decoder_step(ota_transform *transform, ota_bytes_in *in, ota_bytes_out *out, ota_error *error) {
    ota_decoder *decoder = (ota_decoder *)transform;
    if (decoder->state == OTA_DECODER_FAILED) {
        return repeat(decoder, error);
    }
    return run(decoder, in, out, error);
}

static ota_status decoder_finish(ota_transform *transform, ota_bytes_out *out, ota_error *error) {
    ota_decoder *decoder = (ota_decoder *)transform;
    if (decoder->state == OTA_DECODER_FAILED) {
        return repeat(decoder, error);
    }
    ota_bytes_in none = {0};
    const ota_status status = run(decoder, &none, out, error);
    if (status < 0) {
        return status;
    }
    if (decoder->state == OTA_DECODER_COMPLETE) {
        return OTA_DONE;
    }
    if (decoder->held_back) {
        return OTA_OK;
    }
    return fail(decoder, OTA_ERR_INCOMPLETE, error,
                decoder->state == OTA_DECODER_START ? "the compressed data is empty"
                                                    : "the compressed data ended before it was complete");
}

static void decoder_free(ota_transform *transform) {
    ota_decoder *decoder = (ota_decoder *)transform;
    decoder->ops->free(decoder);
}

ota_status ota_transform_new(ota_transform_kind kind, uint64_t max_out, uint64_t max_memory, ota_transform **out,
                             ota_error *error) {
    static const ota_transform_ops ops = {.step = decoder_step, .finish = decoder_finish, .free = decoder_free};
    *out = NULL;
    if (max_memory == 0) {
        max_memory = OTA_TRANSFORM_DEFAULT_MEMORY;
    }
    ota_decoder *decoder = NULL;
    ota_status status = OTA_OK;
    switch (kind) {
    case OTA_TRANSFORM_GZIP:
    case OTA_TRANSFORM_ZLIB:
        status = ota_inflate_new(kind, max_memory, &decoder, error);
        break;
    case OTA_TRANSFORM_ZSTD:
        status = ota_zstd_new(max_memory, &decoder, error);
        break;
    case OTA_TRANSFORM_XZ:
        status = ota_xz_new(max_memory, &decoder, error);
        break;
    default:
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TRANSFORM, 0, 0,
                             "transform kind %d is no decoder: expected gzip, zlib, zstd or xz", (int)kind);
    }
    if (status < 0) {
        return status;
    }
    decoder->transform.ops = &ops;
    decoder->transform.memory = max_memory;
    decoder->max_out = max_out;
    *out = &decoder->transform;
    return OTA_OK;
}

void ota_transform_free(ota_transform **transform) {
    if (*transform != NULL) {
        (*transform)->ops->free(*transform);
        *transform = NULL;
    }
}
