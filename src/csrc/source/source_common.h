/* What the sources share: the first error is kept and repeated. */
#ifndef OTA_SOURCE_SOURCE_COMMON_H
#define OTA_SOURCE_SOURCE_COMMON_H

#include "source/source.h"

/* Hands out `kept` once more, or, when it holds none, nothing. */
static inline ota_status ota_source_repeat(const ota_error *kept, ota_error *error) {
    if (kept->status != OTA_OK && error != NULL && error->status == OTA_OK) {
        *error = *kept;
    }
    return kept->status;
}

/* The next position from the start of the object is `offset`. */
static inline ota_status ota_source_cancelled(ota_error *error, uint64_t offset) {
    return ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_SOURCE, offset, 0, "cancelled");
}

#endif
