/* sources: flasher/slip.c */
#include <stdlib.h>

#include "check.h"
#include "flasher/slip.h"

/* What a decoder makes of a stream, as text: kind, bytes; "|" between pieces. */
typedef struct trace {
    char text[4096];
    size_t len;
} trace;

static void put(trace *t, const ota_slip_decoder *decoder) {
    t->len += (size_t)snprintf(t->text + t->len, sizeof t->text - t->len, "%c", "FND"[decoder->kind]);
    for (size_t i = 0; i < decoder->len; i++) {
        t->len += (size_t)snprintf(t->text + t->len, sizeof t->text - t->len, "%02x", decoder->buf[i]);
    }
    t->len += (size_t)snprintf(t->text + t->len, sizeof t->text - t->len, "|");
}

static unsigned long random_state = 1;
static size_t random_below(size_t n) {
    random_state = random_state * 6364136223846793005ul + 1442695040888963407ul;
    return (size_t)(random_state >> 33) % n;
}

enum {
    WHOLE,
    BYTES,
    SLICES
};

static trace decode(const uint8_t *bytes, size_t len, size_t capacity, int how) {
    trace t = {.len = 0};
    uint8_t *buf = malloc(capacity); /* of its own, so that an overrun is seen */
    ota_slip_decoder decoder;
    ota_slip_init(&decoder, buf, capacity);
    for (size_t at = 0; at < len;) {
        size_t slice = how == WHOLE ? len - at : how == BYTES ? 1 : 1 + random_below(9);
        slice = slice < len - at ? slice : len - at;
        uint8_t *copy = malloc(slice);
        memcpy(copy, bytes + at, slice);
        for (size_t done = 0; done < slice;) {
            size_t used = 0;
            ota_status status = ota_slip_step(&decoder, copy + done, slice - done, &used);
            CHECK(status == OTA_OK ? used == slice - done : used > 0);
            done += used;
            if (status == OTA_DONE) {
                put(&t, &decoder);
            }
        }
        free(copy);
        at += slice;
    }
    free(buf);
    return t;
}

static void check_stream(const char *stream, size_t len, size_t capacity, const char *expected) {
    for (int how = WHOLE; how <= SLICES; how++) {
        trace t = decode((const uint8_t *)stream, len, capacity, how);
        CHECK(strcmp(t.text, expected) == 0);
        if (strcmp(t.text, expected) != 0) {
            printf("  %s, expected %s\n", t.text, expected);
        }
    }
}

#define STREAM(stream, capacity, expected) check_stream(stream, sizeof(stream) - 1, capacity, expected)

TEST(frames_come_out_unescaped) {
    STREAM("\xC0\x01\x02\xC0", 8, "F0102|");
    STREAM("\xC0\xDB\xDC\xDB\xDD\x01\xC0", 8, "Fc0db01|");
    STREAM("\xC0\x01\xC0\xC0\x02\xC0\xC0\xC0\x03\xC0", 8, "F01|F02|F03|");
}

TEST(noise_and_damage_are_told_apart) {
    STREAM("boot\xC0\x01\xC0", 8, "N626f6f74|F01|");
    STREAM("\xC0\x01\xC0log\xC0\x02\xC0", 8, "F01|F6c6f67|F02|");
    STREAM("\xC0\x01\xDB\x02\xC0\x03\xC0", 8, "D0102|F03|");
    STREAM("\xC0\x01\xDB\xC0\x03\xC0", 8, "D01|F03|");
    STREAM("\xC0\xDB\xC0\x03\xC0", 8, "D|F03|");
    STREAM("\xC0\x01\x02\x03\xC0", 3, "F010203|");
    STREAM("\xC0\x01\x02\x03\x04\x05\xC0\x06\xC0", 3, "D010203|N05|F06|");
    STREAM("abcdefg\xC0\x06\xC0", 3, "N616263|N646566|N67|F06|");
    STREAM("\xDB\xDC\xC0\x06\xC0", 3, "Ndbdc|F06|");
}

TEST(every_truncation_ends_quietly_and_the_next_frame_is_whole) {
    static const uint8_t frame[] = {0xC0, 0x01, 0xDB, 0xDC, 0x02, 0xDB, 0xDD, 0xC0};
    for (size_t cut = 0; cut < sizeof frame; cut++) {
        uint8_t stream[2 * sizeof frame];
        memcpy(stream, frame, cut);
        memcpy(stream + cut, frame, sizeof frame);
        trace t = decode(stream, cut + sizeof frame, 16, WHOLE);
        const char *end = "F01c002db|";
        CHECK(t.len >= strlen(end) && strcmp(t.text + t.len - strlen(end), end) == 0);
    }
}

TEST(what_was_escaped_comes_back) {
    for (int round = 0; round < 500; round++) {
        uint8_t payload[64], frame[OTA_SLIP_FRAME_MAX(sizeof payload)];
        size_t len = 1 + random_below(sizeof payload), used = ota_slip_delimit(frame);
        for (size_t i = 0; i < len; i++) {
            static const uint8_t hard[] = {0xC0, 0xDB, 0xDC, 0xDD, 0x00, 0xFF};
            payload[i] = hard[random_below(sizeof hard)];
        }
        size_t half = random_below(len + 1);
        used += ota_slip_escape(frame + used, payload, half);
        used += ota_slip_escape(frame + used, payload + half, len - half);
        used += ota_slip_delimit(frame + used);
        CHECK(used <= OTA_SLIP_FRAME_MAX(len));
        uint8_t buf[64];
        ota_slip_decoder decoder;
        ota_slip_init(&decoder, buf, sizeof buf);
        size_t taken;
        CHECK_EQ(ota_slip_step(&decoder, frame, used, &taken), OTA_DONE);
        CHECK_EQ(taken, used);
        CHECK_EQ(decoder.kind, OTA_SLIP_FRAME);
        CHECK_EQ(decoder.len, len);
        CHECK_MEM(buf, payload, len);
    }
}

TEST(any_bytes_give_the_same_however_they_are_sliced) {
    for (int round = 0; round < 2000; round++) {
        uint8_t stream[48];
        size_t len = random_below(sizeof stream + 1), capacity = 1 + random_below(12);
        for (size_t i = 0; i < len; i++) {
            static const uint8_t hard[] = {0xC0, 0xDB, 0xDC, 0xDD, 0x41};
            stream[i] = hard[random_below(sizeof hard)];
        }
        trace whole = decode(stream, len, capacity, WHOLE);
        trace bytes = decode(stream, len, capacity, BYTES);
        trace slices = decode(stream, len, capacity, SLICES);
        CHECK(strcmp(whole.text, bytes.text) == 0);
        CHECK(strcmp(whole.text, slices.text) == 0);
    }
}

int main(void) {
    RUN(frames_come_out_unescaped);
    RUN(noise_and_damage_are_told_apart);
    RUN(every_truncation_ends_quietly_and_the_next_frame_is_whole);
    RUN(what_was_escaped_comes_back);
    RUN(any_bytes_give_the_same_however_they_are_sliced);
    return DONE();
}
