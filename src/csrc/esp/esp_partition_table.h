/* The partition table of an ESP chip: binary as it lies in flash, and the CSV it is made from. No I/O.
 *
 * Source: ESP-IDF esp_flash_partitions.h, flash_partitions.c (reader), gen_esp32part.py (CSV rules). */
#ifndef OTA_ESP_ESP_PARTITION_TABLE_H
#define OTA_ESP_ESP_PARTITION_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    OTA_ESP_PARTITION_ROW_SIZE = 32,
    OTA_ESP_PARTITION_ROWS_MAX = 96,         /* rows a boot loader reads, MD5 row included */
    OTA_ESP_PARTITION_TABLE_SIZE = 0xC00,    /* bytes of rows; the rest of the sector is for a signature */
    OTA_ESP_PARTITION_TABLE_SECTOR = 0x1000, /* partitions may begin so far behind the table's offset */
    OTA_ESP_PARTITION_TABLE_OFFSET = 0x8000, /* the usual place */
    OTA_ESP_OTA_SLOTS_MAX = 16,
};

enum {
    OTA_ESP_PARTITION_APP = 0x00,
    OTA_ESP_PARTITION_DATA = 0x01,
    OTA_ESP_PARTITION_BOOTLOADER = 0x02,
    OTA_ESP_PARTITION_PARTITION_TABLE = 0x03,

    OTA_ESP_APP_FACTORY = 0x00,
    OTA_ESP_APP_OTA_0 = 0x10, /* up to ota_15 = 0x1F */
    OTA_ESP_APP_TEST = 0x20,

    OTA_ESP_DATA_OTA = 0x00,
    OTA_ESP_DATA_PHY = 0x01,
    OTA_ESP_DATA_NVS = 0x02,
    OTA_ESP_DATA_COREDUMP = 0x03,
    OTA_ESP_DATA_NVS_KEYS = 0x04,
    OTA_ESP_DATA_UNDEFINED = 0x06,
    OTA_ESP_DATA_TEE_OTA = 0x90,

    OTA_ESP_PRIMARY = 0x00, /* subtypes of boot loader and partition table */
    OTA_ESP_OTA_COPY = 0x01,
    OTA_ESP_RECOVERY = 0x02,

    OTA_ESP_PARTITION_ENCRYPTED = 1 << 0,
    OTA_ESP_PARTITION_READONLY = 1 << 1,
};

/* One row. */
typedef struct ota_esp_partition {
    uint8_t type, subtype;
    uint32_t offset, size; /* bytes in flash */
    char label[17];        /* the 16 bytes of the row, then a NUL; a string ends at the first NUL */
    uint32_t flags;        /* OTA_ESP_PARTITION_ENCRYPTED, _READONLY; other bits are kept as they came */
} ota_esp_partition;

typedef struct ota_esp_partition_table {
    uint32_t count;
    ota_esp_partition rows[OTA_ESP_PARTITION_ROWS_MAX];
    bool has_md5;
    uint8_t md5[16];     /* of the rows; filled by parse and by build when has_md5 */
    uint32_t end_offset; /* of the end marker, bytes; filled by parse and by build */
} ota_esp_partition_table;

/* Reads `len` bytes (of which at most 0xC00 matter) by the boot loader's rules: first row not the end marker, every magic
 * right, at most one MD5 row and that one right, an end marker within 96 rows, every partition inside `flash_size` bytes
 * (0: not known). Stricter than a boot loader: no partition behind the MD5 row. ERR_PARTITION_TABLE with the row's number
 * (from 0) and the field; `error->offset` is the row's offset. */
ota_status ota_esp_partition_table_parse(const uint8_t *data, size_t len, uint64_t flash_size,
                                         ota_esp_partition_table *table, ota_error *error);

/* Writes the 0xC00 bytes: rows, MD5 row when table->has_md5, end marker, 0xFF. ERR_PARTITION_TABLE when there is no room for
 * the end marker (more than 94 partitions with MD5, 95 without), or no row at all. */
ota_status ota_esp_partition_table_build(ota_esp_partition_table *table, uint8_t out[OTA_ESP_PARTITION_TABLE_SIZE],
                                         ota_error *error);

/* ---- CSV --------------------------------------------------------------------------------------------------------- */

typedef struct ota_esp_csv_options {
    uint32_t table_offset;      /* where the table will lie; 0: 0x8000 */
    uint64_t flash_size;        /* bytes; 0: not checked */
    uint32_t bootloader_offset; /* for rows of type bootloader, primary; OTA_ESP_UNSET: such a row is an error */
    uint32_t recovery_bootloader_offset; /* the same for recovery */
    bool secure_boot_v1;                 /* app sizes are multiples of 0x10000 */
    /* Value of $NAME or ${NAME}, alive until the call returns; NULL: unknown, an error. No function: all unknown. */
    const char *(*lookup)(void *user, const char *name);
    void *user;
} ota_esp_csv_options;

/* Reads `len` bytes of CSV by the generator's rules; has_md5 is set. `options` NULL: the defaults. ERR_PARTITION_TABLE with
 * line (from 1) and field; `error->offset` is the position in the text where that line begins. */
ota_status ota_esp_partition_table_from_csv(const char *text, size_t len, const ota_esp_csv_options *options,
                                            ota_esp_partition_table *table, ota_error *error);

/* The checks of the generator on a whole table: offsets and sizes aligned, names unique, no overlap, nothing over the table,
 * one otadata of 0x2000 bytes, NVS of 0x3000 bytes or readonly, no readonly otadata or core dump. `options` NULL: the
 * defaults. */
ota_status ota_esp_partition_table_check(const ota_esp_partition_table *table, const ota_esp_csv_options *options,
                                         ota_error *error);

/* Writes the table as CSV with its two comment lines, NUL-terminated. Returns the length without the NUL; when that is
 * not below `size`, the text was cut (out may be NULL with size 0). */
size_t ota_esp_partition_table_to_csv(const ota_esp_partition_table *table, char *out, size_t size);

/* Text of a type ("app", "64") and of a subtype ("ota_0", "7") as CSV writes them, into out[24]. */
const char *ota_esp_partition_type_name(uint8_t type, char out[24]);
const char *ota_esp_partition_subtype_name(uint8_t type, uint8_t subtype, char out[24]);

/* ---- Slots ------------------------------------------------------------------------------------------------------- */

/* What boot loader and update code take from a table. Pointers go into the table. */
typedef struct ota_esp_layout {
    const ota_esp_partition *otadata;                      /* NULL: none, factory boots always */
    const ota_esp_partition *factory;                      /* NULL: none */
    const ota_esp_partition *test;                         /* NULL: none */
    const ota_esp_partition *slots[OTA_ESP_OTA_SLOTS_MAX]; /* ota_0 .., contiguous */
    uint32_t slot_count;
} ota_esp_layout;

/* Finds them. ERR_PARTITION_TABLE where boot loader and app would disagree or the chip could not boot: a gap in the OTA slots,
 * two rows for one of them, otadata smaller than two sectors, no app partition, an app or otadata partition whose offset is
 * not a multiple of a sector, or two of these partitions that overlap. */
ota_status ota_esp_layout_find(const ota_esp_partition_table *table, ota_esp_layout *layout, ota_error *error);

#endif
