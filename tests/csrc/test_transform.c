/* sources: transform/transform.c transform/transform_inflate.c transform/transform_zstd.c transform/transform_xz.c base/status.c base/bytes.c */
/* libs: zlib libzstd liblzma */
#include <lzma.h>
#include <stdbool.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include "check.h"
#include "transform/transform.h"

#define PLAIN_LEN 9000u
#define ROOM (4u * PLAIN_LEN)

static uint8_t plain[PLAIN_LEN];
static uint8_t decoded[ROOM];

static uint32_t random_state = 1;

static uint32_t random_u32(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

/* Half text-like, half incompressible: both kinds of block. */
static void make_plain(void) {
    for (size_t i = 0; i < PLAIN_LEN; i++) {
        plain[i] = i < PLAIN_LEN / 2 ? (uint8_t)("firmware"[i % 8] + (i / 100) % 3) : (uint8_t)random_u32();
    }
}

/* ---- Encoders ---------------------------------------------------------------------------------------------------- */

typedef struct blob {
    uint8_t *data;
    size_t len;
} blob;

static size_t encode(ota_transform_kind kind, const uint8_t *data, size_t len, uint8_t *out, size_t room) {
    switch (kind) {
    case OTA_TRANSFORM_GZIP:
    case OTA_TRANSFORM_ZLIB: {
        z_stream z = {0};
        deflateInit2(&z, 9, Z_DEFLATED, kind == OTA_TRANSFORM_GZIP ? 31 : 15, 9, Z_DEFAULT_STRATEGY);
        z.next_in = (Bytef *)(uintptr_t)data;
        z.avail_in = (uInt)len;
        z.next_out = out;
        z.avail_out = (uInt)room;
        const int result = deflate(&z, Z_FINISH);
        const size_t made = room - z.avail_out;
        deflateEnd(&z);
        return result == Z_STREAM_END ? made : 0;
    }
    case OTA_TRANSFORM_ZSTD: {
        ZSTD_CCtx *cctx = ZSTD_createCCtx();
        ZSTD_CCtx_setParameter(cctx, ZSTD_c_checksumFlag, 1);
        const size_t made = ZSTD_compress2(cctx, out, room, data, len);
        ZSTD_freeCCtx(cctx);
        return ZSTD_isError(made) ? 0 : made;
    }
    case OTA_TRANSFORM_XZ: {
        size_t made = 0;
        return lzma_easy_buffer_encode(6, LZMA_CHECK_CRC64, NULL, data, len, out, &made, room) == LZMA_OK ? made : 0;
    }
    default:
        return 0;
    }
}

static blob encoded(ota_transform_kind kind, const uint8_t *data, size_t len) {
    const size_t room = len + len / 8 + 1024;
    blob b = {.data = malloc(room)};
    b.len = encode(kind, data, len, b.data, room);
    CHECK(b.len > 0);
    return b;
}

/* The bytes in an allocation of exactly their size, so that the sanitizer sees a read past the end. */
static blob exact(const uint8_t *data, size_t len) {
    blob b = {.data = malloc(len ? len : 1), .len = len};
    memcpy(b.data, data, len);
    return b;
}

static void append(blob *b, const void *data, size_t len) {
    b->data = realloc(b->data, b->len + len);
    memcpy(b->data + b->len, data, len);
    b->len += len;
}

/* ---- Decoding in pieces ------------------------------------------------------------------------------------------ */

typedef struct plan {
    size_t in_max, out_max; /* size of the slices at most; 0: whole */
    bool random;
    uint64_t max_out, max_memory;
} plan;

typedef struct outcome {
    ota_status status; /* OTA_DONE or the error */
    size_t len;
    ota_error error;
} outcome;

static size_t slice(size_t max, size_t left, bool random) {
    size_t n = max == 0 ? left : max;
    if (random && n > 0) {
        n = random_u32() % (n + 1);
    }
    return n < left ? n : left;
}

static outcome decode(ota_transform_kind kind, const uint8_t *data, size_t len, plan p) {
    outcome result = {0};
    ota_transform *transform = NULL;
    result.status = ota_transform_new(kind, p.max_out, p.max_memory, &transform, &result.error);
    if (result.status < 0) {
        return result;
    }
    size_t at = 0;
    unsigned idle = 0;
    while (at < len && result.status == OTA_OK && idle < 1000) {
        const size_t given = slice(p.in_max, len - at, p.random);
        uint8_t *room = decoded + result.len;
        ota_bytes_in in = {.data = data + at, .len = given};
        ota_bytes_out out = {.data = room, .capacity = slice(p.out_max, ROOM - result.len, p.random)};
        result.status = transform->ops->step(transform, &in, &out, &result.error);
        CHECK(in.pos <= in.len && out.pos <= out.capacity);
        if (result.status == OTA_OK && given > 0 && out.capacity > 0) {
            CHECK(in.pos > 0 || out.pos > 0); /* the promise: it moves or says why not */
        }
        CHECK(result.status <= OTA_OK);
        idle = in.pos > 0 || out.pos > 0 ? 0 : idle + 1;
        at += in.pos;
        result.len += out.pos;
        if (result.len == ROOM) {
            break;
        }
    }
    CHECK(idle < 1000);
    while (result.status == OTA_OK && result.len < ROOM) {
        ota_bytes_out out = {.data = decoded + result.len,
                             .capacity = p.out_max && p.out_max < ROOM - result.len ? p.out_max : ROOM - result.len};
        result.status = transform->ops->finish(transform, &out, &result.error);
        CHECK(result.status != OTA_OK || out.pos == out.capacity);
        result.len += out.pos;
    }
    if (result.status < 0) { /* the first error sticks */
        ota_bytes_in in = {.data = data, .len = len};
        ota_bytes_out out = {.data = decoded, .capacity = 1};
        ota_error again = {0};
        CHECK_EQ(transform->ops->step(transform, &in, &out, &again), result.status);
        CHECK_EQ(again.status, result.status);
        CHECK(strcmp(again.text, result.error.text) == 0);
        CHECK_EQ(in.pos + out.pos, 0);
        CHECK_EQ(transform->ops->finish(transform, &out, NULL), result.status);
    } else if (result.status == OTA_DONE) {
        CHECK_EQ(transform->bytes_in, len);
        CHECK_EQ(transform->bytes_out, result.len);
    }
    ota_transform_free(&transform);
    CHECK(transform == NULL);
    return result;
}

static const ota_transform_kind kinds[] = {OTA_TRANSFORM_GZIP, OTA_TRANSFORM_ZLIB, OTA_TRANSFORM_ZSTD,
                                           OTA_TRANSFORM_XZ};
#define KINDS (sizeof kinds / sizeof kinds[0])

static void check_plain(outcome result, size_t times) {
    CHECK_EQ(result.status, OTA_DONE);
    CHECK_EQ(result.len, times * PLAIN_LEN);
    for (size_t i = 0; i < times && result.len == times * PLAIN_LEN; i++) {
        CHECK_MEM(decoded + i * PLAIN_LEN, plain, PLAIN_LEN);
    }
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

TEST(the_kind_follows_from_the_first_bytes) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        CHECK_EQ(ota_transform_detect(b.data, OTA_TRANSFORM_MAGIC_LEN), kinds[k]);
        for (size_t len = 0; len < 3; len++) {
            CHECK_EQ(ota_transform_detect(b.data, len), OTA_TRANSFORM_NONE);
        }
        free(b.data);
    }
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\x5E\x2A\x4D\x18\0\0", 6), OTA_TRANSFORM_ZSTD);
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\xE9\x05\x02\x20\0\0", 6), OTA_TRANSFORM_NONE);
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\x78\x9D\x01\x01\0\0", 6), OTA_TRANSFORM_NONE); /* check */
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\x78\xBB\x01\x01\0\0", 6), OTA_TRANSFORM_NONE); /* dictionary */
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\x78\x9C\x07\x01\0\0", 6), OTA_TRANSFORM_NONE); /* block type */
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\x1F\x8B\x08\xE0\0\0", 6), OTA_TRANSFORM_NONE); /* reserved */
    CHECK_EQ(ota_transform_detect((const uint8_t *)"\0\0\0\0\0\0", 6), OTA_TRANSFORM_NONE);
}

TEST(whole_byte_by_byte_and_in_random_slices_give_the_same) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        check_plain(decode(kinds[k], b.data, b.len, (plan){0}), 1);
        check_plain(decode(kinds[k], b.data, b.len, (plan){.in_max = 1}), 1);
        check_plain(decode(kinds[k], b.data, b.len, (plan){.out_max = 1}), 1);
        check_plain(decode(kinds[k], b.data, b.len, (plan){.in_max = 1, .out_max = 1}), 1);
        for (int i = 0; i < 40; i++) {
            check_plain(decode(kinds[k], b.data, b.len, (plan){.in_max = 300, .out_max = 500, .random = true}), 1);
        }
        free(b.data);
    }
}

TEST(an_empty_content_is_complete) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, 0);
        for (size_t in_max = 0; in_max < 3; in_max++) {
            outcome result = decode(kinds[k], b.data, b.len, (plan){.in_max = in_max});
            CHECK_EQ(result.status, OTA_DONE);
            CHECK_EQ(result.len, 0);
        }
        free(b.data);
    }
}

TEST(no_input_at_all_is_incomplete) {
    for (size_t k = 0; k < KINDS; k++) {
        CHECK_EQ(decode(kinds[k], plain, 0, (plan){0}).status, OTA_ERR_INCOMPLETE);
    }
}

TEST(every_truncation_is_incomplete) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        for (size_t len = 0; len < b.len; len += len < 64 || len + 64 > b.len ? 1 : 7) {
            blob cut = exact(b.data, len);
            CHECK_EQ(decode(kinds[k], cut.data, len, (plan){0}).status, OTA_ERR_INCOMPLETE);
            CHECK_EQ(decode(kinds[k], cut.data, len, (plan){.in_max = 64, .out_max = 64}).status, OTA_ERR_INCOMPLETE);
            free(cut.data);
        }
        free(b.data);
    }
}

TEST(several_streams_are_one) {
    static const ota_transform_kind several[] = {OTA_TRANSFORM_GZIP, OTA_TRANSFORM_ZSTD, OTA_TRANSFORM_XZ};
    for (size_t k = 0; k < 3; k++) {
        blob b = encoded(several[k], plain, PLAIN_LEN), all = exact(b.data, b.len);
        append(&all, b.data, b.len);
        append(&all, b.data, b.len);
        check_plain(decode(several[k], all.data, all.len, (plan){0}), 3);
        check_plain(decode(several[k], all.data, all.len, (plan){.in_max = 1, .out_max = 100}), 3);
        for (int i = 0; i < 10; i++) {
            check_plain(decode(several[k], all.data, all.len, (plan){.in_max = 999, .out_max = 999, .random = true}),
                        3);
        }
        /* At the end of a stream the input may end; one byte later it may not. */
        check_plain(decode(several[k], all.data, b.len * 2, (plan){0}), 2);
        CHECK_EQ(decode(several[k], all.data, b.len * 2 + 1, (plan){0}).status, OTA_ERR_INCOMPLETE);
        free(all.data);
        free(b.data);
    }
}

TEST(bytes_behind_the_stream_are_damage) {
    for (size_t k = 0; k < KINDS; k++) {
        for (size_t in_max = 0; in_max < 2; in_max++) {
            blob b = encoded(kinds[k], plain, PLAIN_LEN);
            append(&b, "\xE9", 1);
            outcome result = decode(kinds[k], b.data, b.len, (plan){.in_max = in_max});
            CHECK_EQ(result.status, OTA_ERR_COMPRESSED_DATA);
            CHECK_EQ(result.error.offset, b.len - 1);
            CHECK_EQ(result.len, PLAIN_LEN);
            free(b.data);
        }
    }
    blob twice = encoded(OTA_TRANSFORM_ZLIB, plain, 10), again = exact(twice.data, twice.len);
    append(&twice, again.data, again.len);
    CHECK_EQ(decode(OTA_TRANSFORM_ZLIB, twice.data, twice.len, (plan){0}).status, OTA_ERR_COMPRESSED_DATA);
    free(again.data);
    free(twice.data);
}

TEST(zstd_skippable_frames_are_skipped) {
    static const uint8_t skippable[] = {0x53, 0x2A, 0x4D, 0x18, 5, 0, 0, 0, 'h', 'e', 'l', 'l', 'o'};
    blob frame = encoded(OTA_TRANSFORM_ZSTD, plain, PLAIN_LEN), all = exact(skippable, sizeof skippable);
    append(&all, frame.data, frame.len);
    append(&all, skippable, sizeof skippable);
    append(&all, frame.data, frame.len);
    append(&all, skippable, sizeof skippable);
    check_plain(decode(OTA_TRANSFORM_ZSTD, all.data, all.len, (plan){0}), 2);
    check_plain(decode(OTA_TRANSFORM_ZSTD, all.data, all.len, (plan){.in_max = 1, .out_max = 1}), 2);
    CHECK_EQ(decode(OTA_TRANSFORM_ZSTD, all.data, all.len - 1, (plan){0}).status, OTA_ERR_INCOMPLETE);
    CHECK_EQ(decode(OTA_TRANSFORM_ZSTD, all.data, sizeof skippable, (plan){0}).status, OTA_DONE);
    free(frame.data);
    free(all.data);
}

TEST(xz_padding_is_a_multiple_of_four) {
    blob b = encoded(OTA_TRANSFORM_XZ, plain, PLAIN_LEN);
    for (size_t padding = 0; padding <= 9; padding++) {
        for (size_t in_max = 0; in_max < 3; in_max++) {
            blob all = exact(b.data, b.len);
            append(&all, "\0\0\0\0\0\0\0\0\0", padding);
            const outcome end = decode(OTA_TRANSFORM_XZ, all.data, all.len, (plan){.in_max = in_max});
            append(&all, b.data, b.len);
            const outcome more = decode(OTA_TRANSFORM_XZ, all.data, all.len, (plan){.in_max = in_max});
            if (padding % 4 == 0) {
                CHECK_EQ(end.status, OTA_DONE);
                check_plain(more, 2);
            } else {
                CHECK_EQ(end.status, OTA_ERR_INCOMPLETE);
                CHECK_EQ(more.status, OTA_ERR_COMPRESSED_DATA);
            }
            free(all.data);
        }
    }
    free(b.data);
}

TEST(a_flipped_bit_never_gives_other_bytes) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        for (size_t at = 0; at < b.len; at += at < 64 || at + 64 > b.len ? 1 : 13) {
            blob bad = exact(b.data, b.len);
            bad.data[at] ^= (uint8_t)(1u << (at % 8));
            outcome result = decode(kinds[k], bad.data, bad.len, (plan){.max_out = 2 * PLAIN_LEN});
            if (result.status == OTA_DONE) { /* a bit that means nothing: time or name in the gzip header */
                CHECK_EQ(result.len, PLAIN_LEN);
                CHECK_MEM(decoded, plain, PLAIN_LEN);
            } else {
                CHECK(result.status < 0);
                CHECK(result.error.text[0] != '\0');
            }
            free(bad.data);
        }
        free(b.data);
    }
}

TEST(garbage_is_refused_at_once) {
    for (size_t k = 0; k < KINDS; k++) {
        outcome result = decode(kinds[k], plain, PLAIN_LEN, (plan){0});
        CHECK_EQ(result.status, OTA_ERR_COMPRESSED_DATA);
        CHECK_EQ(result.len, 0);
    }
}

TEST(the_limit_on_expansion_is_exact) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        for (size_t out_max = 0; out_max < 3; out_max++) {
            check_plain(decode(kinds[k], b.data, b.len, (plan){.out_max = out_max, .max_out = PLAIN_LEN}), 1);
            outcome result = decode(kinds[k], b.data, b.len, (plan){.out_max = out_max, .max_out = PLAIN_LEN - 1});
            CHECK_EQ(result.status, OTA_ERR_EXPANSION);
            CHECK_EQ(result.len, PLAIN_LEN - 1);
            CHECK_EQ(decode(kinds[k], b.data, b.len, (plan){.max_out = 1}).status, OTA_ERR_EXPANSION);
        }
        free(b.data);
    }
}

TEST(the_end_is_reached_with_an_output_of_exactly_the_size) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        ota_transform *transform = NULL;
        ota_error error = {0};
        CHECK_EQ(ota_transform_new(kinds[k], 0, 0, &transform, &error), OTA_OK);
        ota_bytes_in in = {.data = b.data, .len = b.len};
        ota_bytes_out out = {.data = decoded, .capacity = PLAIN_LEN};
        for (int i = 0; i < 100; i++) { /* also: asking without room again and again does no harm */
            CHECK_EQ(transform->ops->step(transform, &in, &out, &error), OTA_OK);
        }
        CHECK_EQ(out.pos, PLAIN_LEN);
        uint8_t more;
        ota_bytes_out rest = {.data = &more, .capacity = 1};
        for (int i = 0; i < 100; i++) {
            CHECK_EQ(transform->ops->step(transform, &in, &rest, &error), OTA_OK);
        }
        CHECK_EQ(in.pos, in.len);
        CHECK_EQ(transform->ops->finish(transform, &rest, &error), OTA_DONE);
        CHECK_EQ(transform->ops->finish(transform, &rest, &error), OTA_DONE);
        CHECK_EQ(rest.pos, 0);
        ota_transform_free(&transform);
        free(b.data);
    }
}

TEST(a_full_output_keeps_the_bytes_until_there_is_room) {
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], plain, PLAIN_LEN);
        ota_transform *transform = NULL;
        ota_error error = {0};
        CHECK_EQ(ota_transform_new(kinds[k], 0, 0, &transform, &error), OTA_OK);
        ota_bytes_in in = {.data = b.data, .len = b.len};
        ota_bytes_out none = {.data = NULL, .capacity = 0};
        for (int i = 0; i < 100; i++) {
            CHECK_EQ(transform->ops->step(transform, &in, &none, &error), OTA_OK);
        }
        ota_bytes_out out = {.data = decoded, .capacity = ROOM};
        CHECK_EQ(transform->ops->step(transform, &in, &out, &error), OTA_OK);
        CHECK_EQ(out.pos, PLAIN_LEN);
        CHECK_MEM(decoded, plain, PLAIN_LEN);
        CHECK_EQ(transform->ops->finish(transform, &out, &error), OTA_DONE);
        ota_transform_free(&transform);
        free(b.data);
    }
}

TEST(a_bomb_stops_at_the_limit) {
    const size_t len = 16u << 20;
    uint8_t *zeros = calloc(1, len);
    for (size_t k = 0; k < KINDS; k++) {
        blob b = encoded(kinds[k], zeros, len);
        CHECK(b.len < 32768);
        outcome result = decode(kinds[k], b.data, b.len, (plan){.max_out = 1000});
        CHECK_EQ(result.status, OTA_ERR_EXPANSION);
        CHECK_EQ(result.len, 1000);
        CHECK(strstr(result.error.text, "1000") != NULL);
        free(b.data);
    }
    free(zeros);
}

TEST(a_window_above_the_memory_limit_is_refused_with_the_figures) {
    uint8_t *zeros = calloc(1, 1u << 20);
    for (size_t k = 2; k < KINDS; k++) {
        blob b = encoded(kinds[k], zeros, 1u << 20);
        for (size_t in_max = 0; in_max < 2; in_max++) {
            outcome result = decode(kinds[k], b.data, b.len, (plan){.in_max = in_max, .max_memory = 300000});
            CHECK_EQ(result.status, OTA_ERR_COMPRESSED_DATA);
            CHECK_EQ(result.len, 0);
            CHECK(strstr(result.error.text, kinds[k] == OTA_TRANSFORM_ZSTD ? "1048576" : "562144") != NULL);
        }
        free(b.data);
    }
    free(zeros);
    /* A frame head alone that wants 3.75 TiB, the most the format can say: refused before anything is allocated. */
    static const uint8_t huge[] = {0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xFF, 0x01, 0x00, 0x00};
    outcome result = decode(OTA_TRANSFORM_ZSTD, huge, sizeof huge, (plan){0});
    CHECK_EQ(result.status, OTA_ERR_COMPRESSED_DATA);
    CHECK(strstr(result.error.text, "4123168604160") != NULL);
    /* The limit itself is allowed: a window of 96 KiB is no power of two. */
    static const uint8_t odd[] = {0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x34, 0x01, 0x00, 0x00};
    CHECK_EQ(decode(OTA_TRANSFORM_ZSTD, odd, sizeof odd, (plan){.max_memory = 98304}).status, OTA_DONE);
    CHECK_EQ(decode(OTA_TRANSFORM_ZSTD, odd, sizeof odd, (plan){.max_memory = 98303}).status, OTA_ERR_COMPRESSED_DATA);
}

TEST(an_unknown_kind_is_no_decoder) {
    static const int bad[] = {OTA_TRANSFORM_AUTO, OTA_TRANSFORM_NONE, 6, -1};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ota_transform *transform = NULL;
        ota_error error = {0};
        CHECK_EQ(ota_transform_new((ota_transform_kind)bad[i], 0, 0, &transform, &error), OTA_ERR_ARGUMENT);
        CHECK(transform == NULL);
        ota_transform_free(&transform);
    }
    CHECK_EQ(decode(OTA_TRANSFORM_GZIP, plain, 1, (plan){.max_memory = 1000}).status, OTA_ERR_ARGUMENT);
}

int main(void) {
    make_plain();
    RUN(the_kind_follows_from_the_first_bytes);
    RUN(whole_byte_by_byte_and_in_random_slices_give_the_same);
    RUN(an_empty_content_is_complete);
    RUN(no_input_at_all_is_incomplete);
    RUN(every_truncation_is_incomplete);
    RUN(several_streams_are_one);
    RUN(bytes_behind_the_stream_are_damage);
    RUN(zstd_skippable_frames_are_skipped);
    RUN(xz_padding_is_a_multiple_of_four);
    RUN(a_flipped_bit_never_gives_other_bytes);
    RUN(garbage_is_refused_at_once);
    RUN(the_limit_on_expansion_is_exact);
    RUN(the_end_is_reached_with_an_output_of_exactly_the_size);
    RUN(a_full_output_keeps_the_bytes_until_there_is_room);
    RUN(a_bomb_stops_at_the_limit);
    RUN(a_window_above_the_memory_limit_is_refused_with_the_figures);
    RUN(an_unknown_kind_is_no_decoder);
    return DONE();
}
