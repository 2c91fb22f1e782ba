/* See esp_nvs_flash.h. Every change goes through `program` or nvs_erase_page, which change the copy and append the operation.
 *
 * Two things are done more carefully than firmware does them, with the same bytes at the end: the state of an item's head is
 * programmed alone, first when written and last when erased, so that a cut never leaves value entries alive behind a dead
 * head; and a page that was moved loses its header before it is erased, so that a torn erase never leaves a page that looks
 * like one still to be moved. */
#include "esp/esp_nvs_flash.h"

#include <assert.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

enum {
    ENTRIES = OTA_ESP_NVS_PAGE_ENTRIES,
    ENTRY_SIZE = OTA_ESP_NVS_ENTRY_SIZE,
    PAGE_SIZE = OTA_ESP_NVS_PAGE_SIZE,
};

/* Page states as they lie in flash: each next one clears one more bit. */
#define STATE_ACTIVE 0xFFFFFFFEu
#define STATE_FULL 0xFFFFFFFCu
#define STATE_FREEING 0xFFFFFFF8u
#define VERSION_2 0xFEu

/* ---- Encryption -------------------------------------------------------------------------------------------------- */

struct nvs_cipher {
    EVP_CIPHER_CTX *encrypt, *decrypt;
};

ota_status nvs_cipher_new(const ota_esp_nvs_keys *keys, nvs_cipher **out, ota_error *error) {
    nvs_cipher *cipher = calloc(1, sizeof *cipher);
    *out = NULL;
    if (cipher == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for the NVS cipher");
    }
    cipher->encrypt = EVP_CIPHER_CTX_new();
    cipher->decrypt = EVP_CIPHER_CTX_new();
    if (cipher->encrypt == NULL || cipher->decrypt == NULL ||
        EVP_EncryptInit_ex(cipher->encrypt, EVP_aes_256_xts(), NULL, keys->bytes, NULL) != 1 ||
        EVP_DecryptInit_ex(cipher->decrypt, EVP_aes_256_xts(), NULL, keys->bytes, NULL) != 1) {
        nvs_cipher_free(cipher); /* also when both halves of the key are the same, which libcrypto refuses */
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                             "libcrypto does not take the NVS key for AES-256-XTS");
    }
    *out = cipher;
    return OTA_OK;
}

void nvs_cipher_free(nvs_cipher *cipher) {
    if (cipher != NULL) {
        EVP_CIPHER_CTX_free(cipher->encrypt);
        EVP_CIPHER_CTX_free(cipher->decrypt);
        free(cipher);
    }
}

bool nvs_cipher_entry(nvs_cipher *cipher, bool encrypt, size_t offset, const uint8_t *in, uint8_t *out) {
    EVP_CIPHER_CTX *context = encrypt ? cipher->encrypt : cipher->decrypt;
    uint8_t tweak[16] = {0};
    int len = 0;
    ota_store_u32le(tweak, (uint32_t)offset);
    return EVP_CipherInit_ex(context, NULL, NULL, NULL, tweak, -1) == 1 &&
           EVP_CipherUpdate(context, out, &len, in, ENTRY_SIZE) == 1 && len == ENTRY_SIZE;
}

/* ---- Life -------------------------------------------------------------------------------------------------------- */

static void *copy_of(const void *data, size_t len) {
    void *copy = malloc(len ? len : 1);
    if (copy != NULL && len > 0) {
        memcpy(copy, data, len);
    }
    return copy;
}

ota_status nvs_flash_new(const uint8_t *data, size_t size, nvs_cipher *cipher, bool purge, nvs_flash **out,
                         ota_error *error) {
    nvs_flash *flash = calloc(1, sizeof *flash);
    *out = NULL;
    if (flash == NULL) {
        goto no_memory;
    }
    flash->size = size;
    flash->page_count = (uint32_t)(size / PAGE_SIZE);
    flash->cipher = cipher;
    flash->purge = purge;
    flash->raw = copy_of(data, size);
    flash->plain = cipher == NULL ? flash->raw : copy_of(data, size);
    flash->pages = calloc(flash->page_count, sizeof *flash->pages);
    flash->order = calloc(flash->page_count, sizeof *flash->order);
    flash->free = calloc(flash->page_count, sizeof *flash->free);
    if (!flash->raw || !flash->plain || !flash->pages || !flash->order || !flash->free) {
        goto no_memory;
    }
    *out = flash;
    return OTA_OK;

no_memory:
    nvs_flash_free(flash);
    return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0,
                         "no memory for an NVS partition of %zu bytes", size);
}

ota_status nvs_flash_clone(const nvs_flash *flash, nvs_flash **out, ota_error *error) {
    nvs_flash *clone = NULL;
    ota_status status = nvs_flash_new(flash->raw, flash->size, flash->cipher, flash->purge, &clone, error);
    *out = NULL;
    if (status < 0) {
        return status;
    }
    if (flash->plain != flash->raw) {
        memcpy(clone->plain, flash->plain, flash->size);
    }
    memcpy(clone->pages, flash->pages, flash->page_count * sizeof *flash->pages);
    memcpy(clone->order, flash->order, flash->page_count * sizeof *flash->order);
    memcpy(clone->free, flash->free, flash->page_count * sizeof *flash->free);
    clone->order_count = flash->order_count;
    clone->free_count = flash->free_count;
    clone->next_seq = flash->next_seq;
    clone->ops = copy_of(flash->ops, flash->op_count * sizeof *flash->ops);
    clone->op_data = copy_of(flash->op_data, flash->op_data_len);
    if (clone->ops == NULL || clone->op_data == NULL) {
        nvs_flash_free(clone);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for the NVS operations");
    }
    clone->op_count = clone->op_room = flash->op_count;
    clone->op_data_len = clone->op_data_room = flash->op_data_len;
    *out = clone;
    return OTA_OK;
}

void nvs_flash_free(nvs_flash *flash) {
    if (flash != NULL) {
        if (flash->plain != flash->raw) {
            free(flash->plain);
        }
        free(flash->raw);
        free(flash->pages);
        free(flash->order);
        free(flash->free);
        free(flash->ops);
        free(flash->op_data);
        free(flash);
    }
}

/* ---- Operations -------------------------------------------------------------------------------------------------- */

static bool reserve(void **array, size_t *room, size_t wanted, size_t unit) {
    if (wanted <= *room) {
        return true;
    }
    const size_t more = *room < 64 ? 64 : *room * 2;
    const size_t count = more < wanted ? wanted : more;
    void *grown = realloc(*array, count * unit);
    if (grown == NULL) {
        return false;
    }
    *array = grown;
    *room = count;
    return true;
}

static void append_op(nvs_flash *flash, ota_esp_nvs_op_kind kind, size_t offset, const uint8_t *data, size_t len) {
    const size_t data_len = kind == OTA_ESP_NVS_PROGRAM ? len : 0;
    if (!reserve((void **)&flash->ops, &flash->op_room, flash->op_count + 1, sizeof *flash->ops) ||
        !reserve((void **)&flash->op_data, &flash->op_data_room, flash->op_data_len + data_len, 1)) {
        flash->failed = OTA_ERR_NO_MEMORY;
        return;
    }
    flash->ops[flash->op_count++] = (nvs_op){.kind = kind, .offset = offset, .len = len, .data = flash->op_data_len};
    if (data_len > 0) {
        memcpy(flash->op_data + flash->op_data_len, data, data_len);
        flash->op_data_len += data_len;
    }
}

/* Bytes as they shall lie on the medium; only clears bits. */
static void program(nvs_flash *flash, size_t offset, const uint8_t *data, size_t len) {
    for (size_t i = 0; i < len; i++) {
        assert((flash->raw[offset + i] & data[i]) == data[i]);
        flash->raw[offset + i] = data[i];
    }
    append_op(flash, OTA_ESP_NVS_PROGRAM, offset, data, len);
}

/* `count` plain entries, encrypted one by one where there is a key. */
static void program_entries(nvs_flash *flash, nvs_place at, const uint8_t *entries, uint32_t count) {
    uint8_t cipher_text[ENTRIES * ENTRY_SIZE];
    const size_t offset = nvs_entry_offset(at), len = (size_t)count * ENTRY_SIZE;
    assert(at.entry + count <= ENTRIES);
    if (flash->cipher == NULL) {
        program(flash, offset, entries, len);
        return;
    }
    for (size_t i = 0; i < len; i += ENTRY_SIZE) {
        if (!nvs_cipher_entry(flash->cipher, true, offset + i, entries + i, cipher_text + i)) {
            flash->failed = OTA_ERR_UNSUPPORTED;
            return;
        }
    }
    memcpy(flash->plain + offset, entries, len);
    program(flash, offset, cipher_text, len);
}

void nvs_set_states(nvs_flash *flash, nvs_place at, uint32_t count, nvs_entry_state state) {
    const size_t table = nvs_page_offset(at.page) + NVS_STATE_TABLE;
    const uint32_t first = at.entry / 4, last = (at.entry + count - 1) / 4;
    assert(count > 0 && at.entry + count <= ENTRIES && (state == NVS_ENTRY_WRITTEN || state == NVS_ENTRY_ERASED));
    for (uint32_t index = first; index <= last; index++) {
        uint8_t byte = flash->raw[table + index];
        for (uint32_t entry = index * 4; entry < index * 4 + 4; entry++) {
            if (entry >= at.entry && entry < at.entry + count) {
                byte = (uint8_t)((byte & ~(3u << 2 * (entry % 4))) | (uint32_t)state << 2 * (entry % 4));
            }
        }
        if (byte != flash->raw[table + index]) {
            program(flash, table + index, &byte, 1);
        }
    }
}

void nvs_erase_entries(nvs_flash *flash, nvs_place at, uint32_t span) {
    if (span > 1) {
        nvs_set_states(flash, (nvs_place){at.page, at.entry + 1}, span - 1, NVS_ENTRY_ERASED);
    }
    nvs_set_states(flash, at, 1, NVS_ENTRY_ERASED);
    if (flash->purge) {
        static const uint8_t zeros[ENTRIES * ENTRY_SIZE];
        const size_t offset = nvs_entry_offset(at), len = (size_t)span * ENTRY_SIZE;
        program(flash, offset, zeros, len);
        memset(flash->plain + offset, 0, len);
    }
}

void nvs_erase_page(nvs_flash *flash, uint32_t page) {
    const size_t offset = nvs_page_offset(page);
    memset(flash->raw + offset, 0xFF, PAGE_SIZE);
    memset(flash->plain + offset, 0xFF, PAGE_SIZE);
    append_op(flash, OTA_ESP_NVS_ERASE, offset, NULL, PAGE_SIZE);
    flash->pages[page] = (nvs_page){.state = OTA_ESP_NVS_PAGE_EMPTY};
}

/* ---- Entries ----------------------------------------------------------------------------------------------------- */

bool nvs_blank(const uint8_t *data, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (data[i] != 0xFF) {
            return false;
        }
    }
    return true;
}

uint32_t nvs_head_crc(const uint8_t entry[ENTRY_SIZE]) {
    return ota_crc32(ota_crc32(0xFFFFFFFFu, entry, 4), entry + 8, ENTRY_SIZE - 8);
}

bool nvs_type_has_value_entries(uint8_t type) {
    return type == OTA_ESP_NVS_STRING || type == NVS_TYPE_BLOB_V1 || type == NVS_TYPE_BLOB_CHUNK;
}

static uint32_t value_entries(size_t len) {
    return (uint32_t)((len + ENTRY_SIZE - 1) / ENTRY_SIZE);
}

bool nvs_head_consistent(const nvs_flash *flash, nvs_place at) {
    const uint8_t *entry = flash->plain + nvs_entry_offset(at);
    const nvs_head head = nvs_head_of(flash, at);
    if (ota_load_u32le(entry + 4) != nvs_head_crc(entry) || head.span == 0 || at.entry + head.span > ENTRIES) {
        return false;
    }
    switch (head.type) {
    case OTA_ESP_NVS_U8:
    case OTA_ESP_NVS_I8:
    case OTA_ESP_NVS_U16:
    case OTA_ESP_NVS_I16:
    case OTA_ESP_NVS_U32:
    case OTA_ESP_NVS_I32:
    case OTA_ESP_NVS_U64:
    case OTA_ESP_NVS_I64:
    case OTA_ESP_NVS_FLOAT:
    case OTA_ESP_NVS_DOUBLE:
        return head.span == 1;
    case OTA_ESP_NVS_STRING:
    case NVS_TYPE_BLOB_V1:
    case NVS_TYPE_BLOB_CHUNK:
        return head.span == 1 + value_entries(ota_load_u16le(head.data));
    case NVS_TYPE_BLOB_INDEX:
        return head.span == 1 && head.chunk == NVS_CHUNK_NONE && head.data[4] >= 1 &&
               head.data[4] <= NVS_BLOB_CHUNKS_MAX && (head.data[5] == 0 || head.data[5] == 0x80);
    default:
        return true; /* not known: kept */
    }
}

/* ---- Pages ------------------------------------------------------------------------------------------------------- */

static void set_page_state(nvs_flash *flash, uint32_t page, ota_esp_nvs_page_state state) {
    uint8_t word[4];
    ota_store_u32le(word, state == OTA_ESP_NVS_PAGE_FULL ? STATE_FULL : STATE_FREEING);
    program(flash, nvs_page_offset(page), word, sizeof word);
    flash->pages[page].state = state;
    flash->pages[page].next_free = ENTRIES;
}

static void write_header(nvs_flash *flash, uint32_t page) {
    uint8_t header[32];
    memset(header, 0xFF, sizeof header);
    ota_store_u32le(header, STATE_ACTIVE);
    ota_store_u32le(header + 4, flash->pages[page].seq);
    header[8] = VERSION_2;
    ota_store_u32le(header + 28, ota_crc32(0xFFFFFFFFu, header + 4, 24));
    program(flash, nvs_page_offset(page), header, sizeof header);
    flash->pages[page].state = OTA_ESP_NVS_PAGE_ACTIVE;
    flash->pages[page].next_free = 0;
}

static uint32_t written_entries(const nvs_flash *flash, uint32_t page) {
    uint32_t count = 0;
    for (uint32_t entry = 0; entry < ENTRIES; entry++) {
        count += nvs_entry_state_of(flash, (nvs_place){page, entry}) == NVS_ENTRY_WRITTEN;
    }
    return count;
}

ota_status nvs_activate_page(nvs_flash *flash, ota_error *error) {
    if (flash->free_count == 0) {
        return ota_error_set(error, OTA_ERR_NVS_FULL, OTA_STAGE_TARGET, 0, OTA_ESP_NVS_ERR_NO_FREE_PAGES,
                             "the NVS partition has no free page");
    }
    if (flash->next_seq == UINT32_MAX) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, 0,
                             "the page numbers of the partition are used up");
    }
    const uint32_t page = flash->free[0];
    flash->free_count--;
    memmove(flash->free, flash->free + 1, flash->free_count * sizeof *flash->free);
    if (!nvs_blank(flash->raw + nvs_page_offset(page), PAGE_SIZE)) {
        nvs_erase_page(flash, page); /* it was corrupt */
    }
    flash->pages[page] = (nvs_page){.state = OTA_ESP_NVS_PAGE_EMPTY, .seq = flash->next_seq++};
    flash->order[flash->order_count++] = page;
    return OTA_OK;
}

/* Takes a page out of use. `position`: in `order`. */
static void retire_page(nvs_flash *flash, uint32_t position) {
    static const uint8_t no_header[32];
    const uint32_t page = flash->order[position];
    if (flash->pages[page].state != OTA_ESP_NVS_PAGE_EMPTY) {
        /* Corrupt from here on, in whatever order the bits of the erase come. */
        program(flash, nvs_page_offset(page), no_header, sizeof no_header);
        nvs_erase_page(flash, page);
    }
    flash->order_count--;
    memmove(flash->order + position, flash->order + position + 1,
            (flash->order_count - position) * sizeof *flash->order);
    flash->free[flash->free_count++] = page;
}

/* Writes entries to the newest page, heads and values as they are. */
static nvs_place append_entries(nvs_flash *flash, const uint8_t *entries, uint32_t span) {
    nvs_place at = {.page = flash->order[flash->order_count - 1]};
    if (flash->pages[at.page].state == OTA_ESP_NVS_PAGE_EMPTY) {
        write_header(flash, at.page);
    }
    at.entry = flash->pages[at.page].next_free;
    program_entries(flash, at, entries, 1);
    nvs_set_states(flash, at, 1, NVS_ENTRY_WRITTEN);
    if (span > 1) {
        const nvs_place value = {at.page, at.entry + 1};
        program_entries(flash, value, entries + ENTRY_SIZE, span - 1);
        nvs_set_states(flash, value, span - 1, NVS_ENTRY_WRITTEN);
    }
    flash->pages[at.page].next_free = (uint16_t)(at.entry + span);
    return at;
}

void nvs_move_items(nvs_flash *flash, uint32_t position) {
    uint8_t item[ENTRIES * ENTRY_SIZE];
    nvs_place at = {.page = flash->order[position]};
    while (nvs_next_item(flash, &at)) {
        const uint8_t span = nvs_head_of(flash, at).span;
        memcpy(item, flash->plain + nvs_entry_offset(at), (size_t)span * ENTRY_SIZE);
        append_entries(flash, item, span);
        at.entry += span;
    }
    retire_page(flash, position);
}

ota_status nvs_redo_freeing(nvs_flash *flash, uint32_t position, ota_error *error) {
    const uint32_t newest = flash->order_count - 1;
    if (flash->pages[flash->order[newest]].state == OTA_ESP_NVS_PAGE_ACTIVE) {
        retire_page(flash, newest); /* what was copied there is copied again */
    }
    const ota_status status = nvs_activate_page(flash, error);
    if (status == OTA_OK) {
        nvs_move_items(flash, position);
    }
    return status;
}

ota_status nvs_new_page(nvs_flash *flash, ota_error *error) {
    const uint32_t newest = flash->order[flash->order_count - 1];
    if (flash->pages[newest].state == OTA_ESP_NVS_PAGE_ACTIVE) {
        set_page_state(flash, newest, OTA_ESP_NVS_PAGE_FULL);
    }
    if (flash->free_count != 1) {
        return nvs_activate_page(flash, error);
    }
    uint32_t best = 0, gain = 0;
    for (uint32_t i = 0; i < flash->order_count; i++) {
        const uint32_t unused = ENTRIES - written_entries(flash, flash->order[i]);
        if (unused > gain) {
            best = i;
            gain = unused;
        }
    }
    if (gain == 0) {
        return ota_error_set(error, OTA_ERR_NVS_FULL, OTA_STAGE_TARGET, 0, 0,
                             "the NVS partition is full: no entry of its %u pages in use can be given back",
                             flash->order_count);
    }
    set_page_state(flash, flash->order[best], OTA_ESP_NVS_PAGE_FREEING);
    const ota_status status = nvs_activate_page(flash, error);
    if (status == OTA_OK) {
        nvs_move_items(flash, best);
    }
    return status;
}

void nvs_keep_blank_page(nvs_flash *flash) {
    for (uint32_t i = 0; i < flash->free_count; i++) {
        if (nvs_blank(flash->raw + nvs_page_offset(flash->free[i]), PAGE_SIZE)) {
            return;
        }
    }
    if (flash->free_count > 0) {
        nvs_erase_page(flash, flash->free[0]);
    }
}

static uint32_t free_entries(const nvs_flash *flash) {
    const nvs_page *page = &flash->pages[flash->order[flash->order_count - 1]];
    switch (page->state) {
    case OTA_ESP_NVS_PAGE_EMPTY:
        return ENTRIES;
    case OTA_ESP_NVS_PAGE_ACTIVE:
        return (uint32_t)ENTRIES - page->next_free;
    default:
        return 0;
    }
}

size_t nvs_chunk_room(const nvs_flash *flash) {
    const uint32_t entries = free_entries(flash);
    return entries > 1 ? (size_t)(entries - 1) * ENTRY_SIZE : 0;
}

ota_status nvs_write_item(nvs_flash *flash, uint8_t ns, uint8_t type, const char *key, uint8_t chunk,
                          const uint8_t *data, size_t len, nvs_place *where, ota_error *error) {
    const uint32_t span = nvs_type_has_value_entries(type) ? 1 + value_entries(len) : 1;
    assert(span <= ENTRIES);
    /* Firmware asks for one page; freeing may give too little the first time, so the others are freed in turn. */
    for (uint32_t turn = 0; free_entries(flash) < span; turn++) {
        if (turn > flash->page_count) {
            return ota_error_set(error, OTA_ERR_NVS_FULL, OTA_STAGE_TARGET, 0, 0,
                                 "the NVS partition is full: no page has %u entries free", span);
        }
        const ota_status status = nvs_new_page(flash, error);
        if (status < 0) {
            return status;
        }
    }
    uint8_t item[ENTRIES * ENTRY_SIZE];
    memset(item, 0xFF, sizeof item);
    item[0] = ns;
    item[1] = type;
    item[2] = (uint8_t)span;
    item[3] = chunk;
    memset(item + 8, 0, 16);
    memcpy(item + 8, key, strnlen(key, 16));
    if (nvs_type_has_value_entries(type)) {
        ota_store_u16le(item + 24, (uint16_t)len);
        ota_store_u32le(item + 28, ota_crc32(0xFFFFFFFFu, data, len));
        memcpy(item + ENTRY_SIZE, data, len);
    } else {
        memcpy(item + 24, data, 8);
    }
    ota_store_u32le(item + 4, nvs_head_crc(item));
    *where = append_entries(flash, item, span);
    return OTA_OK;
}
