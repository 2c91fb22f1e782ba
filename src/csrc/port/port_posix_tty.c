/* What sysfs says about the devices behind ttys, and how one is found again that left and came back under another name.
 * Opens no tty: looking at a port must not reset the chip behind it. */
#include "port/port.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* "DIRECTORY/NAME"; false when it does not fit. */
static bool join(char out[PATH_MAX], const char *directory, const char *name) {
    int len = snprintf(out, PATH_MAX, "%s/%s", directory, name);
    return len > 0 && len < PATH_MAX;
}

/* First line of an attribute, cut to fit; "" when there is none. */
static void read_text(const char *directory, const char *attribute, char *out, size_t size) {
    char path[PATH_MAX];
    out[0] = '\0';
    if (!join(path, directory, attribute)) {
        return;
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return;
    }
    ssize_t len = read(fd, out, size - 1);
    close(fd);
    out[len > 0 ? len : 0] = '\0';
    out[strcspn(out, "\n")] = '\0';
}

/* A hexadecimal attribute of at most 16 bits; -1 when there is none or it is something else. */
static int read_hex(const char *directory, const char *attribute) {
    char text[16];
    char *end = NULL;
    read_text(directory, attribute, text, sizeof text);
    if (!isxdigit((unsigned char)text[0])) {
        return -1;
    }
    unsigned long value = strtoul(text, &end, 16);
    return *end == '\0' && value <= UINT16_MAX ? (int)value : -1;
}

/* Last part of what a symbolic link leads to; "" when it leads nowhere. */
static void link_name(const char *directory, const char *link, char *out, size_t size) {
    char path[PATH_MAX], real[PATH_MAX];
    out[0] = '\0';
    if (join(path, directory, link) && realpath(path, real) != NULL) {
        snprintf(out, size, "%s", strrchr(real, '/') + 1);
    }
}

int ota_port_tty_describe(const char *sysfs_root, const char *name, ota_tty_info *out) {
    char path[PATH_MAX], root[PATH_MAX], device[PATH_MAX];
    memset(out, 0, sizeof *out);
    out->interface = -1;
    if (strlen(name) >= sizeof out->name || strchr(name, '/') != NULL || name[0] == '.' || name[0] == '\0') {
        return ENOENT;
    }
    strcpy(out->name, name);
    int len = snprintf(path, sizeof path, "%s/class/tty/%s/device", sysfs_root ? sysfs_root : "/sys", name);
    if (len < 0 || len >= (int)sizeof path || realpath(sysfs_root ? sysfs_root : "/sys", root) == NULL ||
        realpath(path, device) == NULL) {
        return ENOENT;
    }
    link_name(device, "driver", out->driver, sizeof out->driver);
    /* Up from the port to the interface it belongs to, and on to the USB device. */
    size_t root_len = strlen(root);
    while (strncmp(device, root, root_len) == 0 && device[root_len] == '/') {
        int number = read_hex(device, "bInterfaceNumber");
        if (number >= 0 && out->interface < 0) {
            out->interface = number;
        }
        int vid = read_hex(device, "idVendor"), pid = read_hex(device, "idProduct");
        if (vid >= 0 && pid >= 0) {
            out->vid = (uint16_t)vid;
            out->pid = (uint16_t)pid;
            snprintf(out->usb_path, sizeof out->usb_path, "%s", strrchr(device, '/') + 1);
            read_text(device, "serial", out->serial, sizeof out->serial);
            read_text(device, "manufacturer", out->manufacturer, sizeof out->manufacturer);
            read_text(device, "product", out->product, sizeof out->product);
            return 0;
        }
        *strrchr(device, '/') = '\0';
    }
    out->interface = -1;
    return 0;
}

/* A serial port of the mainboard that is not fitted: the driver names four and says "unknown" (0) of those. */
static bool is_missing(const char *sysfs_root, const char *name) {
    char directory[PATH_MAX], type[8];
    int len = snprintf(directory, sizeof directory, "%s/class/tty/%s", sysfs_root, name);
    if (len < 0 || len >= (int)sizeof directory) {
        return true;
    }
    read_text(directory, "type", type, sizeof type);
    return strcmp(type, "0") == 0;
}

static int compare(const void *left, const void *right) {
    return strverscmp(((const ota_tty_info *)left)->name, ((const ota_tty_info *)right)->name);
}

int ota_port_tty_list(const char *sysfs_root, ota_tty_info **out, size_t *count) {
    char path[PATH_MAX];
    ota_tty_info *ports = NULL;
    size_t used = 0, room = 0;
    int errnum = 0;
    *out = NULL;
    *count = 0;
    if (!join(path, sysfs_root ? sysfs_root : "/sys", "class/tty")) {
        return ENAMETOOLONG;
    }
    DIR *directory = opendir(path);
    if (directory == NULL) {
        return errno;
    }
    const struct dirent *entry;
    while ((entry = readdir(directory)) != NULL) {
        if (used == room) {
            room = room == 0 ? 16 : 2 * room;
            ota_tty_info *larger = realloc(ports, room * sizeof *ports);
            if (larger == NULL) {
                errnum = ENOMEM;
                goto done;
            }
            ports = larger;
        }
        if (ota_port_tty_describe(sysfs_root, entry->d_name, &ports[used]) == 0 &&
            !is_missing(sysfs_root ? sysfs_root : "/sys", entry->d_name)) {
            used++;
        }
    }
    if (used > 0) {
        qsort(ports, used, sizeof *ports, compare);
    }

done:
    closedir(directory);
    if (errnum == 0) {
        *out = ports;
        *count = used;
    } else {
        free(ports);
    }
    return errnum;
}

static bool is_same_plug(const ota_tty_info *lost, const ota_tty_info *port) {
    return lost->usb_path[0] != '\0' && strcmp(lost->usb_path, port->usb_path) == 0;
}

static bool is_same_serial(const ota_tty_info *lost, const ota_tty_info *port) {
    return strlen(lost->serial) >= OTA_TTY_SERIAL_MIN && lost->vid == port->vid &&
           strcmp(lost->serial, port->serial) == 0;
}

static const ota_tty_info *pick(const ota_tty_info *ports, size_t count, const ota_tty_info *lost,
                                bool (*is_same)(const ota_tty_info *, const ota_tty_info *)) {
    const ota_tty_info *best = NULL;
    for (size_t i = 0; i < count; i++) {
        if (!is_same(lost, &ports[i])) {
            continue;
        }
        if (ports[i].interface == lost->interface) {
            return &ports[i];
        }
        if (best == NULL || ports[i].interface < best->interface) {
            best = &ports[i];
        }
    }
    return best;
}

int ota_port_tty_find(const char *sysfs_root, const ota_tty_info *lost, ota_tty_info *out) {
    ota_tty_info *ports = NULL;
    size_t count = 0;
    int errnum = ota_port_tty_list(sysfs_root, &ports, &count);
    if (errnum != 0) {
        return errnum == ENOENT ? ENODEV : errnum;
    }
    const ota_tty_info *found = pick(ports, count, lost, is_same_plug);
    if (found == NULL) {
        found = pick(ports, count, lost, is_same_serial);
    }
    errnum = ENODEV;
    if (found != NULL) {
        *out = *found;
        errnum = 0;
    }
    free(ports);
    return errnum;
}
