/* Framing; see slip.h.
 *
 *     state     byte               next
 *     NOISE     END                FRAME; what was collected comes out as noise
 *     NOISE     other              NOISE; a full buffer comes out as noise
 *     FRAME     END                FRAME; a frame that is not empty comes out
 *     FRAME     ESCAPE             ESCAPE
 *     FRAME     other              FRAME, or TOO_LONG when the buffer is full
 *     ESCAPE    DC, DD             FRAME
 *     ESCAPE    END                FRAME; the frame comes out damaged
 *     ESCAPE    other              BAD
 *     BAD       END                FRAME; the frame comes out damaged
 *     BAD       other              BAD
 *     TOO_LONG  any                as NOISE, after the full buffer came out damaged
 */
#include "flasher/slip.h"

#include <string.h>

enum {
    NOISE,
    FRAME,
    ESCAPE,
    BAD,
};

#define ESCAPED_END 0xDCu
#define ESCAPED_ESCAPE 0xDDu

size_t ota_slip_delimit(uint8_t *out) {
    out[0] = OTA_SLIP_END;
    return 1;
}

size_t ota_slip_escape(uint8_t *out, const uint8_t *in, size_t len) {
    uint8_t *to = out;
    for (size_t i = 0; i < len; i++) {
        uint8_t byte = in[i];
        if (byte == OTA_SLIP_END || byte == OTA_SLIP_ESCAPE) {
            *to++ = OTA_SLIP_ESCAPE;
            byte = byte == OTA_SLIP_END ? ESCAPED_END : ESCAPED_ESCAPE;
        }
        *to++ = byte;
    }
    return (size_t)(to - out);
}

void ota_slip_init(ota_slip_decoder *decoder, void *buf, size_t capacity) {
    decoder->buf = buf;
    decoder->capacity = capacity;
    ota_slip_reset(decoder);
}

void ota_slip_reset(ota_slip_decoder *decoder) {
    decoder->len = 0;
    decoder->kind = OTA_SLIP_NOISE;
    decoder->state = NOISE;
    decoder->is_out = false;
}

static void come_out(ota_slip_decoder *decoder, ota_slip_kind kind, uint8_t state) {
    decoder->kind = kind;
    decoder->state = state;
    decoder->is_out = true;
}

/* One byte; whether something came out. */
static bool take(ota_slip_decoder *decoder, uint8_t byte) {
    if (byte == OTA_SLIP_END) {
        ota_slip_kind kind = decoder->state == NOISE   ? OTA_SLIP_NOISE
                             : decoder->state == FRAME ? OTA_SLIP_FRAME
                                                       : OTA_SLIP_DAMAGED;
        decoder->state = FRAME;
        if (decoder->len > 0 || kind == OTA_SLIP_DAMAGED) {
            come_out(decoder, kind, FRAME);
        }
        return decoder->is_out;
    }
    switch (decoder->state) {
    case FRAME:
        if (byte == OTA_SLIP_ESCAPE) {
            decoder->state = ESCAPE;
            return false;
        }
        break;
    case ESCAPE:
        decoder->state = byte == ESCAPED_END || byte == ESCAPED_ESCAPE ? FRAME : BAD;
        byte = byte == ESCAPED_END ? OTA_SLIP_END : byte == ESCAPED_ESCAPE ? OTA_SLIP_ESCAPE : byte;
        break;
    default:
        break;
    }
    if (decoder->len ==
        decoder->capacity) { /* a frame that is too long; noise comes out as soon as the buffer is full */
        come_out(decoder, OTA_SLIP_DAMAGED, NOISE);
        return true;
    }
    decoder->buf[decoder->len++] = byte;
    if (decoder->state == NOISE && decoder->len == decoder->capacity) {
        come_out(decoder, OTA_SLIP_NOISE, NOISE);
    }
    return decoder->is_out;
}

ota_status ota_slip_step(ota_slip_decoder *decoder, const void *in, size_t len, size_t *used) {
    const uint8_t *bytes = in;
    for (size_t i = 0; i < len; i++) {
        if (decoder->is_out) {
            decoder->is_out = false;
            decoder->len = 0;
        }
        if (take(decoder, bytes[i])) {
            *used = i + 1;
            return OTA_DONE;
        }
    }
    *used = len;
    return OTA_OK;
}
