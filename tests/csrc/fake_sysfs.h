/* A sysfs of our own: USB devices with ttys that come and go, made of folders and links below one folder. */
#ifndef OTA_TESTS_FAKE_SYSFS_H
#define OTA_TESTS_FAKE_SYSFS_H

#include <stdbool.h>

typedef struct fake_tty {
    const char *root;   /* of the tree; it and all above it exist */
    const char *name;   /* "ttyUSB0" */
    const char *driver; /* "cp210x" */
    const char *plug;   /* "1-1.2"; NULL: not on USB */
    const char *serial; /* NULL: the device has none */
    unsigned vid, pid;
    int interface;
    bool has_port_device; /* as usb-serial drivers do: one more folder between interface and tty */
} fake_tty;

/* Adds the tty; the process aborts when the file system refuses. */
void fake_sysfs_plug(const fake_tty *tty);
/* The tty leaves /sys/class/tty, the device stays in /sys/devices, out of sight. */
void fake_sysfs_unplug(const char *root, const char *name);
/* Says that the character device `node` (a path) is the tty `name`. */
void fake_sysfs_node(const char *root, const char *name, const char *node);
/* printf into a path, made with all folders above it; `text` NULL: the folder itself. */
void fake_sysfs_write(const char *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
