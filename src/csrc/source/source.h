/* Where bytes come from: open, read, close. One reader thread at a time; `cancel` may come from any thread.
 *
 * The first error after an open is kept and repeated by every later read until the source is closed; a cancelled source
 * stays cancelled for good, so a cancel that comes before open is not lost. */
#ifndef OTA_SOURCE_SOURCE_H
#define OTA_SOURCE_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/status.h"
#include "port/port.h"

typedef struct ota_source ota_source;

/* What opening found out. */
typedef struct ota_source_info {
    uint64_t size;        /* total bytes of the whole object, whatever the offset; OTA_SIZE_UNKNOWN: not told */
    uint64_t offset;      /* where the bytes really begin: the offset asked for, or 0 when it had to start over */
    char entity_tag[128]; /* strong entity tag (RFC 9110, 8.8.3) as sent, with quotes; "": none, weak or too long */
} ota_source_info;

typedef struct ota_source_ops {
    /* Makes the bytes from `offset` on available and fills `info`. A source that cannot start there starts at 0 and says
     * so in info->offset. OTA_ERR_STATE when it is open already, or cannot be opened again. After an error it is closed. */
    ota_status (*open)(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error);
    /* Waits for data; stores 1 to `capacity` bytes. OTA_OK with *len > 0, or OTA_DONE with *len == 0 at the end of a
     * complete object. An early end is an error, never OTA_DONE. */
    ota_status (*read)(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error);
    /* Makes a waiting and every later call return OTA_ERR_CANCELLED promptly. Any thread. */
    void (*cancel)(ota_source *source);
    /* Ends the use begun by open; open may follow again. */
    void (*close)(ota_source *source);
    void (*free)(ota_source *source);
} ota_source_ops;

struct ota_source {
    const ota_source_ops *ops;
    _Atomic uint64_t
        bytes_read; /* body bytes handed out since it was made; only the reader thread writes, any may read */
    _Atomic uint64_t requests; /* HTTP requests sent, redirects included; of other sources: opens */
};

void ota_source_free(ota_source **source);

/* ---- HTTPS: source_http.c ----------------------------------------------------------------------------------------
 * One object by HTTP(S) GET with libcurl. Strings are copied. What must be shown of the URL in an error text is shown
 * without user, password and query. The device_code of an error is
 *   an errno                     of ERR_HTTP_CONNECT, ERR_HTTP_CLOSED, ERR_HTTP_NO_RESPONSE (0: not known); of ERR_HTTP_CONNECT
 *                                an HTTP status, 300 or more, when a proxy refused
 *   OpenSSL's verdict (X509_V_*) of ERR_HTTP_TLS, 0 when it was not the certificate
 *   an errno, or 0               of ERR_HTTP_TLS_FILE, which making the source returns too
 *   the HTTP status              of ERR_HTTP_STATUS, _REDIRECT, _DOWNGRADE, _NOT_MODIFIED, _PROTOCOL, _RANGE */
typedef struct ota_http_options {
    const char *url;              /* https://..., or http://... with allow_http */
    const char *ca_file;          /* PEM bundle to trust; NULL: the system's */
    const char *ca_pem;           /* PEM text to trust in place of ca_file; NULL: none */
    const char *client_cert_file; /* PEM; NULL: none */
    const char *client_key_file;  /* PEM; NULL: none */
    const char *proxy;            /* as libcurl takes it; NULL: from the environment; "": none */
    const char *user_agent;       /* NULL: "rmaker-ota/<version>" */
    const char *entity_tag;       /* for If-Range when resuming; NULL or "": none */
    const char *connect_to;       /* "HOST:PORT:CONNECT-TO-HOST:CONNECT-TO-PORT" as libcurl takes it; NULL: none */
    bool allow_http;              /* plain http is refused unless set */
    bool skip_common_name_check;  /* the certificate is checked, the host name is not */
    uint32_t connect_timeout_ms;  /* 0: 5000 */
    uint32_t stall_timeout_ms;    /* longest wait without a byte; 0: 60000 */
    uint64_t deadline_ms;         /* for everything from open on; 0: none */
    uint64_t max_bytes_per_s;     /* 0: no limit */
    uint32_t max_redirects;       /* 0: 10 */
    uint32_t receive_buffer;      /* bytes taken from the connection at once, 1024 at least; 0: 256 KiB */
} ota_http_options;

ota_status ota_source_http_new(const ota_http_options *options, ota_source **out, ota_error *error);

/* ---- Files and descriptors: source_file.c ------------------------------------------------------------------------ */
ota_status ota_source_file_new(const char *path, ota_source **out, ota_error *error);
/* Reads from an open descriptor (a pipe, standard input, a file), which stays the caller's; position 0 is where it stood
 * when the source was made. Not seekable: an offset above 0 starts over, so info->offset is 0, and what was read once cannot
 * be opened again (OTA_ERR_STATE). */
ota_status ota_source_fd_new(int fd, ota_source **out, ota_error *error);

/* ---- Bytes in memory, and bytes handed in by the caller: source_push.c ------------------------------------------- */
/* `data` must live until the source is freed. */
ota_status ota_source_memory_new(const void *data, size_t len, ota_source **out, ota_error *error);
/* A bounded pipe of `capacity` bytes. `size` is that of the whole object, may be OTA_SIZE_UNKNOWN; `offset` is where the pushed
 * bytes begin: open must ask for that offset, or for any when it is 0. It can be opened once. */
ota_status ota_source_push_new(size_t capacity, uint64_t size, uint64_t offset, ota_source **out, ota_error *error);
/* Writer side, one other thread, before or after open. Waits while the pipe is full. OTA_ERR_CANCELLED once the reader is
 * gone, OTA_ERR_STATE after end or fail, OTA_ERR_SIZE (for the reader too) for more bytes than announced. */
ota_status ota_source_push_write(ota_source *source, const void *data, size_t len, ota_error *error);
/* Waits until the reader took everything written and asked for more, or is gone (OTA_ERR_CANCELLED). */
ota_status ota_source_push_drain(ota_source *source, ota_error *error);
/* No more bytes: once it has read what was written the reader gets OTA_DONE, or OTA_ERR_INCOMPLETE when that is less than
 * announced. */
void ota_source_push_end(ota_source *source);
/* Once it has read what was written the reader gets this error in place of more bytes. The first end or fail counts. */
void ota_source_push_fail(ota_source *source, const ota_error *error);

#endif
