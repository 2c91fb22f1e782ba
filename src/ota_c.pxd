# What the border sees of C, room by room, declaration by declaration. The headers are the manual.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# ---- base ------------------------------------------------------------------------------------------------------------

cdef extern from "base/status.h" nogil:
    ctypedef int ota_status
    ctypedef int ota_stage
    enum:
        OTA_OK
        OTA_DONE
        OTA_ERR_CALLBACK
        OTA_ERR_CANCELLED
        OTA_ERR_REJECTED
    ctypedef struct ota_error:
        ota_status status
        ota_stage stage
        uint64_t offset
        int64_t device_code
        char text[256]
    ctypedef struct ota_status_info:
        ota_status status
        const char *name
        int32_t esp_err
        const char *text
    const ota_status_info *ota_status_table(size_t *count)
    const char *ota_status_name(ota_status status)
    const char *ota_stage_name(ota_stage stage)
    int32_t ota_status_esp_err(ota_status status)

# ---- port ------------------------------------------------------------------------------------------------------------

# ---- esp -------------------------------------------------------------------------------------------------------------

# ---- target ----------------------------------------------------------------------------------------------------------

# ---- source ----------------------------------------------------------------------------------------------------------

# ---- engine ----------------------------------------------------------------------------------------------------------
