/* sources: port/port_posix_serial.c port/port_posix_tty.c port/port_posix_clock.c port/fault.c base/status.c fake_sysfs.c */
/* Serial lines over pseudo terminals and loopback sockets. Clean under the thread sanitizer too. */
#include "check.h"

#include <arpa/inet.h>
#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fake_sysfs.h"
#include "port/port.h"

typedef struct pty {
    int master;
    char path[64];
} pty;

static pty make_pty(void) {
    pty made = {.master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC)};
    CHECK(made.master >= 0 && grantpt(made.master) == 0 && unlockpt(made.master) == 0);
    CHECK_EQ(ptsname_r(made.master, made.path, sizeof made.path), 0);
    return made;
}

static ota_serial *open_line(const char *port, const ota_serial_options *options) {
    ota_serial *serial = NULL;
    ota_error error = {0};
    CHECK_EQ(ota_port_serial_open(port, options, &serial, &error), OTA_OK);
    if (serial == NULL) {
        printf("%s\n", error.text);
        exit(1);
    }
    return serial;
}

static ota_error fail_to_open(const char *port, ota_status expected) {
    ota_serial *serial = NULL;
    ota_error error = {0};
    CHECK_EQ(ota_port_serial_open(port, NULL, &serial, &error), expected);
    CHECK_EQ(error.status, expected);
    CHECK(serial == NULL);
    return error;
}

/* Reads exactly `len` bytes, however they arrive. */
static int read_all(ota_serial *serial, uint8_t *buf, size_t len) {
    for (size_t at = 0, got; at < len; at += got) {
        int errnum = serial->ops->read(serial, buf + at, len - at, UINT64_MAX, &got);
        if (errnum != 0) {
            return errnum;
        }
    }
    return 0;
}

static void far_read(int fd, uint8_t *buf, size_t len) {
    for (size_t at = 0; at < len;) {
        ssize_t n = read(fd, buf + at, len - at);
        CHECK(n > 0);
        if (n <= 0) {
            return;
        }
        at += (size_t)n;
    }
}

TEST(every_byte_passes_unchanged_both_ways) {
    uint8_t all[256], buf[256];
    for (size_t i = 0; i < sizeof all; i++) {
        all[i] = (uint8_t)i;
    }
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    CHECK(strcmp(serial->name, line.path) == 0);
    CHECK_EQ(serial->baud, OTA_SERIAL_BAUD);
    CHECK_EQ(serial->ops->write(serial, all, sizeof all, UINT64_MAX), 0);
    far_read(line.master, buf, sizeof buf);
    CHECK_MEM(buf, all, sizeof all);
    CHECK_EQ(write(line.master, all, sizeof all), (ssize_t)sizeof all);
    memset(buf, 0, sizeof buf);
    CHECK_EQ(read_all(serial, buf, sizeof buf), 0);
    CHECK_MEM(buf, all, sizeof all);
    CHECK_EQ(serial->bytes_written, 256);
    CHECK_EQ(serial->bytes_read, 256);
    CHECK_EQ(serial->writes, 1);
    serial->ops->close(serial);
    close(line.master);
}

TEST(a_silent_line_reads_nothing_at_its_deadline) {
    uint8_t buf[8];
    size_t got = 9;
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, 0, &got), 0);
    CHECK_EQ(got, 0);
    uint64_t start = serial->ops->now_ms(serial);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, start + 5, &got), 0);
    CHECK(serial->ops->now_ms(serial) >= start + 5);
    CHECK_EQ(serial->ops->wait_ms(serial, 3), 0);
    CHECK(serial->ops->now_ms(serial) >= start + 8);
    CHECK_EQ(write(line.master, "ab", 2), 2);
    CHECK_EQ(serial->ops->read(serial, buf, 1, 0, &got), 0); /* what is there comes even after the deadline */
    CHECK_EQ(got, 1);
    CHECK_EQ(serial->ops->flush(serial), 0);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, 0, &got), 0);
    CHECK_EQ(got, 0);
    serial->ops->close(serial);
    close(line.master);
}

TEST(a_receiver_that_takes_nothing_ends_a_write_at_its_deadline) {
    static uint8_t much[1 << 20];
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    CHECK_EQ(serial->ops->write(serial, much, sizeof much, serial->ops->now_ms(serial) + 5), ETIMEDOUT);
    CHECK(serial->bytes_written > 0 && serial->bytes_written < sizeof much);
    serial->ops->close(serial);
    close(line.master);
}

TEST(any_rate_can_be_set_and_a_terminal_without_lines_says_so) {
    static const uint32_t rates[] = {74880, 115200, 250000, 460800, 921600, 1500000, 2000000, 3000000};
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, &(ota_serial_options){.baud = 74880});
    struct termios2 mode;
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++) {
        CHECK_EQ(serial->ops->set_baud(serial, rates[i]), 0);
        CHECK_EQ(serial->baud, rates[i]);
        CHECK_EQ(ioctl(line.master, TCGETS2, &mode), 0);
        CHECK_EQ(mode.c_ospeed, rates[i]);
        CHECK_EQ(mode.c_cflag & (HUPCL | CSTOPB | PARENB | CRTSCTS), 0);
        CHECK_EQ(mode.c_lflag, 0);
    }
    CHECK_EQ(serial->ops->set_baud(serial, 0), EINVAL);
    CHECK_EQ(serial->ops->set_baud(serial, 100000000), EINVAL);
    CHECK_EQ(serial->baud_changes, sizeof rates / sizeof rates[0]);
    CHECK(!serial->has_lines);
    CHECK_EQ(serial->ops->set_lines(serial, true, false), ENOTTY);
    CHECK_EQ(serial->line_changes, 0);
    serial->ops->close(serial);
    close(line.master);
}

typedef struct pins {
    int calls, errnum;
    bool dtr, rts;
} pins;

static int drive_pins(void *user, bool dtr, bool rts) {
    pins *self = user;
    self->calls++;
    self->dtr = dtr;
    self->rts = rts;
    return self->errnum;
}

TEST(pins_of_the_caller_stand_in_for_the_control_lines) {
    pins driven = {0};
    pty line = make_pty();
    ota_serial_options options = {.set_lines = drive_pins, .lines_user = &driven};
    ota_serial *serial = open_line(line.path, &options);
    CHECK(serial->has_lines);
    CHECK_EQ(driven.calls, 0);
    CHECK_EQ(serial->ops->set_lines(serial, true, false), 0);
    CHECK(driven.dtr && !driven.rts);
    CHECK_EQ(serial->ops->set_lines(serial, false, true), 0);
    CHECK(!driven.dtr && driven.rts);
    CHECK_EQ(serial->line_changes, 2);
    driven.errnum = EIO;
    CHECK_EQ(serial->ops->set_lines(serial, false, false), ENODEV);
    CHECK_EQ(serial->line_changes, 2);
    CHECK_EQ(serial->ops->reopen(serial, UINT64_MAX), 0);
    CHECK(serial->has_lines);
    serial->ops->close(serial);
    close(line.master);
}

TEST(a_line_that_was_unplugged_says_so_to_every_call) {
    uint8_t buf[8];
    size_t got;
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    close(line.master);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, UINT64_MAX, &got), ENODEV);
    CHECK_EQ(serial->ops->write(serial, buf, sizeof buf, UINT64_MAX), ENODEV);
    CHECK_EQ(serial->ops->flush(serial), ENODEV);
    CHECK_EQ(serial->ops->set_baud(serial, 9600), ENODEV);
    CHECK_EQ(serial->ops->reopen(serial, 0), ENODEV);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, UINT64_MAX, &got), ENODEV);
    CHECK_EQ(serial->ops->write(serial, buf, sizeof buf, UINT64_MAX), ENODEV);
    CHECK_EQ(serial->ops->set_lines(serial, true, true), ENODEV);
    CHECK_EQ(serial->reopens, 0);
    serial->ops->close(serial);
}

static void *wake_soon(void *user) {
    ota_serial *serial = user;
    serial->ops->wake(serial);
    return NULL;
}

TEST(a_wake_ends_what_waits_and_sticks_until_rearmed) {
    uint8_t buf[8];
    size_t got;
    pthread_t thread;
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    CHECK_EQ(pthread_create(&thread, NULL, wake_soon, serial), 0);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, UINT64_MAX, &got), ECANCELED);
    pthread_join(thread, NULL);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, 0, &got), ECANCELED);
    CHECK_EQ(serial->ops->write(serial, "x", 1, UINT64_MAX), ECANCELED);
    CHECK_EQ(serial->ops->wait_ms(serial, 1000000), ECANCELED);
    CHECK_EQ(serial->ops->reopen(serial, UINT64_MAX), ECANCELED);
    serial->ops->rearm(serial);
    CHECK_EQ(serial->ops->reopen(serial, UINT64_MAX), 0);
    CHECK_EQ(serial->ops->write(serial, "x", 1, UINT64_MAX), 0);
    CHECK_EQ(serial->ops->wait_ms(serial, 1), 0);
    serial->ops->close(serial);
    close(line.master);
}

TEST(a_port_in_use_is_refused_and_the_holder_named) {
    char expected[64];
    pty line = make_pty();
    ota_serial *serial = open_line(line.path, NULL);
    ota_error error = fail_to_open(line.path, OTA_ERR_BUSY);
    snprintf(expected, sizeof expected, "(process %d)", (int)getpid());
    CHECK(strstr(error.text, expected) != NULL);
    CHECK(strstr(error.text, "test_port_posix") != NULL);
    CHECK_EQ(error.device_code, EBUSY);
    serial->ops->close(serial);
    serial = open_line(line.path, NULL);
    serial->ops->close(serial);
    close(line.master);
}

TEST(what_is_no_serial_line_is_refused) {
    fake_sysfs_write("text", "%s", "./file");
    CHECK(strstr(fail_to_open("/dev/ttyUSB9999", OTA_ERR_NOT_FOUND).text, "/dev/ttyUSB9999") != NULL);
    fail_to_open("/dev/null", OTA_ERR_UNSUPPORTED);
    fail_to_open("file", OTA_ERR_UNSUPPORTED);
    fail_to_open("/dev", OTA_ERR_UNSUPPORTED);
    fail_to_open("", OTA_ERR_ARGUMENT);
    pty line = make_pty();
    ota_serial *serial = NULL;
    CHECK_EQ(ota_port_serial_open(line.path, &(ota_serial_options){.baud = 4000000000u}, &serial, NULL),
             OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_port_serial_open("/dev/ttyUSB9999", NULL, &serial, NULL), OTA_ERR_NOT_FOUND);
    close(line.master);
}

/* Opens `port` as somebody without rights: root gives its own up for that. */
static ota_error fail_without_rights(const char *port) {
    bool is_root = geteuid() == 0;
    CHECK_EQ(is_root ? seteuid(65534) : 0, 0);
    ota_error error = fail_to_open(port, OTA_ERR_PERMISSION);
    CHECK_EQ(is_root ? seteuid(0) : 0, 0);
    CHECK_EQ(error.device_code, EACCES);
    return error;
}

TEST(a_missing_right_names_the_group_or_the_rule) {
    char folder[] = "/tmp/rmaker-ota-port-XXXXXX", path[64];
    CHECK(mkdtemp(folder) != NULL && chmod(folder, 0755) == 0);
    snprintf(path, sizeof path, "%s/port", folder);
    fake_sysfs_write("", "%s", path);
    CHECK_EQ(chmod(path, 0), 0);
    CHECK(strstr(fail_without_rights(path).text, "udev rule 60-rmaker-ota-serial.rules") != NULL);
    if (geteuid() == 0) { /* only root can give it to a group it is not in */
        CHECK_EQ(chown(path, 0, 20), 0);
        CHECK_EQ(chmod(path, 0660), 0);
        CHECK(strstr(fail_without_rights(path).text, "group dialout") != NULL);
        CHECK_EQ(chmod(path, 0640), 0);
        CHECK(strstr(fail_without_rights(path).text, "udev rule") != NULL);
    }
    CHECK_EQ(unlink(path), 0);
    CHECK_EQ(rmdir(folder), 0);
}

/* ---- Sockets ----------------------------------------------------------------------------------------------------- */

static int listen_on_loopback(char *port, size_t size) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, len) == 0 && listen(fd, 4) == 0);
    CHECK_EQ(getsockname(fd, (struct sockaddr *)&address, &len), 0);
    snprintf(port, size, "socket://127.0.0.1:%d", ntohs(address.sin_port));
    return fd;
}

TEST(a_socket_is_a_line_without_rate_and_lines) {
    char port[64];
    uint8_t buf[8];
    size_t got;
    int server = listen_on_loopback(port, sizeof port);
    ota_serial *serial = open_line(port, NULL);
    int far = accept(server, NULL, NULL);
    CHECK_EQ(serial->baud, 0);
    CHECK(!serial->has_lines);
    CHECK_EQ(serial->ops->set_lines(serial, true, false), ENOTTY);
    CHECK_EQ(serial->ops->set_baud(serial, 921600), 0);
    CHECK_EQ(serial->ops->write(serial, "hello", 5, UINT64_MAX), 0);
    far_read(far, buf, 5);
    CHECK_MEM(buf, "hello", 5);
    CHECK_EQ(write(far, "old", 3), 3);
    CHECK_EQ(serial->ops->read(serial, buf, 1, UINT64_MAX, &got), 0);
    CHECK_EQ(serial->ops->flush(serial), 0);
    CHECK_EQ(write(far, "new", 3), 3);
    CHECK_EQ(read_all(serial, buf, 3), 0);
    CHECK_MEM(buf, "new", 3);
    close(far);
    CHECK_EQ(serial->ops->read(serial, buf, 1, UINT64_MAX, &got), ENODEV);
    CHECK_EQ(serial->ops->reopen(serial, UINT64_MAX), 0);
    far = accept(server, NULL, NULL);
    CHECK_EQ(write(far, "x", 1), 1);
    CHECK_EQ(read_all(serial, buf, 1), 0);
    close(far);
    int errnum = 0;
    for (int i = 0; i < 1000 && errnum == 0; i++) { /* the first writes may still be taken */
        errnum = serial->ops->write(serial, "x", 1, UINT64_MAX);
    }
    CHECK_EQ(errnum, ENODEV);
    close(server);
    CHECK_EQ(serial->ops->reopen(serial, 0), ECONNREFUSED);
    serial->ops->close(serial);
}

TEST(addresses_that_cannot_be_used_are_refused) {
    static const char *ports[] = {
        "socket://",           "socket://host",    "socket://:5000",    "socket://host:",   "socket://host:0",
        "socket://host:65536", "socket://host:1x", "socket://host:-1",  "socket://::1:500", "socket://[]:5000",
        "socket://[::1:5000",  "socket://[::1]",   "socket://host: 80",
    };
    for (size_t i = 0; i < sizeof ports / sizeof ports[0]; i++) {
        CHECK(strstr(fail_to_open(ports[i], OTA_ERR_ARGUMENT).text, "socket://host:port") != NULL);
    }
    char port[64];
    close(listen_on_loopback(port, sizeof port));
    CHECK_EQ(fail_to_open(port, OTA_ERR_SYSTEM).device_code, ECONNREFUSED);
}

/* ---- Faults ------------------------------------------------------------------------------------------------------ */

TEST(a_plan_fails_the_nth_call_and_tears_a_write) {
    uint8_t buf[8];
    size_t got;
    pty line = make_pty();
    ota_fault fault = {.ops = OTA_FAULT_WRITE, .after = 1, .count = 1, .errnum = ETIMEDOUT, .torn_len = 2};
    ota_serial *serial = open_line(line.path, &(ota_serial_options){.fault = &fault});
    CHECK_EQ(serial->ops->write(serial, "ab", 2, UINT64_MAX), 0);
    CHECK_EQ(serial->ops->write(serial, "cdef", 4, UINT64_MAX), ETIMEDOUT);
    CHECK_EQ(serial->ops->write(serial, "g", 1, UINT64_MAX), 0);
    far_read(line.master, buf, 5);
    CHECK_MEM(buf, "abcdg", 5);
    fault = (ota_fault){.ops = OTA_FAULT_BAUD | OTA_FAULT_LINES | OTA_FAULT_READ, .count = 3};
    CHECK_EQ(serial->ops->set_baud(serial, 9600), ENODEV);
    CHECK_EQ(serial->ops->set_lines(serial, true, true), ENODEV);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, 0, &got), ENODEV);
    CHECK_EQ(serial->ops->set_baud(serial, 9600), 0);
    serial->ops->close(serial);
    close(line.master);
}

TEST(a_pulled_cable_stays_pulled) {
    uint8_t buf[8];
    size_t got;
    pty line = make_pty();
    ota_fault fault = {.after = 3, .power_cut = true, .torn_len = 1};
    ota_serial *serial = open_line(line.path, &(ota_serial_options){.fault = &fault}); /* counted: 0 */
    CHECK_EQ(serial->ops->write(serial, "ab", 2, UINT64_MAX), 0);
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, 0, &got), 0);
    CHECK_EQ(serial->ops->write(serial, "cd", 2, UINT64_MAX), ENODEV);
    CHECK_EQ(serial->ops->write(serial, "ef", 2, UINT64_MAX), ENODEV);
    CHECK_EQ(serial->ops->reopen(serial, 0), ENODEV);
    far_read(line.master, buf, 3);
    CHECK_MEM(buf, "abc", 3);
    serial->ops->close(serial);
    close(line.master);
    fault = (ota_fault){.ops = OTA_FAULT_OPEN, .count = 1, .errnum = EBUSY};
    CHECK_EQ(ota_port_serial_open("/dev/null", &(ota_serial_options){.fault = &fault}, &serial, NULL), OTA_ERR_BUSY);
}

/* ---- Devices that come back under another name ------------------------------------------------------------------- */

static const fake_tty chip = {.root = "sys",
                              .name = "ttyACM0",
                              .driver = "cdc_acm",
                              .plug = "1-3",
                              .serial = "34:85:18:AA:BB:CC\n",
                              .vid = 0x303a,
                              .pid = 0x1001};

typedef struct arrival {
    pty line;
    const char *name;
    unsigned pid;
    bool failed; /* the checks count without a lock: only the main thread makes them */
} arrival;

static void *arrive(void *user) {
    arrival *self = user;
    char path[64];
    fake_tty tty = chip;
    tty.name = self->name;
    tty.pid = self->pid;
    fake_sysfs_plug(&tty);
    snprintf(path, sizeof path, "dev/%s", self->name);
    self->failed = symlink(self->line.path, path) != 0; /* a moment after sysfs, as udev does it */
    fake_sysfs_node("sys", self->name, self->line.path);
    return NULL;
}

TEST(a_device_that_comes_back_under_another_name_is_taken_again) {
    uint8_t buf[4];
    size_t got;
    pthread_t thread;
    fake_sysfs_write(NULL, "./dev");
    fake_sysfs_write(NULL, "./sys");
    arrival first = {make_pty(), "ttyACM0", 0x1001, true}, second = {make_pty(), "ttyACM4", 0x0009, true};
    arrive(&first);
    ota_serial *serial = open_line("dev/ttyACM0", &(ota_serial_options){.sysfs_root = "sys", .dev_root = "dev"});
    CHECK_EQ(serial->usb_vid, 0x303a);
    CHECK_EQ(serial->usb_pid, 0x1001);
    CHECK_EQ(serial->ops->set_baud(serial, 460800), 0);
    close(first.line.master);
    CHECK_EQ(unlink("dev/ttyACM0"), 0);
    fake_sysfs_unplug("sys", "ttyACM0");
    CHECK_EQ(serial->ops->read(serial, buf, sizeof buf, UINT64_MAX, &got), ENODEV);
    CHECK_EQ(serial->ops->reopen(serial, 0), ENODEV);
    CHECK_EQ(pthread_create(&thread, NULL, arrive, &second), 0);
    CHECK_EQ(serial->ops->reopen(serial, UINT64_MAX), 0);
    pthread_join(thread, NULL);
    CHECK(!first.failed && !second.failed);
    CHECK(strcmp(serial->name, "dev/ttyACM4") == 0);
    CHECK_EQ(serial->reopens, 1);
    CHECK_EQ(serial->baud, 460800);
    CHECK_EQ(write(second.line.master, "back", 4), 4);
    CHECK_EQ(read_all(serial, buf, 4), 0);
    CHECK_MEM(buf, "back", 4);
    serial->ops->close(serial);
    serial = open_line("dev/ttyACM4", &(ota_serial_options){.sysfs_root = "sys", .dev_root = "dev"});
    CHECK_EQ(serial->usb_pid, 0x0009);
    serial->ops->close(serial);
    close(second.line.master);
}

int main(void) {
    RUN(every_byte_passes_unchanged_both_ways);
    RUN(a_silent_line_reads_nothing_at_its_deadline);
    RUN(a_receiver_that_takes_nothing_ends_a_write_at_its_deadline);
    RUN(any_rate_can_be_set_and_a_terminal_without_lines_says_so);
    RUN(pins_of_the_caller_stand_in_for_the_control_lines);
    RUN(a_line_that_was_unplugged_says_so_to_every_call);
    RUN(a_wake_ends_what_waits_and_sticks_until_rearmed);
    RUN(a_port_in_use_is_refused_and_the_holder_named);
    RUN(what_is_no_serial_line_is_refused);
    RUN(a_missing_right_names_the_group_or_the_rule);
    RUN(a_socket_is_a_line_without_rate_and_lines);
    RUN(addresses_that_cannot_be_used_are_refused);
    RUN(a_plan_fails_the_nth_call_and_tears_a_write);
    RUN(a_pulled_cable_stays_pulled);
    RUN(a_device_that_comes_back_under_another_name_is_taken_again);
    return DONE();
}
