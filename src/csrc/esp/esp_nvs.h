/* The NVS partition: key-value pages in flash. Reads what firmware would read at its next start, and writes as firmware does.
 * No I/O: an opened partition is a copy in memory, and every change is a list of flash operations the caller carries out on
 * the medium, in order, each before the next. Cut between or inside any of them, the next reader (this one or firmware)
 * finds the old or the new value.
 *
 * Opening does to the copy what firmware does to the flash at start: it ends what a power cut left half done. Those repairs
 * are the first operations of the list; who only reads leaves them.
 * Source: ESP-IDF components/nvs_flash, file format version 2 (0xFE) and 1 (0xFF); NVS Encryption.
 *
 *     ota_esp_nvs_open(data, size, &options, &nvs, &error);
 *     ota_esp_nvs_set(nvs, "rmaker_ota", "ota_written", OTA_ESP_NVS_U16, value, 2, &error);
 *     for (size_t i = 0; i < ota_esp_nvs_op_count(nvs); i++) { carry out ota_esp_nvs_op_at(nvs, i) }
 *     ota_esp_nvs_free(&nvs); */
#ifndef OTA_ESP_ESP_NVS_H
#define OTA_ESP_ESP_NVS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    OTA_ESP_NVS_PAGE_SIZE = 4096,
    OTA_ESP_NVS_ENTRY_SIZE = 32,
    OTA_ESP_NVS_PAGE_ENTRIES = 126,
    OTA_ESP_NVS_NAME_MAX = 15,                    /* characters of a key or a namespace */
    OTA_ESP_NVS_STRING_MAX = 3999,                /* bytes of a string, without its NUL */
    OTA_ESP_NVS_CHUNK_MAX = 4000,                 /* bytes of a blob on one page */
    OTA_ESP_NVS_PARTITION_MAX = 16 * 1024 * 1024, /* this reader's limit, not the format's */
    OTA_ESP_NVS_KEYS_SIZE = 64,
    OTA_ESP_NVS_KEY_PARTITION_MIN = 68, /* bytes of an nvs_keys partition that count */
};

/* esp_err_t kept as device_code of an error */
enum {
    OTA_ESP_NVS_ERR_NO_FREE_PAGES = 0x110D,
    OTA_ESP_NVS_ERR_NEW_VERSION = 0x1110,
};

/* Numbers as in nvs_type_t. A number that is not here is a type this code does not know; it is kept and listed as it is. */
typedef enum ota_esp_nvs_type {
    OTA_ESP_NVS_U8 = 0x01,
    OTA_ESP_NVS_I8 = 0x11,
    OTA_ESP_NVS_U16 = 0x02,
    OTA_ESP_NVS_I16 = 0x12,
    OTA_ESP_NVS_U32 = 0x04,
    OTA_ESP_NVS_I32 = 0x14,
    OTA_ESP_NVS_U64 = 0x08,
    OTA_ESP_NVS_I64 = 0x18,
    OTA_ESP_NVS_FLOAT = 0x24,
    OTA_ESP_NVS_DOUBLE = 0x28,
    OTA_ESP_NVS_STRING = 0x21,
    OTA_ESP_NVS_BLOB = 0x42, /* of either format */
    OTA_ESP_NVS_ANY = 0xFF,
} ota_esp_nvs_type;

typedef enum ota_esp_nvs_page_state {
    OTA_ESP_NVS_PAGE_EMPTY,  /* all 0xFF */
    OTA_ESP_NVS_PAGE_ACTIVE, /* takes writes */
    OTA_ESP_NVS_PAGE_FULL,
    OTA_ESP_NVS_PAGE_FREEING, /* its items are being moved to the newest page */
    OTA_ESP_NVS_PAGE_CORRUPT, /* header CRC wrong, state unknown, or "empty" with bytes in it; counts as free */
} ota_esp_nvs_page_state;

/* A page as it was found, before repairs. */
typedef struct ota_esp_nvs_page {
    ota_esp_nvs_page_state state;
    uint32_t seq;     /* 0 where EMPTY or CORRUPT */
    uint8_t version;  /* 0xFE: format 2, 0xFF: format 1; 0 where EMPTY or CORRUPT */
    uint16_t written; /* entries in state written */
} ota_esp_nvs_page;

typedef struct ota_esp_nvs_namespace {
    uint8_t index; /* 1..254 */
    char name[17];
} ota_esp_nvs_namespace;

/* One live value. Pointers are good until the next set, erase or free. */
typedef struct ota_esp_nvs_item {
    const char *namespace_name; /* NULL: no entry names the index */
    uint8_t namespace_index;
    uint8_t type; /* ota_esp_nvs_type, or a number that is not known */
    char key[17]; /* bytes as found, NUL-terminated; firmware writes 15 characters at most */
    /* Numbers: little-endian, of their size. Strings: without the NUL. Unknown types: 8 bytes of the entry and those of the
     * entries that belong to it. */
    const uint8_t *value;
    size_t len;
} ota_esp_nvs_item;

typedef struct ota_esp_nvs_keys {
    uint8_t bytes[OTA_ESP_NVS_KEYS_SIZE]; /* eky[32] tky[32] */
} ota_esp_nvs_keys;

typedef struct ota_esp_nvs_options {
    const ota_esp_nvs_keys *keys; /* NULL: not encrypted. Copied */
    bool purge;                   /* overwrite erased entries with zeros, as IDF 6.1 does; older firmware leaves them */
} ota_esp_nvs_options;

typedef enum ota_esp_nvs_op_kind {
    OTA_ESP_NVS_ERASE = 1,   /* one sector of 4096 bytes becomes 0xFF */
    OTA_ESP_NVS_PROGRAM = 2, /* `len` bytes; only clears bits. Not aligned: 1, 4, 32 or a multiple of 32 bytes */
} ota_esp_nvs_op_kind;

typedef struct ota_esp_nvs_op {
    ota_esp_nvs_op_kind kind;
    size_t offset; /* in the partition */
    size_t len;
    const uint8_t *data; /* PROGRAM: what is there afterwards. Good until the next change of the handle */
} ota_esp_nvs_op;

typedef struct ota_esp_nvs ota_esp_nvs;

/* Keys of a data/nvs_keys partition. ERR_NVS: short, empty (all 0xFF: keys not made yet) or CRC wrong, as where flash
 * encryption covers it. */
ota_status ota_esp_nvs_keys_parse(const uint8_t *data, size_t len, ota_esp_nvs_keys *out, ota_error *error);

/* Opens a copy of a whole partition. `options` may be NULL. ERR_ARGUMENT: size 0, not whole pages, or above the maximum;
 * ERR_NVS with device code 0x1110: a page of a newer format; other damage is not an error: what cannot be read is not there.
 * With missing or wrong keys that is every item. */
ota_status ota_esp_nvs_open(const uint8_t *data, size_t size, const ota_esp_nvs_options *options, ota_esp_nvs **out,
                            ota_error *error);
void ota_esp_nvs_free(ota_esp_nvs **nvs);

size_t ota_esp_nvs_page_count(const ota_esp_nvs *nvs);
ota_esp_nvs_page ota_esp_nvs_page_at(const ota_esp_nvs *nvs, size_t index);
/* Namespaces in the order of their entries. */
size_t ota_esp_nvs_namespace_count(const ota_esp_nvs *nvs);
ota_esp_nvs_namespace ota_esp_nvs_namespace_at(const ota_esp_nvs *nvs, size_t index);
/* Items, oldest page first; a value nobody can reach (a duplicate) is not among them. */
size_t ota_esp_nvs_item_count(const ota_esp_nvs *nvs);
ota_esp_nvs_item ota_esp_nvs_item_at(const ota_esp_nvs *nvs, size_t index);
/* Entries whose CRC is wrong or whose length cannot be, and values whose CRC is wrong, as found. */
size_t ota_esp_nvs_damaged(const ota_esp_nvs *nvs);

/* The item of a key; type ANY: the first of that name. ERR_NOT_FOUND. */
ota_status ota_esp_nvs_get(const ota_esp_nvs *nvs, const char *namespace_name, const char *key, uint8_t type,
                           ota_esp_nvs_item *out, ota_error *error);

/* Stores a value; makes the namespace when it is missing. The same value of the same type: nothing to do. Old values of the
 * key, of whatever type, are erased after the new one is there. `len`: the size of the number; a string without its NUL.
 * When it fails nothing has changed and the list of operations is as it was.
 *
 * ERR_ARGUMENT: name or length; ERR_UNSUPPORTED: type; ERR_NVS_FULL: no room (or no free namespace index);
 * ERR_NVS: the partition cannot be written: fewer than 3 pages, no free page (0x110D: firmware would erase it all), or no
 * entry at all could be read, which is what a wrong key looks like. */
ota_status ota_esp_nvs_set(ota_esp_nvs *nvs, const char *namespace_name, const char *key, uint8_t type,
                           const uint8_t *value, size_t len, ota_error *error);
/* Erases a key; `key` NULL: every key of the namespace. ERR_NOT_FOUND: there is none. */
ota_status ota_esp_nvs_erase(ota_esp_nvs *nvs, const char *namespace_name, const char *key, ota_error *error);

/* Operations since open: repairs first, then every change. */
size_t ota_esp_nvs_op_count(const ota_esp_nvs *nvs);
ota_esp_nvs_op ota_esp_nvs_op_at(const ota_esp_nvs *nvs, size_t index);
/* How many of them are repairs. */
size_t ota_esp_nvs_repair_count(const ota_esp_nvs *nvs);
/* The partition as it is after all of them. */
const uint8_t *ota_esp_nvs_image(const ota_esp_nvs *nvs, size_t *size);

/* Carries out one operation on a copy in memory. ERR_ARGUMENT: outside; ERR_STATE: a bit would have to be set without an
 * erase (the copy is not what the list was made for); nothing is changed then. */
ota_status ota_esp_nvs_apply(uint8_t *partition, size_t size, const ota_esp_nvs_op *op, ota_error *error);

#endif
