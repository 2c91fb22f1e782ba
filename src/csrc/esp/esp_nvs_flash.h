/* The partition as flash: pages, entries, their states, and the list of operations that changes them. Internal to esp/.
 *
 * Invariants once esp_nvs.c has loaded it: every entry in state written on a page in use belongs to an item whose head has a
 * right CRC and whose entries are all written; behind `next_free` of the active page everything is 0xFF. */
#ifndef OTA_ESP_ESP_NVS_FLASH_H
#define OTA_ESP_ESP_NVS_FLASH_H

#include "base/bytes.h"
#include "esp/esp_nvs.h"

enum {
    NVS_STATE_TABLE = 32, /* offset in the page */
    NVS_FIRST_ENTRY = 64,
    NVS_TYPE_BLOB_V1 = 0x41,
    NVS_TYPE_BLOB_CHUNK = 0x42,
    NVS_TYPE_BLOB_INDEX = 0x48,
    NVS_CHUNK_NONE = 0xFF,
    NVS_BLOB_CHUNKS_MAX = 127,
};

typedef enum nvs_entry_state {
    NVS_ENTRY_ERASED = 0,
    NVS_ENTRY_ILLEGAL = 1, /* counts as erased */
    NVS_ENTRY_WRITTEN = 2,
    NVS_ENTRY_EMPTY = 3,
} nvs_entry_state;

/* The 32 bytes of an item's head, decoded. */
typedef struct nvs_head {
    uint8_t ns, type, span, chunk;
    const uint8_t *key;  /* 16 bytes, zero-padded */
    const uint8_t *data; /* 8 bytes */
} nvs_head;

typedef struct nvs_page {
    ota_esp_nvs_page_state state;
    uint32_t seq;
    uint16_t next_free; /* entries behind it are not looked at; ACTIVE: the first one to write to */
} nvs_page;

/* Where an item lies. */
typedef struct nvs_place {
    uint32_t page;
    uint32_t entry;
} nvs_place;

typedef struct nvs_op {
    ota_esp_nvs_op_kind kind;
    size_t offset, len, data; /* data: offset in op_data */
} nvs_op;

typedef struct nvs_cipher nvs_cipher;

typedef struct nvs_flash {
    uint8_t *raw;   /* as on the medium */
    uint8_t *plain; /* the same with entries decrypted; == raw without a key */
    size_t size;
    uint32_t page_count;
    nvs_page *pages;
    uint32_t *order; /* pages in use, oldest first */
    uint32_t order_count;
    uint32_t *free; /* the others, next one to use first */
    uint32_t free_count;
    uint32_t next_seq;
    nvs_cipher *cipher; /* borrowed; NULL: not encrypted */
    bool purge;
    nvs_op *ops;
    size_t op_count, op_room;
    uint8_t *op_data;
    size_t op_data_len, op_data_room;
    ota_status failed; /* ERR_NO_MEMORY or the cipher's; checked once, at the end of a change */
} nvs_flash;

ota_status nvs_cipher_new(const ota_esp_nvs_keys *keys, nvs_cipher **out, ota_error *error);
void nvs_cipher_free(nvs_cipher *cipher);
/* One entry, whose offset in the partition is its tweak. */
bool nvs_cipher_entry(nvs_cipher *cipher, bool encrypt, size_t offset, const uint8_t *in, uint8_t *out);

ota_status nvs_flash_new(const uint8_t *data, size_t size, nvs_cipher *cipher, bool purge, nvs_flash **out,
                         ota_error *error);
ota_status nvs_flash_clone(const nvs_flash *flash, nvs_flash **out, ota_error *error);
void nvs_flash_free(nvs_flash *flash);

static inline size_t nvs_page_offset(uint32_t page) {
    return (size_t)page * OTA_ESP_NVS_PAGE_SIZE;
}

static inline size_t nvs_entry_offset(nvs_place at) {
    return nvs_page_offset(at.page) + NVS_FIRST_ENTRY + (size_t)at.entry * OTA_ESP_NVS_ENTRY_SIZE;
}

static inline nvs_entry_state nvs_entry_state_of(const nvs_flash *flash, nvs_place at) {
    const uint8_t byte = flash->raw[nvs_page_offset(at.page) + NVS_STATE_TABLE + at.entry / 4];
    return (nvs_entry_state)(byte >> 2 * (at.entry % 4) & 3);
}

static inline nvs_head nvs_head_of(const nvs_flash *flash, nvs_place at) {
    const uint8_t *p = flash->plain + nvs_entry_offset(at);
    return (nvs_head){.ns = p[0], .type = p[1], .span = p[2], .chunk = p[3], .key = p + 8, .data = p + 24};
}

/* Moves to the item at `at` or the next one behind it on the page; false: there is none. The caller adds its span to go on. */
static inline bool nvs_next_item(const nvs_flash *flash, nvs_place *at) {
    while (at->entry < flash->pages[at->page].next_free && nvs_entry_state_of(flash, *at) != NVS_ENTRY_WRITTEN) {
        at->entry++;
    }
    return at->entry < flash->pages[at->page].next_free;
}

/* CRC of an entry's head, over all but the CRC itself. */
uint32_t nvs_head_crc(const uint8_t entry[OTA_ESP_NVS_ENTRY_SIZE]);
/* String, blob of format 1 or blob chunk: length and CRC in the head, value in the entries behind it. */
bool nvs_type_has_value_entries(uint8_t type);
/* The head's CRC is right and its length can be. */
bool nvs_head_consistent(const nvs_flash *flash, nvs_place at);
bool nvs_blank(const uint8_t *data, size_t len);

/* The steps a change is made of; each one appends its operations. */
void nvs_set_states(nvs_flash *flash, nvs_place at, uint32_t count, nvs_entry_state state);
/* Marks an item erased, its head last; `span` entries. */
void nvs_erase_entries(nvs_flash *flash, nvs_place at, uint32_t span);
void nvs_erase_page(nvs_flash *flash, uint32_t page);
/* Takes the next free page for `order`; its header is written with its first entry. ERR_NVS_FULL: none is free. */
ota_status nvs_activate_page(nvs_flash *flash, ota_error *error);
/* Ends the newest page and takes another one; when only one is free, the page with most to gain moves there and becomes the
 * free one. ERR_NVS_FULL: nothing to gain. */
ota_status nvs_new_page(nvs_flash *flash, ota_error *error);
/* Copies every item of a page in use to the newest one and erases the page. `position`: in `order`. */
void nvs_move_items(nvs_flash *flash, uint32_t position);
/* The same for a page a power cut left in state freeing: from the beginning, as firmware does. */
ota_status nvs_redo_freeing(nvs_flash *flash, uint32_t position, ota_error *error);
/* Sees to it that one free page is all 0xFF: firmware without one erases everything. */
void nvs_keep_blank_page(nvs_flash *flash);
/* Bytes of a blob chunk that fit into the newest page. */
size_t nvs_chunk_room(const nvs_flash *flash);
/* Appends one item to the newest page, or to another one when it does not fit. `data`: the 8 bytes of the head, or the value of `len` bytes for a
 * type that has value entries. */
ota_status nvs_write_item(nvs_flash *flash, uint8_t ns, uint8_t type, const char *key, uint8_t chunk,
                          const uint8_t *data, size_t len, nvs_place *where, ota_error *error);

#endif
