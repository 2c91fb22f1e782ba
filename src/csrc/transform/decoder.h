/* What the decoders of this room share: the limit on expansion, the first error that sticks, the promise that every step
 * moves or says why not, and what "complete" means. Internal to transform/.
 *
 *     state      on                                to
 *     START      bytes of a stream                 INSIDE
 *     INSIDE     the stream ends, all is out       COMPLETE
 *     COMPLETE   more bytes: another stream        INSIDE
 *     any        an error                          FAILED (repeats it until freed)
 *
 * finish: COMPLETE is done; INSIDE with bytes still to come out wants room; everything else is an incomplete input. */
#ifndef OTA_TRANSFORM_DECODER_H
#define OTA_TRANSFORM_DECODER_H

#include <stdbool.h>

#include "transform/transform.h"

#define OTA_TRANSFORM_DEFAULT_MEMORY (64ull << 20)

typedef enum ota_decoder_state {
    OTA_DECODER_START,
    OTA_DECODER_INSIDE,
    OTA_DECODER_COMPLETE,
    OTA_DECODER_FAILED,
} ota_decoder_state;

typedef struct ota_decoder ota_decoder;

typedef struct ota_decoder_ops {
    /* Decodes some bytes and moves both positions. OTA_OK: more input or room is needed; OTA_DONE: the input may end here,
     * and no byte is held back. Called with an empty input only to fetch bytes held back, and `out->data` is never NULL. */
    ota_status (*code)(ota_decoder *decoder, ota_bytes_in *in, ota_bytes_out *out, ota_error *error);
    void (*free)(ota_decoder *decoder);
} ota_decoder_ops;

struct ota_decoder {
    ota_transform transform;
    const ota_decoder_ops *ops;
    uint64_t max_out; /* 0: no limit */
    ota_decoder_state state;
    bool held_back; /* the last call filled its output: more may come out without input */
    bool no_room;   /* the last call had input, no room, and did not move: useless to call again without room */
    ota_error error;
};

ota_status ota_inflate_new(ota_transform_kind kind, uint64_t max_memory, ota_decoder **out, ota_error *error);
ota_status ota_zstd_new(uint64_t max_memory, ota_decoder **out, ota_error *error);
ota_status ota_xz_new(uint64_t max_memory, ota_decoder **out, ota_error *error);

#endif
