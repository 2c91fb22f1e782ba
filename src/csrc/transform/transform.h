/* Bytes into other bytes. A transform takes an input and an output, each with a position; every step makes progress on one
 * of them or says why not. End of input is not end of stream: `finish` fails when the stream was not complete. */
#ifndef OTA_TRANSFORM_TRANSFORM_H
#define OTA_TRANSFORM_TRANSFORM_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef enum ota_transform_kind {
    OTA_TRANSFORM_AUTO = 0, /* by magic number; none when it is no known one */
    OTA_TRANSFORM_NONE = 1,
    OTA_TRANSFORM_GZIP = 2, /* RFC 1952, several members allowed */
    OTA_TRANSFORM_ZLIB = 3, /* RFC 1950; never chosen by magic unless the two header bytes check */
    OTA_TRANSFORM_ZSTD = 4, /* RFC 8878, several frames and skippable frames allowed */
    OTA_TRANSFORM_XZ = 5,   /* several streams and padding allowed */
} ota_transform_kind;

typedef struct ota_bytes_in {
    const uint8_t *data;
    size_t len, pos;
} ota_bytes_in;

typedef struct ota_bytes_out {
    uint8_t *data;
    size_t capacity, pos;
} ota_bytes_out;

typedef struct ota_transform ota_transform;

typedef struct ota_transform_ops {
    /* OTA_OK: give more input or more room. OTA_ERR_*: repeats until freed. Bytes behind a complete stream that do not begin
     * another one are OTA_ERR_COMPRESSED_DATA. */
    ota_status (*step)(ota_transform *transform, ota_bytes_in *in, ota_bytes_out *out, ota_error *error);
    /* No more input. OTA_OK: flush again with more room; OTA_DONE: complete and all bytes are out; OTA_ERR_INCOMPLETE. */
    ota_status (*finish)(ota_transform *transform, ota_bytes_out *out, ota_error *error);
    void (*free)(ota_transform *transform);
} ota_transform_ops;

struct ota_transform {
    const ota_transform_ops *ops;
    uint64_t bytes_in, bytes_out;
    uint64_t memory; /* bytes its decoder may use at most */
};

#define OTA_TRANSFORM_MAGIC_LEN 6 /* bytes ota_transform_detect wants to see */

/* Kind by magic number: OTA_TRANSFORM_NONE when it is none of them. */
ota_transform_kind ota_transform_detect(const uint8_t *head, size_t len);

/* A decoder of `kind` (not AUTO, not NONE). `max_out`: more output is OTA_ERR_EXPANSION; 0: no limit. `max_memory`: bytes the
 * decoder's window and dictionary may take, 0: 64 MiB; a stream that wants more is OTA_ERR_COMPRESSED_DATA with the figures. */
ota_status ota_transform_new(ota_transform_kind kind, uint64_t max_out, uint64_t max_memory, ota_transform **out,
                             ota_error *error);
void ota_transform_free(ota_transform **transform);

#endif
