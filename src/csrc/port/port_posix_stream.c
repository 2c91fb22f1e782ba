/* Streams over descriptors. A read waits in poll() for data or for the eventfd of `wake`, so it never hangs in read();
 * regular files and block devices are read with pread(), which leaves a borrowed descriptor's position alone. */
#include "port/port.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

struct ota_stream {
    int fd;
    int wake_fd;
    bool owned;
    bool seekable;
    uint64_t start;    /* position in the file when the stream was made */
    uint64_t size;     /* from `start`; UINT64_MAX: unknown */
    uint64_t position; /* from `start` */
    atomic_bool woken;
};

static int describe(ota_stream *stream) {
    struct stat st;
    if (fstat(stream->fd, &st) != 0) {
        return errno;
    }
    if (S_ISDIR(st.st_mode)) {
        return EISDIR;
    }
    stream->size = UINT64_MAX;
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        return 0;
    }
    off_t start = lseek(stream->fd, 0, SEEK_CUR);
    if (start < 0) {
        return errno;
    }
    off_t end = st.st_size;
    if (S_ISBLK(st.st_mode)) {
        end = lseek(stream->fd, 0, SEEK_END);
        if (end < 0 || lseek(stream->fd, start, SEEK_SET) < 0) {
            return errno;
        }
    }
    stream->seekable = true;
    stream->start = (uint64_t)start;
    if (end > 0) {
        stream->size = end > start ? (uint64_t)(end - start) : 0;
        posix_fadvise(stream->fd, start, 0, POSIX_FADV_SEQUENTIAL); /* a hint: its failure is none of ours */
    }
    return 0;
}

static int stream_new(int fd, bool owned, ota_stream **out) {
    ota_stream *stream = calloc(1, sizeof *stream);
    int errnum = ENOMEM;
    if (stream == NULL) {
        goto fail;
    }
    stream->fd = fd;
    stream->owned = owned;
    stream->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stream->wake_fd < 0) {
        errnum = errno;
        goto fail;
    }
    errnum = describe(stream);
    if (errnum != 0) {
        goto fail;
    }
    *out = stream;
    return 0;

fail:
    if (stream != NULL && stream->wake_fd >= 0) {
        close(stream->wake_fd);
    }
    free(stream);
    if (owned) {
        close(fd);
    }
    return errnum;
}

int ota_port_stream_open(const char *path, ota_stream **out) {
    /* O_NONBLOCK: do not wait for a FIFO's writer; it means nothing to regular files, and read() comes after poll(). */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    return fd < 0 ? errno : stream_new(fd, true, out);
}

int ota_port_stream_borrow(int fd, ota_stream **out) {
    return stream_new(fd, false, out);
}

uint64_t ota_port_stream_size(const ota_stream *stream) {
    return stream->size;
}

int ota_port_stream_seek(ota_stream *stream, uint64_t offset) {
    if (!stream->seekable) {
        return ESPIPE;
    }
    if (offset > (uint64_t)INT64_MAX - stream->start) {
        return EINVAL;
    }
    stream->position = offset;
    return 0;
}

static ssize_t read_some(ota_stream *stream, void *buf, size_t len) {
    if (stream->seekable) {
        return pread(stream->fd, buf, len, (off_t)(stream->start + stream->position));
    }
    struct pollfd waits[2] = {{.fd = stream->fd, .events = POLLIN}, {.fd = stream->wake_fd, .events = POLLIN}};
    if (poll(waits, 2, -1) < 0) {
        return -1;
    }
    if (waits[1].revents != 0) {
        errno = ECANCELED;
        return -1;
    }
    return read(stream->fd, buf, len);
}

int ota_port_stream_read(ota_stream *stream, void *buf, size_t len, size_t *got) {
    *got = 0;
    for (;;) {
        if (atomic_load(&stream->woken)) {
            return ECANCELED;
        }
        ssize_t n = read_some(stream, buf, len);
        if (n >= 0) {
            stream->position += (uint64_t)n;
            *got = (size_t)n;
            return 0;
        }
        if (errno != EINTR && errno != EAGAIN) {
            return errno;
        }
    }
}

void ota_port_stream_wake(ota_stream *stream) {
    atomic_store(&stream->woken, true);
    eventfd_write(stream->wake_fd, 1); /* fails only when it is full of wakes already */
}

void ota_port_stream_close(ota_stream **stream) {
    if (*stream == NULL) {
        return;
    }
    close((*stream)->wake_fd);
    if ((*stream)->owned) {
        close((*stream)->fd);
    }
    free(*stream);
    *stream = NULL;
}
