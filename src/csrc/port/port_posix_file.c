/* Files and block devices, written around the page cache where that is possible.
 *
 * Where it is not (a file system without O_DIRECT, or one that refuses it at the first write), writes are buffered: the kernel
 * is told every WINDOW bytes to begin writing out, and to drop what is out, so that the sync at the end is short and no dirty
 * page outlives it. */
#include "port/port.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW (8u << 20)
#define BOUNCE_SIZE (64u * 1024u)

typedef struct posix_file {
    ota_file base;
    int fd;
    uint64_t window_start; /* buffered bytes from here on have not been pushed out */
    uint64_t window_len;
    void *bounce; /* for direct reads into buffers that are not aligned */
} posix_file;

static void push_out(posix_file *file, uint64_t offset, size_t len) {
    if (offset != file->window_start + file->window_len) {
        file->window_start = offset;
        file->window_len = 0;
    }
    file->window_len += len;
    if (file->window_len < WINDOW) {
        return;
    }
    off_t start = (off_t)file->window_start;
    sync_file_range(file->fd, start, (off_t)file->window_len, SYNC_FILE_RANGE_WRITE);
    if (start >= (off_t)WINDOW) {
        off_t before = start - (off_t)WINDOW;
        sync_file_range(file->fd, before, WINDOW,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        posix_fadvise(file->fd, before, WINDOW, POSIX_FADV_DONTNEED);
    }
    file->window_start += file->window_len;
    file->window_len = 0;
}

static int give_up_direct(posix_file *file) {
    int flags = fcntl(file->fd, F_GETFL);
    if (flags < 0 || fcntl(file->fd, F_SETFL, flags & ~O_DIRECT) != 0) {
        return errno;
    }
    file->base.is_direct = false;
    file->base.align = 1;
    return 0;
}

static int file_write_at(ota_file *base, const void *buf, size_t len, uint64_t offset, size_t *written) {
    posix_file *file = (posix_file *)base;
    const char *from = buf;
    uint64_t take = len;
    int planned = ota_fault_check(base->fault, OTA_FAULT_WRITE, offset, len, &take);
    size_t end = planned == 0 || !base->is_direct ? (size_t)take : (size_t)(take / base->align * base->align);
    size_t done = 0;
    int result = 0;
    while (done < end && result == 0) {
        ssize_t n = pwrite(file->fd, from + done, end - done, (off_t)(offset + done));
        base->writes++;
        if (n > 0) {
            done += (size_t)n;
            if (base->is_direct && done < end && done % base->align != 0) {
                done -= done % base->align; /* a short direct write is finished from its last whole block */
            }
        } else if (n == 0) {
            break;
        } else if (errno == EINVAL && base->is_direct) {
            result = give_up_direct(file);
        } else if (errno != EINTR) {
            result = errno;
        }
    }
    base->bytes_written += done;
    *written = done;
    if (!base->is_direct && done > 0) {
        push_out(file, offset, done);
    }
    if (offset + done > base->size && !base->is_block) {
        base->size = offset + done;
    }
    return result != 0 ? result : planned;
}

/* One read; `buf`, `len` and `offset` as the file wants them. */
static int read_once(posix_file *file, void *buf, size_t len, uint64_t offset, size_t *got) {
    for (;;) {
        ssize_t n = pread(file->fd, buf, len, (off_t)offset);
        file->base.reads++;
        if (n >= 0) {
            *got = (size_t)n;
            return 0;
        }
        if (errno != EINTR) {
            return errno;
        }
    }
}

static int read_bounced(posix_file *file, char *into, size_t len, uint64_t offset, size_t *got) {
    uint32_t align = file->base.align;
    if (file->bounce == NULL && posix_memalign(&file->bounce, align, BOUNCE_SIZE) != 0) {
        return ENOMEM;
    }
    size_t skip = (size_t)(offset % align), n = 0;
    size_t want = skip + len < BOUNCE_SIZE ? skip + len : BOUNCE_SIZE;
    want = (want + align - 1) / align * align;
    int result = read_once(file, file->bounce, want, offset - skip, &n);
    if (result != 0) {
        return result;
    }
    n = n > skip ? n - skip : 0;
    *got = n < len ? n : len;
    memcpy(into, (char *)file->bounce + skip, *got);
    return 0;
}

static int file_read_at(ota_file *base, void *buf, size_t len, uint64_t offset, size_t *got) {
    posix_file *file = (posix_file *)base;
    uint64_t take = 0;
    *got = 0;
    int result = ota_fault_check(base->fault, OTA_FAULT_READ, offset, len, &take);
    while (result == 0 && *got < len) {
        char *into = (char *)buf + *got;
        size_t rest = len - *got, n = 0;
        uint64_t at = offset + *got;
        if (base->is_direct && ((uintptr_t)into % base->align != 0 || at % base->align != 0 || rest < base->align)) {
            result = read_bounced(file, into, rest, at, &n);
        } else {
            result = read_once(file, into, base->is_direct ? rest / base->align * base->align : rest, at, &n);
        }
        if (result == 0 && n == 0) {
            break;
        }
        *got += n;
    }
    base->bytes_read += *got;
    return result;
}

static int file_sync(ota_file *base) {
    posix_file *file = (posix_file *)base;
    uint64_t take = 0;
    int result = ota_fault_check(base->fault, OTA_FAULT_SYNC, 0, 0, &take);
    if (result != 0) {
        return result;
    }
    base->syncs++;
    if (fdatasync(file->fd) != 0) {
        return errno;
    }
    if (!base->is_direct) {
        posix_fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    return 0;
}

static int file_resize(ota_file *base, uint64_t size) {
    posix_file *file = (posix_file *)base;
    uint64_t take = 0;
    if (base->is_block) {
        return ENOTSUP;
    }
    int result = ota_fault_check(base->fault, OTA_FAULT_WRITE, 0, 0, &take);
    if (result == 0 && ftruncate(file->fd, (off_t)size) != 0) {
        result = errno;
    }
    if (result == 0) {
        base->size = size;
    }
    return result;
}

static int file_reserve(ota_file *base, uint64_t size) {
    posix_file *file = (posix_file *)base;
    if (base->is_block || size == 0) {
        return 0;
    }
    if (fallocate(file->fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)size) != 0) {
        return errno == EOPNOTSUPP || errno == ENOSYS ? 0 : errno;
    }
    return 0;
}

static void file_close(ota_file *base) {
    posix_file *file = (posix_file *)base;
    close(file->fd);
    free(file->bounce);
    free(file);
}

static const ota_file_ops ops = {
    .read_at = file_read_at,
    .write_at = file_write_at,
    .sync = file_sync,
    .resize = file_resize,
    .reserve = file_reserve,
    .close = file_close,
};

static int sync_directory_of(const char *path) {
    const char *slash = strrchr(path, '/');
    char *directory = slash == NULL ? strdup(".") : strndup(path, slash == path ? 1 : (size_t)(slash - path));
    if (directory == NULL) {
        return ENOMEM;
    }
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = fd < 0 ? errno : 0;
    free(directory);
    if (fd >= 0) {
        /* EINVAL: a file system that does not sync directories has nothing to sync */
        result = fsync(fd) != 0 && errno != EINVAL ? errno : 0;
        close(fd);
    }
    return result;
}

static int measure(posix_file *file, bool to_write) {
    struct stat st;
    if (fstat(file->fd, &st) != 0) {
        return errno;
    }
    if (S_ISREG(st.st_mode)) {
        file->base.size = (uint64_t)st.st_size;
        return 0;
    }
    if (!S_ISBLK(st.st_mode)) {
        return S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    }
    file->base.is_block = true;
    int read_only = 0;
    if (to_write && ioctl(file->fd, BLKROGET, &read_only) == 0 && read_only) {
        return EROFS; /* opening it is allowed all the same */
    }
    return ioctl(file->fd, BLKGETSIZE64, &file->base.size) != 0 ? errno : 0;
}

/* Opens with O_DIRECT where that is asked for and possible; *direct says which it was. */
static int open_descriptor(const char *path, int flags, bool *direct) {
    int fd = -1;
    if (*direct) {
        fd = open(path, flags | O_DIRECT, 0600);
    }
    if (fd < 0 && (!*direct || errno == EINVAL)) {
        *direct = false;
        fd = open(path, flags, 0600);
    }
    return fd;
}

int ota_port_file_open(const char *path, uint32_t flags, ota_fault *fault, ota_file **out) {
    *out = NULL;
    uint64_t take = 0;
    int result = ota_fault_check(fault, OTA_FAULT_OPEN, 0, 0, &take);
    if (result != 0) {
        return result;
    }
    posix_file *file = calloc(1, sizeof *file);
    if (file == NULL) {
        return ENOMEM;
    }
    bool direct = (flags & OTA_FILE_DIRECT) != 0, created = false;
    int mode = O_CLOEXEC | ((flags & OTA_FILE_WRITE) != 0 ? O_RDWR : O_RDONLY);
    struct stat st;
    if ((flags & OTA_FILE_EXCLUSIVE) != 0 && stat(path, &st) == 0 && S_ISBLK(st.st_mode)) {
        mode |= O_EXCL;
    }
    file->fd = open_descriptor(path, mode, &direct);
    if (file->fd < 0 && errno == ENOENT && (flags & OTA_FILE_CREATE) != 0) {
        direct = (flags & OTA_FILE_DIRECT) != 0;
        file->fd = open_descriptor(path, mode | O_CREAT, &direct);
        created = true;
    }
    if (file->fd < 0) {
        result = errno;
        free(file);
        return result;
    }
    file->base.ops = &ops;
    file->base.fault = fault;
    file->base.is_direct = direct;
    file->base.align = direct ? 4096 : 1;
    result = measure(file, (flags & OTA_FILE_WRITE) != 0);
    if (result == 0 && !file->base.is_block && (flags & OTA_FILE_EXCLUSIVE) != 0 &&
        flock(file->fd, LOCK_EX | LOCK_NB) != 0) {
        result = errno == EWOULDBLOCK ? EBUSY : errno;
    }
    if (result == 0 && created) {
        result = sync_directory_of(path);
    }
    if (result == 0 && direct && file->base.is_block && file->base.size % file->base.align != 0) {
        int sector = 512;
        result = ioctl(file->fd, BLKSSZGET, &sector) != 0 ? errno : 0;
        file->base.align = (uint32_t)sector; /* a device that ends inside a 4 KiB block */
    }
    if (result != 0) {
        file_close(&file->base);
        return result;
    }
    *out = &file->base;
    return 0;
}

int ota_port_file_rename(const char *from, const char *to) {
    return rename(from, to) == 0 ? sync_directory_of(to) : errno;
}

int ota_port_file_remove(const char *path) {
    return unlink(path) == 0 ? 0 : errno;
}
