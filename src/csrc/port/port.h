/* What the engine needs of an operating system: tables of functions, so that tests can put a file that fails, a medium
 * that loses power or a clock of their own in their place. Nothing outside this room makes a system call.
 *
 * Functions return 0 or a positive errno, so that the device's own code is never lost. */
#ifndef OTA_PORT_PORT_H
#define OTA_PORT_PORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* ---- Faults ------------------------------------------------------------------------------------------------------
 * A plan for what goes wrong with the files it is given to. Owned by the caller, must outlive the file. A zeroed plan
 * does nothing but count. Used by tests, and by whoever wants to see an installation interrupted. */

enum {
    OTA_FAULT_READ = 1 << 0,
    OTA_FAULT_WRITE = 1 << 1,
    OTA_FAULT_SYNC = 1 << 2,
    OTA_FAULT_ERASE =
        1 << 3, /* flash only; an erase reaches the file as one or more writes, which are not counted too */
    OTA_FAULT_OPEN = 1 << 4,  /* open, size and close of a file; open of a serial line */
    OTA_FAULT_LINES = 1 << 5, /* serial only: the control lines */
    OTA_FAULT_BAUD = 1 << 6,  /* serial only: a change of the rate */
};

typedef struct ota_fault {
    uint32_t ops;      /* OTA_FAULT_*: which operations are counted; 0: all of them */
    uint64_t after;    /* so many counted operations succeed first */
    uint64_t count;    /* so many fail then; 0: none. Ignored when power_cut is set */
    int errnum;        /* what the failing ones report; 0: EIO */
    uint64_t reaches;  /* count only operations whose last byte lies beyond this offset; 0: every one */
    bool power_cut;    /* operation number `after` (from 0) is cut: torn_len bytes of it take effect, it and everything
                              after it, reads included, fail with EIO */
    uint64_t torn_len; /* bytes of a cut or failing write, program or erase that still reach the medium */
    uint64_t seen;     /* out: counted operations so far, failed ones included */
    bool lost;         /* out: power is gone; nothing is counted any more */
} ota_fault;

/* Asks the plan about one operation on [offset, offset + len), before it is done; counts it. Sync, open and close pass 0, 0
 * (so they are not counted when `reaches` is set). 0: do all of it, `*take` is len. Otherwise an errno: do the first `*take`
 * bytes of it (0 for what has no bytes, and for a read), then report that errno. `fault` may be NULL: always 0. */
int ota_fault_check(ota_fault *fault, uint32_t op, uint64_t offset, uint64_t len, uint64_t *take);

/* ---- Files and block devices ------------------------------------------------------------------------------------- */

typedef struct ota_file ota_file;

typedef struct ota_file_ops {
    /* Reads up to `len` bytes at `offset`; `*got` is smaller only at the end of the file. */
    int (*read_at)(ota_file *file, void *buf, size_t len, uint64_t offset, size_t *got);
    /* Writes all `len` bytes at `offset`. Through a direct file buf, len and offset are multiples of file->align. On an
     * error `*written` says how many bytes were taken before it. */
    int (*write_at)(ota_file *file, const void *buf, size_t len, uint64_t offset, size_t *written);
    /* Data and the size needed to read it are on the medium when this returns. */
    int (*sync)(ota_file *file);
    /* Cuts or extends a regular file; ENOTSUP for a block device. */
    int (*resize)(ota_file *file, uint64_t size);
    /* Sets room aside for a regular file of `size` bytes without changing its size, so that a full disk is found before the
     * first write. 0 where the file system cannot, and for block devices. */
    int (*reserve)(ota_file *file, uint64_t size);
    void (*close)(ota_file *file);
} ota_file_ops;

struct ota_file {
    const ota_file_ops *ops;
    uint64_t size;    /* bytes when opened; of a block device its capacity */
    uint32_t align;   /* multiple that buffer address, len and offset of direct writes must keep; 1: buffered */
    bool is_block;    /* a block device: cannot grow */
    bool is_direct;   /* writes go around the page cache */
    ota_fault *fault; /* NULL: none */
    uint64_t reads, writes, syncs; /* system calls made */
    uint64_t bytes_read, bytes_written;
};

enum {
    OTA_FILE_READ = 0,
    OTA_FILE_WRITE = 1 << 0,  /* read and write */
    OTA_FILE_CREATE = 1 << 1, /* make it when it is missing (mode 0600) and sync its directory */
    OTA_FILE_DIRECT = 1 << 2, /* around the page cache; falls back to buffered writes where that is not possible */
    /* A block device is opened with O_EXCL, a regular file is locked against other writers; EBUSY when somebody has it. */
    OTA_FILE_EXCLUSIVE = 1 << 3,
};

/* Opens `path` (UTF-8, NUL-terminated). 0 and a file to be closed through its table, or an errno. */
int ota_port_file_open(const char *path, uint32_t flags, ota_fault *fault, ota_file **out);

/* Gives a file another name in the same file system, in place of what had that name, durably. 0 or an errno. */
int ota_port_file_rename(const char *from, const char *to);
int ota_port_file_remove(const char *path);

/* ---- Flash -------------------------------------------------------------------------------------------------------
 * NOR flash: erase sets whole sectors to 0xFF, program clears bits. Reached through a table so that a flash image in a file,
 * a chip behind a serial line and a flash in memory that loses power look alike. */

#define OTA_FLASH_SECTOR 4096u /* erase unit of every ESP32 flash chip, bytes */

typedef struct ota_flash ota_flash;

typedef struct ota_flash_ops {
    ota_status (*read)(ota_flash *flash, uint64_t offset, void *buf, size_t len, ota_error *error);
    /* offset and len are multiples of OTA_FLASH_SECTOR. */
    ota_status (*erase)(ota_flash *flash, uint64_t offset, uint64_t len, ota_error *error);
    ota_status (*program)(ota_flash *flash, uint64_t offset, const void *buf, size_t len, ota_error *error);
    /* Everything before this call survives a power cut after it. */
    ota_status (*sync)(ota_flash *flash, ota_error *error);
    void (*close)(ota_flash *flash);
} ota_flash_ops;

struct ota_flash {
    const ota_flash_ops *ops;
    uint64_t size;
    uint64_t reads, programs, erases, syncs; /* operations; one erase may span many sectors */
    uint64_t bytes_read, bytes_programmed, sectors_erased;
};

/* A flash image file (raw dump of the whole chip), opened exclusively for writing unless `read_only`. Its size must be a
 * multiple of OTA_FLASH_SECTOR. The fault plan counts flash operations (READ, WRITE = program, ERASE, SYNC). */
ota_status ota_port_flash_file_open(const char *path, bool read_only, ota_fault *fault, ota_flash **out,
                                    ota_error *error);

/* Gives the file of such a flash back at once, from any thread. The flash still has to be closed; until then everything that
 * is done with it fails with ECANCELED. */
void ota_port_flash_file_shut(ota_flash *flash);

/* ---- Streams -----------------------------------------------------------------------------------------------------
 * What is read once from front to back: a regular file, a block device, a pipe, a socket, standard input. One reader
 * thread; `wake` may come from any thread. */

typedef struct ota_stream ota_stream;

/* Opens `path` for reading. A FIFO is opened without waiting for its writer; the first read waits. EISDIR for a directory. */
int ota_port_stream_open(const char *path, ota_stream **out);
/* Borrows an open descriptor, which stays the caller's and keeps its flags. */
int ota_port_stream_borrow(int fd, ota_stream **out);
/* Bytes from where the stream stood when it was made to its end; UINT64_MAX: cannot be known (a pipe, or an empty regular
 * file, as those of /proc look). */
uint64_t ota_port_stream_size(const ota_stream *stream);
/* Goes to `offset`, counted from where the stream stood when it was made. ESPIPE where that is not possible. */
int ota_port_stream_seek(ota_stream *stream, uint64_t offset);
/* Waits for data and stores up to `len` bytes; *got == 0 at the end. ECANCELED, now and ever after, once woken. */
int ota_port_stream_read(ota_stream *stream, void *buf, size_t len, size_t *got);
void ota_port_stream_wake(ota_stream *stream);
void ota_port_stream_close(ota_stream **stream);

/* ---- Serial lines ------------------------------------------------------------------------------------------------
 * Eight data bits, no parity, one stop bit, nothing translated, no flow control. Reached through a table, so that a tty, a
 * socket and a line made of memory with a clock of its own look alike. One thread uses a line; `wake` may come from any.
 *
 * Errnos that mean the same everywhere: ENODEV, the other side is gone (unplugged, hung up, connection closed): only `reopen`
 * helps; ECANCELED, somebody called wake, now and ever after until rearm; ETIMEDOUT; ENOTTY, this line cannot do that. */

typedef struct ota_serial ota_serial;

typedef struct ota_serial_ops {
    /* Waits for the first byte and stores what is there, up to `len` bytes. *got == 0: the deadline passed and nothing came. A
     * deadline in the past reads what is there without waiting. */
    int (*read)(ota_serial *serial, void *buf, size_t len, uint64_t deadline_ms, size_t *got);
    /* Hands over all `len` bytes or reports ETIMEDOUT; some may be on the wire then. */
    int (*write)(ota_serial *serial, const void *buf, size_t len, uint64_t deadline_ms);
    /* Both control lines at once, as the operating system names them: true is asserted. ENOTTY where there are none. */
    int (*set_lines)(ota_serial *serial, bool dtr, bool rts);
    /* Waits until what was written has left and changes the rate. EINVAL when the driver sets another (more than 3 % off):
     * serial->baud says which. A socket has no rate: 0, nothing happens. */
    int (*set_baud)(ota_serial *serial, uint32_t baud);
    /* Drops what was received and not read, and what was written and not sent. */
    int (*flush)(ota_serial *serial);
    /* The line's clock, monotonic milliseconds; deadlines are counted on it. UINT64_MAX as deadline: none. */
    uint64_t (*now_ms)(ota_serial *serial);
    int (*wait_ms)(ota_serial *serial, uint32_t ms);
    /* Gives the port back and takes it again at its last rate, under whatever name the device has by then; waits for it until the
     * deadline (then ENODEV). On an error the line stays as one that is gone. */
    int (*reopen)(ota_serial *serial, uint64_t deadline_ms);
    void (*wake)(ota_serial *serial);  /* whatever waits, and all that is tried later, ends with ECANCELED */
    void (*rearm)(ota_serial *serial); /* forgets earlier wakes, so that a cancelled chip can still be reset */
    void (*close)(ota_serial *serial); /* frees the line */
} ota_serial_ops;

struct ota_serial {
    const ota_serial_ops *ops;
    const char *name;    /* where it is now, "/dev/ttyUSB0", for messages; changed by reopen */
    uint32_t baud;       /* bits per second; 0: no rate (a socket) */
    bool has_lines;      /* control lines: DTR and RTS */
    bool is_low_latency; /* the driver hands over received bytes at once */
    uint16_t usb_vid;    /* USB vendor and product of the adapter or chip; 0: not on USB, or not known */
    uint16_t usb_pid;
    ota_fault *fault;       /* NULL: none. Offsets are bytes since the line was made */
    uint64_t reads, writes; /* calls of read and write that moved bytes */
    uint64_t bytes_read, bytes_written;
    uint64_t line_changes, baud_changes, reopens;
};

enum {
    OTA_SERIAL_BAUD = 115200 /* the rate at which boot ROMs start */
};

typedef struct ota_serial_options {
    uint32_t baud;               /* 0: OTA_SERIAL_BAUD */
    uint32_t connect_timeout_ms; /* of a socket, for each address; 0: 10 s */
    bool keep_lines;  /* leave both lines as opening sets them (asserted); otherwise both are released at once */
    ota_fault *fault; /* must outlive the line */
    /* Drives the chip's reset and boot pins in place of the port's own control lines, as a gateway does by GPIO; DTR asserted
     * pulls the boot pin low, RTS asserted the reset pin, both the same: neither. 0 or an errno. NULL: the port's lines. */
    int (*set_lines)(void *user, bool dtr, bool rts);
    void *lines_user;
    const char *sysfs_root; /* NULL: "/sys"; where the device behind a tty is looked up. For tests */
    const char *dev_root;   /* NULL: "/dev" */
} ota_serial_options;

/* What is behind a tty, as sysfs tells it. Strings are what the device says of itself: not to be trusted, cut to fit, and empty
 * where it says nothing. */
typedef struct ota_tty_info {
    char name[64];     /* "ttyUSB0" */
    char driver[32];   /* "cp210x" */
    char usb_path[64]; /* the plug it is in, "1-1.2"; "": not on USB */
    char serial[128];  /* of the USB device */
    char manufacturer[128];
    char product[128];
    uint16_t vid; /* 0 when it is not on USB */
    uint16_t pid;
    int interface; /* USB interface number; -1 when it is not on USB */
} ota_tty_info;

/* All ttys with a device behind them, sorted by name with numbers in order. 0 and an array for free(), or an errno. `sysfs_root`
 * NULL: "/sys". */
int ota_port_tty_list(const char *sysfs_root, ota_tty_info **out, size_t *count);
/* The tty with that name. ENOENT: there is none, or no device behind it. */
int ota_port_tty_describe(const char *sysfs_root, const char *name, ota_tty_info *out);
/* The same device after it left and came back: what is in the same plug, else what has the same vendor and a serial of at least
 * OTA_TTY_SERIAL_MIN characters (shorter ones, "0001", are shared by many adapters). Of several interfaces the same number, else
 * the lowest. ENODEV: not there. */
int ota_port_tty_find(const char *sysfs_root, const ota_tty_info *lost, ota_tty_info *out);

enum {
    OTA_TTY_SERIAL_MIN = 6
};

/* Opens `port`: a tty ("/dev/ttyUSB0", "/dev/serial/by-id/...", a pseudo terminal) or "socket://host:port" (plain TCP; no control
 * lines). Taken for us alone: BUSY when another program has it, which the error names where that can be known. NOT_FOUND: no such
 * device; PERMISSION: the error says which group or rule would help; UNSUPPORTED: not a serial line; ARGUMENT: not a usable
 * port or rate. `options` may be NULL. Strings are copied. */
ota_status ota_port_serial_open(const char *port, const ota_serial_options *options, ota_serial **out,
                                ota_error *error);

/* ---- Clock ------------------------------------------------------------------------------------------------------- */

typedef struct ota_clock {
    uint64_t (*now_ms)(void *user); /* monotonic milliseconds */
    void *user;
} ota_clock;

extern const ota_clock ota_port_clock; /* CLOCK_MONOTONIC */

#endif
