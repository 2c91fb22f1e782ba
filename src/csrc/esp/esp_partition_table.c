/* Reads and writes partition tables, binary and CSV. Leaves to others what lies in the partitions, and the signature that may
 * follow the rows. */
#include "esp/esp_partition_table.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <openssl/evp.h>

#include "base/bytes.h"
#include "esp/esp_image.h"

#define ROW OTA_ESP_PARTITION_ROW_SIZE
#define SECTOR 0x1000u
#define APP_ALIGNMENT 0x10000u
#define OTADATA_SIZE 0x2000u
#define NVS_WRITABLE_SIZE 0x3000u /* NVS needs three pages to be written */
#define LABEL_SIZE 16

static ota_status table_error(ota_error *error, uint64_t offset, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static ota_status table_error(ota_error *error, uint64_t offset, const char *format, ...) {
    char text[sizeof error->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return ota_error_set(error, OTA_ERR_PARTITION_TABLE, OTA_STAGE_TARGET, offset, 0, "%s", text);
}

/* ---- Names ------------------------------------------------------------------------------------------------------- */

typedef struct keyword {
    const char *name;
    int type; /* of subtypes: the type they belong to; of types: -1 */
    uint8_t value;
} keyword;

/* Source: gen_esp32part.py 1.5. ota_0..15 and tee_0..1 are made by number. */
static const keyword types[] = {
    {"app", -1, OTA_ESP_PARTITION_APP},
    {"data", -1, OTA_ESP_PARTITION_DATA},
    {"bootloader", -1, OTA_ESP_PARTITION_BOOTLOADER},
    {"partition_table", -1, OTA_ESP_PARTITION_PARTITION_TABLE},
};

static const keyword subtypes[] = {
    {"factory", OTA_ESP_PARTITION_APP, OTA_ESP_APP_FACTORY},
    {"test", OTA_ESP_PARTITION_APP, OTA_ESP_APP_TEST},
    {"tee_0", OTA_ESP_PARTITION_APP, 0x30},
    {"tee_1", OTA_ESP_PARTITION_APP, 0x31},
    {"ota", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_OTA},
    {"phy", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_PHY},
    {"nvs", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_NVS},
    {"coredump", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_COREDUMP},
    {"nvs_keys", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_NVS_KEYS},
    {"efuse", OTA_ESP_PARTITION_DATA, 0x05},
    {"undefined", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_UNDEFINED},
    {"esphttpd", OTA_ESP_PARTITION_DATA, 0x80},
    {"fat", OTA_ESP_PARTITION_DATA, 0x81},
    {"spiffs", OTA_ESP_PARTITION_DATA, 0x82},
    {"littlefs", OTA_ESP_PARTITION_DATA, 0x83},
    {"tee_ota", OTA_ESP_PARTITION_DATA, OTA_ESP_DATA_TEE_OTA},
    {"primary", OTA_ESP_PARTITION_BOOTLOADER, OTA_ESP_PRIMARY},
    {"ota", OTA_ESP_PARTITION_BOOTLOADER, OTA_ESP_OTA_COPY},
    {"recovery", OTA_ESP_PARTITION_BOOTLOADER, OTA_ESP_RECOVERY},
    {"primary", OTA_ESP_PARTITION_PARTITION_TABLE, OTA_ESP_PRIMARY},
    {"ota", OTA_ESP_PARTITION_PARTITION_TABLE, OTA_ESP_OTA_COPY},
};

static bool is_ota_subtype(uint8_t type, uint8_t subtype) {
    return type == OTA_ESP_PARTITION_APP && subtype >= OTA_ESP_APP_OTA_0 &&
           subtype < OTA_ESP_APP_OTA_0 + OTA_ESP_OTA_SLOTS_MAX;
}

const char *ota_esp_partition_type_name(uint8_t type, char out[24]) {
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        if (types[i].value == type) {
            snprintf(out, 24, "%s", types[i].name);
            return out;
        }
    }
    snprintf(out, 24, "%u", type);
    return out;
}

const char *ota_esp_partition_subtype_name(uint8_t type, uint8_t subtype, char out[24]) {
    if (is_ota_subtype(type, subtype)) {
        snprintf(out, 24, "ota_%d", subtype - OTA_ESP_APP_OTA_0);
        return out;
    }
    for (size_t i = 0; i < sizeof subtypes / sizeof subtypes[0]; i++) {
        if (subtypes[i].type == type && subtypes[i].value == subtype) {
            snprintf(out, 24, "%s", subtypes[i].name);
            return out;
        }
    }
    snprintf(out, 24, "%u", subtype);
    return out;
}

/* A label for messages: what cannot be printed becomes '?'. */
static const char *shown(const char label[LABEL_SIZE + 1], char out[LABEL_SIZE + 1]) {
    size_t i = 0;
    for (; i < LABEL_SIZE && label[i] != '\0'; i++) {
        out[i] = label[i] >= 0x20 && label[i] < 0x7F ? label[i] : '?';
    }
    out[i] = '\0';
    return out;
}

/* ---- Binary ------------------------------------------------------------------------------------------------------ */

static ota_status md5_of(const uint8_t *data, size_t len, uint8_t out[16], ota_error *error) {
    if (EVP_Digest(data, len, out, NULL, EVP_md5(), NULL) != 1) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TARGET, 0, 0, "libcrypto has no MD5");
    }
    return OTA_OK;
}

static void load_row(const uint8_t *data, ota_esp_partition *row) {
    row->type = data[2];
    row->subtype = data[3];
    row->offset = ota_load_u32le(data + 4);
    row->size = ota_load_u32le(data + 8);
    memcpy(row->label, data + 12, LABEL_SIZE);
    row->label[LABEL_SIZE] = '\0';
    row->flags = ota_load_u32le(data + 28);
}

static void store_row(const ota_esp_partition *row, uint8_t *data) {
    data[0] = 0xAA;
    data[1] = 0x50;
    data[2] = row->type;
    data[3] = row->subtype;
    ota_store_u32le(data + 4, row->offset);
    ota_store_u32le(data + 8, row->size);
    memcpy(data + 12, row->label, LABEL_SIZE);
    ota_store_u32le(data + 28, row->flags);
}

static ota_status parse_md5_row(const uint8_t *data, uint32_t index, ota_esp_partition_table *table, ota_error *error) {
    size_t offset = (size_t)index * ROW;
    if (table->has_md5) {
        return table_error(error, offset, "row %u of the partition table is a second MD5 row", index);
    }
    uint8_t computed[16];
    ota_status status = md5_of(data, offset, computed, error);
    if (status < 0) {
        return status;
    }
    table->has_md5 = true;
    memcpy(table->md5, data + offset + 16, sizeof table->md5);
    if (memcmp(computed, table->md5, sizeof computed) != 0) {
        return table_error(error, offset, "row %u of the partition table: the MD5 of the rows before it is another one",
                           index);
    }
    return OTA_OK;
}

static ota_status parse_row(const uint8_t *data, uint32_t index, uint64_t flash_size, ota_esp_partition_table *table,
                            ota_error *error) {
    ota_esp_partition *row = &table->rows[table->count];
    load_row(data, row);
    if (flash_size != 0 && !ota_range_inside(row->offset, row->size, flash_size)) {
        char label[LABEL_SIZE + 1];
        return table_error(error, (uint64_t)index * ROW,
                           "row %u of the partition table (%s): offset 0x%" PRIx32 " and size 0x%" PRIx32
                           " reach over the end of the flash, 0x%" PRIx64 " bytes",
                           index, shown(row->label, label), row->offset, row->size, flash_size);
    }
    table->count++;
    return OTA_OK;
}

ota_status ota_esp_partition_table_parse(const uint8_t *data, size_t len, uint64_t flash_size,
                                         ota_esp_partition_table *table, ota_error *error) {
    memset(table, 0, sizeof *table);
    for (uint32_t index = 0; index < OTA_ESP_PARTITION_ROWS_MAX; index++) {
        size_t offset = (size_t)index * ROW;
        if (len < offset + ROW) {
            return table_error(error, offset, "the partition table ends after %zu bytes, before its end marker", len);
        }
        const uint8_t *row = data + offset;
        uint16_t magic = ota_load_u16le(row);
        ota_status status = OTA_OK;
        if (magic == 0x50AA && table->has_md5) {
            /* A boot loader reads it, then takes the MD5 row for the last partition. */
            return table_error(error, offset, "row %u of the partition table is a partition behind the MD5 row", index);
        }
        if (magic == 0x50AA) {
            status = parse_row(row, index, flash_size, table, error);
        } else if (magic == 0xEBEB) {
            status = parse_md5_row(data, index, table, error);
        } else if (magic == 0xFFFF && row[2] == 0xFF && row[3] == 0xFF) {
            if (index == 0) {
                return table_error(error, 0, "the partition table is empty");
            }
            table->end_offset = (uint32_t)offset;
            return OTA_OK;
        } else {
            return table_error(error, offset, "row %u of the partition table: 0x%04x where the magic 0x50aa should be",
                               index, magic);
        }
        if (status < 0) {
            return status;
        }
    }
    return table_error(error, OTA_ESP_PARTITION_TABLE_SIZE, "the partition table has no end marker in its %d rows",
                       OTA_ESP_PARTITION_ROWS_MAX);
}

ota_status ota_esp_partition_table_build(ota_esp_partition_table *table, uint8_t out[OTA_ESP_PARTITION_TABLE_SIZE],
                                         ota_error *error) {
    memset(out, 0xFF, OTA_ESP_PARTITION_TABLE_SIZE);
    uint32_t most = OTA_ESP_PARTITION_ROWS_MAX - 1 - (table->has_md5 ? 1 : 0);
    if (table->count == 0) {
        return table_error(error, 0, "a partition table needs at least one partition");
    }
    if (table->count > most) {
        return table_error(error, 0, "%u partitions are too many for a table: at most %u", table->count, most);
    }
    for (uint32_t i = 0; i < table->count; i++) {
        store_row(&table->rows[i], out + (size_t)i * ROW);
    }
    uint32_t end = table->count * ROW;
    if (table->has_md5) {
        ota_status status = md5_of(out, end, table->md5, error);
        if (status < 0) {
            return status;
        }
        out[end] = out[end + 1] = 0xEB;
        memcpy(out + end + 16, table->md5, sizeof table->md5);
        end += ROW;
    }
    table->end_offset = end;
    return OTA_OK;
}

/* ---- Checks of the generator ------------------------------------------------------------------------------------- */

static const ota_esp_csv_options default_options = {.bootloader_offset = OTA_ESP_UNSET,
                                                    .recovery_bootloader_offset = OTA_ESP_UNSET};

static uint32_t table_offset_of(const ota_esp_csv_options *options) {
    return options->table_offset != 0 ? options->table_offset : OTA_ESP_PARTITION_TABLE_OFFSET;
}

/* Boot loader and table themselves lie below the partitions. */
static bool is_primary(const ota_esp_partition *row) {
    return (row->type == OTA_ESP_PARTITION_BOOTLOADER || row->type == OTA_ESP_PARTITION_PARTITION_TABLE) &&
           row->subtype == OTA_ESP_PRIMARY;
}

static uint32_t offset_alignment(uint8_t type) {
    return type == OTA_ESP_PARTITION_APP ? APP_ALIGNMENT : SECTOR;
}

/* Where a row came from, for messages: "line 7 (ota_0)" of a CSV, "partition 3 (ota_0)" of a table. */
typedef struct row_origin {
    uint32_t line;   /* from 1; 0: not from a CSV */
    uint64_t offset; /* of that line in the text, or of the row in the table */
} row_origin;

static const char *where(const ota_esp_partition_table *table, const row_origin *origins, uint32_t index,
                         char out[64]) {
    char label[LABEL_SIZE + 1];
    shown(table->rows[index].label, label);
    if (origins != NULL) {
        snprintf(out, 64, "line %u (%s)", origins[index].line, label);
    } else {
        snprintf(out, 64, "partition %u (%s)", index, label);
    }
    return out;
}

static uint64_t position(const row_origin *origins, uint32_t index) {
    return origins != NULL ? origins[index].offset : (uint64_t)index * ROW;
}

/* One row by itself; the sentence of what is wrong, or NULL. */
static const char *fault_of(const ota_esp_partition *row, const ota_esp_csv_options *options) {
    bool data = row->type == OTA_ESP_PARTITION_DATA;
    bool readonly = (row->flags & OTA_ESP_PARTITION_READONLY) != 0;
    uint32_t app_size = options->secure_boot_v1 ? APP_ALIGNMENT : SECTOR;
    if (row->offset % offset_alignment(row->type) != 0) {
        return row->type == OTA_ESP_PARTITION_APP ? "offset: not a multiple of 0x10000"
                                                  : "offset: not a multiple of 0x1000";
    }
    if (row->type == OTA_ESP_PARTITION_APP && row->size % app_size != 0) {
        return options->secure_boot_v1 ? "size: not a multiple of 0x10000" : "size: not a multiple of 0x1000";
    }
    if ((uint64_t)row->offset + row->size > UINT32_MAX) {
        return "size: the partition reaches over 4 GiB";
    }
    if (!is_primary(row) && row->offset < (uint64_t)table_offset_of(options) + OTA_ESP_PARTITION_TABLE_SECTOR) {
        return "offset: over the partition table or below it";
    }
    if (options->flash_size != 0 && !ota_range_inside(row->offset, row->size, options->flash_size)) {
        return "size: the partition reaches over the end of the flash";
    }
    if (data && (row->subtype == OTA_ESP_DATA_OTA || row->subtype == OTA_ESP_DATA_TEE_OTA) &&
        row->size != OTADATA_SIZE) {
        return "size: otadata has 0x2000 bytes";
    }
    if (data && row->subtype == OTA_ESP_DATA_NVS && row->size < NVS_WRITABLE_SIZE && !readonly) {
        return "size: NVS needs 0x3000 bytes, or the flag readonly";
    }
    if (data && readonly && (row->subtype == OTA_ESP_DATA_OTA || row->subtype == OTA_ESP_DATA_COREDUMP)) {
        return "flags: otadata and core dump cannot be readonly";
    }
    return NULL;
}

static bool overlap(const ota_esp_partition *a, const ota_esp_partition *b) {
    return a->offset < (uint64_t)b->offset + b->size && b->offset < (uint64_t)a->offset + a->size;
}

static ota_status check_table(const ota_esp_partition_table *table, const ota_esp_csv_options *options,
                              const row_origin *origins, ota_error *error) {
    char at[64], other[64];
    for (uint32_t i = 0; i < table->count; i++) {
        const ota_esp_partition *row = &table->rows[i];
        const char *fault = fault_of(row, options);
        if (fault != NULL) {
            return table_error(error, position(origins, i), "%s, %s (offset 0x%" PRIx32 ", size 0x%" PRIx32 ")",
                               where(table, origins, i, at), fault, row->offset, row->size);
        }
        for (uint32_t k = 0; k < i; k++) {
            const ota_esp_partition *before = &table->rows[k];
            const char *clash = NULL;
            if (strcmp(before->label, row->label) == 0) {
                clash = "name: the same as";
            } else if (overlap(before, row)) {
                clash = "offset: it overlaps";
            } else if (before->type == OTA_ESP_PARTITION_DATA && row->type == OTA_ESP_PARTITION_DATA &&
                       before->subtype == row->subtype &&
                       (row->subtype == OTA_ESP_DATA_OTA || row->subtype == OTA_ESP_DATA_TEE_OTA)) {
                clash = "subtype: there can be only one otadata, and there is";
            }
            if (clash != NULL) {
                return table_error(error, position(origins, i), "%s, %s %s", where(table, origins, i, at), clash,
                                   where(table, origins, k, other));
            }
        }
    }
    return OTA_OK;
}

ota_status ota_esp_partition_table_check(const ota_esp_partition_table *table, const ota_esp_csv_options *options,
                                         ota_error *error) {
    return check_table(table, options != NULL ? options : &default_options, NULL, error);
}

/* ---- CSV in ------------------------------------------------------------------------------------------------------ */

#define CSV_LINE_MAX 1024 /* bytes of a line after its variables are put in */

enum field_index {
    FIELD_NAME,
    FIELD_TYPE,
    FIELD_SUBTYPE,
    FIELD_OFFSET,
    FIELD_SIZE,
    FIELD_FLAGS,
    FIELD_COUNT,
};

static const char *const field_names[FIELD_COUNT] = {"name", "type", "subtype", "offset", "size", "flags"};

typedef struct csv_reader {
    const ota_esp_csv_options *options;
    ota_esp_partition_table *table;
    row_origin origins[OTA_ESP_PARTITION_ROWS_MAX];
    bool offset_given[OTA_ESP_PARTITION_ROWS_MAX];
    int64_t sizes[OTA_ESP_PARTITION_ROWS_MAX]; /* negative: where the partition ends */
    uint32_t line;                             /* from 1 */
    uint64_t line_offset;                      /* of its first byte in the text */
    ota_error *error;
} csv_reader;

static ota_status field_error(const csv_reader *reader, enum field_index field, const char *value, const char *what) {
    return table_error(reader->error, reader->line_offset, "line %u, %s: \"%.40s\" %s", reader->line,
                       field_names[field], value, what);
}

/* Python's str.strip for bytes. */
static char *trim(char *text) {
    while (isspace((unsigned char)*text)) {
        text++;
    }
    size_t len = strlen(text);
    while (len > 0 && isspace((unsigned char)text[len - 1])) {
        text[--len] = '\0';
    }
    return text;
}

static bool is_name_char(char c, bool first) {
    return c == '_' || isalpha((unsigned char)c) || (!first && isdigit((unsigned char)c));
}

/* Reads $NAME or ${NAME} at *text into name; false where the dollar sign stands for itself. */
static bool read_variable(const char **text, char name[64]) {
    const char *p = *text + 1;
    bool braces = *p == '{';
    p += braces;
    size_t len = 0;
    while (is_name_char(*p, len == 0) && len < 63) {
        name[len++] = *p++;
    }
    name[len] = '\0';
    if (len == 0 || (braces && *p != '}')) {
        return false;
    }
    *text = p + braces;
    return true;
}

static ota_status expand(const csv_reader *reader, const char *text, char out[CSV_LINE_MAX]) {
    size_t len = 0;
    char name[64];
    while (*text != '\0') {
        const char *from = text;
        size_t count = 1;
        if (*text == '$' && read_variable(&text, name)) {
            from = reader->options->lookup != NULL ? reader->options->lookup(reader->options->user, name) : NULL;
            if (from == NULL) {
                return table_error(reader->error, reader->line_offset, "line %u: unknown variable $%s", reader->line,
                                   name);
            }
            count = strlen(from);
        } else {
            text++;
        }
        if (count >= CSV_LINE_MAX - len) {
            return table_error(reader->error, reader->line_offset, "line %u: longer than %d bytes", reader->line,
                               CSV_LINE_MAX - 1);
        }
        memcpy(out + len, from, count);
        len += count;
    }
    out[len] = '\0';
    return OTA_OK;
}

/* [-] digits or 0x digits, then K or M. Python's int(text, 0) without its rarer spellings. */
static bool read_number(const char *text, int64_t *out) {
    bool negative = *text == '-';
    text += negative;
    int base = 10;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        base = 16;
        text += 2;
    } else if (text[0] == '0' && isdigit((unsigned char)text[1])) {
        return false; /* 010 is octal to some, decimal to others */
    }
    uint64_t value = 0;
    bool any = false;
    for (; isxdigit((unsigned char)*text); text++) {
        int digit = isdigit((unsigned char)*text) ? *text - '0' : tolower((unsigned char)*text) - 'a' + 10;
        if (digit >= base) {
            return false;
        }
        value = value * (uint64_t)base + (uint64_t)digit;
        any = true;
        if (value > UINT32_MAX) {
            return false;
        }
    }
    if (*text != '\0') {
        int unit = tolower((unsigned char)*text);
        value *= unit == 'k' ? 1024u : unit == 'm' ? 1024u * 1024u : 0;
        if ((unit != 'k' && unit != 'm') || text[1] != '\0' || value > UINT32_MAX) {
            return false;
        }
    }
    *out = negative ? -(int64_t)value : (int64_t)value;
    return any;
}

/* A keyword in any case, or a number 0..254. */
static bool read_keyword(const char *text, const keyword *words, size_t count, int type, uint8_t *out) {
    char lower[32];
    size_t len = 0;
    for (; len < sizeof lower - 1 && text[len] != '\0'; len++) {
        lower[len] = (char)tolower((unsigned char)text[len]);
    }
    lower[len] = '\0';
    for (size_t i = 0; i < count; i++) {
        if (words[i].type == type && strcmp(words[i].name, lower) == 0) {
            *out = words[i].value;
            return true;
        }
    }
    int64_t number;
    if (type == OTA_ESP_PARTITION_APP && strncmp(lower, "ota_", 4) == 0 && isdigit((unsigned char)lower[4]) &&
        read_number(lower + 4, &number) && number < OTA_ESP_OTA_SLOTS_MAX) {
        *out = (uint8_t)(OTA_ESP_APP_OTA_0 + number);
        return true;
    }
    if (!read_number(text, &number) || number < 0 || number > 0xFE) {
        return false;
    }
    *out = (uint8_t)number;
    return true;
}

static ota_status read_flags(const csv_reader *reader, char *text, uint32_t *flags) {
    *flags = 0;
    while (text != NULL) {
        char *next = strchr(text, ':');
        if (next != NULL) {
            *next++ = '\0';
        }
        if (strcmp(text, "encrypted") == 0) {
            *flags |= OTA_ESP_PARTITION_ENCRYPTED;
        } else if (strcmp(text, "readonly") == 0) {
            *flags |= OTA_ESP_PARTITION_READONLY;
        } else if (*text != '\0') {
            return field_error(reader, FIELD_FLAGS, text, "is neither encrypted nor readonly");
        }
        text = next;
    }
    return OTA_OK;
}

/* Offset of a row whose place is not for the CSV to say; false: it is. */
static bool fixed_offset(const csv_reader *reader, const ota_esp_partition *row, uint32_t *offset) {
    if (row->type == OTA_ESP_PARTITION_PARTITION_TABLE && row->subtype == OTA_ESP_PRIMARY) {
        *offset = table_offset_of(reader->options);
        return true;
    }
    if (row->type == OTA_ESP_PARTITION_BOOTLOADER &&
        (row->subtype == OTA_ESP_PRIMARY || row->subtype == OTA_ESP_RECOVERY)) {
        *offset = row->subtype == OTA_ESP_PRIMARY ? reader->options->bootloader_offset
                                                  : reader->options->recovery_bootloader_offset;
        return true;
    }
    return false;
}

static ota_status read_offset(csv_reader *reader, const char *text, uint32_t index) {
    ota_esp_partition *row = &reader->table->rows[index];
    int64_t number = 0;
    reader->offset_given[index] = true;
    if (fixed_offset(reader, row, &row->offset)) {
        if (row->offset == OTA_ESP_UNSET) {
            return field_error(reader, FIELD_OFFSET, text,
                               "cannot be filled in: the boot loader's offset was not given");
        }
        return OTA_OK;
    }
    if (*text == '\0') {
        reader->offset_given[index] = false;
        return OTA_OK;
    }
    if (!read_number(text, &number) || number < 0) {
        return field_error(reader, FIELD_OFFSET, text, "is not an offset: decimal or 0x, with K or M");
    }
    row->offset = (uint32_t)number;
    return OTA_OK;
}

static ota_status read_size(csv_reader *reader, const char *text, uint32_t index) {
    const ota_esp_partition *row = &reader->table->rows[index];
    const ota_esp_csv_options *options = reader->options;
    if (row->type == OTA_ESP_PARTITION_BOOTLOADER) {
        if (options->bootloader_offset == OTA_ESP_UNSET || options->bootloader_offset >= table_offset_of(options)) {
            return field_error(reader, FIELD_SIZE, text, "cannot be filled in: the boot loader's offset was not given");
        }
        reader->sizes[index] = (int64_t)table_offset_of(options) - options->bootloader_offset;
        return OTA_OK;
    }
    if (row->type == OTA_ESP_PARTITION_PARTITION_TABLE) {
        reader->sizes[index] = OTA_ESP_PARTITION_TABLE_SECTOR;
        return OTA_OK;
    }
    if (*text == '\0') {
        return field_error(reader, FIELD_SIZE, text, "is empty");
    }
    if (!read_number(text, &reader->sizes[index])) {
        return field_error(reader, FIELD_SIZE, text, "is not a size: decimal or 0x, with K or M");
    }
    return OTA_OK;
}

static ota_status read_fields(csv_reader *reader, char *fields[FIELD_COUNT]) {
    ota_esp_partition_table *table = reader->table;
    if (table->count == OTA_ESP_PARTITION_ROWS_MAX - 2) {
        return table_error(reader->error, reader->line_offset, "line %u: a partition table has room for %d partitions",
                           reader->line, OTA_ESP_PARTITION_ROWS_MAX - 2);
    }
    uint32_t index = table->count;
    ota_esp_partition *row = &table->rows[index];
    memset(row, 0, sizeof *row);
    reader->origins[index] = (row_origin){.line = reader->line, .offset = reader->line_offset};
    size_t name_len = strlen(fields[FIELD_NAME]);
    if (name_len > LABEL_SIZE) {
        return field_error(reader, FIELD_NAME, fields[FIELD_NAME], "has more than 16 bytes");
    }
    memcpy(row->label, fields[FIELD_NAME], name_len);
    if (!read_keyword(fields[FIELD_TYPE], types, sizeof types / sizeof types[0], -1, &row->type)) {
        return field_error(reader, FIELD_TYPE, fields[FIELD_TYPE], "is not a partition type");
    }
    if (*fields[FIELD_SUBTYPE] == '\0' && row->type != OTA_ESP_PARTITION_APP) {
        row->subtype = OTA_ESP_DATA_UNDEFINED;
    } else if (!read_keyword(fields[FIELD_SUBTYPE], subtypes, sizeof subtypes / sizeof subtypes[0], row->type,
                             &row->subtype)) {
        return field_error(reader, FIELD_SUBTYPE, fields[FIELD_SUBTYPE], "is not a subtype of that type");
    }
    ota_status status = read_offset(reader, fields[FIELD_OFFSET], index);
    if (status == OTA_OK) {
        status = read_size(reader, fields[FIELD_SIZE], index);
    }
    if (status == OTA_OK) {
        status = read_flags(reader, fields[FIELD_FLAGS], &row->flags);
    }
    if (status == OTA_OK) {
        table->count++;
    }
    return status;
}

static ota_status read_line(csv_reader *reader, const char *raw) {
    char line[CSV_LINE_MAX];
    while (isspace((unsigned char)*raw)) {
        raw++;
    }
    if (*raw == '#' || *raw == '\0') {
        return OTA_OK;
    }
    ota_status status = expand(reader, raw, line);
    if (status < 0) {
        return status;
    }
    char empty[1] = "";
    char *fields[FIELD_COUNT] = {empty, empty, empty, empty, empty, empty};
    char *rest = trim(line);
    if (*rest == '#' || *rest == '\0') {
        return OTA_OK;
    }
    for (int i = 0; i < FIELD_COUNT && rest != NULL; i++) {
        char *comma = strchr(rest, ',');
        if (comma != NULL) {
            *comma++ = '\0';
        }
        fields[i] = trim(rest);
        rest = comma;
    }
    if (rest != NULL && rest[strspn(rest, ", \t")] != '\0') {
        return table_error(reader->error, reader->line_offset, "line %u: more than %d fields", reader->line,
                           FIELD_COUNT);
    }
    return read_fields(reader, fields);
}

/* Fills in the offsets left out and the sizes given by an end, in the order of the lines. */
static ota_status place(csv_reader *reader) {
    ota_esp_partition_table *table = reader->table;
    uint64_t end = (uint64_t)table_offset_of(reader->options) + OTA_ESP_PARTITION_TABLE_SECTOR;
    for (uint32_t i = 0; i < table->count; i++) {
        ota_esp_partition *row = &table->rows[i];
        char at[64];
        where(table, reader->origins, i, at);
        uint64_t at_line = reader->origins[i].offset;
        if (!is_primary(row)) {
            if (!reader->offset_given[i]) {
                uint64_t offset = ota_round_up(end, offset_alignment(row->type));
                if (offset > UINT32_MAX) {
                    return table_error(reader->error, at_line, "%s, offset: no room below 4 GiB", at);
                }
                row->offset = (uint32_t)offset;
            } else if (row->offset < end) {
                return table_error(reader->error, at_line,
                                   "%s, offset: 0x%" PRIx32 " is below 0x%" PRIx64 ", where what comes before it ends",
                                   at, row->offset, end);
            }
        }
        int64_t size = reader->sizes[i] < 0 ? -reader->sizes[i] - (int64_t)row->offset : reader->sizes[i];
        if (size < 0) {
            return table_error(reader->error, at_line,
                               "%s, size: it would end at 0x%" PRIx64 ", before its offset 0x%" PRIx32, at,
                               (uint64_t)-reader->sizes[i], row->offset);
        }
        row->size = (uint32_t)size;
        if (!is_primary(row)) {
            end = (uint64_t)row->offset + row->size;
        }
    }
    return OTA_OK;
}

ota_status ota_esp_partition_table_from_csv(const char *text, size_t len, const ota_esp_csv_options *options,
                                            ota_esp_partition_table *table, ota_error *error) {
    memset(table, 0, sizeof *table);
    csv_reader reader = {.options = options != NULL ? options : &default_options, .table = table, .error = error};
    size_t at = len >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0; /* a byte order mark */
    while (at < len) {
        size_t end = at;
        while (end < len && text[end] != '\n' && text[end] != '\r') {
            end++;
        }
        char line[CSV_LINE_MAX];
        reader.line++;
        reader.line_offset = at;
        if (end - at >= sizeof line) {
            return table_error(error, at, "line %u: longer than %d bytes", reader.line, CSV_LINE_MAX - 1);
        }
        if (memchr(text + at, '\0', end - at) != NULL) {
            return table_error(error, at, "line %u: a NUL byte", reader.line);
        }
        memcpy(line, text + at, end - at);
        line[end - at] = '\0';
        ota_status status = read_line(&reader, line);
        if (status < 0) {
            return status;
        }
        at = end + (end + 1 < len && text[end] == '\r' && text[end + 1] == '\n' ? 2 : 1);
    }
    if (table->count == 0) {
        return table_error(error, len, "the CSV names no partition");
    }
    table->has_md5 = true;
    ota_status status = place(&reader);
    return status < 0 ? status : check_table(table, reader.options, reader.origins, error);
}

/* ---- CSV out ----------------------------------------------------------------------------------------------------- */

typedef struct writer {
    char *out;
    size_t size, len; /* len: as if everything had fitted */
} writer;

static void put(writer *w, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void put(writer *w, const char *format, ...) {
    va_list args;
    va_start(args, format);
    size_t room = w->len < w->size ? w->size - w->len : 0;
    int len = vsnprintf(room > 0 ? w->out + w->len : NULL, room, format, args);
    va_end(args);
    w->len += len > 0 ? (size_t)len : 0;
}

static void put_size(writer *w, uint32_t size) {
    if (size % (1024 * 1024) == 0) {
        put(w, "%" PRIu32 "M", size / (1024 * 1024));
    } else if (size % 1024 == 0) {
        put(w, "%" PRIu32 "K", size / 1024);
    } else {
        put(w, "0x%" PRIx32, size);
    }
}

size_t ota_esp_partition_table_to_csv(const ota_esp_partition_table *table, char *out, size_t size) {
    writer w = {.out = out, .size = size};
    char type[24], subtype[24];
    put(&w, "# ESP-IDF Partition Table\n# Name, Type, SubType, Offset, Size, Flags\n");
    for (uint32_t i = 0; i < table->count; i++) {
        const ota_esp_partition *row = &table->rows[i];
        bool encrypted = (row->flags & OTA_ESP_PARTITION_ENCRYPTED) != 0;
        bool readonly = (row->flags & OTA_ESP_PARTITION_READONLY) != 0;
        put(&w, "%s,%s,%s,0x%" PRIx32 ",", row->label, ota_esp_partition_type_name(row->type, type),
            ota_esp_partition_subtype_name(row->type, row->subtype, subtype), row->offset);
        put_size(&w, row->size);
        put(&w, ",%s%s%s\n", encrypted ? "encrypted" : "", encrypted && readonly ? ":" : "",
            readonly ? "readonly" : "");
    }
    return w.len;
}

/* ---- Slots ------------------------------------------------------------------------------------------------------- */

/* Puts a row in its place, once. */
static ota_status take(const ota_esp_partition_table *table, uint32_t index, const ota_esp_partition **place,
                       ota_error *error) {
    const ota_esp_partition *row = &table->rows[index];
    char at[64], other[64];
    if (*place != NULL) {
        return table_error(error, position(NULL, index), "%s, subtype: the same as %s", where(table, NULL, index, at),
                           where(table, NULL, (uint32_t)(*place - table->rows), other));
    }
    if (row->offset % SECTOR != 0 || row->size == 0) {
        return table_error(error, position(NULL, index),
                           "%s, offset: 0x%" PRIx32 " is no place for an erasable partition",
                           where(table, NULL, index, at), row->offset);
    }
    *place = row;
    return OTA_OK;
}

/* The slots and otadata must not lie over each other: writing one would change the other. */
static ota_status check_overlaps(const ota_esp_partition_table *table, const ota_esp_layout *layout, ota_error *error) {
    const ota_esp_partition *used[OTA_ESP_OTA_SLOTS_MAX + 3] = {layout->otadata, layout->factory, layout->test};
    size_t count = sizeof used / sizeof used[0];
    memcpy(used + 3, layout->slots, sizeof layout->slots);
    for (size_t i = 0; i < count; i++) {
        for (size_t k = 0; k < i; k++) {
            if (used[i] != NULL && used[k] != NULL && overlap(used[i], used[k])) {
                char at[64], other[64];
                uint32_t index = (uint32_t)(used[i] - table->rows);
                return table_error(error, position(NULL, index), "%s, offset: it overlaps %s",
                                   where(table, NULL, index, at),
                                   where(table, NULL, (uint32_t)(used[k] - table->rows), other));
            }
        }
    }
    return OTA_OK;
}

ota_status ota_esp_layout_find(const ota_esp_partition_table *table, ota_esp_layout *layout, ota_error *error) {
    memset(layout, 0, sizeof *layout);
    uint32_t highest = 0; /* slot number + 1 */
    for (uint32_t i = 0; i < table->count; i++) {
        const ota_esp_partition *row = &table->rows[i];
        const ota_esp_partition **place = NULL;
        if (row->type == OTA_ESP_PARTITION_DATA && row->subtype == OTA_ESP_DATA_OTA) {
            place = &layout->otadata;
        } else if (row->type == OTA_ESP_PARTITION_APP && row->subtype == OTA_ESP_APP_FACTORY) {
            place = &layout->factory;
        } else if (row->type == OTA_ESP_PARTITION_APP && row->subtype == OTA_ESP_APP_TEST) {
            place = &layout->test;
        } else if (is_ota_subtype(row->type, row->subtype)) {
            uint32_t slot = row->subtype - OTA_ESP_APP_OTA_0;
            place = &layout->slots[slot];
            layout->slot_count++;
            highest = slot + 1 > highest ? slot + 1 : highest;
        }
        ota_status status = place != NULL ? take(table, i, place, error) : OTA_OK;
        if (status < 0) {
            return status;
        }
    }
    if (layout->slot_count == 0 && layout->factory == NULL && layout->test == NULL) {
        return table_error(error, 0, "the partition table has no app partition");
    }
    if (highest != layout->slot_count) {
        return table_error(error, 0, "the OTA slots of the partition table have a gap: %u of them, the last one ota_%u",
                           layout->slot_count, highest - 1);
    }
    if (layout->otadata != NULL && layout->otadata->size < OTADATA_SIZE) {
        return table_error(error, 0, "otadata has 0x%" PRIx32 " bytes, two sectors are needed", layout->otadata->size);
    }
    return check_overlaps(table, layout, error);
}
