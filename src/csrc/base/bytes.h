/* Little-endian load and store, CRC-32, names of chips, and small helpers for untrusted lengths. Header only where it is hot. */
#ifndef OTA_BASE_BYTES_H
#define OTA_BASE_BYTES_H

#include <ctype.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OTA_SIZE_UNKNOWN UINT64_MAX /* where a number of bytes is not known */

static inline uint16_t ota_load_u16le(const uint8_t *p) {
    return (uint16_t)(p[0] | (uint16_t)p[1] << 8);
}

static inline uint32_t ota_load_u32le(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t ota_load_u64le(const uint8_t *p) {
    return (uint64_t)ota_load_u32le(p) | (uint64_t)ota_load_u32le(p + 4) << 32;
}

static inline void ota_store_u16le(uint8_t *p, uint16_t value) {
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

static inline void ota_store_u32le(uint8_t *p, uint32_t value) {
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
    p[2] = (uint8_t)(value >> 16);
    p[3] = (uint8_t)(value >> 24);
}

static inline void ota_store_u64le(uint8_t *p, uint64_t value) {
    ota_store_u32le(p, (uint32_t)value);
    ota_store_u32le(p + 4, (uint32_t)(value >> 32));
}

/* True when [offset, offset + len) lies inside [0, size); never overflows. */
static inline bool ota_range_inside(uint64_t offset, uint64_t len, uint64_t size) {
    return offset <= size && len <= size - offset;
}

/* `value` rounded up to a multiple of `unit`, a power of two. The caller keeps value + unit below 2^64. */
static inline uint64_t ota_round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) & ~(unit - 1);
}

static inline uint64_t ota_round_down(uint64_t value, uint64_t unit) {
    return value & ~(unit - 1);
}

/* Whether two names of chips are the same: "ESP32-C3" and "esp32c3" are; case and hyphens do not count. */
static inline bool ota_same_chip_name(const char *a, const char *b) {
    for (;;) {
        a += *a == '-';
        b += *b == '-';
        if (tolower((unsigned char)*a) != tolower((unsigned char)*b)) {
            return false;
        }
        if (*a == '\0') {
            return true;
        }
        a++;
        b++;
    }
}

/* CRC-32 as zlib computes it (reflected 0xEDB88320, final inversion), continued from `crc`. Start from 0 for the common
 * CRC-32, from 0xFFFFFFFF for the one ESP-IDF keeps in otadata and NVS. */
uint32_t ota_crc32(uint32_t crc, const void *data, size_t len);

#endif
