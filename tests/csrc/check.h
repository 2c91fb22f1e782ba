/* The few macros the C unit tests need. A test program runs every TEST and returns the number of failures.
 *
 *     TEST(sink_error_stops_and_sticks) { CHECK_EQ(sink->ops->finish(sink, &error), OTA_ERR_NO_SPACE); }
 *     int main(void) { RUN(sink_error_stops_and_sticks); return DONE(); }
 */
#ifndef OTA_TESTS_CHECK_H
#define OTA_TESTS_CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static int check_failures;
static int check_count;

#define TEST(name) static void name(void)

#define RUN(name)                                                                                                      \
    do {                                                                                                               \
        int before = check_failures;                                                                                   \
        name();                                                                                                        \
        printf("%s %s\n", check_failures == before ? "ok  " : "FAIL", #name);                                          \
    } while (0)

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        check_count++;                                                                                                 \
        if (!(condition)) {                                                                                            \
            check_failures++;                                                                                          \
            printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                           \
        }                                                                                                              \
    } while (0)

#define CHECK_EQ(got, expected)                                                                                        \
    do {                                                                                                               \
        long long check_got = (long long)(got), check_expected = (long long)(expected);                                \
        check_count++;                                                                                                 \
        if (check_got != check_expected) {                                                                             \
            check_failures++;                                                                                          \
            printf("%s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__, #got, check_got, check_expected);         \
        }                                                                                                              \
    } while (0)

#define CHECK_MEM(got, expected, len)                                                                                  \
    do {                                                                                                               \
        check_count++;                                                                                                 \
        if (memcmp((got), (expected), (len)) != 0) {                                                                   \
            check_failures++;                                                                                          \
            printf("%s:%d: bytes of %s differ from %s\n", __FILE__, __LINE__, #got, #expected);                        \
        }                                                                                                              \
    } while (0)

#define DONE() (printf("%d checks, %d failed\n", check_count, check_failures), check_failures != 0 || check_count == 0)

#endif
