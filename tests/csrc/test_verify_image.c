/* sources: verify/verify.c verify/verify_image.c esp/esp_image.c base/bytes.c base/status.c small_chip.c flash_emu.c
 *          esp/esp_otadata.c esp/esp_partition_table.c port/fault.c */
/* libs: libcrypto zlib */
/* The image verifier behind the verifier's table: what it says of an image, and when. */
#include "verify/verify.h"

#include <stdlib.h>

#include "check.h"
#include "small_chip.h"

static uint8_t image[CHIP_IMAGE_SIZE];
static ota_error error;

static ota_image_rules rules(void) {
    ota_image_rules made = OTA_ESP_IMAGE_RULES_NONE;
    made.chip_id = CHIP_ID;
    memset(&error, 0, sizeof error);
    small_chip_image(image, "1.0.0", 0);
    return made;
}

/* Feeds pieces of at most `piece` bytes; the first error, or what finish says. */
static ota_status verify(const ota_image_rules *with, const uint8_t *bytes, size_t len, size_t piece) {
    ota_verify *made = NULL;
    ota_error own = {0};
    CHECK_EQ(ota_verify_image_new(with, &made, &own), OTA_OK);
    ota_status status = OTA_OK;
    for (size_t at = 0; at < len && status == OTA_OK; at += piece) {
        status = made->ops->update(made, bytes + at, piece < len - at ? piece : len - at, &own);
        CHECK(status != OTA_DONE);
    }
    ota_status finished = made->ops->finish(made, &own);
    CHECK(status == OTA_OK || finished == status);
    if (finished == OTA_OK) {
        CHECK_EQ(ota_verify_image_size(made), CHIP_IMAGE_SIZE);
        CHECK_EQ(made->offset, len);
    } else {
        CHECK_EQ(own.status, finished);
        CHECK_EQ(own.stage, OTA_STAGE_VERIFY);
    }
    ota_verify_free(&made);
    CHECK(made == NULL);
    return finished;
}

TEST(a_right_image_is_accepted_in_any_pieces) {
    ota_image_rules with = rules();
    const size_t pieces[] = {1, 7, 288, 4096, CHIP_IMAGE_SIZE};
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
        CHECK_EQ(verify(&with, image, sizeof image, pieces[i]), OTA_OK);
    }
}

TEST(bytes_behind_it_are_accepted_where_the_rules_say_so) {
    ota_image_rules with = rules();
    uint8_t *padded = malloc(sizeof image + 1000);
    memcpy(padded, image, sizeof image);
    memset(padded + sizeof image, 0xFF, 1000);
    CHECK_EQ(verify(&with, padded, sizeof image + 1000, 512), OTA_OK);
    with.bytes_after_allowed = false;
    CHECK_EQ(verify(&with, padded, sizeof image + 1000, 512), OTA_ERR_SIZE);
    free(padded);
}

TEST(the_end_of_the_input_is_not_the_end_of_the_image) {
    ota_image_rules with = rules();
    for (size_t len = 0; len < sizeof image; len += 13) {
        CHECK_EQ(verify(&with, image, len, 100), OTA_ERR_INCOMPLETE);
    }
    CHECK_EQ(verify(&with, image, sizeof image - 1, 100), OTA_ERR_INCOMPLETE);
}

TEST(the_first_bytes_decide_before_the_rest_is_there) {
    ota_image_rules with = rules();
    ota_verify *made = NULL;
    with.chip_id = CHIP_ID + 1;
    CHECK_EQ(ota_verify_image_new(&with, &made, &error), OTA_OK);
    CHECK_EQ(made->ops->update(made, image, 288, &error), OTA_ERR_IMAGE_CHIP);
    ota_error again = {0};
    CHECK_EQ(made->ops->update(made, image + 288, 100, &again), OTA_ERR_IMAGE_CHIP);
    CHECK(strcmp(again.text, error.text) == 0);
    CHECK_EQ(ota_verify_image_size(made), 0);
    ota_verify_free(&made);
}

TEST(a_changed_byte_is_found_by_the_end) {
    ota_image_rules with = rules();
    for (size_t at = 0; at < sizeof image; at += 31) {
        image[at] ^= 0x20;
        CHECK(verify(&with, image, sizeof image, 1000) < 0);
        image[at] ^= 0x20;
    }
}

TEST(the_size_of_another_verifier_is_none_of_its_business) {
    ota_verify *made = NULL;
    CHECK_EQ(ota_verify_image_size(&(ota_verify){.ops = NULL}), 0);
    ota_verify_free(&made);
}

int main(void) {
    RUN(a_right_image_is_accepted_in_any_pieces);
    RUN(bytes_behind_it_are_accepted_where_the_rules_say_so);
    RUN(the_end_of_the_input_is_not_the_end_of_the_image);
    RUN(the_first_bytes_decide_before_the_rest_is_there);
    RUN(a_changed_byte_is_found_by_the_end);
    RUN(the_size_of_another_verifier_is_none_of_its_business);
    return DONE();
}
