/* The table of statuses and the one way an error is recorded. Knows nothing of any stage. */
#include "base/status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const ota_status_info table[] = {
#define OTA_STATUS_ROW(name, number, esp_err, text) {OTA_##name, #name, (esp_err), (text)},
    OTA_STATUS_LIST(OTA_STATUS_ROW)
#undef OTA_STATUS_ROW
};

const ota_status_info *ota_status_table(size_t *count) {
    *count = sizeof table / sizeof table[0];
    return table;
}

static const ota_status_info *find(ota_status status) {
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (table[i].status == status) {
            return &table[i];
        }
    }
    return NULL;
}

const char *ota_status_name(ota_status status) {
    const ota_status_info *info = find(status);
    return info ? info->name : "?";
}

int32_t ota_status_esp_err(ota_status status) {
    const ota_status_info *info = find(status);
    return info ? info->esp_err : -1;
}

const char *ota_stage_name(ota_stage stage) {
    switch (stage) {
#define OTA_STAGE_CASE(name, number, text)                                                                             \
    case OTA_STAGE_##name:                                                                                             \
        return text;
        OTA_STAGE_LIST(OTA_STAGE_CASE)
#undef OTA_STAGE_CASE
    }
    return "?";
}

ota_status ota_error_set(ota_error *error, ota_status status, ota_stage stage, uint64_t offset, int64_t device_code,
                         const char *format, ...) {
    if (error == NULL) {
        return status;
    }
    if (error->status != OTA_OK) {
        return error->status;
    }
    error->status = status;
    error->stage = stage;
    error->offset = offset;
    error->device_code = device_code;
    va_list args;
    va_start(args, format);
    int len = vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    if (len < 0) {
        error->text[0] = '\0';
    } else if ((size_t)len >= sizeof error->text) {
        size_t end = sizeof error->text - 1;
        while (end > 0 && ((unsigned char)error->text[end - 1] & 0xC0) == 0x80) {
            end--; /* back over continuation bytes of a cut UTF-8 character */
        }
        if (end > 0 && ((unsigned char)error->text[end - 1] & 0xC0) == 0xC0) {
            end--;
        }
        error->text[end] = '\0';
    }
    return status;
}

static ota_status status_of_errno(int errnum) {
    switch (errnum) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return OTA_ERR_NO_SPACE;
    case EROFS:
        return OTA_ERR_READ_ONLY;
    case EBUSY:
    case ETXTBSY:
        return OTA_ERR_BUSY;
    case ENOENT:
    case ENODEV:
    case ENXIO:
        return OTA_ERR_NOT_FOUND;
    case EACCES:
    case EPERM:
        return OTA_ERR_PERMISSION;
    case ENOMEM:
        return OTA_ERR_NO_MEMORY;
    default:
        return OTA_ERR_SYSTEM;
    }
}

ota_status ota_error_set_errno(ota_error *error, ota_stage stage, uint64_t offset, int errnum, const char *what) {
    char text[128];
    const char *reason = strerror_r(errnum, text, sizeof text);
    return ota_error_set(error, status_of_errno(errnum), stage, offset, errnum, "%s: %s", what, reason);
}
