/* Decides, for every port that takes a fault plan, whether an operation succeeds. Does no I/O itself, so that files and
 * flash fail in the same way. Not locked: the file or flash that asks has its own lock. */
#include <errno.h>

#include "port/port.h"

int ota_fault_check(ota_fault *fault, uint32_t op, uint64_t offset, uint64_t len, uint64_t *take) {
    *take = len;
    if (fault == NULL) {
        return 0;
    }
    if (fault->lost) {
        *take = 0;
        return EIO;
    }
    if (fault->ops != 0 && (fault->ops & op) == 0) {
        return 0;
    }
    if (fault->reaches != 0 && (len == 0 || len > UINT64_MAX - offset || offset + len <= fault->reaches)) {
        return 0;
    }
    uint64_t index = fault->seen++;
    bool hit = fault->power_cut ? index == fault->after : index >= fault->after && index - fault->after < fault->count;
    if (!hit) {
        return 0;
    }
    fault->lost = fault->power_cut;
    bool tears = (op & (OTA_FAULT_WRITE | OTA_FAULT_ERASE)) != 0;
    *take = !tears ? 0 : fault->torn_len < len ? fault->torn_len : len;
    return fault->power_cut || fault->errnum == 0 ? EIO : fault->errnum;
}
