/* Opening a partition as firmware does at start, what is in it, and changing it. The flash side of it, entries and pages, is
 * esp_nvs_flash.c.
 *
 * Open, in this order (names of the steps are those of the functions):
 *     classify          pages by header; those in use by sequence number, the rest is free
 *     repair_page       half-written entries, damaged heads, items not wholly written; on the active page the later of two
 *                       items of one key stays
 *     repair_across     the last item of the newest page beats the same item on an older page
 *     redo freeing      a page that was being moved is moved again, from the beginning
 *     repair_blobs      duplicates nobody can reach, indexes whose chunks are missing, chunks without index */
#include "esp/esp_nvs.h"

#include <stdlib.h>
#include <string.h>

#include "esp/esp_nvs_flash.h"

enum {
    ENTRIES = OTA_ESP_NVS_PAGE_ENTRIES,
    ENTRY_SIZE = OTA_ESP_NVS_ENTRY_SIZE,
    PAGE_SIZE = OTA_ESP_NVS_PAGE_SIZE,
    KEY_SIZE = 16,
    NAMESPACES = 0, /* namespace index of the entries that define namespaces */
    NAMESPACE_MAX = 254,
    WRITABLE_PAGES = 3,
    SMALL_FIRST_CHUNK = OTA_ESP_NVS_CHUNK_MAX / 10, /* firmware takes a new page rather than begin a blob in less */
};

/* An item as the sorted table holds it: by name, then by age. */
typedef struct nvs_ref {
    uint8_t id[1 + KEY_SIZE + 2]; /* namespace, key, type, chunk index (0xFF but for chunks) */
    bool dead;
    uint32_t rank; /* position among all items, oldest page first */
    nvs_place at;
} nvs_ref;

/* What can be read: rebuilt after every change. Values lie in the flash copy, those of several chunks in `values`. */
typedef struct nvs_view {
    ota_esp_nvs_namespace *namespaces;
    size_t namespace_count;
    ota_esp_nvs_item *items;
    size_t item_count;
    uint8_t *values;
    size_t damaged; /* values whose CRC is wrong */
} nvs_view;

struct ota_esp_nvs {
    nvs_flash *flash;
    nvs_cipher *cipher;
    nvs_view view;
    ota_esp_nvs_page *found;
    size_t damaged_heads, good_heads;
    size_t repairs;
};

static ota_status no_memory(ota_error *error) {
    return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for the NVS partition");
}

ota_status ota_esp_nvs_keys_parse(const uint8_t *data, size_t len, ota_esp_nvs_keys *out, ota_error *error) {
    if (len < OTA_ESP_NVS_KEY_PARTITION_MIN) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, 0,
                             "an NVS key partition has at least %d bytes, this has %zu", OTA_ESP_NVS_KEY_PARTITION_MIN,
                             len);
    }
    if (nvs_blank(data, OTA_ESP_NVS_KEY_PARTITION_MIN)) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, 0,
                             "the NVS key partition is empty: firmware makes the keys at its first start");
    }
    const uint32_t found = ota_load_u32le(data + OTA_ESP_NVS_KEYS_SIZE);
    const uint32_t expected = ota_crc32(0xFFFFFFFFu, data, OTA_ESP_NVS_KEYS_SIZE);
    if (found != expected) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, OTA_ESP_NVS_KEYS_SIZE, 0,
                             "the CRC of the NVS keys is %08x, expected %08x: damaged, or covered by flash encryption",
                             found, expected);
    }
    memcpy(out->bytes, data, OTA_ESP_NVS_KEYS_SIZE);
    return OTA_OK;
}

/* ---- Table of items ---------------------------------------------------------------------------------------------- */

static int compare_refs(const void *left, const void *right) {
    const nvs_ref *a = left, *b = right;
    const int order = memcmp(a->id, b->id, sizeof a->id);
    return order ? order : (a->rank > b->rank) - (a->rank < b->rank);
}

static void make_id(uint8_t id[sizeof((nvs_ref *)0)->id], uint8_t ns, const uint8_t key[KEY_SIZE], uint8_t type,
                    uint8_t chunk) {
    id[0] = ns;
    memcpy(id + 1, key, KEY_SIZE);
    id[1 + KEY_SIZE] = type;
    id[2 + KEY_SIZE] = type == NVS_TYPE_BLOB_CHUNK ? chunk : NVS_CHUNK_NONE;
}

/* All items of the pages in use, sorted. NULL: no memory. */
static nvs_ref *make_table(const nvs_flash *flash, size_t *count) {
    size_t room = 1, made = 0;
    for (uint32_t i = 0; i < flash->order_count; i++) {
        room += flash->pages[flash->order[i]].next_free;
    }
    nvs_ref *table = calloc(room, sizeof *table);
    for (uint32_t i = 0; table != NULL && i < flash->order_count; i++) {
        nvs_place at = {.page = flash->order[i]};
        while (nvs_next_item(flash, &at)) {
            const nvs_head head = nvs_head_of(flash, at);
            nvs_ref *ref = &table[made++];
            make_id(ref->id, head.ns, head.key, head.type, head.chunk);
            ref->rank = (uint32_t)made;
            ref->at = at;
            at.entry += head.span;
        }
    }
    if (table != NULL) {
        qsort(table, made, sizeof *table, compare_refs);
    }
    *count = made;
    return table;
}

/* The item of that name, in a table where no two have the same; NULL: there is none, or it is dead. */
static nvs_ref *find_ref(nvs_ref *table, size_t count, uint8_t ns, const uint8_t key[KEY_SIZE], uint8_t type,
                         uint8_t chunk) {
    uint8_t id[sizeof table->id];
    make_id(id, ns, key, type, chunk);
    size_t low = 0, high = count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (memcmp(table[middle].id, id, sizeof id) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && !table[low].dead && memcmp(table[low].id, id, sizeof id) == 0 ? &table[low] : NULL;
}

/* ---- Open -------------------------------------------------------------------------------------------------------- */

static ota_status classify_page(ota_esp_nvs *nvs, uint32_t page, ota_error *error) {
    nvs_flash *flash = nvs->flash;
    const uint8_t *p = flash->raw + nvs_page_offset(page);
    const uint32_t state = ota_load_u32le(p);
    ota_esp_nvs_page found = {.state = OTA_ESP_NVS_PAGE_CORRUPT};
    if (state == 0xFFFFFFFFu) {
        if (nvs_blank(p, PAGE_SIZE)) {
            found.state = OTA_ESP_NVS_PAGE_EMPTY;
        }
    } else if (ota_load_u32le(p + 28) == ota_crc32(0xFFFFFFFFu, p + 4, 24)) {
        if (p[8] < 0xFE) {
            return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, nvs_page_offset(page) + 8,
                                 OTA_ESP_NVS_ERR_NEW_VERSION, "page %u has a newer NVS format (version byte 0x%02x)",
                                 page, p[8]);
        }
        found.state = state == 0xFFFFFFFEu   ? OTA_ESP_NVS_PAGE_ACTIVE
                      : state == 0xFFFFFFFCu ? OTA_ESP_NVS_PAGE_FULL
                      : state == 0xFFFFFFF8u ? OTA_ESP_NVS_PAGE_FREEING
                                             : OTA_ESP_NVS_PAGE_CORRUPT;
        if (found.state != OTA_ESP_NVS_PAGE_CORRUPT) {
            found.seq = ota_load_u32le(p + 4);
            found.version = p[8];
            for (uint32_t i = 0; i < ENTRIES; i++) {
                found.written += nvs_entry_state_of(flash, (nvs_place){page, i}) == NVS_ENTRY_WRITTEN;
            }
        }
    }
    nvs->found[page] = found;
    flash->pages[page] = (nvs_page){.state = found.state, .seq = found.seq};
    return OTA_OK;
}

typedef struct page_age {
    uint32_t seq, page;
} page_age;

static int compare_ages(const void *left, const void *right) {
    const page_age *a = left, *b = right;
    const uint32_t x = a->seq != b->seq ? a->seq : a->page, y = a->seq != b->seq ? b->seq : b->page;
    return (x > y) - (x < y);
}

static ota_status classify(ota_esp_nvs *nvs, ota_error *error) {
    nvs_flash *flash = nvs->flash;
    page_age *ages = calloc(flash->page_count, sizeof *ages);
    ota_status status = ages == NULL ? no_memory(error) : OTA_OK;
    for (uint32_t page = 0; status == OTA_OK && page < flash->page_count; page++) {
        status = classify_page(nvs, page, error);
        if (flash->pages[page].state == OTA_ESP_NVS_PAGE_EMPTY ||
            flash->pages[page].state == OTA_ESP_NVS_PAGE_CORRUPT) {
            flash->free[flash->free_count++] = page;
        } else {
            ages[flash->order_count++] = (page_age){flash->pages[page].seq, page};
        }
    }
    if (status == OTA_OK && flash->order_count > 0) {
        qsort(ages, flash->order_count, sizeof *ages, compare_ages);
        for (uint32_t i = 0; i < flash->order_count; i++) {
            flash->order[i] = ages[i].page;
        }
        const uint32_t last = ages[flash->order_count - 1].seq;
        flash->next_seq = last == UINT32_MAX ? last : last + 1;
    }
    free(ages);
    return status;
}

static void decrypt_page(nvs_flash *flash, uint32_t page) {
    for (nvs_place at = {.page = page}; at.entry < ENTRIES; at.entry++) {
        const size_t offset = nvs_entry_offset(at);
        if (nvs_entry_state_of(flash, at) == NVS_ENTRY_WRITTEN &&
            !nvs_cipher_entry(flash->cipher, false, offset, flash->raw + offset, flash->plain + offset)) {
            flash->failed = OTA_ERR_UNSUPPORTED;
        }
    }
}

/* Entries of the active page up to the last one that is not as an erase leaves it; those among them that were never marked
 * written were cut short and are marked erased. Firmware looks at the first four bytes of each only; a value may hold FF. */
static void end_half_written(nvs_flash *flash, uint32_t page) {
    nvs_place at = {.page = page, .entry = ENTRIES};
    while (at.entry > 0) {
        const nvs_place before = {page, at.entry - 1};
        if (nvs_entry_state_of(flash, before) != NVS_ENTRY_EMPTY ||
            !nvs_blank(flash->raw + nvs_entry_offset(before), ENTRY_SIZE)) {
            break;
        }
        at = before;
    }
    flash->pages[page].next_free = (uint16_t)at.entry;
    for (uint32_t i = 0; i < at.entry; i++) {
        if (nvs_entry_state_of(flash, (nvs_place){page, i}) == NVS_ENTRY_EMPTY) {
            nvs_erase_entries(flash, (nvs_place){page, i}, 1);
        }
    }
}

static bool same_key(nvs_head a, nvs_head b) {
    return a.ns == b.ns && a.chunk == b.chunk && memcmp(a.key, b.key, KEY_SIZE) == 0;
}

/* On the active page: the item at `later` replaced the one of the same key before it, whatever its type. */
static void drop_replaced(nvs_flash *flash, nvs_place later) {
    const nvs_head head = nvs_head_of(flash, later);
    nvs_place at = {.page = later.page};
    while (nvs_next_item(flash, &at) && at.entry < later.entry) {
        const nvs_head earlier = nvs_head_of(flash, at);
        if (same_key(earlier, head)) {
            nvs_erase_entries(flash, at, earlier.span);
        }
        at.entry += earlier.span;
    }
}

static void repair_page(ota_esp_nvs *nvs, uint32_t page) {
    nvs_flash *flash = nvs->flash;
    const bool active = flash->pages[page].state == OTA_ESP_NVS_PAGE_ACTIVE;
    if (active) {
        end_half_written(flash, page);
    } else {
        flash->pages[page].next_free = ENTRIES;
    }
    if (flash->cipher != NULL) {
        decrypt_page(flash, page);
    }
    nvs_place at = {.page = page};
    while (nvs_next_item(flash, &at)) {
        if (!nvs_head_consistent(flash, at)) {
            nvs->damaged_heads++;
            nvs_erase_entries(flash, at, 1);
            at.entry++;
            continue;
        }
        const uint8_t span = nvs_head_of(flash, at).span;
        nvs->good_heads++;
        bool whole = true;
        for (uint32_t i = 1; i < span; i++) {
            whole = whole && nvs_entry_state_of(flash, (nvs_place){page, at.entry + i}) == NVS_ENTRY_WRITTEN;
        }
        if (!whole) {
            nvs_erase_entries(flash, at, span);
            if (at.entry + span > flash->pages[page].next_free) {
                flash->pages[page].next_free = (uint16_t)(at.entry + span); /* its other entries were never begun */
            }
        } else if (active) {
            drop_replaced(flash, at);
        }
        at.entry += span;
    }
}

static void repair_across(nvs_flash *flash) {
    const uint32_t newest = flash->order_count - 1;
    nvs_place at = {.page = flash->order[newest]}, last = at;
    bool any = false;
    while (nvs_next_item(flash, &at)) {
        last = at;
        any = true;
        at.entry += nvs_head_of(flash, at).span;
    }
    for (uint32_t i = 0; any && i < newest; i++) {
        if (flash->pages[flash->order[i]].state == OTA_ESP_NVS_PAGE_FREEING) {
            continue;
        }
        const nvs_head head = nvs_head_of(flash, last);
        at = (nvs_place){.page = flash->order[i]};
        while (nvs_next_item(flash, &at)) {
            const nvs_head older = nvs_head_of(flash, at);
            const bool replaced =
                older.type == head.type || (head.type == NVS_TYPE_BLOB_INDEX && older.type == NVS_TYPE_BLOB_V1);
            if (replaced && same_key(older, head)) {
                nvs_erase_entries(flash, at, older.span);
                return;
            }
            at.entry += older.span;
        }
    }
}

/* The chunks an index names are all there and have its length together. */
static bool blob_is_whole(const nvs_flash *flash, nvs_ref *table, size_t count, nvs_head index) {
    uint64_t len = 0;
    for (uint32_t i = 0; i < index.data[4]; i++) {
        const nvs_ref *chunk =
            find_ref(table, count, index.ns, index.key, NVS_TYPE_BLOB_CHUNK, (uint8_t)(index.data[5] + i));
        if (chunk == NULL) {
            return false;
        }
        len += ota_load_u16le(nvs_head_of(flash, chunk->at).data);
    }
    return len == ota_load_u32le(index.data);
}

static void drop_ref(nvs_flash *flash, nvs_ref *ref) {
    nvs_erase_entries(flash, ref->at, nvs_head_of(flash, ref->at).span);
    ref->dead = true;
}

static ota_status repair_blobs(nvs_flash *flash, ota_error *error) {
    size_t count = 0;
    nvs_ref *table = make_table(flash, &count);
    if (table == NULL) {
        return no_memory(error);
    }
    size_t unique = 0;
    for (size_t i = 0; i < count; i++) {
        if (unique > 0 && memcmp(table[i].id, table[unique - 1].id, sizeof table[i].id) == 0) {
            drop_ref(flash, &table[i]); /* firmware finds the older one; after a cut those two were told apart above */
        } else {
            table[unique++] = table[i];
        }
    }
    count = unique;
    for (size_t i = 0; i < count; i++) {
        if (!table[i].dead && table[i].id[1 + KEY_SIZE] == NVS_TYPE_BLOB_INDEX &&
            !blob_is_whole(flash, table, count, nvs_head_of(flash, table[i].at))) {
            drop_ref(flash, &table[i]);
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (table[i].dead || table[i].id[1 + KEY_SIZE] != NVS_TYPE_BLOB_CHUNK) {
            continue;
        }
        const nvs_head chunk = nvs_head_of(flash, table[i].at);
        const nvs_ref *ref = find_ref(table, count, chunk.ns, chunk.key, NVS_TYPE_BLOB_INDEX, NVS_CHUNK_NONE);
        const nvs_head index = ref ? nvs_head_of(flash, ref->at) : (nvs_head){0};
        if (ref == NULL || chunk.chunk < index.data[5] || chunk.chunk - index.data[5] >= index.data[4]) {
            drop_ref(flash, &table[i]);
        }
    }
    free(table);
    return OTA_OK;
}

static ota_status load(ota_esp_nvs *nvs, ota_error *error) {
    nvs_flash *flash = nvs->flash;
    ota_status status = classify(nvs, error);
    if (status < 0) {
        return status;
    }
    for (uint32_t i = 0; i < flash->order_count; i++) {
        repair_page(nvs, flash->order[i]);
    }
    if (flash->order_count > 0) {
        repair_across(flash);
    }
    for (uint32_t i = 0; i < flash->order_count; i++) {
        if (flash->pages[flash->order[i]].state == OTA_ESP_NVS_PAGE_FREEING) {
            const uint32_t newest = flash->order[flash->order_count - 1];
            const bool possible = (flash->free_count > 0 || flash->pages[newest].state == OTA_ESP_NVS_PAGE_ACTIVE) &&
                                  flash->next_seq != UINT32_MAX;
            status = possible ? nvs_redo_freeing(flash, i, error) : OTA_OK;
            break;
        }
    }
    if (status == OTA_OK) {
        status = repair_blobs(flash, error);
    }
    nvs->repairs = flash->op_count;
    return status;
}

/* ---- What can be read -------------------------------------------------------------------------------------------- */

static void free_view(nvs_view *view) {
    free(view->namespaces);
    free(view->items);
    free(view->values);
    *view = (nvs_view){0};
}

/* Bytes of a value that has entries of its own; false: its CRC is wrong. */
static bool value_bytes(const nvs_flash *flash, nvs_place at, const uint8_t **value, size_t *len) {
    const nvs_head head = nvs_head_of(flash, at);
    *value = head.data + 8; /* the next entry */
    *len = ota_load_u16le(head.data);
    return ota_crc32(0xFFFFFFFFu, *value, *len) == ota_load_u32le(head.data + 4);
}

/* Joins the chunks of a blob, at `*used` of `values` when there are several. */
static bool join_blob(const nvs_flash *flash, nvs_ref *table, size_t count, nvs_head index, nvs_view *view,
                      size_t *used, ota_esp_nvs_item *item) {
    const size_t start = *used;
    for (uint32_t i = 0; i < index.data[4]; i++) {
        const nvs_ref *chunk =
            find_ref(table, count, index.ns, index.key, NVS_TYPE_BLOB_CHUNK, (uint8_t)(index.data[5] + i));
        if (chunk == NULL || !value_bytes(flash, chunk->at, &item->value, &item->len)) {
            *used = start;
            return false;
        }
        if (index.data[4] > 1) {
            memcpy(view->values + *used, item->value, item->len);
            *used += item->len;
        }
    }
    if (index.data[4] > 1) {
        item->value = view->values + start;
        item->len = *used - start;
    }
    return true;
}

static size_t number_size(uint8_t type) {
    switch (type) {
    case OTA_ESP_NVS_U8:
    case OTA_ESP_NVS_I8:
        return 1;
    case OTA_ESP_NVS_U16:
    case OTA_ESP_NVS_I16:
        return 2;
    case OTA_ESP_NVS_U32:
    case OTA_ESP_NVS_I32:
    case OTA_ESP_NVS_FLOAT:
        return 4;
    case OTA_ESP_NVS_U64:
    case OTA_ESP_NVS_I64:
    case OTA_ESP_NVS_DOUBLE:
        return 8;
    default:
        return 0;
    }
}

/* Fills in type and value; false: nothing to list, or damaged. */
static bool read_value(const nvs_flash *flash, nvs_ref *table, size_t count, nvs_place at, nvs_view *view, size_t *used,
                       ota_esp_nvs_item *item) {
    const nvs_head head = nvs_head_of(flash, at);
    item->type = head.type;
    item->value = head.data;
    switch (head.type) {
    case NVS_TYPE_BLOB_CHUNK:
        return false;
    case NVS_TYPE_BLOB_INDEX:
        item->type = OTA_ESP_NVS_BLOB;
        if (!join_blob(flash, table, count, head, view, used, item)) {
            view->damaged++;
            return false;
        }
        return true;
    case NVS_TYPE_BLOB_V1:
        if (find_ref(table, count, head.ns, head.key, NVS_TYPE_BLOB_INDEX, NVS_CHUNK_NONE) != NULL) {
            return false; /* firmware looks for the index first */
        }
        item->type = OTA_ESP_NVS_BLOB;
        break;
    case OTA_ESP_NVS_STRING:
        break;
    default:
        item->len = number_size(head.type);
        if (item->len == 0) {
            item->len = 8 + (size_t)(head.span - 1) * ENTRY_SIZE;
        }
        return true;
    }
    if (!value_bytes(flash, at, &item->value, &item->len)) {
        view->damaged++;
        return false;
    }
    if (head.type == OTA_ESP_NVS_STRING && item->len > 0 && item->value[item->len - 1] == 0) {
        item->len--;
    }
    return true;
}

static ota_status make_view(const nvs_flash *flash, nvs_view *out, ota_error *error) {
    nvs_view view = {0};
    size_t count = 0, namespaces = 0, joined = 0, used = 0;
    const char *names[256] = {NULL};
    nvs_ref *table = make_table(flash, &count);
    if (table == NULL) {
        goto fail;
    }
    for (size_t i = 0; i < count; i++) {
        const nvs_head head = nvs_head_of(flash, table[i].at);
        namespaces += head.ns == NAMESPACES;
        joined += head.type == NVS_TYPE_BLOB_CHUNK ? ota_load_u16le(head.data) : 0;
    }
    view.namespaces = calloc(namespaces + 1, sizeof *view.namespaces);
    view.items = calloc(count + 1, sizeof *view.items);
    view.values = malloc(joined + 1);
    if (!view.namespaces || !view.items || !view.values) {
        goto fail;
    }
    for (int pass = 0; pass < 2; pass++) { /* namespaces first: they may be defined behind their items */
        for (uint32_t i = 0; i < flash->order_count; i++) {
            nvs_place at = {.page = flash->order[i]};
            for (; nvs_next_item(flash, &at); at.entry += nvs_head_of(flash, at).span) {
                const nvs_head head = nvs_head_of(flash, at);
                if (pass == 0 && head.ns == NAMESPACES && head.type == OTA_ESP_NVS_U8 && head.data[0] >= 1 &&
                    head.data[0] <= NAMESPACE_MAX) {
                    ota_esp_nvs_namespace *ns = &view.namespaces[view.namespace_count++];
                    ns->index = head.data[0];
                    memcpy(ns->name, head.key, KEY_SIZE);
                    names[ns->index] = names[ns->index] ? names[ns->index] : ns->name;
                } else if (pass == 1 && head.ns != NAMESPACES) {
                    ota_esp_nvs_item *item = &view.items[view.item_count];
                    *item = (ota_esp_nvs_item){.namespace_name = names[head.ns], .namespace_index = head.ns};
                    memcpy(item->key, head.key, KEY_SIZE);
                    view.item_count += read_value(flash, table, count, at, &view, &used, item);
                }
            }
        }
    }
    free(table);
    *out = view;
    return OTA_OK;

fail:
    free(table);
    free_view(&view);
    return no_memory(error);
}

ota_status ota_esp_nvs_open(const uint8_t *data, size_t size, const ota_esp_nvs_options *options, ota_esp_nvs **out,
                            ota_error *error) {
    const ota_esp_nvs_options none = {0};
    options = options ? options : &none;
    *out = NULL;
    if (size == 0 || size % PAGE_SIZE != 0 || size > OTA_ESP_NVS_PARTITION_MAX) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                             "an NVS partition is a number of %d-byte pages, at most %d bytes; this has %zu", PAGE_SIZE,
                             OTA_ESP_NVS_PARTITION_MAX, size);
    }
    ota_status status = OTA_OK;
    ota_esp_nvs *nvs = calloc(1, sizeof *nvs);
    if (nvs == NULL) {
        return no_memory(error);
    }
    nvs->found = calloc(size / PAGE_SIZE, sizeof *nvs->found);
    if (nvs->found == NULL) {
        status = no_memory(error);
    }
    if (status == OTA_OK && options->keys != NULL) {
        status = nvs_cipher_new(options->keys, &nvs->cipher, error);
    }
    if (status == OTA_OK) {
        status = nvs_flash_new(data, size, nvs->cipher, options->purge, &nvs->flash, error);
    }
    if (status == OTA_OK) {
        status = load(nvs, error);
    }
    if (status == OTA_OK && nvs->flash->failed < 0) {
        status =
            ota_error_set(error, nvs->flash->failed, OTA_STAGE_TARGET, 0, 0, "the NVS partition could not be read");
    }
    if (status == OTA_OK) {
        status = make_view(nvs->flash, &nvs->view, error);
    }
    if (status < 0) {
        ota_esp_nvs_free(&nvs);
        return status;
    }
    *out = nvs;
    return OTA_OK;
}

void ota_esp_nvs_free(ota_esp_nvs **nvs) {
    if (*nvs != NULL) {
        free_view(&(*nvs)->view);
        nvs_flash_free((*nvs)->flash);
        nvs_cipher_free((*nvs)->cipher);
        free((*nvs)->found);
        free(*nvs);
        *nvs = NULL;
    }
}

size_t ota_esp_nvs_page_count(const ota_esp_nvs *nvs) {
    return nvs->flash->page_count;
}

ota_esp_nvs_page ota_esp_nvs_page_at(const ota_esp_nvs *nvs, size_t index) {
    return nvs->found[index];
}

size_t ota_esp_nvs_namespace_count(const ota_esp_nvs *nvs) {
    return nvs->view.namespace_count;
}

ota_esp_nvs_namespace ota_esp_nvs_namespace_at(const ota_esp_nvs *nvs, size_t index) {
    return nvs->view.namespaces[index];
}

size_t ota_esp_nvs_item_count(const ota_esp_nvs *nvs) {
    return nvs->view.item_count;
}

ota_esp_nvs_item ota_esp_nvs_item_at(const ota_esp_nvs *nvs, size_t index) {
    return nvs->view.items[index];
}

size_t ota_esp_nvs_damaged(const ota_esp_nvs *nvs) {
    return nvs->damaged_heads + nvs->view.damaged;
}

/* The index of a namespace: that of the first entry of the name, as firmware finds it; 0: there is none. */
static uint8_t namespace_index(const nvs_view *view, const char *name) {
    for (size_t i = 0; i < view->namespace_count; i++) {
        if (strcmp(view->namespaces[i].name, name) == 0) {
            return view->namespaces[i].index;
        }
    }
    return 0;
}

/* Position of an item; item_count: there is none. */
static size_t find_item(const nvs_view *view, uint8_t ns, const char *key, uint8_t type) {
    size_t i = 0;
    while (i < view->item_count &&
           (ns == 0 || view->items[i].namespace_index != ns || strcmp(view->items[i].key, key) != 0 ||
            (type != OTA_ESP_NVS_ANY && view->items[i].type != type))) {
        i++;
    }
    return i;
}

static ota_status not_found(ota_error *error, const char *namespace_name, const char *key) {
    return ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, 0, "NVS has no %.40s in namespace %.40s",
                         key ? key : "key", namespace_name);
}

ota_status ota_esp_nvs_get(const ota_esp_nvs *nvs, const char *namespace_name, const char *key, uint8_t type,
                           ota_esp_nvs_item *out, ota_error *error) {
    const size_t i = find_item(&nvs->view, namespace_index(&nvs->view, namespace_name), key, type);
    if (i == nvs->view.item_count) {
        return not_found(error, namespace_name, key);
    }
    *out = nvs->view.items[i];
    return OTA_OK;
}

/* ---- Changes: on a clone, which takes the place of the partition when all went well ------------------------------- */

static ota_status check_name(const char *name, const char *what, ota_error *error) {
    const size_t len = strlen(name);
    if (len == 0 || len > OTA_ESP_NVS_NAME_MAX) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                             "an NVS %s has 1 to %d bytes, \"%.60s\" has %zu", what, OTA_ESP_NVS_NAME_MAX, name, len);
    }
    return OTA_OK;
}

static ota_status check_value(const nvs_flash *flash, uint8_t type, const uint8_t *value, size_t len,
                              ota_error *error) {
    if (type == OTA_ESP_NVS_STRING) {
        if (len > OTA_ESP_NVS_STRING_MAX || (len > 0 && memchr(value, 0, len) != NULL)) {
            return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                                 "an NVS string has at most %d bytes and no NUL, this has %zu bytes",
                                 OTA_ESP_NVS_STRING_MAX, len);
        }
        return OTA_OK;
    }
    if (type == OTA_ESP_NVS_BLOB) {
        size_t pages = flash->page_count - 1;
        pages = pages < NVS_BLOB_CHUNKS_MAX ? pages : NVS_BLOB_CHUNKS_MAX;
        if (len > pages * OTA_ESP_NVS_CHUNK_MAX) {
            return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                                 "a blob in an NVS partition of %u pages has at most %zu bytes, this has %zu",
                                 flash->page_count, pages * OTA_ESP_NVS_CHUNK_MAX, len);
        }
        return OTA_OK;
    }
    if (number_size(type) == 0) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TARGET, 0, 0, "NVS type 0x%02x cannot be written",
                             type);
    }
    if (number_size(type) != len) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                             "an NVS number of type 0x%02x has %zu bytes, not %zu", type, number_size(type), len);
    }
    return OTA_OK;
}

static ota_status check_writable(const ota_esp_nvs *nvs, ota_error *error) {
    if (nvs->flash->page_count < WRITABLE_PAGES) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, 0,
                             "an NVS partition that is written to has at least %d pages, this has %u", WRITABLE_PAGES,
                             nvs->flash->page_count);
    }
    if (nvs->good_heads == 0 && nvs->damaged_heads > 0) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, 0,
                             "none of the %zu items in the NVS partition can be read: the key is missing or wrong",
                             nvs->damaged_heads);
    }
    if (nvs->flash->free_count == 0) {
        return ota_error_set(error, OTA_ERR_NVS, OTA_STAGE_TARGET, 0, OTA_ESP_NVS_ERR_NO_FREE_PAGES,
                             "the NVS partition has no free page left; firmware would erase all of it");
    }
    return OTA_OK;
}

static ota_status write_blob(nvs_flash *flash, uint8_t ns, const char *key, uint8_t start, const uint8_t *value,
                             size_t len, uint8_t *chunks, nvs_place *where, ota_error *error) {
    size_t done = 0;
    uint32_t turns = 0;
    *chunks = 0;
    do {
        const size_t room = nvs_chunk_room(flash);
        const bool too_small =
            room == 0 || (*chunks == 0 && room < len && room < SMALL_FIRST_CHUNK && turns <= flash->page_count);
        if (too_small || *chunks == NVS_BLOB_CHUNKS_MAX) {
            if (turns++ > flash->page_count || *chunks == NVS_BLOB_CHUNKS_MAX) {
                return ota_error_set(error, OTA_ERR_NVS_FULL, OTA_STAGE_TARGET, 0, 0,
                                     "the NVS partition is full: no room for a blob of %zu bytes", len);
            }
            const ota_status status = nvs_new_page(flash, error);
            if (status < 0) {
                return status;
            }
            continue;
        }
        const size_t chunk = len - done < room ? len - done : room;
        const ota_status status = nvs_write_item(flash, ns, NVS_TYPE_BLOB_CHUNK, key, (uint8_t)(start + *chunks),
                                                 value + done, chunk, where, error);
        if (status < 0) {
            return status;
        }
        turns = 0;
        done += chunk;
        ++*chunks;
    } while (done < len || *chunks == 0);
    uint8_t index[8] = {0, 0, 0, 0, *chunks, start, 0xFF, 0xFF};
    ota_store_u32le(index, (uint32_t)len);
    return nvs_write_item(flash, ns, NVS_TYPE_BLOB_INDEX, key, NVS_CHUNK_NONE, index, 0, where, error);
}

/* What a change leaves alone: the item at `at`, and of the same key the chunks [start, start + count). */
typedef struct nvs_kept {
    bool any;
    nvs_place at;
    uint8_t start, count;
} nvs_kept;

/* Erases the items of a key (NULL: of the namespace), heads of blobs before their chunks. Returns how many there were. */
static size_t erase_items(nvs_flash *flash, uint8_t ns, const char *key, nvs_kept kept) {
    uint8_t padded[KEY_SIZE] = {0};
    size_t erased = 0;
    memcpy(padded, key ? key : "", key ? strnlen(key, KEY_SIZE) : 0);
    for (int chunks = 0; chunks < 2; chunks++) {
        for (uint32_t i = 0; i < flash->order_count; i++) {
            nvs_place at = {.page = flash->order[i]};
            while (nvs_next_item(flash, &at)) {
                const nvs_head head = nvs_head_of(flash, at);
                const nvs_place here = at;
                at.entry += head.span;
                if (head.ns != ns || (head.type == NVS_TYPE_BLOB_CHUNK) != chunks ||
                    (key != NULL && memcmp(head.key, padded, KEY_SIZE) != 0)) {
                    continue;
                }
                if (kept.any && (chunks ? (uint8_t)(head.chunk - kept.start) < kept.count
                                        : here.page == kept.at.page && here.entry == kept.at.entry)) {
                    continue;
                }
                nvs_erase_entries(flash, here, head.span);
                erased++;
            }
        }
    }
    return erased;
}

/* The lowest index no namespace and no item has; 0: none. */
static uint8_t free_namespace_index(const nvs_flash *flash) {
    bool taken[256] = {[0] = true, [255] = true};
    for (uint32_t i = 0; i < flash->order_count; i++) {
        nvs_place at = {.page = flash->order[i]};
        for (; nvs_next_item(flash, &at); at.entry += nvs_head_of(flash, at).span) {
            const nvs_head head = nvs_head_of(flash, at);
            taken[head.ns == NAMESPACES ? head.data[0] : head.ns] = true;
        }
    }
    uint8_t index = 1;
    while (index != 0 && taken[index]) {
        index++;
    }
    return index;
}

static ota_status write_value(const nvs_view *view, nvs_flash *flash, const char *namespace_name, const char *key,
                              uint8_t type, const uint8_t *value, size_t len, ota_error *error) {
    nvs_kept kept = {.any = true};
    uint8_t ns = namespace_index(view, namespace_name);
    ota_status status = flash->order_count == 0 ? nvs_activate_page(flash, error) : OTA_OK;
    if (status == OTA_OK && ns == 0) {
        ns = free_namespace_index(flash);
        if (ns == 0) {
            return ota_error_set(error, OTA_ERR_NVS_FULL, OTA_STAGE_TARGET, 0, 0, "all 254 NVS namespaces are taken");
        }
        const uint8_t data[8] = {ns, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
        status =
            nvs_write_item(flash, NAMESPACES, OTA_ESP_NVS_U8, namespace_name, NVS_CHUNK_NONE, data, 0, &kept.at, error);
    }
    if (status < 0) {
        return status;
    }
    if (type == OTA_ESP_NVS_BLOB) {
        uint8_t padded[KEY_SIZE] = {0};
        size_t count = 0;
        memcpy(padded, key, strlen(key));
        nvs_ref *table = make_table(flash, &count);
        if (table == NULL) {
            return no_memory(error);
        }
        const nvs_ref *old = find_ref(table, count, ns, padded, NVS_TYPE_BLOB_INDEX, NVS_CHUNK_NONE);
        kept.start = old != NULL && nvs_head_of(flash, old->at).data[5] == 0 ? 0x80 : 0;
        free(table);
        status = write_blob(flash, ns, key, kept.start, value, len, &kept.count, &kept.at, error);
    } else if (type == OTA_ESP_NVS_STRING) {
        uint8_t text[OTA_ESP_NVS_STRING_MAX + 1] = {0};
        memcpy(text, value, len);
        status = nvs_write_item(flash, ns, type, key, NVS_CHUNK_NONE, text, len + 1, &kept.at, error);
    } else {
        uint8_t data[8];
        memset(data, 0xFF, sizeof data);
        memcpy(data, value, len);
        status = nvs_write_item(flash, ns, type, key, NVS_CHUNK_NONE, data, 0, &kept.at, error);
    }
    if (status == OTA_OK) {
        erase_items(flash, ns, key, kept);
    }
    return status;
}

/* Takes `flash` over when it is sound. */
static ota_status finish_change(ota_esp_nvs *nvs, nvs_flash *flash, ota_status status, ota_error *error) {
    nvs_view view = {0};
    if (status == OTA_OK) {
        nvs_keep_blank_page(flash);
        if (flash->failed < 0) {
            status = ota_error_set(error, flash->failed, OTA_STAGE_TARGET, 0, 0, "the NVS change could not be made");
        }
    }
    if (status == OTA_OK) {
        status = make_view(flash, &view, error);
    }
    if (status < 0) {
        nvs_flash_free(flash);
        return status;
    }
    nvs_flash_free(nvs->flash);
    free_view(&nvs->view);
    nvs->flash = flash;
    nvs->view = view;
    return OTA_OK;
}

ota_status ota_esp_nvs_set(ota_esp_nvs *nvs, const char *namespace_name, const char *key, uint8_t type,
                           const uint8_t *value, size_t len, ota_error *error) {
    static const uint8_t nothing[1];
    nvs_flash *flash = NULL;
    value = value ? value : nothing;
    ota_status status = check_name(namespace_name, "namespace", error);
    if (status == OTA_OK) {
        status = check_name(key, "key", error);
    }
    if (status == OTA_OK) {
        status = check_value(nvs->flash, type, value, len, error);
    }
    if (status == OTA_OK) {
        status = check_writable(nvs, error);
    }
    if (status < 0) {
        return status;
    }
    const size_t i = find_item(&nvs->view, namespace_index(&nvs->view, namespace_name), key, type);
    if (i < nvs->view.item_count && nvs->view.items[i].len == len &&
        memcmp(nvs->view.items[i].value, value, len) == 0) {
        return OTA_OK;
    }
    status = nvs_flash_clone(nvs->flash, &flash, error);
    if (status < 0) {
        return status;
    }
    status = write_value(&nvs->view, flash, namespace_name, key, type, value, len, error);
    return finish_change(nvs, flash, status, error);
}

ota_status ota_esp_nvs_erase(ota_esp_nvs *nvs, const char *namespace_name, const char *key, ota_error *error) {
    const uint8_t ns = namespace_index(&nvs->view, namespace_name);
    nvs_flash *flash = NULL;
    ota_status status = check_writable(nvs, error);
    if (status == OTA_OK && ns == 0) {
        status = not_found(error, namespace_name, key);
    }
    if (status == OTA_OK) {
        status = nvs_flash_clone(nvs->flash, &flash, error);
    }
    if (status < 0) {
        return status;
    }
    if (erase_items(flash, ns, key, (nvs_kept){0}) == 0) {
        status = not_found(error, namespace_name, key);
    }
    return finish_change(nvs, flash, status, error);
}

/* ---- Operations -------------------------------------------------------------------------------------------------- */

size_t ota_esp_nvs_op_count(const ota_esp_nvs *nvs) {
    return nvs->flash->op_count;
}

ota_esp_nvs_op ota_esp_nvs_op_at(const ota_esp_nvs *nvs, size_t index) {
    const nvs_op *op = &nvs->flash->ops[index];
    return (ota_esp_nvs_op){
        .kind = op->kind,
        .offset = op->offset,
        .len = op->len,
        .data = op->kind == OTA_ESP_NVS_PROGRAM ? nvs->flash->op_data + op->data : NULL,
    };
}

size_t ota_esp_nvs_repair_count(const ota_esp_nvs *nvs) {
    return nvs->repairs;
}

const uint8_t *ota_esp_nvs_image(const ota_esp_nvs *nvs, size_t *size) {
    *size = nvs->flash->size;
    return nvs->flash->raw;
}

ota_status ota_esp_nvs_apply(uint8_t *partition, size_t size, const ota_esp_nvs_op *op, ota_error *error) {
    const bool erase = op->kind == OTA_ESP_NVS_ERASE;
    if (!ota_range_inside(op->offset, op->len, size) || (!erase && op->kind != OTA_ESP_NVS_PROGRAM) ||
        (erase && (op->len != PAGE_SIZE || op->offset % PAGE_SIZE != 0))) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, op->offset, 0,
                             "no operation for a partition of %zu bytes: kind %d, offset %zu, %zu bytes", size,
                             (int)op->kind, op->offset, op->len);
    }
    if (erase) {
        memset(partition + op->offset, 0xFF, op->len);
        return OTA_OK;
    }
    for (size_t i = 0; i < op->len; i++) {
        if ((partition[op->offset + i] & op->data[i]) != op->data[i]) {
            return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, op->offset + i, 0,
                                 "cannot program 0x%02x over 0x%02x without an erase", op->data[i],
                                 partition[op->offset + i]);
        }
    }
    memcpy(partition + op->offset, op->data, op->len);
    return OTA_OK;
}
