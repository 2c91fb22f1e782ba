/* sources: port/port_posix_tty.c fake_sysfs.c */
/* What sysfs says of ttys, and devices that come back under another name. */
#include "check.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "fake_sysfs.h"
#include "port/port.h"

static const fake_tty bridge = {.name = "ttyUSB10",
                                .driver = "cp210x",
                                .plug = "1-1.2",
                                .serial = "0001\n",
                                .vid = 0x10c4,
                                .pid = 0xea60,
                                .has_port_device = true};
static const fake_tty native = {.name = "ttyACM2",
                                .driver = "cdc_acm",
                                .plug = "1-3",
                                .serial = "34:85:18:AA:BB:CC\n",
                                .vid = 0x303a,
                                .pid = 0x1001};

static void plug(const char *root, fake_tty tty, const char *name, const char *port, int interface) {
    tty.root = root;
    tty.name = name;
    tty.plug = port;
    tty.interface = interface;
    mkdir(root, 0755);
    fake_sysfs_plug(&tty);
}

static ota_tty_info describe(const char *root, const char *name) {
    ota_tty_info info;
    CHECK_EQ(ota_port_tty_describe(root, name, &info), 0);
    return info;
}

static void check_found(const char *root, const ota_tty_info *lost, const char *name) {
    ota_tty_info found = {0};
    CHECK_EQ(ota_port_tty_find(root, lost, &found), name != NULL ? 0 : ENODEV);
    CHECK(name == NULL || strcmp(found.name, name) == 0);
}

TEST(a_bridge_and_a_native_port_are_described) {
    plug("a", bridge, "ttyUSB10", "1-1.2", 0);
    plug("a", native, "ttyACM2", "1-3", 2);
    ota_tty_info info = describe("a", "ttyUSB10");
    CHECK(strcmp(info.driver, "cp210x") == 0);
    CHECK(strcmp(info.usb_path, "1-1.2") == 0);
    CHECK(strcmp(info.serial, "0001") == 0);
    CHECK_EQ(info.vid, 0x10c4);
    CHECK_EQ(info.pid, 0xea60);
    CHECK_EQ(info.interface, 0);
    info = describe("a", "ttyACM2");
    CHECK(strcmp(info.driver, "cdc_acm") == 0);
    CHECK(strcmp(info.product, "USB JTAG/serial debug unit") == 0);
    CHECK(strcmp(info.manufacturer, "Espressif") == 0);
    CHECK_EQ(info.interface, 2);
}

TEST(the_list_is_in_order_and_leaves_out_what_is_not_there) {
    plug("b", bridge, "ttyUSB10", "1-1", 0);
    plug("b", bridge, "ttyUSB9", "1-2", 0);
    plug("b", native, "ttyACM0", "1-3", 0);
    fake_tty board = {.root = "b", .name = "ttyS0", .driver = "serial8250"};
    fake_sysfs_plug(&board);
    board.name = "ttyS1";
    fake_sysfs_plug(&board);
    fake_sysfs_write("0\n", "b/devices/platform/serial8250/tty/ttyS1/type"); /* not fitted */
    fake_sysfs_write("", "b/class/tty/console/type");                        /* no device behind it */
    ota_tty_info *ports = NULL;
    size_t count = 0;
    CHECK_EQ(ota_port_tty_list("b", &ports, &count), 0);
    CHECK_EQ(count, 4);
    static const char *expected[] = {"ttyACM0", "ttyS0", "ttyUSB9", "ttyUSB10"};
    for (size_t i = 0; i < count && i < 4; i++) {
        CHECK(strcmp(ports[i].name, expected[i]) == 0);
    }
    CHECK(count != 4 || (ports[1].interface == -1 && ports[1].vid == 0 && ports[1].usb_path[0] == '\0'));
    free(ports);
    CHECK_EQ(ota_port_tty_list("nowhere", &ports, &count), ENOENT);
    CHECK_EQ(count, 0);
}

TEST(names_that_leave_the_folder_are_refused) {
    static const char *names[] = {"", ".", "..", "../tty/ttyUSB0", "a/b", "ttyUSB77"};
    ota_tty_info info;
    char longest[200];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = '\0';
    plug("c", bridge, "ttyUSB0", "1-1", 0);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        CHECK_EQ(ota_port_tty_describe("c", names[i], &info), ENOENT);
    }
    CHECK_EQ(ota_port_tty_describe("c", longest, &info), ENOENT);
}

TEST(what_a_device_says_of_itself_is_cut_to_fit) {
    char text[1000];
    memset(text, 'S', sizeof text);
    text[sizeof text - 1] = '\0';
    fake_tty liar = bridge;
    liar.serial = text;
    plug("d", liar, "ttyUSB0", "1-1", 0);
    fake_sysfs_write("fffff\n", "d/devices/pci0000:00/usb1/1-1/idProduct");
    ota_tty_info info = describe("d", "ttyUSB0");
    CHECK(info.usb_path[0] == '\0'); /* an id of 20 bits is none */
    CHECK_EQ(info.interface, -1);
    fake_sysfs_write("ffff\n", "d/devices/pci0000:00/usb1/1-1/idProduct");
    info = describe("d", "ttyUSB0");
    CHECK_EQ(strlen(info.serial), sizeof info.serial - 1);
    CHECK_EQ(info.pid, 0xffff);
}

TEST(a_device_is_found_again_in_its_plug_then_by_its_serial) {
    plug("e", native, "ttyACM0", "1-3", 0);
    ota_tty_info lost = describe("e", "ttyACM0");
    fake_sysfs_unplug("e", "ttyACM0");
    check_found("e", &lost, NULL);
    plug("e", bridge, "ttyUSB0", "1-4", 0);
    check_found("e", &lost, NULL);
    plug("e", native, "ttyACM7", "2-1", 0); /* the same device in another plug */
    check_found("e", &lost, "ttyACM7");
    fake_tty other = native;
    other.serial = "34:85:18:00:00:01\n";
    other.pid = 2;
    plug("e", other, "ttyACM5", "1-3", 0); /* its boot ROM says another serial, but sits in the plug */
    check_found("e", &lost, "ttyACM5");
}

TEST(a_short_serial_does_not_lead_to_another_adapter) {
    plug("f", bridge, "ttyUSB0", "1-1", 0);
    ota_tty_info lost = describe("f", "ttyUSB0");
    fake_sysfs_unplug("f", "ttyUSB0");
    plug("f", bridge, "ttyUSB1", "1-2", 0);
    check_found("f", &lost, NULL);
}

TEST(of_several_interfaces_the_same_number_wins_else_the_lowest) {
    plug("g", native, "ttyACM0", "1-3", 2);
    ota_tty_info lost = describe("g", "ttyACM0");
    fake_sysfs_unplug("g", "ttyACM0");
    plug("g", native, "ttyACM1", "1-3", 4);
    plug("g", native, "ttyACM3", "1-3", 0);
    check_found("g", &lost, "ttyACM3");
    plug("g", native, "ttyACM9", "1-3", 2);
    check_found("g", &lost, "ttyACM9");
}

int main(void) {
    RUN(a_bridge_and_a_native_port_are_described);
    RUN(the_list_is_in_order_and_leaves_out_what_is_not_there);
    RUN(names_that_leave_the_folder_are_refused);
    RUN(what_a_device_says_of_itself_is_cut_to_fit);
    RUN(a_device_is_found_again_in_its_plug_then_by_its_serial);
    RUN(a_short_serial_does_not_lead_to_another_adapter);
    RUN(of_several_interfaces_the_same_number_wins_else_the_lowest);
    return DONE();
}
