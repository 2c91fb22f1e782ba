/* sources: verify/verify_digest.c verify/verify.c verify/verify_size.c base/status.c base/bytes.c */
/* libs: zlib libcrypto */
#include <stdlib.h>

#include "check.h"
#include "verify/verify.h"

/* FIPS 180-4 and RFC 1321 examples. */
static const struct {
    ota_digest_kind kind;
    size_t len;
    const char *text;
    const char *digest;
} examples[] = {
    {OTA_DIGEST_SHA256, 32, "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {OTA_DIGEST_SHA256, 32, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    {OTA_DIGEST_SHA256, 32, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    {OTA_DIGEST_MD5, 16, "", "d41d8cd98f00b204e9800998ecf8427e"},
    {OTA_DIGEST_MD5, 16, "abc", "900150983cd24fb0d6963f7d28e17f72"},
    {OTA_DIGEST_MD5, 16, "12345678901234567890123456789012345678901234567890123456789012345678901234567890",
     "57edf4a22be3c955ac49da2e2107b67a"},
};
#define EXAMPLES (sizeof examples / sizeof examples[0])

static void from_hex(uint8_t *out, const char *hex) {
    for (; hex[0] != '\0'; hex += 2) {
        const char pair[3] = {hex[0], hex[1], '\0'};
        *out++ = (uint8_t)strtoul(pair, NULL, 16);
    }
}

TEST(the_published_examples_come_out_in_every_slicing) {
    for (size_t i = 0; i < EXAMPLES; i++) {
        const size_t text_len = strlen(examples[i].text);
        uint8_t expected[OTA_DIGEST_MAX];
        from_hex(expected, examples[i].digest);
        for (size_t step = 1; step <= text_len + 1; step++) {
            for (int compare = 0; compare < 2; compare++) {
                ota_verify *verify = NULL;
                ota_error error = {0};
                CHECK_EQ(ota_verify_digest_new(examples[i].kind, compare ? expected : NULL, &verify, &error), OTA_OK);
                for (size_t at = 0; at < text_len; at += step) {
                    const size_t len = step < text_len - at ? step : text_len - at;
                    CHECK_EQ(verify->ops->update(verify, (const uint8_t *)examples[i].text + at, len, &error), OTA_OK);
                }
                CHECK_EQ(verify->offset, text_len);
                CHECK_EQ(verify->ops->finish(verify, &error), OTA_OK);
                uint8_t value[OTA_DIGEST_MAX];
                size_t len = 0;
                CHECK_EQ(ota_verify_digest_value(verify, value, &len), OTA_OK);
                CHECK_EQ(len, examples[i].len);
                CHECK_MEM(value, expected, len);
                ota_verify_free(&verify);
            }
        }
    }
}

TEST(another_digest_is_the_error_of_its_kind_and_sticks) {
    for (size_t i = 0; i < EXAMPLES; i++) {
        uint8_t expected[OTA_DIGEST_MAX];
        from_hex(expected, examples[i].digest);
        for (size_t bit = 0; bit < examples[i].len * 8; bit++) {
            const ota_status status = examples[i].kind == OTA_DIGEST_SHA256 ? OTA_ERR_SHA256 : OTA_ERR_MD5;
            ota_verify *verify = NULL;
            ota_error error = {0}, again = {0};
            expected[bit / 8] ^= (uint8_t)(1u << bit % 8);
            CHECK_EQ(ota_verify_digest_new(examples[i].kind, expected, &verify, &error), OTA_OK);
            expected[bit / 8] ^= (uint8_t)(1u << bit % 8);
            verify->ops->update(verify, (const uint8_t *)examples[i].text, strlen(examples[i].text), &error);
            CHECK_EQ(verify->ops->finish(verify, &error), status);
            CHECK_EQ(error.stage, OTA_STAGE_VERIFY);
            CHECK(strstr(error.text, examples[i].digest) != NULL); /* the one found, whole */
            CHECK_EQ(verify->ops->finish(verify, &again), status);
            CHECK(strcmp(again.text, error.text) == 0);
            CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"x", 1, NULL), status);
            uint8_t value[OTA_DIGEST_MAX];
            size_t len = 0;
            CHECK_EQ(ota_verify_digest_value(verify, value, &len), OTA_OK); /* for the report */
            CHECK_MEM(value, expected, len);
            ota_verify_free(&verify);
        }
    }
}

TEST(there_is_no_value_before_finish_and_no_byte_after_it) {
    ota_verify *verify = NULL, *size = NULL;
    ota_error error = {0};
    uint8_t value[OTA_DIGEST_MAX];
    size_t len = 0;
    CHECK_EQ(ota_verify_digest_new(OTA_DIGEST_MD5, NULL, &verify, &error), OTA_OK);
    CHECK_EQ(ota_verify_digest_value(verify, value, &len), OTA_ERR_STATE);
    CHECK_EQ(verify->ops->update(verify, NULL, 0, &error), OTA_OK);
    CHECK_EQ(verify->ops->finish(verify, &error), OTA_OK);
    CHECK_EQ(verify->ops->finish(verify, &error), OTA_OK);
    CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"x", 1, &error), OTA_ERR_STATE);
    ota_verify_free(&verify);

    error = (ota_error){0};
    CHECK_EQ(ota_verify_digest_new((ota_digest_kind)7, NULL, &verify, &error), OTA_ERR_ARGUMENT);
    CHECK(verify == NULL);
    error = (ota_error){0};
    CHECK_EQ(ota_verify_size_new(0, &size, &error), OTA_OK);
    CHECK_EQ(ota_verify_digest_value(size, value, &len), OTA_ERR_ARGUMENT);
    ota_verify_free(&size);
}

int main(void) {
    RUN(the_published_examples_come_out_in_every_slicing);
    RUN(another_digest_is_the_error_of_its_kind_and_sticks);
    RUN(there_is_no_value_before_finish_and_no_byte_after_it);
    return DONE();
}
