#include "fake_sysfs.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static void must(int result) {
    if (result != 0 && errno != EEXIST) {
        perror("fake sysfs");
        abort();
    }
}

static void make_folders(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        must(mkdir(path, 0755));
        *slash = '/';
    }
}

void fake_sysfs_write(const char *text, const char *format, ...) {
    char path[PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    make_folders(path);
    if (text == NULL) {
        must(mkdir(path, 0755));
        return;
    }
    FILE *file = fopen(path, "w");
    must(file == NULL || fputs(text, file) < 0 || fclose(file) != 0);
}

static void make_link(const char *target, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void make_link(const char *target, const char *format, ...) {
    char path[PATH_MAX], real[PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    make_folders(path);
    must(realpath(target, real) == NULL);
    unlink(path);
    must(symlink(real, path));
}

void fake_sysfs_plug(const fake_tty *tty) {
    char device[PATH_MAX / 4], owner[PATH_MAX / 2], folder[PATH_MAX], text[16];
    if (tty->plug == NULL) {
        snprintf(owner, sizeof owner, "%s/devices/platform/%s", tty->root, tty->driver);
    } else {
        snprintf(device, sizeof device, "%s/devices/pci0000:00/usb1/%s", tty->root, tty->plug);
        snprintf(owner, sizeof owner, "%s/%s:1.%d", device, tty->plug, tty->interface);
        snprintf(text, sizeof text, "%04x\n", tty->vid);
        fake_sysfs_write(text, "%s/idVendor", device);
        snprintf(text, sizeof text, "%04x\n", tty->pid);
        fake_sysfs_write(text, "%s/idProduct", device);
        if (tty->serial != NULL) {
            fake_sysfs_write(tty->serial, "%s/serial", device);
        }
        fake_sysfs_write("Espressif\n", "%s/manufacturer", device);
        fake_sysfs_write("USB JTAG/serial debug unit\n", "%s/product", device);
        snprintf(text, sizeof text, "%02x\n", (unsigned)tty->interface);
        fake_sysfs_write(text, "%s/bInterfaceNumber", owner);
    }
    if (tty->has_port_device) {
        snprintf(folder, sizeof folder, "/%s", tty->name);
        strncat(owner, folder, sizeof owner - strlen(owner) - 1);
    }
    snprintf(folder, sizeof folder, "%s/bus/drivers/%s", tty->root, tty->driver);
    fake_sysfs_write(NULL, "%s", folder);
    fake_sysfs_write("4\n", "%s/tty/%s/type", owner, tty->name);
    make_link(folder, "%s/driver", owner);
    make_link(owner, "%s/tty/%s/device", owner, tty->name);
    snprintf(folder, sizeof folder, "%s/tty/%s", owner, tty->name);
    make_link(folder, "%s/class/tty/%s", tty->root, tty->name);
}

void fake_sysfs_unplug(const char *root, const char *name) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/class/tty/%s", root, name);
    must(unlink(path));
}

void fake_sysfs_node(const char *root, const char *name, const char *node) {
    struct stat st;
    char path[PATH_MAX];
    must(stat(node, &st));
    snprintf(path, sizeof path, "%s/class/tty/%s", root, name);
    make_link(path, "%s/dev/char/%u:%u", root, major(st.st_rdev), minor(st.st_rdev));
}
