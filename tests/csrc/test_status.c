/* sources: base/status.c */
#include "base/status.h"

#include <errno.h>
#include <stdlib.h>

#include "check.h"

TEST(names_and_numbers_of_the_table_are_unique) {
    size_t count = 0;
    const ota_status_info *table = ota_status_table(&count);
    CHECK(count > 10);
    for (size_t i = 0; i < count; i++) {
        CHECK(table[i].text[0] != '\0');
        CHECK(strcmp(ota_status_name(table[i].status), table[i].name) == 0);
        CHECK_EQ(ota_status_esp_err(table[i].status), table[i].esp_err);
        for (size_t j = 0; j < i; j++) {
            CHECK(table[i].status != table[j].status);
            CHECK(strcmp(table[i].name, table[j].name) != 0);
        }
    }
}

TEST(unknown_numbers_have_a_name_too) {
    CHECK(strcmp(ota_status_name((ota_status)-9999), "?") == 0);
    CHECK(strcmp(ota_stage_name((ota_stage)99), "?") == 0);
    CHECK_EQ(ota_status_esp_err((ota_status)-9999), -1);
}

TEST(first_error_is_kept) {
    ota_error error = {0};
    CHECK_EQ(ota_error_set(&error, OTA_ERR_SHA256, OTA_STAGE_VERIFY, 7, 5, "first %d", 1), OTA_ERR_SHA256);
    CHECK_EQ(ota_error_set(&error, OTA_ERR_MD5, OTA_STAGE_SINK, 8, 6, "second"), OTA_ERR_SHA256);
    CHECK_EQ(error.status, OTA_ERR_SHA256);
    CHECK_EQ(error.stage, OTA_STAGE_VERIFY);
    CHECK_EQ(error.offset, 7);
    CHECK_EQ(error.device_code, 5);
    CHECK(strcmp(error.text, "first 1") == 0);
    CHECK_EQ(ota_error_set(NULL, OTA_ERR_MD5, OTA_STAGE_SINK, 0, 0, "nowhere to put it"), OTA_ERR_MD5);
}

TEST(long_text_is_cut_at_a_character) {
    /* Every length of ASCII before a run of two-byte characters: the cut may never leave half of one. */
    for (int lead = 0; lead < 4; lead++) {
        char text[600];
        size_t len = 0;
        for (int i = 0; i < lead; i++) {
            text[len++] = 'a';
        }
        while (len + 2 < sizeof text) {
            text[len++] = (char)0xC3;
            text[len++] = (char)0xA4;
        }
        text[len] = '\0';
        ota_error error = {0};
        ota_error_set(&error, OTA_ERR_STATE, OTA_STAGE_NONE, 0, 0, "%s", text);
        size_t kept = strlen(error.text);
        CHECK(kept > sizeof error.text - 4);
        CHECK(kept < sizeof error.text);
        CHECK_EQ((kept - (size_t)lead) % 2, 0);
        CHECK_MEM(error.text, text, kept);
    }
}

TEST(errno_picks_the_status) {
    static const struct {
        int errnum;
        ota_status status;
    } cases[] = {{ENOSPC, OTA_ERR_NO_SPACE},  {EROFS, OTA_ERR_READ_ONLY},   {EBUSY, OTA_ERR_BUSY},
                 {ENOENT, OTA_ERR_NOT_FOUND}, {EACCES, OTA_ERR_PERMISSION}, {ENOMEM, OTA_ERR_NO_MEMORY},
                 {EIO, OTA_ERR_SYSTEM}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_error error = {0};
        CHECK_EQ(ota_error_set_errno(&error, OTA_STAGE_SINK, 3, cases[i].errnum, "cannot write /x"), cases[i].status);
        CHECK_EQ(error.device_code, cases[i].errnum);
        CHECK(strstr(error.text, "cannot write /x") != NULL);
        CHECK(strstr(error.text, strerror(cases[i].errnum)) != NULL);
    }
}

int main(void) {
    RUN(names_and_numbers_of_the_table_are_unique);
    RUN(unknown_numbers_have_a_name_too);
    RUN(first_error_is_kept);
    RUN(long_text_is_cut_at_a_character);
    RUN(errno_picks_the_status);
    return DONE();
}
