/* sources: port/port_posix_flash.c port/fault.c base/status.c
 *
 * threads
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "port/port.h"

#define SECTOR OTA_FLASH_SECTOR
#define SIZE (40u * SECTOR) /* more than the 64 KiB that are moved at a time */
#define PATH "flash.bin"    /* every test program runs in a directory of its own */

static ota_error error;
static uint8_t bytes[SIZE], expected[SIZE];

static void make_file(size_t size, uint8_t value) {
    int fd = open(PATH, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    memset(bytes, value, size);
    CHECK_EQ(write(fd, bytes, size), size);
    close(fd);
    memset(&error, 0, sizeof error);
}

static void read_file(uint8_t *out) {
    int fd = open(PATH, O_RDONLY);
    CHECK_EQ(read(fd, out, SIZE), SIZE);
    close(fd);
}

static ota_flash *open_flash(ota_fault *fault) {
    ota_flash *flash = NULL;
    CHECK_EQ(ota_port_flash_file_open(PATH, false, fault, &flash, &error), OTA_OK);
    CHECK_EQ(flash->size, SIZE);
    return flash;
}

TEST(erase_sets_whole_sectors_and_program_clears_bits) {
    make_file(SIZE, 0x3C);
    memset(expected, 0x3C, SIZE);
    ota_flash *flash = open_flash(NULL);
    CHECK_EQ(flash->ops->erase(flash, 2 * SECTOR, 20 * SECTOR, &error), OTA_OK);
    memset(expected + 2 * SECTOR, 0xFF, 20 * SECTOR);
    for (size_t i = 0; i < SIZE; i++) {
        bytes[i] = (uint8_t)(i * 7 + i / 256);
    }
    CHECK_EQ(flash->ops->program(flash, SECTOR + 5, bytes, 20 * SECTOR, &error), OTA_OK);
    for (size_t i = 0; i < 20 * SECTOR; i++) {
        expected[SECTOR + 5 + i] &= bytes[i];
    }
    uint8_t more[3] = {0xF0, 0x0F, 0xFF};
    CHECK_EQ(flash->ops->program(flash, 3 * SECTOR, more, 3, &error), OTA_OK);
    for (size_t i = 0; i < 3; i++) {
        expected[3 * SECTOR + i] &= more[i];
    }
    CHECK_EQ(flash->ops->sync(flash, &error), OTA_OK);
    read_file(bytes);
    CHECK_MEM(bytes, expected, SIZE);
    memset(bytes, 0, SIZE);
    CHECK_EQ(flash->ops->read(flash, 1, bytes, SIZE - 1, &error), OTA_OK);
    CHECK_MEM(bytes, expected + 1, SIZE - 1);
    CHECK_EQ(flash->erases, 1);
    CHECK_EQ(flash->sectors_erased, 20);
    CHECK_EQ(flash->programs, 2);
    CHECK_EQ(flash->bytes_programmed, 20 * SECTOR + 3);
    CHECK_EQ(flash->reads, 1);
    CHECK_EQ(flash->bytes_read, SIZE - 1);
    CHECK_EQ(flash->syncs, 1);
    flash->ops->close(flash);
}

TEST(what_is_not_inside_the_flash_is_refused) {
    make_file(SIZE, 0);
    ota_flash *flash = open_flash(NULL);
    uint64_t erases[][2] = {{1, SECTOR}, {0, 1}, {SIZE, SECTOR}, {0, SIZE + SECTOR}, {UINT64_MAX - SECTOR + 1, SECTOR}};
    for (size_t i = 0; i < sizeof erases / sizeof *erases; i++) {
        memset(&error, 0, sizeof error);
        CHECK_EQ(flash->ops->erase(flash, erases[i][0], erases[i][1], &error), OTA_ERR_ARGUMENT);
    }
    memset(&error, 0, sizeof error);
    CHECK_EQ(flash->ops->program(flash, SIZE - 1, bytes, 2, &error), OTA_ERR_ARGUMENT);
    memset(&error, 0, sizeof error);
    CHECK_EQ(flash->ops->read(flash, UINT64_MAX, bytes, 2, &error), OTA_ERR_ARGUMENT);
    flash->ops->close(flash);
    memset(expected, 0, SIZE);
    read_file(bytes);
    CHECK_MEM(bytes, expected, SIZE);
}

TEST(a_file_that_is_no_flash_image_is_refused) {
    ota_flash *flash = &(ota_flash){0};
    memset(&error, 0, sizeof error);
    unlink(PATH);
    CHECK_EQ(ota_port_flash_file_open(PATH, false, NULL, &flash, &error), OTA_ERR_NOT_FOUND);
    CHECK_EQ(error.device_code, ENOENT);
    CHECK(strstr(error.text, PATH) != NULL);
    CHECK(flash == NULL);
    size_t sizes[] = {0, 1, SECTOR - 1, SECTOR + 1};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        make_file(sizes[i], 0xFF);
        CHECK_EQ(ota_port_flash_file_open(PATH, false, NULL, &flash, &error), OTA_ERR_ARGUMENT);
    }
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_port_flash_file_open("/", true, NULL, &flash, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EISDIR);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_port_flash_file_open("/dev/null", false, NULL, &flash, &error), OTA_ERR_SYSTEM);
}

TEST(one_writer_at_a_time_and_any_number_of_readers) {
    make_file(SIZE, 0x55);
    ota_flash *first = open_flash(NULL), *second = NULL, *reader = NULL;
    CHECK_EQ(ota_port_flash_file_open(PATH, false, NULL, &second, &error), OTA_ERR_BUSY);
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_port_flash_file_open(PATH, true, NULL, &reader, &error), OTA_OK);
    CHECK_EQ(reader->ops->read(reader, 0, bytes, 10, &error), OTA_OK);
    CHECK_EQ(bytes[9], 0x55);
    reader->ops->close(reader);
    first->ops->close(first);
    second = open_flash(NULL);
    second->ops->close(second);
}

TEST(a_read_only_flash_is_not_changed) {
    make_file(SIZE, 0x55);
    ota_flash *flash = NULL;
    CHECK_EQ(ota_port_flash_file_open(PATH, true, NULL, &flash, &error), OTA_OK);
    CHECK_EQ(flash->ops->erase(flash, 0, SECTOR, &error), OTA_ERR_READ_ONLY);
    memset(&error, 0, sizeof error);
    CHECK_EQ(flash->ops->program(flash, 0, bytes, 1, &error), OTA_ERR_READ_ONLY);
    flash->ops->close(flash);
    memset(expected, 0x55, SIZE);
    read_file(bytes);
    CHECK_MEM(bytes, expected, SIZE);
}

TEST(each_operation_fails_with_the_errno_of_the_plan) {
    static const struct {
        uint32_t op;
        int errnum;
        ota_status status;
    } cases[] = {{OTA_FAULT_READ, EIO, OTA_ERR_SYSTEM},
                 {OTA_FAULT_WRITE, ENOSPC, OTA_ERR_NO_SPACE},
                 {OTA_FAULT_ERASE, EROFS, OTA_ERR_READ_ONLY},
                 {OTA_FAULT_SYNC, EACCES, OTA_ERR_PERMISSION}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        make_file(SIZE, 0);
        ota_fault fault = {.ops = cases[i].op, .count = 1, .errnum = cases[i].errnum};
        ota_flash *flash = open_flash(&fault);
        for (int round = 0; round < 2; round++) { /* the second time all is well */
            ota_status got[4];
            ota_error errors[4] = {0};
            got[0] = flash->ops->read(flash, 0, bytes, 1, &errors[0]);
            got[1] = flash->ops->program(flash, 0, bytes, 1, &errors[1]);
            got[2] = flash->ops->erase(flash, 0, SECTOR, &errors[2]);
            got[3] = flash->ops->sync(flash, &errors[3]);
            for (size_t j = 0; j < 4; j++) {
                bool hit = round == 0 && j == i;
                CHECK_EQ(got[j], hit ? cases[i].status : OTA_OK);
                CHECK_EQ(errors[j].device_code, hit ? cases[i].errnum : 0);
            }
        }
        CHECK_EQ(fault.seen, 2);
        flash->ops->close(flash);
    }
    ota_fault fault = {.ops = OTA_FAULT_OPEN, .count = 1, .errnum = EMFILE};
    ota_flash *flash = NULL;
    memset(&error, 0, sizeof error);
    CHECK_EQ(ota_port_flash_file_open(PATH, false, &fault, &flash, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EMFILE);
}

TEST(a_cut_operation_reaches_the_file_in_part_and_nothing_after_it) {
    for (int erase = 0; erase <= 1; erase++) {
        uint64_t torn[] = {0, 1, 2048, 65536, 65537, UINT64_MAX};
        for (size_t i = 0; i < sizeof torn / sizeof *torn; i++) {
            make_file(SIZE, 0xA5);
            memset(expected, 0xA5, SIZE);
            ota_fault fault = {.power_cut = true, .torn_len = torn[i]};
            fault.ops = erase ? OTA_FAULT_ERASE : OTA_FAULT_WRITE;
            ota_flash *flash = open_flash(&fault);
            memset(bytes, 0x0F, SIZE);
            uint64_t len = 20 * SECTOR, take = torn[i] < len ? torn[i] : len;
            memset(expected + SECTOR, erase ? 0xFF : 0x05, take);
            CHECK_EQ(erase ? flash->ops->erase(flash, SECTOR, len, &error)
                           : flash->ops->program(flash, SECTOR, bytes, len, &error),
                     OTA_ERR_SYSTEM);
            CHECK(fault.lost);
            ota_error later = {0};
            CHECK_EQ(flash->ops->erase(flash, 0, SIZE, &later), OTA_ERR_SYSTEM);
            CHECK_EQ(flash->ops->program(flash, 0, bytes, SIZE, &later), OTA_ERR_SYSTEM);
            CHECK_EQ(flash->ops->read(flash, 0, bytes, 1, &later), OTA_ERR_SYSTEM);
            CHECK_EQ(flash->ops->sync(flash, &later), OTA_ERR_SYSTEM);
            flash->ops->close(flash);
            read_file(bytes);
            CHECK_MEM(bytes, expected, SIZE);
        }
    }
}

TEST(a_flash_that_was_shut_gives_the_file_back_and_refuses) {
    make_file(SIZE, 0x55);
    ota_flash *flash = open_flash(NULL), *second = NULL;
    ota_port_flash_file_shut(flash);
    ota_port_flash_file_shut(flash);
    ota_error errors[4] = {0};
    CHECK_EQ(flash->ops->read(flash, 0, bytes, 1, &errors[0]), OTA_ERR_SYSTEM);
    CHECK_EQ(flash->ops->program(flash, 0, bytes, 1, &errors[1]), OTA_ERR_SYSTEM);
    CHECK_EQ(flash->ops->erase(flash, 0, SECTOR, &errors[2]), OTA_ERR_SYSTEM);
    CHECK_EQ(flash->ops->sync(flash, &errors[3]), OTA_ERR_SYSTEM);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(errors[i].device_code, ECANCELED);
    }
    second = open_flash(NULL);
    second->ops->close(second);
    flash->ops->close(flash);
    memset(expected, 0x55, SIZE);
    read_file(bytes);
    CHECK_MEM(bytes, expected, SIZE);
}

TEST(a_file_cut_by_somebody_else_is_an_error) {
    make_file(SIZE, 0);
    ota_flash *flash = open_flash(NULL);
    CHECK_EQ(truncate(PATH, SIZE / 2), 0);
    CHECK_EQ(flash->ops->read(flash, SIZE / 2 - 1, bytes, 2, &error), OTA_ERR_SYSTEM);
    CHECK_EQ(error.device_code, EIO);
    flash->ops->close(flash);
}

TEST(a_real_system_error_is_reported_as_what_it_is) {
    make_file(SIZE, 0);
    ota_flash *flash = open_flash(NULL);
    struct rlimit old, small = {SECTOR, RLIM_INFINITY};
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    setrlimit(RLIMIT_FSIZE, &small);
    ota_status status = flash->ops->erase(flash, SECTOR, SECTOR, &error);
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK_EQ(status, OTA_ERR_NO_SPACE);
    CHECK_EQ(error.device_code, EFBIG);
    flash->ops->close(flash);
}

static void *hammer(void *arg) {
    ota_flash *flash = arg;
    static const uint8_t zeros[100];
    for (int i = 0; i < 50; i++) {
        uint8_t buf[100];
        ota_error err = {0};
        flash->ops->read(flash, 0, buf, sizeof buf, &err);
        flash->ops->program(flash, (uint64_t)i * 200, zeros, sizeof zeros, &err);
        flash->ops->sync(flash, &err);
    }
    return NULL;
}

TEST(two_threads_share_a_flash) {
    make_file(SIZE, 0xFF);
    ota_flash *flash = open_flash(NULL);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, hammer, flash), 0);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    CHECK_EQ(flash->reads, 100);
    CHECK_EQ(flash->programs, 100);
    CHECK_EQ(flash->syncs, 100);
    flash->ops->close(flash);
}

int main(void) {
    RUN(erase_sets_whole_sectors_and_program_clears_bits);
    RUN(what_is_not_inside_the_flash_is_refused);
    RUN(a_file_that_is_no_flash_image_is_refused);
    RUN(one_writer_at_a_time_and_any_number_of_readers);
    RUN(a_read_only_flash_is_not_changed);
    RUN(each_operation_fails_with_the_errno_of_the_plan);
    RUN(a_cut_operation_reaches_the_file_in_part_and_nothing_after_it);
    RUN(a_flash_that_was_shut_gives_the_file_back_and_refuses);
    RUN(a_file_cut_by_somebody_else_is_an_error);
    RUN(a_real_system_error_is_reported_as_what_it_is);
    RUN(two_threads_share_a_flash);
    unlink(PATH);
    return DONE();
}
