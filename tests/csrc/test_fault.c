/* sources: port/fault.c */
#include <errno.h>

#include "check.h"
#include "port/port.h"

static uint64_t take;

TEST(no_plan_and_an_empty_plan_let_everything_pass) {
    ota_fault fault = {0};
    CHECK_EQ(ota_fault_check(NULL, OTA_FAULT_WRITE, 0, 7, &take), 0);
    CHECK_EQ(take, 7);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 7, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_SYNC, 0, 0, &take), 0);
    CHECK_EQ(take, 0);
    CHECK_EQ(fault.seen, 2);
    CHECK(!fault.lost);
}

TEST(so_many_succeed_then_so_many_fail) {
    ota_fault fault = {.after = 2, .count = 2, .errnum = ENOSPC, .torn_len = 3};
    int expected[] = {0, 0, ENOSPC, ENOSPC, 0};
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 8, &take), expected[i]);
        CHECK_EQ(take, expected[i] != 0 ? 3 : 8);
    }
    CHECK_EQ(fault.seen, 5);
    CHECK(!fault.lost);
}

TEST(only_the_chosen_operations_count) {
    ota_fault fault = {.ops = OTA_FAULT_SYNC | OTA_FAULT_ERASE, .after = 1, .count = 1};
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 8, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_SYNC, 0, 0, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_READ, 0, 8, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_ERASE, 0, 4096, &take), EIO);
    CHECK_EQ(take, 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_SYNC, 0, 0, &take), 0);
    CHECK_EQ(fault.seen, 3);
}

TEST(only_operations_beyond_the_offset_count) {
    ota_fault fault = {.reaches = 100, .count = 9};
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 100, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_SYNC, 0, 0, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 200, 0, &take), 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, UINT64_MAX - 1, 4, &take),
             0); /* nonsense is the port's to refuse */
    CHECK_EQ(fault.seen, 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 101, &take), EIO);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_READ, 100, 1, &take), EIO);
}

TEST(after_a_power_cut_nothing_works) {
    ota_fault fault = {.ops = OTA_FAULT_WRITE, .after = 1, .power_cut = true, .torn_len = 5, .errnum = ENOSPC};
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 0, 8, &take), 0);
    CHECK(!fault.lost);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 8, 8, &take), EIO);
    CHECK_EQ(take, 5);
    CHECK(fault.lost);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_WRITE, 8, 8, &take), EIO);
    CHECK_EQ(take, 0);
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_READ, 0, 8, &take), EIO); /* not counted before, but gone too */
    CHECK_EQ(take, 0);
    CHECK_EQ(fault.seen, 2);
}

TEST(a_torn_length_beyond_the_operation_is_all_of_it) {
    ota_fault fault = {.power_cut = true, .torn_len = UINT64_MAX};
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_ERASE, 0, 4096, &take), EIO);
    CHECK_EQ(take, 4096);
    fault = (ota_fault){.power_cut = true, .torn_len = 4};
    CHECK_EQ(ota_fault_check(&fault, OTA_FAULT_READ, 0, 4096, &take), EIO);
    CHECK_EQ(take, 0);
}

int main(void) {
    RUN(no_plan_and_an_empty_plan_let_everything_pass);
    RUN(so_many_succeed_then_so_many_fail);
    RUN(only_the_chosen_operations_count);
    RUN(only_operations_beyond_the_offset_count);
    RUN(after_a_power_cut_nothing_works);
    RUN(a_torn_length_beyond_the_operation_is_all_of_it);
    return DONE();
}
