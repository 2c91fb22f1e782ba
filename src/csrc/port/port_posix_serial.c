/* Serial lines: ttys, pseudo terminals among them, and TCP connections in their place.
 *
 * Everything that waits does so in poll(), together with the eventfd of `wake`, and the descriptor does not block: a USB chip
 * whose receiver is full would otherwise hold write() for ever. Both control lines change in one TIOCMSET, because the time
 * between two calls is seen as a wrong state by the transistors that reset a chip. */
#include "port/port.h"

#include <asm/ioctls.h>
#include <asm/termbits.h> /* struct termios2; <termios.h> has another struct termios and cannot be included beside it */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/serial.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define SOCKET_SCHEME "socket://"
#define CONNECT_TIMEOUT_MS 10000u
#define DRAIN_FLOOR_MS 1000u /* beyond the time the bytes need on the wire */
#define RETRY_MS 20u         /* between two looks for a device that is gone */
#define BAUD_MAX 12000000u   /* beyond what any bridge does */

typedef struct posix_serial {
    ota_serial base;
    int fd; /* -1: gone */
    int wake_fd;
    bool is_socket;
    bool keep_lines;
    int (*drive_lines)(void *user, bool dtr, bool rts); /* NULL: the tty's own */
    void *lines_user;
    uint32_t wanted_baud; /* what reopen sets again */
    uint32_t connect_timeout_ms;
    atomic_bool woken;
    char *port; /* as it was given */
    char *host; /* of a socket */
    char *service;
    char *sysfs_root;
    char *dev_root;
    ota_tty_info tty;    /* usb_path "": cannot be told from others, only its path is known */
    char name[PATH_MAX]; /* base.name points here */
} posix_serial;

static uint64_t clock_now(void) {
    return ota_port_clock.now_ms(ota_port_clock.user);
}

/* One errno for all the ways a device says that it is no longer there. */
static int fold(int errnum) {
    switch (errnum) {
    case EIO:
    case ENXIO:
    case EBADF:
    case EPIPE:
    case ECONNRESET:
    case ECONNABORTED:
    case ENOTCONN:
    case EPROTO:
    case ESHUTDOWN:
        return ENODEV;
    default:
        return errnum;
    }
}

/* Waits for `events` (0: nothing but a wake) until the deadline. 0, ETIMEDOUT, ECANCELED or another errno. */
static int wait_until(posix_serial *self, int fd, short events, uint64_t deadline_ms) {
    for (;;) {
        if (atomic_load(&self->woken)) {
            return ECANCELED;
        }
        int timeout = -1;
        if (deadline_ms != UINT64_MAX) {
            uint64_t now = clock_now();
            uint64_t left = deadline_ms > now ? deadline_ms - now : 0;
            timeout = left > INT_MAX ? INT_MAX : (int)left;
        }
        struct pollfd waits[2] = {{.fd = self->wake_fd, .events = POLLIN}, {.fd = fd, .events = events}};
        int ready = poll(waits, events != 0 ? 2 : 1, timeout);
        if (ready < 0 && errno != EINTR) {
            return errno;
        }
        if (ready > 0 && waits[0].revents != 0) {
            return ECANCELED;
        }
        if (ready > 0 && waits[1].revents != 0) {
            return (waits[1].revents & POLLNVAL) != 0 ? EBADF : 0;
        }
        if (ready == 0 && timeout >= 0 && clock_now() >= deadline_ms) {
            return ETIMEDOUT;
        }
    }
}

/* ---- Reading and writing ----------------------------------------------------------------------------------------- */

static int serial_read(ota_serial *serial, void *buf, size_t len, uint64_t deadline_ms, size_t *got) {
    posix_serial *self = (posix_serial *)serial;
    uint64_t take;
    *got = 0;
    if (atomic_load(&self->woken)) {
        return ECANCELED;
    }
    int errnum = ota_fault_check(serial->fault, OTA_FAULT_READ, serial->bytes_read, len, &take);
    if (errnum != 0) {
        return fold(errnum);
    }
    if (self->fd < 0) {
        return ENODEV;
    }
    if (len == 0) {
        return 0;
    }
    for (;;) {
        errnum = wait_until(self, self->fd, POLLIN, deadline_ms);
        if (errnum != 0) {
            return errnum == ETIMEDOUT ? 0 : fold(errnum);
        }
        ssize_t n = read(self->fd, buf, len);
        if (n > 0) {
            *got = (size_t)n;
            serial->reads++;
            serial->bytes_read += (uint64_t)n;
            return 0;
        }
        if (n == 0) {
            return ENODEV; /* hung up: a line that is merely silent says EAGAIN */
        }
        if (errno != EINTR && errno != EAGAIN) {
            return fold(errno);
        }
    }
}

static int write_all(posix_serial *self, const uint8_t *buf, size_t len, uint64_t deadline_ms) {
    size_t done = 0;
    while (done < len) {
        /* send() for sockets: the other side closing must be an errno, not a SIGPIPE. */
        ssize_t n = self->is_socket ? send(self->fd, buf + done, len - done, MSG_NOSIGNAL)
                                    : write(self->fd, buf + done, len - done);
        if (n > 0) {
            done += (size_t)n;
            self->base.bytes_written += (uint64_t)n;
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            return fold(errno);
        }
        int errnum = wait_until(self, self->fd, POLLOUT, deadline_ms);
        if (errnum != 0) {
            return fold(errnum);
        }
    }
    return 0;
}

static int serial_write(ota_serial *serial, const void *buf, size_t len, uint64_t deadline_ms) {
    posix_serial *self = (posix_serial *)serial;
    uint64_t take;
    if (atomic_load(&self->woken)) {
        return ECANCELED;
    }
    int injected = ota_fault_check(serial->fault, OTA_FAULT_WRITE, serial->bytes_written, len, &take);
    if (self->fd < 0) {
        return ENODEV;
    }
    serial->writes++;
    int errnum = write_all(self, buf, (size_t)take, deadline_ms);
    return errnum != 0 ? errnum : fold(injected);
}

static int serial_flush(ota_serial *serial) {
    posix_serial *self = (posix_serial *)serial;
    if (self->fd < 0) {
        return ENODEV;
    }
    if (!self->is_socket) {
        return ioctl(self->fd, TCFLSH, TCIOFLUSH) == 0 ? 0 : fold(errno);
    }
    char dropped[4096];
    for (;;) {
        ssize_t n = recv(self->fd, dropped, sizeof dropped, MSG_DONTWAIT);
        if (n == 0) {
            return ENODEV;
        }
        if (n < 0 && errno != EINTR) {
            return errno == EAGAIN ? 0 : fold(errno);
        }
    }
}

/* ---- Lines and rate ---------------------------------------------------------------------------------------------- */

static int set_lines(int fd, bool dtr, bool rts) {
    int lines;
    if (ioctl(fd, TIOCMGET, &lines) != 0) {
        return errno;
    }
    lines &= ~(TIOCM_DTR | TIOCM_RTS);
    lines |= (dtr ? TIOCM_DTR : 0) | (rts ? TIOCM_RTS : 0);
    return ioctl(fd, TIOCMSET, &lines) == 0 ? 0 : errno;
}

static int serial_set_lines(ota_serial *serial, bool dtr, bool rts) {
    posix_serial *self = (posix_serial *)serial;
    uint64_t take;
    int errnum = ota_fault_check(serial->fault, OTA_FAULT_LINES, 0, 0, &take);
    if (errnum != 0) {
        return fold(errnum);
    }
    if (self->fd < 0) {
        return ENODEV;
    }
    if (!serial->has_lines) {
        return ENOTTY;
    }
    errnum = self->drive_lines != NULL ? self->drive_lines(self->lines_user, dtr, rts) : set_lines(self->fd, dtr, rts);
    if (errnum == 0) {
        serial->line_changes++;
    }
    return errnum == EINVAL ? ENOTTY : fold(errnum); /* some CDC drivers say EINVAL for lines they do not have */
}

/* Raw 8N1 at `baud`; `*actual` is what the driver made of it. */
static int set_mode(int fd, unsigned long request, uint32_t baud, uint32_t *actual) {
    struct termios2 mode;
    if (ioctl(fd, TCGETS2, &mode) != 0) {
        return errno;
    }
    mode.c_iflag = IGNBRK;
    mode.c_oflag = 0;
    mode.c_lflag = 0;
    mode.c_cflag = CS8 | CREAD | CLOCAL | BOTHER; /* no HUPCL: closing must not drop the lines and reset the chip */
    mode.c_ispeed = baud;
    mode.c_ospeed = baud;
    mode.c_cc[VMIN] = 1; /* so that 0 from read() means a hang-up */
    mode.c_cc[VTIME] = 0;
    if (ioctl(fd, request, &mode) != 0 || ioctl(fd, TCGETS2, &mode) != 0) {
        return errno;
    }
    *actual = mode.c_ospeed;
    return 0;
}

static bool is_near(uint32_t actual, uint32_t wanted) {
    uint32_t off = actual > wanted ? actual - wanted : wanted - actual;
    return (uint64_t)off * 100u <= (uint64_t)wanted * 3u; /* 8N1 frames are read wrongly beyond about 4 % */
}

/* Waits until the driver has sent everything: TCSETSW2 waits too, but cannot be woken. */
static int drain(posix_serial *self) {
    int queued = 0;
    if (ioctl(self->fd, TIOCOUTQ, &queued) != 0) {
        return errno == ENOTTY || errno == EINVAL ? 0 : errno;
    }
    uint64_t baud = self->base.baud > 0 ? self->base.baud : OTA_SERIAL_BAUD;
    uint64_t deadline_ms = clock_now() + DRAIN_FLOOR_MS + (uint64_t)(queued > 0 ? queued : 0) * 10u * 1000u / baud;
    while (queued > 0) {
        int errnum = wait_until(self, -1, 0, clock_now() + 1);
        if (errnum != ETIMEDOUT) {
            return errnum;
        }
        if (clock_now() >= deadline_ms) {
            return ETIMEDOUT;
        }
        if (ioctl(self->fd, TIOCOUTQ, &queued) != 0) {
            return errno;
        }
    }
    return 0;
}

static int serial_set_baud(ota_serial *serial, uint32_t baud) {
    posix_serial *self = (posix_serial *)serial;
    uint64_t take;
    int errnum = ota_fault_check(serial->fault, OTA_FAULT_BAUD, 0, 0, &take);
    if (errnum != 0) {
        return fold(errnum);
    }
    if (self->fd < 0) {
        return ENODEV;
    }
    if (baud == 0 || baud > BAUD_MAX) {
        return EINVAL;
    }
    if (self->is_socket) {
        return 0;
    }
    errnum = drain(self);
    if (errnum != 0) {
        return fold(errnum);
    }
    errnum = set_mode(self->fd, TCSETSW2, baud, &serial->baud);
    if (errnum != 0) {
        return fold(errnum);
    }
    serial->baud_changes++;
    if (!is_near(serial->baud, baud)) {
        return EINVAL;
    }
    self->wanted_baud = baud;
    return 0;
}

/* ---- Clock, waking ----------------------------------------------------------------------------------------------- */

static uint64_t serial_now_ms(ota_serial *serial) {
    (void)serial;
    return clock_now();
}

static int serial_wait_ms(ota_serial *serial, uint32_t ms) {
    int errnum = wait_until((posix_serial *)serial, -1, 0, clock_now() + ms);
    return errnum == ETIMEDOUT ? 0 : errnum;
}

static void serial_wake(ota_serial *serial) {
    posix_serial *self = (posix_serial *)serial;
    atomic_store(&self->woken, true);
    eventfd_write(self->wake_fd, 1); /* fails only when it is full of wakes already */
}

static void serial_rearm(ota_serial *serial) {
    posix_serial *self = (posix_serial *)serial;
    eventfd_t count;
    eventfd_read(self->wake_fd, &count);
    atomic_store(&self->woken, false);
}

/* ---- Opening ----------------------------------------------------------------------------------------------------- */

/* The driver hands over received bytes at once instead of every 16 ms (FTDI); most have no such thing. */
static bool ask_low_latency(int fd) {
    struct serial_struct settings;
    if (ioctl(fd, TIOCGSERIAL, &settings) != 0) {
        return false;
    }
    if ((settings.flags & ASYNC_LOW_LATENCY) != 0) {
        return true;
    }
    settings.flags |= ASYNC_LOW_LATENCY;
    return ioctl(fd, TIOCSSERIAL, &settings) == 0;
}

/* Finds out which device `fd` is, to know it again. */
static void identify(posix_serial *self) {
    struct stat st;
    char path[PATH_MAX], real[PATH_MAX];
    self->tty = (ota_tty_info){.interface = -1};
    if (fstat(self->fd, &st) != 0) {
        return;
    }
    int len = snprintf(path, sizeof path, "%s/dev/char/%u:%u", self->sysfs_root, major(st.st_rdev), minor(st.st_rdev));
    if (len > 0 && len < (int)sizeof path && realpath(path, real) != NULL) {
        ota_tty_info found;
        if (ota_port_tty_describe(self->sysfs_root, strrchr(real, '/') + 1, &found) == 0) {
            self->tty = found;
        }
    }
    self->base.usb_vid = self->tty.vid;
    self->base.usb_pid = self->tty.pid;
}

static int open_tty(posix_serial *self, const char *path) {
    struct stat st;
    int errnum = 0;
    /* O_NONBLOCK: do not wait for a carrier either. */
    int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) {
        return errno;
    }
    if (fstat(fd, &st) != 0 || !S_ISCHR(st.st_mode)) {
        errnum = ENOTTY;
        goto fail;
    }
    /* TIOCEXCL keeps later openers out, but not root; the lock keeps out all that ask for one, as most do. */
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        errnum = errno == EWOULDBLOCK ? EBUSY : errno;
        goto fail;
    }
    if (ioctl(fd, TIOCEXCL) != 0) {
        errnum = errno;
        goto fail;
    }
    int lines;
    bool has_own_lines = ioctl(fd, TIOCMGET, &lines) == 0;
    if (has_own_lines && !self->keep_lines && set_lines(fd, false, false) != 0) {
        has_own_lines = false;
    }
    self->base.has_lines = has_own_lines || self->drive_lines != NULL;
    errnum = set_mode(fd, TCSETS2, self->wanted_baud, &self->base.baud);
    if (errnum == 0 && !is_near(self->base.baud, self->wanted_baud)) {
        errnum = EINVAL;
    }
    if (errnum != 0) {
        goto fail;
    }
    self->base.is_low_latency = ask_low_latency(fd);
    if (ioctl(fd, TCFLSH, TCIOFLUSH) != 0) {
        errnum = errno;
        goto fail;
    }
    snprintf(self->name, sizeof self->name, "%s", path);
    self->fd = fd;
    return 0;

fail:
    close(fd);
    return errnum;
}

static int connect_one(posix_serial *self, const struct addrinfo *address, uint64_t deadline_ms) {
    int errnum = 0, one = 1;
    socklen_t len = sizeof errnum;
    int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, address->ai_protocol);
    if (fd < 0) {
        return errno;
    }
    if (connect(fd, address->ai_addr, address->ai_addrlen) != 0) {
        errnum = errno;
        if (errnum == EINPROGRESS) {
            errnum = wait_until(self, fd, POLLOUT, deadline_ms);
            if (errnum == 0 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &errnum, &len) != 0) {
                errnum = errno;
            }
        }
    }
    if (errnum == 0 && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0) {
        errnum = errno;
    }
    if (errnum != 0) {
        close(fd);
        return errnum;
    }
    self->fd = fd;
    return 0;
}

static int open_socket(posix_serial *self, uint64_t deadline_ms) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *found = NULL;
    int code = getaddrinfo(self->host, self->service, &hints, &found);
    if (code != 0) {
        return code == EAI_SYSTEM ? errno : code == EAI_MEMORY ? ENOMEM : ENOENT;
    }
    int errnum = EHOSTUNREACH;
    for (const struct addrinfo *address = found; address != NULL && errnum != 0 && errnum != ECANCELED;
         address = address->ai_next) {
        uint64_t limit = clock_now() + self->connect_timeout_ms;
        errnum = connect_one(self, address, limit < deadline_ms ? limit : deadline_ms);
    }
    freeaddrinfo(found);
    return errnum;
}

/* Whether waiting can help: the device is on its way back, udev has not yet set the group, a modem manager looks at it. */
static bool may_pass(int errnum) {
    return errnum == ENODEV || errnum == ENOENT || errnum == ENXIO || errnum == EIO || errnum == EACCES ||
           errnum == EPERM || errnum == EBUSY || errnum == ECONNREFUSED || errnum == EHOSTUNREACH ||
           errnum == ENETUNREACH || errnum == ECONNRESET || errnum == ETIMEDOUT;
}

static int open_again(posix_serial *self, uint64_t deadline_ms) {
    if (self->is_socket) {
        return open_socket(self, deadline_ms);
    }
    if (self->tty.usb_path[0] == '\0') {
        return open_tty(self, self->port);
    }
    ota_tty_info found;
    char path[PATH_MAX];
    int errnum = ota_port_tty_find(self->sysfs_root, &self->tty, &found);
    if (errnum != 0) {
        return errnum;
    }
    int len = snprintf(path, sizeof path, "%s/%s", self->dev_root, found.name);
    return len < 0 || len >= (int)sizeof path ? ENAMETOOLONG : open_tty(self, path);
}

static int serial_reopen(ota_serial *serial, uint64_t deadline_ms) {
    posix_serial *self = (posix_serial *)serial;
    uint64_t take;
    if (self->fd >= 0) {
        close(self->fd);
        self->fd = -1;
    }
    for (;;) {
        if (atomic_load(&self->woken)) {
            return ECANCELED;
        }
        int errnum = ota_fault_check(serial->fault, OTA_FAULT_OPEN, 0, 0, &take);
        errnum = errnum != 0 ? fold(errnum) : open_again(self, deadline_ms);
        if (errnum == 0) {
            serial->reopens++;
            if (!self->is_socket) {
                identify(self);
            }
            return 0;
        }
        if (!may_pass(errnum)) {
            return errnum;
        }
        uint64_t next = clock_now() + RETRY_MS;
        if (next >= deadline_ms) {
            return errnum == ENOENT ? ENODEV : fold(errnum);
        }
        errnum = wait_until(self, -1, 0, next);
        if (errnum != ETIMEDOUT) {
            return errnum;
        }
    }
}

static void serial_close(ota_serial *serial) {
    posix_serial *self = (posix_serial *)serial;
    if (self->fd >= 0) {
        close(self->fd);
    }
    if (self->wake_fd >= 0) {
        close(self->wake_fd);
    }
    free(self->port);
    free(self->host);
    free(self->service);
    free(self->sysfs_root);
    free(self->dev_root);
    free(self);
}

static const ota_serial_ops serial_ops = {
    .read = serial_read,
    .write = serial_write,
    .set_lines = serial_set_lines,
    .set_baud = serial_set_baud,
    .flush = serial_flush,
    .now_ms = serial_now_ms,
    .wait_ms = serial_wait_ms,
    .reopen = serial_reopen,
    .wake = serial_wake,
    .rearm = serial_rearm,
    .close = serial_close,
};

/* ---- What to say when it cannot be opened ------------------------------------------------------------------------ */

/* "picocom (process 812)" of the first process that has the device open, among those we may look into. */
static bool find_holder(const char *path, char *out, size_t size) {
    struct stat wanted;
    if (stat(path, &wanted) != 0) {
        return false;
    }
    bool found = false;
    DIR *processes = opendir("/proc");
    const struct dirent *process;
    while (processes != NULL && !found && (process = readdir(processes)) != NULL) {
        if (!isdigit((unsigned char)process->d_name[0]) || strlen(process->d_name) > 12) {
            continue;
        }
        char directory[64];
        snprintf(directory, sizeof directory, "/proc/%.12s/fd", process->d_name);
        DIR *descriptors = opendir(directory);
        const struct dirent *descriptor;
        while (descriptors != NULL && !found && (descriptor = readdir(descriptors)) != NULL) {
            struct stat st;
            found = fstatat(dirfd(descriptors), descriptor->d_name, &st, 0) == 0 && S_ISCHR(st.st_mode) &&
                    st.st_rdev == wanted.st_rdev;
        }
        if (descriptors != NULL) {
            closedir(descriptors);
        }
        if (found) {
            char name[32] = "?";
            snprintf(directory, sizeof directory, "/proc/%.12s/comm", process->d_name);
            int fd = open(directory, O_RDONLY | O_CLOEXEC);
            ssize_t len = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
            if (fd >= 0) {
                close(fd);
            }
            name[len > 0 ? len : 1] = '\0';
            for (char *c = name; *c != '\0'; c++) {
                *c = *c == '\n'
                         ? '\0'
                         : (char)(isprint((unsigned char)*c) ? *c : '?'); /* any program may call itself anything */
            }
            snprintf(out, size, "%s (process %.12s)", name, process->d_name);
        }
    }
    if (processes != NULL) {
        closedir(processes);
    }
    return found;
}

static ota_status refuse_permission(const char *path, int errnum, ota_error *error) {
    struct stat st;
    struct group entry, *group = NULL;
    char text[1024];
    if (stat(path, &st) == 0 && st.st_gid != 0 && (st.st_mode & (S_IRGRP | S_IWGRP)) == (S_IRGRP | S_IWGRP) &&
        getgrgid_r(st.st_gid, &entry, text, sizeof text, &group) == 0 && group != NULL) {
        return ota_error_set(error, OTA_ERR_PERMISSION, OTA_STAGE_TARGET, 0, errnum,
                             "no permission to use %s: it belongs to the group %s; become a member "
                             "(usermod -aG %s USER, then log in again)",
                             path, group->gr_name, group->gr_name);
    }
    return ota_error_set(error, OTA_ERR_PERMISSION, OTA_STAGE_TARGET, 0, errnum,
                         "no permission to use %s, and no group has it: install the udev rule "
                         "60-rmaker-ota-serial.rules and plug the device in again",
                         path);
}

static ota_status refuse(const char *port, int errnum, uint32_t baud, ota_error *error) {
    char text[160];
    switch (errnum) {
    case EACCES:
    case EPERM:
        return refuse_permission(port, errnum, error);
    case EBUSY:
        if (find_holder(port, text, sizeof text)) {
            return ota_error_set(error, OTA_ERR_BUSY, OTA_STAGE_TARGET, 0, errnum, "%s is in use by %s", port, text);
        }
        return ota_error_set(error, OTA_ERR_BUSY, OTA_STAGE_TARGET, 0, errnum, "%s is in use by another program", port);
    case ENOENT:
    case ENODEV:
    case ENXIO:
        return ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, errnum, "there is no device at %s", port);
    case EIO: /* the driver of a port that is named but not fitted */
        return ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, errnum, "no device answers at %s", port);
    case ENOTTY:
    case EISDIR:
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TARGET, 0, errnum, "%s is not a serial line", port);
    case EINVAL:
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, errnum,
                             "the driver of %s does not do %u baud", port, (unsigned)baud);
    default:
        snprintf(text, sizeof text, "cannot open %.140s", port);
        return ota_error_set_errno(error, OTA_STAGE_TARGET, 0, errnum, text);
    }
}

/* Splits "HOST:PORT" or "[HOST]:PORT". 0, EINVAL or ENOMEM. */
static int parse_address(posix_serial *self, const char *address) {
    const char *colon = strrchr(address, ':');
    if (colon == NULL || colon == address) {
        return EINVAL;
    }
    const char *host = address;
    size_t len = (size_t)(colon - address);
    if (host[0] == '[') {
        if (len < 3 || host[len - 1] != ']') {
            return EINVAL;
        }
        host++;
        len -= 2;
    } else if (memchr(host, ':', len) != NULL) {
        return EINVAL;
    }
    char *end = NULL;
    unsigned long number = isdigit((unsigned char)colon[1]) ? strtoul(colon + 1, &end, 10) : 0;
    if (number == 0 || number > UINT16_MAX || *end != '\0') {
        return EINVAL;
    }
    self->host = strndup(host, len);
    self->service = strdup(colon + 1);
    return self->host != NULL && self->service != NULL ? 0 : ENOMEM;
}

ota_status ota_port_serial_open(const char *port, const ota_serial_options *options, ota_serial **out,
                                ota_error *error) {
    static const ota_serial_options defaults = {0};
    uint64_t take;
    if (options == NULL) {
        options = &defaults;
    }
    uint32_t baud = options->baud != 0 ? options->baud : OTA_SERIAL_BAUD;
    *out = NULL;
    if (port[0] == '\0' || strlen(port) >= PATH_MAX) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0, "a port has 1 to %d characters",
                             PATH_MAX - 1);
    }
    if (baud > BAUD_MAX) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0, "%u baud are more than %u",
                             (unsigned)baud, (unsigned)BAUD_MAX);
    }
    ota_status status = OTA_OK;
    posix_serial *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set_errno(error, OTA_STAGE_TARGET, 0, ENOMEM, port);
    }
    self->base.ops = &serial_ops;
    self->base.name = self->name;
    self->base.fault = options->fault;
    self->fd = -1;
    self->keep_lines = options->keep_lines;
    self->drive_lines = options->set_lines;
    self->lines_user = options->lines_user;
    self->base.has_lines = options->set_lines != NULL;
    self->wanted_baud = baud;
    self->connect_timeout_ms = options->connect_timeout_ms != 0 ? options->connect_timeout_ms : CONNECT_TIMEOUT_MS;
    self->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->port = strdup(port);
    self->sysfs_root = strdup(options->sysfs_root != NULL ? options->sysfs_root : "/sys");
    self->dev_root = strdup(options->dev_root != NULL ? options->dev_root : "/dev");
    int errnum = self->wake_fd < 0 ? errno : 0;
    if (self->port == NULL || self->sysfs_root == NULL || self->dev_root == NULL) {
        errnum = ENOMEM;
    }
    if (errnum != 0) {
        status = ota_error_set_errno(error, OTA_STAGE_TARGET, 0, errnum, port);
        goto fail;
    }
    snprintf(self->name, sizeof self->name, "%s", port);
    self->is_socket = strncmp(port, SOCKET_SCHEME, strlen(SOCKET_SCHEME)) == 0;
    if (self->is_socket) {
        errnum = parse_address(self, port + strlen(SOCKET_SCHEME));
        if (errnum == EINVAL) {
            status = ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, errnum,
                                   "%s is not of the form socket://host:port", port);
            goto fail;
        }
    }
    if (errnum == 0) {
        errnum = ota_fault_check(options->fault, OTA_FAULT_OPEN, 0, 0, &take);
    }
    if (errnum == 0) {
        errnum = self->is_socket ? open_socket(self, UINT64_MAX) : open_tty(self, port);
    }
    if (errnum != 0) {
        status = refuse(port, errnum, baud, error);
        goto fail;
    }
    if (!self->is_socket) {
        identify(self);
    }
    *out = &self->base;
    return OTA_OK;

fail:
    serial_close(&self->base);
    return status;
}
