/* sources: verify/verify_size.c verify/verify.c base/status.c base/bytes.c */
/* libs: zlib */
#include "check.h"
#include "verify/verify.h"

TEST(exactly_the_announced_bytes_pass) {
    for (uint64_t size = 0; size < 4; size++) {
        ota_verify *verify = NULL;
        ota_error error = {0};
        CHECK_EQ(ota_verify_size_new(size, &verify, &error), OTA_OK);
        for (uint64_t i = 0; i < size; i++) {
            CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"x", 1, &error), OTA_OK);
        }
        CHECK_EQ(verify->offset, size);
        CHECK_EQ(verify->ops->finish(verify, &error), OTA_OK);
        ota_verify_free(&verify);
        CHECK(verify == NULL);
    }
    ota_verify *none = NULL;
    ota_verify_free(&none);
}

TEST(too_few_are_found_at_the_end) {
    ota_verify *verify = NULL;
    ota_error error = {0};
    CHECK_EQ(ota_verify_size_new(5, &verify, &error), OTA_OK);
    CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"1234", 4, &error), OTA_OK);
    CHECK_EQ(verify->ops->finish(verify, &error), OTA_ERR_SIZE);
    CHECK_EQ(error.stage, OTA_STAGE_VERIFY);
    CHECK(strcmp(error.text, "expected 5 bytes, 4 came") == 0);
    ota_verify_free(&verify);
}

TEST(too_many_are_found_as_they_come_and_stick) {
    ota_verify *verify = NULL;
    ota_error error = {0};
    CHECK_EQ(ota_verify_size_new(5, &verify, &error), OTA_OK);
    CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"12345", 5, &error), OTA_OK);
    CHECK_EQ(verify->ops->update(verify, (const uint8_t *)"6", 1, &error), OTA_ERR_SIZE);
    CHECK_EQ(error.offset, 6);
    CHECK_EQ(verify->ops->update(verify, NULL, 0, NULL), OTA_ERR_SIZE);
    CHECK_EQ(verify->ops->finish(verify, NULL), OTA_ERR_SIZE);
    ota_verify_free(&verify);
}

int main(void) {
    RUN(exactly_the_announced_bytes_pass);
    RUN(too_few_are_found_at_the_end);
    RUN(too_many_are_found_as_they_come_and_stick);
    return DONE();
}
