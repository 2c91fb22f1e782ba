/* sources: source/http_fields.c */
/* HTTP fields and URLs taken apart, and the bandwidth limit over a clock of our own. */
#include "check.h"

#include <stdbool.h>
#include <stdlib.h>

#include "source/http_fields.h"
#include "source/rate.h"

/* The value in a buffer of exactly its size, so that the sanitizer sees a read behind it. */
static char *exact(const char *value) {
    size_t len = strlen(value);
    char *copy = malloc(len > 0 ? len : 1);
    memcpy(copy, value, len);
    return copy;
}

static bool range_of(const char *value, ota_http_range *range) {
    char *copy = exact(value);
    bool ok = ota_http_parse_content_range(copy, strlen(value), range);
    free(copy);
    return ok;
}

TEST(a_content_range_is_parsed) {
    ota_http_range range;
    CHECK(range_of("bytes 0-0/1", &range));
    CHECK_EQ(range.first, 0);
    CHECK_EQ(range.last, 0);
    CHECK_EQ(range.total, 1);
    CHECK(range_of(" \tBytes  100-299/300 \r\n", &range));
    CHECK_EQ(range.first, 100);
    CHECK_EQ(range.last, 299);
    CHECK_EQ(range.total, 300);
    CHECK(range_of("bytes 7-8/*", &range));
    CHECK(range.total == UINT64_MAX);
    CHECK(range_of("bytes 18446744073709551613-18446744073709551614/18446744073709551615", &range));
    CHECK(range.first == UINT64_MAX - 2);
}

TEST(a_content_range_that_is_none_is_refused) {
    const char *bad[] = {
        "",
        "bytes",
        "bytes ",
        "bytes */300",
        "bytes 0-0",
        "bytes 0-0/",
        "bytes 0-/1",
        "bytes -0/1",
        "bytes 0/1",
        "bytes 5-4/10",
        "bytes 0-10/10",
        "bytes 0-0/0",
        "bytes 0-0/1x",
        "bytes 0-0/*x",
        "bytes 0 - 0 / 1",
        "bytes=0-0/1",
        "byte 0-0/1",
        "bytes 0-0/18446744073709551616",
        "bytes 99999999999999999999-99999999999999999999/*",
        "bytes 0x0-0/1",
        "bytes +0-0/1",
        "bytes 0-0/-1",
    };
    ota_http_range range;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        if (range_of(bad[i], &range)) {
            printf("taken: %s\n", bad[i]);
        }
        CHECK(!range_of(bad[i], &range));
    }
}

TEST(every_truncation_of_a_content_range_but_the_last_digits_is_refused) {
    const char *value = "bytes 100-299/300";
    ota_http_range range;
    for (size_t len = 0; len < strlen(value); len++) {
        char *copy = malloc(len > 0 ? len : 1);
        memcpy(copy, value, len);
        CHECK(!ota_http_parse_content_range(copy, len, &range)); /* 3 and 30 are totals below the range */
        free(copy);
    }
}

TEST(lengths_are_digits_and_nothing_else) {
    uint64_t number;
    CHECK(ota_http_parse_length("0", 1, &number) && number == 0);
    CHECK(ota_http_parse_length(" 12 ", 4, &number) && number == 12);
    CHECK(ota_http_parse_length("9223372036854775807", 19, &number) && number == INT64_MAX);
    CHECK(!ota_http_parse_length("9223372036854775808", 19, &number));
    CHECK(!ota_http_parse_length("18446744073709551616", 20, &number));
    const char *bad[] = {"", " ", "-1", "+1", "1x", "x", "1 2", "1,1", "0x1", "1.0"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK(!ota_http_parse_length(bad[i], strlen(bad[i]), &number));
    }
}

TEST(only_strong_entity_tags_that_fit_are_taken) {
    char tag[8];
    CHECK(ota_http_parse_entity_tag(" \"abc\" ", 7, tag, sizeof tag));
    CHECK(strcmp(tag, "\"abc\"") == 0);
    CHECK(ota_http_parse_entity_tag("\"\"", 2, tag, sizeof tag));
    CHECK(ota_http_parse_entity_tag("\"abcde\"", 7, tag, sizeof tag));
    CHECK(strcmp(tag, "\"abcde\"") == 0);
    const char *bad[] = {"",    "\"",      "abc",      "W/\"a\"", "\"abcdef\"", "\"a",
                         "a\"", "\"a b\"", "\"a\"b\"", "\"a\n\"", "\"\x7f\""};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memset(tag, 'x', sizeof tag);
        CHECK(!ota_http_parse_entity_tag(bad[i], strlen(bad[i]), tag, sizeof tag));
        CHECK_EQ(tag[0], 0);
    }
}

TEST(a_field_is_found_by_its_whole_name) {
    const char *value;
    size_t len;
    CHECK(ota_http_field("ETag: \"a\"\r\n", 11, "etag", &value, &len));
    CHECK_EQ(len, 3);
    CHECK_MEM(value, "\"a\"", 3);
    CHECK(ota_http_field("etag:", 5, "ETag", &value, &len));
    CHECK_EQ(len, 0);
    CHECK(!ota_http_field("ETag", 4, "ETag", &value, &len));
    CHECK(!ota_http_field("ETags: x", 8, "ETag", &value, &len));
    CHECK(!ota_http_field("ETag : x", 8, "ETag", &value, &len));
    CHECK(!ota_http_field("", 0, "ETag", &value, &len));
}

static void check_shown(const char *url, const char *expected) {
    char shown[64];
    ota_http_public_url(url, shown, sizeof shown);
    if (strcmp(shown, expected) != 0) {
        printf("%s is shown as %s\n", url, shown);
    }
    CHECK(strcmp(shown, expected) == 0);
}

TEST(secrets_of_a_url_are_not_shown) {
    check_shown("https://host/a?sig=1", "https://host/a");
    check_shown("https://host/a#frag?x", "https://host/a");
    check_shown("https://u:p@host:8443/a@b", "https://host:8443/a@b");
    check_shown("https://u:p@q@host", "https://host");
    check_shown("https://u:p@", "https://");
    check_shown("u:p@host/path", "host/path");
    check_shown("?https://u:p@host", "");
    check_shown("https://host/\r\n\x1b\x80", "https://host/????");
    check_shown("", "");
}

TEST(a_url_is_cut_to_the_room_there_is) {
    const char *url = "https://u:p@host/0123456789?secret";
    for (size_t size = 0; size < 40; size++) {
        char *shown = malloc(size > 0 ? size : 1);
        ota_http_public_url(url, shown, size);
        if (size > 0) {
            CHECK(strlen(shown) < size);
            CHECK(strstr(shown, "p@") == NULL && strstr(shown, "secret") == NULL);
            CHECK(size < 24 || strcmp(shown, "https://host/0123456789") == 0);
            CHECK(size < 4 || size >= 24 || strcmp(shown + strlen(shown) - 3, "...") == 0);
        }
        free(shown);
    }
}

/* Takes what it gets, always asking for `want`, waiting as long as it is told; never more than the limit by any time. */
static void check_rate(uint64_t limit, uint64_t want, uint64_t step_ms) {
    ota_rate rate;
    uint64_t now = 1000, total = 0, wait_ms, grants = 0;
    ota_rate_start(&rate, limit, now);
    while (now < 61000) {
        uint64_t granted = ota_rate_grant(&rate, want, now, &wait_ms);
        CHECK((granted > 0) == (wait_ms == 0) && granted <= want);
        ota_rate_spend(&rate, granted);
        total += granted;
        grants += granted > 0;
        CHECK(total <= limit * (now - 1000) / 1000);
        now += wait_ms > 0 ? wait_ms : step_ms;
    }
    CHECK(grants > 0);
    if (step_ms == 0) { /* whoever asks at once again gets all there is but the last portion */
        CHECK(total + limit / 20 + want + 1 >= limit * 60);
    }
}

TEST(the_limit_is_kept_and_used_up) {
    check_rate(1, 1, 0);
    check_rate(1, 4096, 0);
    check_rate(3, 7, 0);
    check_rate(1000, 1, 0);
    check_rate(100000, 65536, 0);
    check_rate(100000, 65536, 300);
    check_rate(UINT64_C(1) << 33, 1 << 20, 1);
}

TEST(a_long_silence_saves_up_a_quarter_of_a_second_only) {
    ota_rate rate;
    uint64_t wait_ms;
    ota_rate_start(&rate, 1000, 0);
    CHECK_EQ(ota_rate_grant(&rate, 100000, UINT64_C(1) << 60, &wait_ms), 250);
}

TEST(no_limit_grants_everything) {
    ota_rate rate;
    uint64_t wait_ms = 5;
    ota_rate_start(&rate, 0, 0);
    CHECK_EQ(ota_rate_grant(&rate, 12345, 0, &wait_ms), 12345);
    CHECK_EQ(wait_ms, 0);
    ota_rate_start(&rate, UINT64_MAX, 0); /* too much to count in thousandths: as good as none */
    CHECK_EQ(ota_rate_grant(&rate, 12345, 0, &wait_ms), 12345);
}

int main(void) {
    RUN(a_content_range_is_parsed);
    RUN(a_content_range_that_is_none_is_refused);
    RUN(every_truncation_of_a_content_range_but_the_last_digits_is_refused);
    RUN(lengths_are_digits_and_nothing_else);
    RUN(only_strong_entity_tags_that_fit_are_taken);
    RUN(a_field_is_found_by_its_whole_name);
    RUN(secrets_of_a_url_are_not_shown);
    RUN(a_url_is_cut_to_the_room_there_is);
    RUN(the_limit_is_kept_and_used_up);
    RUN(a_long_silence_saves_up_a_quarter_of_a_second_only);
    RUN(no_limit_grants_everything);
    return DONE();
}
