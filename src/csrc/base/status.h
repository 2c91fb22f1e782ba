/* Statuses: the one list of everything a fallible function of the engine can say.
 *
 * Numbers are pinned for ever: a status keeps its number, a number is never used again. Zero means "go on", above zero is
 * a named good outcome, below zero an error. Python builds its enum and its exception tree from this table
 * (ota_status_info), so there is one list. The esp_err_t column is what the RainMaker API reports for it. */
#ifndef OTA_BASE_STATUS_H
#define OTA_BASE_STATUS_H

#include <stddef.h>
#include <stdint.h>

/*      name               number  esp_err_t  text */
#define OTA_STATUS_LIST(X)                                                                                             \
    X(OK, 0, 0, "go on")                                                                                               \
    X(DONE, 1, 0, "complete")                                                                                          \
    X(ERR_ARGUMENT, -1, 0x102, "an argument is out of range")                                                          \
    X(ERR_NO_MEMORY, -2, 0x101, "out of memory")                                                                       \
    X(ERR_STATE, -3, 0x103, "not allowed in this state")                                                               \
    X(ERR_CANCELLED, -4, -1, "cancelled")                                                                              \
    X(ERR_CALLBACK, -5, -1, "a callback failed")                                                                       \
    X(ERR_DEADLINE, -6, 0x107, "the overall deadline passed")                                                          \
    X(ERR_STALLED, -7, 0x107, "no data arrived for the stall time-out")                                                \
    X(ERR_SYSTEM, -8, -1, "the operating system reported an error")                                                    \
    X(ERR_NO_SPACE, -9, 0x104, "no space left on the device")                                                          \
    X(ERR_READ_ONLY, -10, -1, "the target is read-only")                                                               \
    X(ERR_BUSY, -11, 0x103, "the target is in use")                                                                    \
    X(ERR_NOT_FOUND, -12, 0x105, "not found")                                                                          \
    X(ERR_TOO_LARGE, -13, 0x104, "the image does not fit")                                                             \
    X(ERR_UNSUPPORTED, -14, 0x106, "not supported")                                                                    \
    X(ERR_REJECTED, -15, -1, "the image was refused before anything was written")                                      \
    X(ERR_PERMISSION, -16, -1, "permission denied")                                                                    \
    X(ERR_SHORT_WRITE, -17, -1, "the device took fewer bytes than it was given")                                       \
    X(ERR_READ_BACK, -18, 0x1503, "what was read back is not what was written")                                        \
    X(ERR_NOT_RESUMABLE, -19, 0x103, "what is on the slot does not belong to the resume record")                       \
    X(ERR_HTTP_CONNECT, -20, 0x7002, "the server could not be reached")                                                \
    X(ERR_HTTP_RESOLVE, -21, 0x7002, "the host name could not be resolved")                                            \
    X(ERR_HTTP_TLS, -22, 0x7002, "the TLS handshake or the server's certificate failed")                               \
    X(ERR_HTTP_STATUS, -23, -1, "the server answered with an error status")                                            \
    X(ERR_HTTP_REDIRECT, -24, 0x7001, "too many redirects, or one without a usable target")                            \
    X(ERR_HTTP_DOWNGRADE, -25, 0x700D, "a redirect from https to http was refused")                                    \
    X(ERR_HTTP_CLOSED, -26, -1, "the connection closed before the whole body arrived")                                 \
    X(ERR_HTTP_NOT_MODIFIED, -27, 0x7009, "the server answered 304 not modified")                                      \
    X(ERR_HTTP_PROTOCOL, -28, 0x7004, "the server's answer could not be understood")                                   \
    X(ERR_HTTP_RANGE, -29, 0x700A, "the server answered another range than the one asked for")                         \
    X(ERR_HTTP_INSECURE, -30, 0x102, "a plain http URL is not allowed")                                                \
    X(ERR_HTTP_URL, -31, 0x102, "the URL cannot be used")                                                              \
    X(ERR_HTTP_CONNECT_TIMEOUT, -32, 0x7002, "the server did not accept the connection in time")                       \
    X(ERR_HTTP_NO_RESPONSE, -33, 0x7004, "the server closed the connection without an answer")                         \
    X(ERR_HTTP_TLS_FILE, -34, 0x7002, "a certificate, key or authorities file cannot be used")                         \
    X(ERR_INCOMPLETE, -40, -1, "the input ended before it was complete")                                               \
    X(ERR_SIZE, -41, 0x1503, "the size differs from the announced one")                                                \
    X(ERR_SHA256, -42, 0x1503, "the SHA-256 digest differs from the expected one")                                     \
    X(ERR_MD5, -43, 0x1503, "the MD5 digest differs from the announced one")                                           \
    X(ERR_COMPRESSED_DATA, -44, -1, "the compressed data is damaged")                                                  \
    X(ERR_EXPANSION, -45, 0x104, "the compressed data expands beyond the limit")                                       \
    X(ERR_IMAGE_MAGIC, -50, 0x1503, "the image magic byte is wrong")                                                   \
    X(ERR_IMAGE_STRUCTURE, -51, 0x1503, "the image structure is not valid")                                            \
    X(ERR_IMAGE_CHECKSUM, -52, 0x1503, "the image checksum is wrong")                                                  \
    X(ERR_IMAGE_HASH, -53, 0x1503, "the appended image hash is wrong")                                                 \
    X(ERR_IMAGE_DESCRIPTOR, -54, -1, "the image has no app descriptor")                                                \
    X(ERR_IMAGE_CHIP, -55, 0x10A, "the image is for another chip")                                                     \
    X(ERR_IMAGE_REVISION, -56, 0x10A, "the image is for another chip revision")                                        \
    X(ERR_IMAGE_FLASH_MODE, -57, 0x1508, "the image is for another SPI flash mode")                                    \
    X(ERR_PARTITION_TABLE, -60, -1, "the partition table is not valid")                                                \
    X(ERR_OTADATA, -61, 0x1502, "otadata is not valid")                                                                \
    X(ERR_NVS, -62, -1, "the NVS partition is not valid")                                                              \
    X(ERR_NVS_FULL, -63, -1, "the NVS partition is full")                                                              \
    X(ERR_SLOT_RUNNING, -64, 0x1501, "the slot is the running one")                                                    \
    X(ERR_PENDING_VERIFY, -65, 0x1506, "the running image is not confirmed yet")                                       \
    X(ERR_SECURE_VERSION, -66, 0x1504, "the image's secure version is too small")                                      \
    X(ERR_ROLLBACK, -67, 0x1505, "there is no image to roll back to")                                                  \
    X(ERR_NOT_BOOTABLE, -68, -1, "no slot holds an image that boots")                                                  \
    X(ERR_SERIAL_LOST, -70, -1, "the device on the serial line is gone")                                               \
    X(ERR_CHIP_SILENT, -71, 0x107, "the chip does not answer")                                                         \
    X(ERR_CHIP_PROTOCOL, -72, -1, "the chip's answer could not be understood")                                         \
    X(ERR_CHIP_REFUSED, -73, -1, "the chip refused a command")                                                         \
    X(ERR_CHIP_OTHER, -74, 0x10A, "the chip is another one than expected")                                             \
    X(ERR_CHIP_BOOT_MODE, -75, -1, "the chip is not in download mode")                                                 \
    X(ERR_CHIP_RESTARTED, -76, -1, "the chip restarted or crashed meanwhile")

typedef enum ota_status {
#define OTA_STATUS_ENUM(name, number, esp_err, text) OTA_##name = (number),
    OTA_STATUS_LIST(OTA_STATUS_ENUM)
#undef OTA_STATUS_ENUM
} ota_status;

/* Where in the flow something happened. Numbers are pinned as those of statuses are. */
#define OTA_STAGE_LIST(X)                                                                                              \
    X(NONE, 0, "none")                                                                                                 \
    X(SOURCE, 1, "source")                                                                                             \
    X(TRANSFORM, 2, "transform")                                                                                       \
    X(VERIFY, 3, "verify")                                                                                             \
    X(SINK, 4, "sink")                                                                                                 \
    X(HEADER, 5, "header")                                                                                             \
    X(COMMIT, 6, "commit")                                                                                             \
    X(TARGET, 7, "target")

typedef enum ota_stage {
#define OTA_STAGE_ENUM(name, number, text) OTA_STAGE_##name = (number),
    OTA_STAGE_LIST(OTA_STAGE_ENUM)
#undef OTA_STAGE_ENUM
} ota_stage;

/* What went wrong, for people and for programs. The first error of a context is kept; later ones never replace it. */
typedef struct ota_error {
    ota_status status;   /* OTA_OK: nothing happened */
    ota_stage stage;     /* which stage found it */
    uint64_t offset;     /* position in that stage's bytes, from the start of the image; 0 where there is none */
    int64_t device_code; /* errno, HTTP status or a device's own code; 0: none. Never dropped */
    char text[256];      /* one sentence in UTF-8 with what was expected and found; always NUL-terminated */
} ota_error;

typedef struct ota_status_info {
    ota_status status;
    const char *name; /* "ERR_IMAGE_CHIP" */
    int32_t esp_err;  /* the esp_err_t the RainMaker API reports for it */
    const char *text;
} ota_status_info;

/* The table above, `*count` rows. The rows live as long as the program. */
const ota_status_info *ota_status_table(size_t *count);

/* Name of a status or stage; "?" for a number that is not in the table. */
const char *ota_status_name(ota_status status);
const char *ota_stage_name(ota_stage stage);

/* esp_err_t of a status; -1 (ESP_FAIL) for a number that is not in the table. */
int32_t ota_status_esp_err(ota_status status);

/* Records `status` with a printf-style sentence, unless `error` already holds an error; returns the status that is now
 * recorded. `error` may be NULL. Text that does not fit is cut at a character boundary. */
ota_status ota_error_set(ota_error *error, ota_status status, ota_stage stage, uint64_t offset, int64_t device_code,
                         const char *format, ...) __attribute__((format(printf, 6, 7)));

/* The same for an errno: picks NO_SPACE, READ_ONLY, BUSY, NOT_FOUND, PERMISSION, NO_MEMORY or SYSTEM by its number and
 * appends its text to `what`. */
ota_status ota_error_set_errno(ota_error *error, ota_stage stage, uint64_t offset, int errnum, const char *what);

#endif
