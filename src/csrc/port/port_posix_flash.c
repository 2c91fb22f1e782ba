/* A flash image file that behaves like the flash it is a dump of: an erase writes 0xFF over whole sectors, a program writes
 * the AND of what is there and what is given. What the chip would do for ever on a bit that is cleared already, this does
 * too: who wants to know reads back.
 *
 * Erase and program reach the page cache, sync the medium. A sync also drops the file from the page cache, so that what is
 * read back afterwards comes from the medium where the file system allows it.
 *
 * Safe from several threads: one operation at a time. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "port/port.h"

#define SCRATCH_SIZE 65536u

typedef struct flash_file {
    ota_flash flash;
    pthread_mutex_t lock;
    int fd; /* -1: given back */
    bool read_only;
    ota_fault *fault;
    uint8_t *scratch; /* SCRATCH_SIZE bytes, under the lock */
} flash_file;

/* ---- System calls -------------------------------------------------------------------------------------------------- */

static int read_all(int fd, uint64_t offset, uint8_t *buf, size_t len) {
    while (len > 0) {
        ssize_t got = pread(fd, buf, len, (off_t)offset);
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (got == 0) {
            return EIO; /* somebody cut the file */
        }
        buf += got;
        offset += (uint64_t)got;
        len -= (size_t)got;
    }
    return 0;
}

static int write_all(int fd, uint64_t offset, const uint8_t *buf, size_t len) {
    while (len > 0) {
        ssize_t put = pwrite(fd, buf, len, (off_t)offset);
        if (put < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (put == 0) {
            return ENOSPC;
        }
        buf += put;
        offset += (uint64_t)put;
        len -= (size_t)put;
    }
    return 0;
}

/* The file, or why not; under the lock. */
static int usable(const flash_file *self, bool to_write) {
    return self->fd < 0 ? ECANCELED : to_write && self->read_only ? EROFS : 0;
}

/* ---- Operations ---------------------------------------------------------------------------------------------------- */

static ota_status outside(ota_error *error, const ota_flash *flash, uint64_t offset, uint64_t len) {
    return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, offset, 0,
                         "%llu bytes at 0x%llx are not inside the flash of %llu bytes, or not whole sectors",
                         (unsigned long long)len, (unsigned long long)offset, (unsigned long long)flash->size);
}

static ota_status flash_file_read(ota_flash *flash, uint64_t offset, void *buf, size_t len, ota_error *error) {
    flash_file *self = (flash_file *)flash;
    if (!ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    uint64_t take;
    pthread_mutex_lock(&self->lock);
    int errnum = usable(self, false);
    if (errnum == 0) {
        errnum = ota_fault_check(self->fault, OTA_FAULT_READ, offset, len, &take);
    }
    if (errnum == 0) {
        errnum = read_all(self->fd, offset, buf, len);
    }
    if (errnum == 0) {
        flash->reads++;
        flash->bytes_read += len;
    }
    pthread_mutex_unlock(&self->lock);
    return errnum == 0 ? OTA_OK
                       : ota_error_set_errno(error, OTA_STAGE_TARGET, offset, errnum, "reading the flash image");
}

static int write_ones(flash_file *self, uint64_t offset, uint64_t len) {
    int errnum = 0;
    memset(self->scratch, 0xFF, SCRATCH_SIZE);
    for (uint64_t done = 0; errnum == 0 && done < len;) {
        size_t part = len - done < SCRATCH_SIZE ? (size_t)(len - done) : SCRATCH_SIZE;
        errnum = write_all(self->fd, offset + done, self->scratch, part);
        done += part;
    }
    return errnum;
}

static ota_status flash_file_erase(ota_flash *flash, uint64_t offset, uint64_t len, ota_error *error) {
    flash_file *self = (flash_file *)flash;
    if (offset % OTA_FLASH_SECTOR != 0 || len % OTA_FLASH_SECTOR != 0 || !ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    uint64_t take;
    pthread_mutex_lock(&self->lock);
    int errnum = usable(self, true);
    if (errnum == 0) {
        int verdict = ota_fault_check(self->fault, OTA_FAULT_ERASE, offset, len, &take);
        errnum = write_ones(self, offset, take);
        errnum = verdict != 0 ? verdict : errnum;
    }
    if (errnum == 0) {
        flash->erases++;
        flash->sectors_erased += len / OTA_FLASH_SECTOR;
    }
    pthread_mutex_unlock(&self->lock);
    return errnum == 0 ? OTA_OK
                       : ota_error_set_errno(error, OTA_STAGE_TARGET, offset, errnum, "erasing in the flash image");
}

/* The AND of file and data, a scratch buffer at a time. */
static int program_and(flash_file *self, uint64_t offset, const uint8_t *data, uint64_t len) {
    int errnum = 0;
    for (uint64_t done = 0; errnum == 0 && done < len;) {
        size_t part = len - done < SCRATCH_SIZE ? (size_t)(len - done) : SCRATCH_SIZE;
        errnum = read_all(self->fd, offset + done, self->scratch, part);
        for (size_t i = 0; i < part; i++) {
            self->scratch[i] &= data[done + i];
        }
        if (errnum == 0) {
            errnum = write_all(self->fd, offset + done, self->scratch, part);
        }
        done += part;
    }
    return errnum;
}

static ota_status flash_file_program(ota_flash *flash, uint64_t offset, const void *buf, size_t len, ota_error *error) {
    flash_file *self = (flash_file *)flash;
    if (!ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    uint64_t take;
    pthread_mutex_lock(&self->lock);
    int errnum = usable(self, true);
    if (errnum == 0) {
        int verdict = ota_fault_check(self->fault, OTA_FAULT_WRITE, offset, len, &take);
        errnum = program_and(self, offset, buf, take);
        errnum = verdict != 0 ? verdict : errnum;
    }
    if (errnum == 0) {
        flash->programs++;
        flash->bytes_programmed += len;
    }
    pthread_mutex_unlock(&self->lock);
    return errnum == 0 ? OTA_OK
                       : ota_error_set_errno(error, OTA_STAGE_TARGET, offset, errnum, "programming the flash image");
}

static ota_status flash_file_sync(ota_flash *flash, ota_error *error) {
    flash_file *self = (flash_file *)flash;
    uint64_t take;
    pthread_mutex_lock(&self->lock);
    int errnum = usable(self, false);
    if (errnum == 0) {
        errnum = ota_fault_check(self->fault, OTA_FAULT_SYNC, 0, 0, &take);
    }
    if (errnum == 0 && fdatasync(self->fd) != 0) {
        errnum = errno;
    }
    if (errnum == 0) {
        (void)posix_fadvise(self->fd, 0, 0, POSIX_FADV_DONTNEED); /* advice: nothing is wrong when it is not taken */
        flash->syncs++;
    }
    pthread_mutex_unlock(&self->lock);
    return errnum == 0 ? OTA_OK : ota_error_set_errno(error, OTA_STAGE_TARGET, 0, errnum, "syncing the flash image");
}

void ota_port_flash_file_shut(ota_flash *flash) {
    flash_file *self = (flash_file *)flash;
    pthread_mutex_lock(&self->lock);
    if (self->fd >= 0) {
        close(self->fd);
        self->fd = -1;
    }
    pthread_mutex_unlock(&self->lock);
}

static void flash_file_close(ota_flash *flash) {
    flash_file *self = (flash_file *)flash;
    ota_port_flash_file_shut(flash);
    pthread_mutex_destroy(&self->lock);
    free(self->scratch);
    free(self);
}

static const ota_flash_ops flash_file_ops = {
    .read = flash_file_read,
    .erase = flash_file_erase,
    .program = flash_file_program,
    .sync = flash_file_sync,
    .close = flash_file_close,
};

/* ---- Opening ------------------------------------------------------------------------------------------------------- */

/* Opens the file and finds its size; on an error *fd is -1. */
static int open_file(const char *path, bool read_only, int *fd, uint64_t *size) {
    struct stat st;
    int errnum = 0;
    *fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (*fd < 0) {
        return errno;
    }
    if (!read_only && flock(*fd, LOCK_EX | LOCK_NB) != 0) {
        errnum = errno == EWOULDBLOCK ? EBUSY : errno;
    } else if (fstat(*fd, &st) != 0) {
        errnum = errno;
    } else if (!S_ISREG(st.st_mode)) {
        errnum = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    } else {
        *size = (uint64_t)st.st_size;
    }
    if (errnum != 0) {
        close(*fd);
        *fd = -1;
    }
    return errnum;
}

ota_status ota_port_flash_file_open(const char *path, bool read_only, ota_fault *fault, ota_flash **out,
                                    ota_error *error) {
    flash_file *self = NULL;
    uint64_t size = 0, take;
    int fd = -1;
    ota_status status = OTA_OK;
    *out = NULL;
    int errnum = ota_fault_check(fault, OTA_FAULT_OPEN, 0, 0, &take);
    if (errnum == 0) {
        errnum = open_file(path, read_only, &fd, &size);
    }
    if (errnum != 0) {
        char what[160];
        snprintf(what, sizeof what, "opening the flash image %s", path);
        return ota_error_set_errno(error, OTA_STAGE_TARGET, 0, errnum, what);
    }
    if (size == 0 || size % OTA_FLASH_SECTOR != 0) {
        status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                               "%s has %llu bytes: not a flash image, which is whole sectors of %u bytes", path,
                               (unsigned long long)size, OTA_FLASH_SECTOR);
        goto failed;
    }
    self = calloc(1, sizeof *self);
    if (self == NULL || (self->scratch = malloc(SCRATCH_SIZE)) == NULL || pthread_mutex_init(&self->lock, NULL) != 0) {
        status = ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for a flash image");
        goto failed;
    }
    self->flash.ops = &flash_file_ops;
    self->flash.size = size;
    self->fd = fd;
    self->read_only = read_only;
    self->fault = fault;
    *out = &self->flash;
    return OTA_OK;

failed:
    if (self != NULL) {
        free(self->scratch);
        free(self);
    }
    close(fd);
    return status;
}
