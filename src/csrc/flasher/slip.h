/* SLIP framing as ESP32 boot ROMs and stubs speak it: C0 payload C0, in the payload C0 -> DB DC and DB -> DB DD.
 *
 * The decoder takes every C0 for a boundary, closing and opening at once: a lost delimiter costs one frame and never turns
 * frames inside out. So bytes between two frames (boot messages, garbage) come out as frames of their own, which the layer
 * above finds to be none. Source: esp-serial-protocol.md 1. */
#ifndef OTA_FLASHER_SLIP_H
#define OTA_FLASHER_SLIP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define OTA_SLIP_END 0xC0u
#define OTA_SLIP_ESCAPE 0xDBu

/* The most bytes a frame with `len` bytes of payload can take on the wire. */
#define OTA_SLIP_FRAME_MAX(len) (2 * (size_t)(len) + 2)

/* Writes the delimiter that opens or closes a frame; returns the number of bytes written, 1. */
size_t ota_slip_delimit(uint8_t *out);
/* Writes `len` bytes of payload, escaped: between `len` and 2 * `len` bytes, whose number is returned. A frame may be made of
 * several pieces. `out` and `in` do not overlap. */
size_t ota_slip_escape(uint8_t *out, const uint8_t *in, size_t len);

typedef enum ota_slip_kind {
    OTA_SLIP_FRAME,   /* bytes between two delimiters, unescaped */
    OTA_SLIP_NOISE,   /* bytes before the first delimiter, or a piece of a text too long for the buffer */
    OTA_SLIP_DAMAGED, /* a frame with a wrong escape, or one too long for the buffer; what fits of it */
} ota_slip_kind;

typedef struct ota_slip_decoder {
    uint8_t *buf;       /* of the caller */
    size_t capacity;    /* bytes of it, at least 1 */
    size_t len;         /* bytes collected; after DONE those of the frame */
    ota_slip_kind kind; /* after DONE: what buf holds */
    uint8_t state;      /* of slip.c */
    bool is_out;        /* of slip.c: a frame lies in buf, the next byte starts a new one */
} ota_slip_decoder;

void ota_slip_init(ota_slip_decoder *decoder, void *buf, size_t capacity);

/* Forgets what was collected; the next delimiter counts as the first one. */
void ota_slip_reset(ota_slip_decoder *decoder);

/* Takes up to `len` bytes; `*used` says how many. OTA_OK: all were taken and no frame is complete. OTA_DONE: buf[0..len) holds a
 * frame (never an empty one); it lasts until the next call, which goes on with the rest. Never an error. */
ota_status ota_slip_step(ota_slip_decoder *decoder, const void *in, size_t len, size_t *used);

#endif
