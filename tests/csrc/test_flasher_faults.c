/* sources: flasher/flasher.c flasher/rom_loader.c flasher/rom_exchange.c flasher/rom_write.c flasher/rom_command.c
 *     flasher/slip.c flasher/chip.c base/status.c fake_rom.c
 * libs: zlib libcrypto
 *
 * What goes wrong at every place where it can: calls of the port, bytes, replies, chips that restart. A session then ends with a
 * clean error in bounded time, and the next one does the whole job. */
#include <errno.h>
#include <stdlib.h>

#include <openssl/evp.h>

#include "check.h"
#include "fake_rom.h"
#include "flasher/chip.h"
#include "flasher/flasher.h"

#define SIZE 20000u
#define OFFSET 0x20000u
#define SESSION_MS_MAX 400000u /* of virtual time; nothing here has so much work */

static uint8_t stub_text[0x1800 + 40], stub_data[20];
static ota_flasher_stub stub = {.name = "esp32c3",
                                .entry = FAKE_ROM_ENTRY,
                                .text_start = 0x40380000,
                                .text = stub_text,
                                .text_len = sizeof stub_text,
                                .data_start = 0x3FC96D6C,
                                .data = stub_data,
                                .data_len = sizeof stub_data};
static uint8_t content[SIZE], packed[SIZE + 100], expected[16];
static uLongf packed_len = sizeof packed;

static void prepare(void) {
    uint32_t x = 3;
    for (size_t i = 0; i < sizeof content; i++) {
        x = x * 1664525 + 1013904223;
        content[i] = (uint8_t)(i % 2 == 0 ? x >> 24 : 7);
    }
    if (compress2(packed, &packed_len, content, sizeof content, 6) != Z_OK ||
        EVP_Digest(content, sizeof content, expected, NULL, EVP_md5(), NULL) != 1) {
        abort();
    }
}

typedef struct bench {
    fake_rom fake;
    ota_flasher_options options;
    ota_flasher *flasher;
    ota_error error;
    bool with_stub, deflated;
} bench;

static void set_up(bench *b, bool with_stub, bool deflated) {
    memset(b, 0, sizeof *b);
    fake_rom_init(&b->fake, &(fake_rom_options){.chip_id = 5, .flash_size = 1 << 20});
    b->options.serial = &b->fake.serial;
    b->options.stubs = &stub;
    b->options.stub_count = with_stub;
    b->options.baud = 921600;
    b->deflated = deflated;
    CHECK_EQ(ota_flasher_new(&b->options, &b->flasher, &b->error), OTA_OK);
}

static void tear_down(bench *b) {
    CHECK(!b->fake.is_stuck);
    ota_flasher_free(&b->flasher);
    fake_rom_free(&b->fake);
}

/* Everything that a session does. ERR_MD5: all went well, but what lies in flash is not what was given. */
static ota_status job(bench *b) {
    ota_flasher *f = b->flasher;
    ota_error *error = &b->error;
    memset(error, 0, sizeof *error);
    ota_status status = ota_flasher_connect(f, error);
    ota_flasher_write write = {
        .offset = OFFSET, .size = SIZE, .deflated = b->deflated, .wire_bound = b->deflated ? packed_len : 0};
    uint8_t entry[32] = {1, 2, 3}, back[5000], digest[16];
    if (status == OTA_OK) {
        status = ota_flasher_erase(f, 0x40000, 0x2000, error);
    }
    if (status == OTA_OK) {
        status = ota_flasher_write_begin(f, &write, error);
    }
    if (status == OTA_OK) {
        status =
            ota_flasher_write_data(f, b->deflated ? packed : content, b->deflated ? packed_len : SIZE, SIZE, error);
    }
    if (status == OTA_OK) {
        status = ota_flasher_write_end(f, error);
    }
    if (status == OTA_OK) {
        status = ota_flasher_md5(f, OFFSET, SIZE, digest, error);
    }
    if (status == OTA_OK && memcmp(digest, expected, 16) != 0) {
        return OTA_ERR_MD5;
    }
    if (status == OTA_OK) {
        status = ota_flasher_read(f, OFFSET + 1, back, b->with_stub ? sizeof back : 200, error);
    }
    if (status == OTA_OK) {
        status = ota_flasher_program(f, 0x40000, entry, sizeof entry, error);
    }
    return status;
}

static bool is_done(const bench *b) {
    return memcmp(b->fake.flash + OFFSET, content, SIZE) == 0 && b->fake.flash[0x40000] == 1 &&
           b->fake.flash[0x40001] == 2 && b->fake.flash[0x40003] == 0 && b->fake.flash[0x41000] == 0xFF;
}

/* Does what a caller does about an error, then the job once more, now without faults. */
static void recover(bench *b) {
    memset(&b->fake.faults, 0, sizeof b->fake.faults);
    ota_error error = {0};
    ota_flasher_state state = ota_flasher_get_state(b->flasher);
    char before[256];
    snprintf(before, sizeof before, "%s", b->error.text);
    CHECK(state != OTA_FLASHER_OFF);
    if (state == OTA_FLASHER_GONE) {
        CHECK_EQ(ota_flasher_reopen(b->flasher, 1000, &error), OTA_OK);
    } else if (state == OTA_FLASHER_STOPPED) {
        ota_flasher_rearm(b->flasher);
    }
    ota_status status = job(b);
    CHECK_EQ(status, OTA_OK);
    if (status != OTA_OK) {
        printf("    %s, after %s\n", b->error.text, before);
    }
    CHECK(is_done(b));
}

/* Runs the job with the faults that are set: it ends well, or with an error that says what and leaves a state that fits. */
static ota_status suffer(bench *b, const char *fault, uint64_t n) {
    uint64_t began = b->fake.now_us;
    int failures = check_failures;
    ota_status status = job(b);
    CHECK((b->fake.now_us - began) / 1000 < SESSION_MS_MAX);
    CHECK(!b->fake.is_stuck);
    CHECK(status == OTA_OK || status == OTA_ERR_MD5 || (b->error.status == status && b->error.text[0] != '\0'));
    CHECK(status != OTA_OK || is_done(b));
    CHECK(status != OTA_ERR_STATE && status != OTA_ERR_SIZE);
    if (check_failures != failures) {
        printf("    %s %d: %s %s\n", fault, (int)n, ota_status_name(status), b->error.text);
    }
    return status;
}

/* Of faults at neighbouring places every seventh is tried, all of them when RMAKER_OTA_EVERY_FAULT is set (a minute). */
static unsigned thin(void) {
    return getenv("RMAKER_OTA_EVERY_FAULT") != NULL ? 1 : 7;
}

TEST(every_call_of_the_port_may_fail) {
    static const int errnums[] = {ENODEV, EIO, ETIMEDOUT, ECANCELED};
    static const ota_status statuses[] = {OTA_ERR_SERIAL_LOST, OTA_ERR_SYSTEM, OTA_ERR_CHIP_SILENT, OTA_ERR_CANCELLED};
    static const ota_flasher_state states[] = {OTA_FLASHER_GONE, OTA_FLASHER_BROKEN, OTA_FLASHER_BROKEN,
                                               OTA_FLASHER_STOPPED};
    for (size_t e = 0; e < 4; e++) {
        for (int with_stub = 0; with_stub < 2; with_stub++) {
            uint64_t n = 1;
            ota_status status;
            do {
                bench b;
                set_up(&b, with_stub, true);
                b.fake.faults.fail_call = n;
                b.fake.faults.fail_errnum = errnums[e];
                status = suffer(&b, "call", n);
                if (b.fake.calls >= n) {
                    CHECK_EQ(status, statuses[e]);
                    CHECK_EQ(b.error.device_code, errnums[e]);
                    CHECK_EQ(ota_flasher_get_state(b.flasher), states[e]);
                    CHECK_EQ(ota_flasher_erase(b.flasher, 0, 4096, NULL), OTA_ERR_STATE);
                    recover(&b);
                }
                tear_down(&b);
                n += e == 0 ? 1 : thin();
            } while (status != OTA_OK && n < 10000);
            CHECK(n > 50 && n < 10000);
        }
    }
}

static void set_fault(fake_rom_faults *faults, int kind, uint64_t n) {
    uint64_t *const fields[] = {&faults->drop_in,  &faults->flip_in,   &faults->insert_in,  &faults->double_in,
                                &faults->drop_out, &faults->flip_out,  &faults->insert_out, &faults->double_out,
                                &faults->reset_at, &faults->lose_reply};
    *fields[kind] = n;
}

static const char *const kinds[] = {"drop in",  "flip in",    "insert in",  "double in", "drop out",
                                    "flip out", "insert out", "double out", "reset",     "lost reply"};
enum {
    RESET = 8,
    LOST_REPLY = 9,
    KINDS = 10
};

/* One fault for each place, in steps that grow where the data is. */
static void everywhere(bool with_stub, bool deflated, fake_rom_mode reset_into, unsigned step) {
    bench b;
    set_up(&b, with_stub, deflated);
    CHECK_EQ(job(&b), OTA_OK);
    uint64_t in = b.fake.bytes_to_chip, out = b.fake.bytes_to_host, replies = b.fake.replies;
    tear_down(&b);
    for (int kind = 0; kind < KINDS; kind++) {
        unsigned ended_well = 0, runs = 0;
        uint64_t last = kind == LOST_REPLY ? replies : kind >= 4 && kind != RESET ? out : in;
        unsigned stride = kind == LOST_REPLY ? 1 : (last == out ? step / 16 : step) * thin();
        for (uint64_t n = 1; n <= last; n += stride) {
            set_up(&b, with_stub, deflated);
            set_fault(&b.fake.faults, kind, n);
            b.fake.faults.reset_into = reset_into;
            b.fake.faults.crash_text = n % 2 == 0 ? "\r\nGuru Meditation Error: Core  0 panic'ed\r\n" : NULL;
            ota_status status = suffer(&b, kinds[kind], n);
            runs++;
            ended_well += status == OTA_OK;
            if (status != OTA_OK) {
                recover(&b);
            }
            tear_down(&b);
        }
        printf("  %-10s %4u places, %4u sessions ended well by themselves\n", kinds[kind], runs, ended_well);
    }
}

TEST(every_byte_may_be_hurt_on_the_way_with_a_stub) {
    everywhere(true, true, FAKE_ROM_APP, 127);
}

TEST(every_byte_may_be_hurt_on_the_way_to_the_boot_rom) {
    everywhere(false, false, FAKE_ROM_ROM, 257);
}

TEST(every_byte_up_to_the_first_data_may_be_hurt) {
    bench b;
    set_up(&b, false, true);
    ota_error error = {0};
    CHECK_EQ(ota_flasher_connect(b.flasher, &error), OTA_OK);
    uint64_t in = b.fake.bytes_to_chip, out = b.fake.bytes_to_host;
    tear_down(&b);
    unsigned ended_well = 0, runs = 0;
    for (int kind = 0; kind < RESET; kind++) {
        for (uint64_t n = 1; n <= (kind < 4 ? in : out); n += thin()) {
            set_up(&b, false, true);
            set_fault(&b.fake.faults, kind, n);
            ota_status status = ota_flasher_connect(b.flasher, &b.error);
            CHECK(!b.fake.is_stuck);
            CHECK(status == b.error.status);
            runs++;
            ended_well += status == OTA_OK;
            if (status != OTA_OK) {
                recover(&b);
            }
            tear_down(&b);
        }
    }
    printf("  %u places, %u connected by themselves\n", runs, ended_well);
    CHECK(ended_well > runs * 9 / 10);
}

TEST(a_restart_in_mid_stream_is_told) {
    bench b;
    set_up(&b, true, true);
    CHECK_EQ(job(&b), OTA_OK);
    uint64_t in = b.fake.bytes_to_chip;
    tear_down(&b);
    set_up(&b, true, true);
    b.fake.faults.reset_at = in - 5000;
    b.fake.faults.crash_text = "\r\nGuru Meditation Error: Core  0 panic'ed (Cache disabled)\r\n";
    b.options.baud = 0; /* so that the messages can be read */
    ota_flasher_free(&b.flasher);
    CHECK_EQ(ota_flasher_new(&b.options, &b.flasher, &b.error), OTA_OK);
    CHECK_EQ(job(&b), OTA_ERR_CHIP_RESTARTED);
    CHECK(strstr(b.error.text, "Cache disabled") != NULL);
    CHECK_EQ(ota_flasher_get_state(b.flasher), OTA_FLASHER_BROKEN);
    recover(&b);
    tear_down(&b);
}

TEST(a_lying_md5_is_seen_by_the_caller) {
    bench b;
    set_up(&b, true, true);
    b.fake.faults.md5_lies = true;
    CHECK_EQ(job(&b), OTA_ERR_MD5);
    tear_down(&b);
}

int main(void) {
    prepare();
    RUN(every_call_of_the_port_may_fail);
    RUN(every_byte_may_be_hurt_on_the_way_with_a_stub);
    RUN(every_byte_may_be_hurt_on_the_way_to_the_boot_rom);
    RUN(every_byte_up_to_the_first_data_may_be_hurt);
    RUN(a_restart_in_mid_stream_is_told);
    RUN(a_lying_md5_is_seen_by_the_caller);
    return DONE();
}
