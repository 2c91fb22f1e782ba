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
    OTA_FAULT_OPEN = 1 << 4, /* open, size and close of a file */
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

/* ---- Clock ------------------------------------------------------------------------------------------------------- */

typedef struct ota_clock {
    uint64_t (*now_ms)(void *user); /* monotonic milliseconds */
    void *user;
} ota_clock;

extern const ota_clock ota_port_clock; /* CLOCK_MONOTONIC */

#endif
