/* One image that several readers take at their own pace while it arrives.
 *
 * One writer appends the raw bytes, which stay where they are until the store is freed. Readers wait for bytes, ask for MD5
 * digests of sectors and blocks, and read zlib streams of any run of it. A stream is compressed once, a step at a time, by
 * whoever needs its bytes first; everybody who asks for the same run shares it. What the cache file held need not be
 * compressed at all.
 *
 * Memory: address space for `capacity` bytes is set aside and filled as bytes come. Each stream has room for its own run; those
 * nobody holds are kept for the next one who asks, together at most `capacity` compressed bytes, the oldest go first.
 *
 * A failure (of the writer, or a cancel) reaches every reader that waits or comes later. All functions but append and finish
 * may be called from any thread. */
#ifndef OTA_SINK_IMAGE_STORE_H
#define OTA_SINK_IMAGE_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/status.h"

#define OTA_STORE_SECTOR 4096u /* unit of digests and of blank runs, from the start of the image */
#define OTA_STORE_BLOCK 65536u
#define OTA_STORE_MD5 16

typedef struct ota_image_store_options {
    uint64_t capacity;     /* bytes an image may have at most, 1..1 GiB */
    uint64_t size;         /* of the image as announced; OTA_SIZE_UNKNOWN */
    int level;             /* of zlib, 1..9; 0: 6. 9 saves 0.1 % of the bytes for twice the time */
    const char *cache_dir; /* where whole streams are kept as files <SHA-256 of the image>.zlib; NULL: nowhere */
    const uint8_t
        *sha256; /* of the image as announced, 32 bytes: its stream may come from the cache; NULL: not known */
} ota_image_store_options;

/* What was done once, for however many readers. */
typedef struct ota_image_store_counts {
    uint64_t appended;     /* image bytes taken */
    uint64_t compressed;   /* image bytes that went through deflate */
    uint64_t stream_bytes; /* that came out of it */
    uint64_t digested;     /* image bytes that went through MD5 */
    uint64_t streams;      /* made */
    uint64_t shared;       /* asked for again, and there */
    bool cached;           /* the stream of the whole image came from the cache */
} ota_image_store_counts;

typedef struct ota_image_store ota_image_store;
typedef struct ota_image_stream ota_image_stream;

/* A cache file that is missing, damaged, or not that image's is not an error: the stream is compressed then. */
ota_status ota_image_store_new(const ota_image_store_options *options, ota_image_store **out, ota_error *error);
/* After every stream was released and every reader left. */
void ota_image_store_free(ota_image_store **store);

/* ---- Writer: one thread --------------------------------------------------------------------------------------------- */

/* The next bytes. ERR_TOO_LARGE beyond the capacity, ERR_SIZE beyond the announced size; both fail the store. */
ota_status ota_image_store_append(ota_image_store *store, const void *data, size_t len, ota_error *error);
/* That was all of them. ERR_INCOMPLETE when more were announced, or there were none, ERR_SHA256 when its stream
 * came from the cache and is another image's; both fail the store. */
ota_status ota_image_store_finish(ota_image_store *store, ota_error *error);
/* Compresses up to `steps` steps (64 KiB of image each) of the whole image's stream ahead of its readers, as far as bytes are
 * there; false: nothing to do now. Does nothing while nobody holds that stream. */
bool ota_image_store_advance(ota_image_store *store, uint32_t steps);
/* Keeps the whole image's stream as a cache file, for an image whose contents were found right. Only what was compressed
 * anyway is kept. OTA_DONE: there is nothing to keep, or it is there already. */
ota_status ota_image_store_keep(ota_image_store *store, ota_error *error);

/* From any thread. The first failure counts. */
void ota_image_store_fail(ota_image_store *store, const ota_error *error);

/* ---- Readers -------------------------------------------------------------------------------------------------------- */

/* Waits until the first `want` bytes are there (OTA_OK), or the image is complete (OTA_DONE). `*available` bytes are there
 * then. The store's failure otherwise. */
ota_status ota_image_store_wait(ota_image_store *store, uint64_t want, uint64_t *available, ota_error *error);
/* Bytes that are there, and whether these are all. */
uint64_t ota_image_store_available(ota_image_store *store, bool *complete);
/* The image bytes; as many as are available may be read, until the store is freed. */
const uint8_t *ota_image_store_bytes(const ota_image_store *store);
/* Of the image once complete; as announced before; OTA_SIZE_UNKNOWN. */
uint64_t ota_image_store_size(ota_image_store *store);

/* MD5 of [start, end), which must be available. Whole sectors, blocks and the whole image are remembered. */
ota_status ota_image_store_md5(ota_image_store *store, uint64_t start, uint64_t end, uint8_t md5[OTA_STORE_MD5],
                               ota_error *error);

/* Where the next bytes that are not FF begin: the first sector at or after `start` (a multiple of a sector) that is not blank;
 * `end` when all up to it is. Then, in `*run_end`, where they end: the start of the next run of at least `min_blank` bytes of
 * blank sectors, or `end`. Everything up to `end` must be available. */
uint64_t ota_image_store_next_run(const ota_image_store *store, uint64_t start, uint64_t end, uint64_t min_blank,
                                  uint64_t *run_end);

/* ---- Streams -------------------------------------------------------------------------------------------------------- */

/* One zlib stream of image bytes [start, end); `end` OTA_SIZE_UNKNOWN: to the end of the image, wherever that will be. To be
 * released. */
ota_status ota_image_store_stream(ota_image_store *store, uint64_t start, uint64_t end, ota_image_stream **out,
                                  ota_error *error);
void ota_image_stream_release(ota_image_stream **stream);

/* Points `*data` at up to `want` bytes of the stream from `position` on, and says in `*inflated` how many image bytes of the
 * run at most come out of everything before position + len. Waits for image bytes, and compresses. OTA_OK: `want` bytes are
 * there and more may follow; OTA_DONE: they end with the stream. The bytes stay until the stream is released. */
ota_status ota_image_stream_read(ota_image_stream *stream, uint64_t position, size_t want, const uint8_t **data,
                                 size_t *len, uint64_t *inflated, ota_error *error);
/* Whether read would return without waiting for image bytes. Compresses what is there, as far as it is wanted. */
bool ota_image_stream_ready(ota_image_stream *stream, uint64_t position, size_t want);
/* Bytes of the whole stream once all of it is compressed; OTA_SIZE_UNKNOWN before. */
uint64_t ota_image_stream_size(ota_image_stream *stream);

void ota_image_store_get_counts(ota_image_store *store, ota_image_store_counts *counts);

#endif
