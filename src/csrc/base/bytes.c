/* CRC-32 by way of zlib, which has the fast code. */
#include "base/bytes.h"

#include <zlib.h>

uint32_t ota_crc32(uint32_t crc, const void *data, size_t len) {
    return (uint32_t)crc32_z(crc, data, len);
}
