/* sources: esp/esp_nvs.c esp/esp_nvs_flash.c base/bytes.c base/status.c */
/* libs: zlib libcrypto */
#include <stdbool.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "check.h"
#include "esp/esp_nvs.h"

#define PAGE 4096u
#define PAGES_MAX 6u
#define SIZE_MAX_TEST (PAGES_MAX * PAGE)

static uint32_t random_state = 7;

static uint32_t random_u32(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static const ota_esp_nvs_keys keys = {
    .bytes = "0123456789abcdef0123456789ABCDEFtweak key of the same 32 bytes..",
};

/* The four ways a partition can be written. */
static const ota_esp_nvs_options modes[] = {
    {.keys = NULL, .purge = false},
    {.keys = NULL, .purge = true},
    {.keys = &keys, .purge = false},
    {.keys = &keys, .purge = true},
};
#define MODES (sizeof modes / sizeof modes[0])

/* ---- Helpers ----------------------------------------------------------------------------------------------------- */

static ota_esp_nvs *opened(const uint8_t *data, size_t size, const ota_esp_nvs_options *options) {
    ota_esp_nvs *nvs = NULL;
    ota_error error = {0};
    const ota_status status = ota_esp_nvs_open(data, size, options, &nvs, &error);
    CHECK_EQ(status, OTA_OK);
    if (status < 0) {
        printf("%s\n", error.text);
        abort();
    }
    return nvs;
}

static bool has(const ota_esp_nvs *nvs, const char *ns, const char *key, uint8_t type, const void *value, size_t len) {
    ota_esp_nvs_item item;
    return ota_esp_nvs_get(nvs, ns, key, type, &item, NULL) == OTA_OK && item.len == len &&
           memcmp(item.value, value, len) == 0;
}

static bool has_u32(const ota_esp_nvs *nvs, const char *ns, const char *key, uint32_t number) {
    uint8_t value[4];
    ota_store_u32le(value, number);
    return has(nvs, ns, key, OTA_ESP_NVS_U32, value, sizeof value);
}

static ota_status set_u32(ota_esp_nvs *nvs, const char *ns, const char *key, uint32_t number) {
    uint8_t value[4];
    ota_store_u32le(value, number);
    return ota_esp_nvs_set(nvs, ns, key, OTA_ESP_NVS_U32, value, sizeof value, NULL);
}

static ota_status set_string(ota_esp_nvs *nvs, const char *ns, const char *key, const char *text) {
    return ota_esp_nvs_set(nvs, ns, key, OTA_ESP_NVS_STRING, (const uint8_t *)text, strlen(text), NULL);
}

/* Carries the operations [from, to) out on `flash` and checks that each only clears bits. */
static void carry_out(const ota_esp_nvs *nvs, size_t from, size_t to, uint8_t *flash, size_t size) {
    for (size_t i = from; i < to; i++) {
        const ota_esp_nvs_op op = ota_esp_nvs_op_at(nvs, i);
        ota_error error = {0};
        CHECK_EQ(ota_esp_nvs_apply(flash, size, &op, &error), OTA_OK);
    }
}

static bool blank(const uint8_t *data, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (data[i] != 0xFF) {
            return false;
        }
    }
    return true;
}

/* What a partition has to be after every change: as the list of operations says, and with one page all 0xFF. */
static void check_image(const ota_esp_nvs *nvs, const uint8_t *flash, size_t size) {
    size_t image_size = 0;
    const uint8_t *image = ota_esp_nvs_image(nvs, &image_size);
    CHECK_EQ(image_size, size);
    CHECK_MEM(image, flash, size);
    bool any = false;
    for (size_t page = 0; page < size / PAGE; page++) {
        any = any || blank(flash + page * PAGE, PAGE);
    }
    CHECK(any);
}

/* ---- Partitions made by hand ------------------------------------------------------------------------------------- */

static void put_header(uint8_t *page, uint32_t state, uint32_t seq, uint8_t version) {
    memset(page, 0xFF, 32);
    ota_store_u32le(page, state);
    ota_store_u32le(page + 4, seq);
    page[8] = version;
    ota_store_u32le(page + 28, ota_crc32(0xFFFFFFFFu, page + 4, 24));
}

static void put_state(uint8_t *page, uint32_t entry, uint32_t state) {
    page[32 + entry / 4] = (uint8_t)((page[32 + entry / 4] & ~(3u << 2 * (entry % 4))) | state << 2 * (entry % 4));
}

/* An item with its entries in state written; returns the entry behind it. */
static uint32_t put_item(uint8_t *page, uint32_t entry, uint8_t ns, uint8_t type, uint8_t chunk, const char *key,
                         const void *data, size_t len) {
    const bool entries = type == 0x21 || type == 0x41 || type == 0x42;
    const uint32_t span = entries ? 1 + (uint32_t)(len + 31) / 32 : 1;
    uint8_t *p = page + 64 + 32 * entry;
    memset(p, 0xFF, 32 * span);
    p[0] = ns;
    p[1] = type;
    p[2] = (uint8_t)span;
    p[3] = chunk;
    memset(p + 8, 0, 16);
    memcpy(p + 8, key, strnlen(key, 16));
    if (entries) {
        ota_store_u16le(p + 24, (uint16_t)len);
        ota_store_u32le(p + 28, ota_crc32(0xFFFFFFFFu, data, len));
        memcpy(p + 32, data, len);
    } else {
        memcpy(p + 24, data, len);
    }
    ota_store_u32le(p + 4, ota_crc32(ota_crc32(0xFFFFFFFFu, p, 4), p + 8, 24));
    for (uint32_t i = 0; i < span; i++) {
        put_state(page, entry + i, 2);
    }
    return entry + span;
}

/* ---- Values ------------------------------------------------------------------------------------------------------ */

TEST(an_erased_partition_is_empty_and_takes_its_first_value) {
    for (size_t m = 0; m < MODES; m++) {
        uint8_t flash[3 * PAGE];
        memset(flash, 0xFF, sizeof flash);
        ota_esp_nvs *nvs = opened(flash, sizeof flash, &modes[m]);
        CHECK_EQ(ota_esp_nvs_item_count(nvs), 0);
        CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
        CHECK_EQ(set_u32(nvs, "rmaker_ota", "mqtt_ota_off", 1048576), OTA_OK);
        CHECK(has_u32(nvs, "rmaker_ota", "mqtt_ota_off", 1048576));
        carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
        check_image(nvs, flash, sizeof flash);
        ota_esp_nvs_free(&nvs);
        CHECK_EQ(ota_load_u32le(flash), 0xFFFFFFFE);
        CHECK_EQ(ota_load_u32le(flash + 4), 0);
        CHECK_EQ(flash[8], 0xFE);
        CHECK_EQ(flash[32], 0xFA); /* namespace and value written, two empty */

        nvs = opened(flash, sizeof flash, &modes[m]);
        CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
        CHECK_EQ(ota_esp_nvs_item_count(nvs), 1);
        CHECK_EQ(ota_esp_nvs_namespace_count(nvs), 1);
        CHECK_EQ(ota_esp_nvs_namespace_at(nvs, 0).index, 1);
        CHECK(strcmp(ota_esp_nvs_namespace_at(nvs, 0).name, "rmaker_ota") == 0);
        CHECK(has_u32(nvs, "rmaker_ota", "mqtt_ota_off", 1048576));
        ota_esp_nvs_free(&nvs);
    }
}

TEST(every_type_comes_back) {
    static const struct {
        uint8_t type;
        size_t len;
    } numbers[] = {{OTA_ESP_NVS_U8, 1},    {OTA_ESP_NVS_I8, 1},    {OTA_ESP_NVS_U16, 2}, {OTA_ESP_NVS_I16, 2},
                   {OTA_ESP_NVS_U32, 4},   {OTA_ESP_NVS_I32, 4},   {OTA_ESP_NVS_U64, 8}, {OTA_ESP_NVS_I64, 8},
                   {OTA_ESP_NVS_FLOAT, 4}, {OTA_ESP_NVS_DOUBLE, 8}};
    static const uint8_t value[] = {0x81, 0x92, 0xA3, 0xB4, 0xC5, 0xD6, 0xE7, 0xF8};
    uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        const char key[] = {'k', (char)('a' + i), '\0'};
        CHECK_EQ(ota_esp_nvs_set(nvs, "n", key, numbers[i].type, value, numbers[i].len, NULL), OTA_OK);
        CHECK_EQ(ota_esp_nvs_set(nvs, "n", key, numbers[i].type, value, numbers[i].len + 1, NULL), OTA_ERR_ARGUMENT);
    }
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    ota_esp_nvs_free(&nvs);
    nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 10);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        const char key[] = {'k', (char)('a' + i), '\0'};
        CHECK(has(nvs, "n", key, numbers[i].type, value, numbers[i].len));
        CHECK(has(nvs, "n", key, OTA_ESP_NVS_ANY, value, numbers[i].len));
    }
    ota_esp_nvs_free(&nvs);
}

TEST(strings_and_blobs_of_every_length_come_back) {
    static uint8_t value[20001];
    static const size_t lengths[] = {0,    1,    31,   32,   33,   63,   64,   65,    399,   400,   401,   3967, 3968,
                                     3998, 3999, 4000, 4001, 7999, 8000, 8001, 12000, 15999, 16000, 16001, 20000};
    for (size_t i = 0; i < sizeof value; i++) {
        value[i] = (uint8_t)(1 + i * 7 % 255);
    }
    for (size_t m = 0; m < MODES; m++) {
        for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
            uint8_t flash[SIZE_MAX_TEST];
            memset(flash, 0xFF, sizeof flash);
            ota_esp_nvs *nvs = opened(flash, sizeof flash, &modes[m]);
            const size_t len = lengths[i];
            const bool fits = len <= 3999;
            CHECK_EQ(ota_esp_nvs_set(nvs, "text", "s", OTA_ESP_NVS_STRING, value, len, NULL),
                     fits ? OTA_OK : OTA_ERR_ARGUMENT);
            ota_esp_nvs_free(&nvs);
            nvs = opened(flash, sizeof flash, &modes[m]);
            const ota_status status = ota_esp_nvs_set(nvs, "blobs", "b", OTA_ESP_NVS_BLOB, value, len, NULL);
            /* Five pages of data; the namespace and the index take two entries of one of them. */
            CHECK_EQ(status, len <= 5 * 4000 - 64 ? OTA_OK : OTA_ERR_NVS_FULL);
            carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
            check_image(nvs, flash, sizeof flash);
            ota_esp_nvs_free(&nvs);
            nvs = opened(flash, sizeof flash, &modes[m]);
            CHECK_EQ(has(nvs, "blobs", "b", OTA_ESP_NVS_BLOB, value, len), status == OTA_OK);
            CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
            ota_esp_nvs_free(&nvs);
        }
    }
    uint8_t flash[SIZE_MAX_TEST];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "b", OTA_ESP_NVS_BLOB, value, 20001, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "s", OTA_ESP_NVS_STRING, (const uint8_t *)"a\0b", 3, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "s", 0x41, value, 3, NULL), OTA_ERR_UNSUPPORTED);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "", OTA_ESP_NVS_U8, value, 1, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_esp_nvs_set(nvs, "", "b", OTA_ESP_NVS_U8, value, 1, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "sixteen_bytes_12", OTA_ESP_NVS_U8, value, 1, NULL), OTA_ERR_ARGUMENT);
    CHECK_EQ(ota_esp_nvs_set(nvs, "b", "fifteen_bytes_1", OTA_ESP_NVS_U8, value, 1, NULL), OTA_OK);
    ota_esp_nvs_free(&nvs);
}

TEST(the_same_value_writes_nothing) {
    uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(set_u32(nvs, "a", "k", 5), OTA_OK);
    CHECK_EQ(set_string(nvs, "a", "s", "text"), OTA_OK);
    const size_t before = ota_esp_nvs_op_count(nvs);
    CHECK_EQ(set_u32(nvs, "a", "k", 5), OTA_OK);
    CHECK_EQ(set_string(nvs, "a", "s", "text"), OTA_OK);
    CHECK_EQ(ota_esp_nvs_op_count(nvs), before);
    CHECK_EQ(set_u32(nvs, "a", "k", 6), OTA_OK);
    CHECK(ota_esp_nvs_op_count(nvs) > before);
    ota_esp_nvs_free(&nvs);
}

TEST(another_type_of_the_same_key_replaces_the_old_one) {
    uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "k", OTA_ESP_NVS_BLOB, flash, 5000, NULL), OTA_OK);
    CHECK_EQ(set_string(nvs, "a", "k", "text"), OTA_OK);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 1);
    CHECK(has(nvs, "a", "k", OTA_ESP_NVS_STRING, "text", 4));
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "k", OTA_ESP_NVS_BLOB, flash, 5, NULL), OTA_OK);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 1);
    CHECK(has(nvs, "a", "k", OTA_ESP_NVS_BLOB, flash, 5));
    ota_esp_nvs_free(&nvs);
}

TEST(erase_takes_a_key_or_a_namespace) {
    uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(set_u32(nvs, "a", "x", 1), OTA_OK);
    CHECK_EQ(set_string(nvs, "a", "y", "text"), OTA_OK);
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "z", OTA_ESP_NVS_BLOB, flash, 4500, NULL), OTA_OK);
    CHECK_EQ(set_u32(nvs, "b", "x", 2), OTA_OK);
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", "x", NULL), OTA_OK);
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", "x", NULL), OTA_ERR_NOT_FOUND);
    CHECK_EQ(ota_esp_nvs_erase(nvs, "c", "x", NULL), OTA_ERR_NOT_FOUND);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 3);
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", NULL, NULL), OTA_OK);
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", NULL, NULL), OTA_ERR_NOT_FOUND);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 1);
    CHECK_EQ(ota_esp_nvs_namespace_count(nvs), 2);
    CHECK(has_u32(nvs, "b", "x", 2));
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    check_image(nvs, flash, sizeof flash);
    ota_esp_nvs_free(&nvs);
}

TEST(namespaces_take_the_lowest_free_index_until_all_are_taken) {
    static uint8_t flash[SIZE_MAX_TEST];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    ota_error error = {0};
    for (int i = 1; i <= 254; i++) {
        char name[16];
        snprintf(name, sizeof name, "ns%d", i);
        CHECK_EQ(set_u32(nvs, name, "k", (uint32_t)i), OTA_OK);
        CHECK_EQ(ota_esp_nvs_namespace_at(nvs, (size_t)i - 1).index, i);
    }
    CHECK_EQ(ota_esp_nvs_set(nvs, "one_more", "k", OTA_ESP_NVS_U8, flash, 1, &error), OTA_ERR_NVS_FULL);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 254);
    CHECK(has_u32(nvs, "ns254", "k", 254));
    ota_esp_nvs_free(&nvs);
}

/* ---- Against a model --------------------------------------------------------------------------------------------- */

#define NAMES 3
#define KEYS 8
#define VALUE_MAX 5000

typedef struct model_value {
    bool set;
    uint8_t type;
    size_t len;
    uint8_t bytes[VALUE_MAX];
} model_value;

static model_value model[NAMES][KEYS];
static const char *const names[NAMES] = {"rmaker_ota", "nvs.net80211", "z"};
static const char *const key_names[KEYS] = {"ota_written", "rmaker_ota_id",   "k", "a",
                                            "ota_update",  "fifteen_bytes_1", "b", "c"};

static void random_value(model_value *out, bool large) {
    static const struct {
        uint8_t type;
        size_t len;
    } numbers[] = {{OTA_ESP_NVS_U8, 1}, {OTA_ESP_NVS_U16, 2}, {OTA_ESP_NVS_U32, 4}, {OTA_ESP_NVS_I64, 8}};
    const uint32_t choice = random_u32() % 8;
    out->set = true;
    if (choice < 4) {
        out->type = numbers[choice].type;
        out->len = numbers[choice].len;
    } else {
        out->type = choice < 6 ? OTA_ESP_NVS_STRING : OTA_ESP_NVS_BLOB;
        out->len = random_u32() % (random_u32() % 4 ? 100 : 700);
        if (large && out->type == OTA_ESP_NVS_BLOB && random_u32() % 3 == 0) {
            out->len = random_u32() % VALUE_MAX;
        }
    }
    for (size_t i = 0; i < out->len; i++) {
        out->bytes[i] = (uint8_t)(out->type == OTA_ESP_NVS_STRING ? 1 + random_u32() % 255 : random_u32());
        if (out->type == OTA_ESP_NVS_BLOB && random_u32() % 8 == 0) {
            out->bytes[i] = 0xFF; /* looks like nothing was written */
        }
    }
    if (out->type == OTA_ESP_NVS_BLOB && random_u32() % 4 == 0) {
        memset(out->bytes, 0xFF, out->len < 70 ? out->len : 70);
    }
}

static bool holds(const ota_esp_nvs *nvs, int n, int k, const model_value *value) {
    if (!value->set) {
        ota_esp_nvs_item item;
        return ota_esp_nvs_get(nvs, names[n], key_names[k], OTA_ESP_NVS_ANY, &item, NULL) == OTA_ERR_NOT_FOUND;
    }
    return has(nvs, names[n], key_names[k], value->type, value->bytes, value->len);
}

/* Every value but that of (skip_n, skip_k) is that of the model, and there are no others. */
static void check_model(const ota_esp_nvs *nvs, int skip_n, int skip_k) {
    size_t count = 0, skipped = 0;
    for (int n = 0; n < NAMES; n++) {
        for (int k = 0; k < KEYS; k++) {
            if (n == skip_n && k == skip_k) {
                continue;
            }
            count += model[n][k].set;
            CHECK(holds(nvs, n, k, &model[n][k]));
        }
    }
    for (size_t i = 0; i < ota_esp_nvs_item_count(nvs); i++) {
        const ota_esp_nvs_item item = ota_esp_nvs_item_at(nvs, i);
        skipped +=
            skip_n >= 0 && strcmp(item.namespace_name, names[skip_n]) == 0 && strcmp(item.key, key_names[skip_k]) == 0;
    }
    CHECK_EQ(ota_esp_nvs_item_count(nvs) - skipped, count);
}

TEST(any_series_of_changes_leaves_what_a_dictionary_would_hold) {
    static uint8_t flash[SIZE_MAX_TEST];
    static model_value value;
    for (size_t m = 0; m < MODES; m++) {
        const size_t size = (3 + m) * PAGE;
        size_t full = 0;
        memset(flash, 0xFF, sizeof flash);
        memset(model, 0, sizeof model);
        ota_esp_nvs *nvs = opened(flash, size, &modes[m]);
        size_t done = 0;
        for (int turn = 0; turn < 1500; turn++) {
            const int n = (int)(random_u32() % NAMES), k = (int)(random_u32() % KEYS);
            const size_t before = ota_esp_nvs_op_count(nvs);
            if (random_u32() % 5 == 0) {
                const ota_status status = ota_esp_nvs_erase(nvs, names[n], key_names[k], NULL);
                CHECK_EQ(status, model[n][k].set ? OTA_OK : OTA_ERR_NOT_FOUND);
                model[n][k].set = false;
            } else {
                random_value(&value, true);
                ota_error error = {0};
                const ota_status status =
                    ota_esp_nvs_set(nvs, names[n], key_names[k], value.type, value.bytes, value.len, &error);
                CHECK(status == OTA_OK || status == OTA_ERR_NVS_FULL);
                if (status == OTA_OK) {
                    model[n][k] = value;
                } else {
                    full++;
                    CHECK_EQ(ota_esp_nvs_op_count(nvs), before);
                }
            }
            carry_out(nvs, done, ota_esp_nvs_op_count(nvs), flash, size);
            done = ota_esp_nvs_op_count(nvs);
            if (turn % 8 == 0) {
                check_model(nvs, -1, -1);
                check_image(nvs, flash, size);
                ota_esp_nvs_free(&nvs); /* and what another one finds */
                nvs = opened(flash, size, &modes[m]);
                CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
                CHECK_EQ(ota_esp_nvs_damaged(nvs), 0);
                check_model(nvs, -1, -1);
                done = 0;
            }
        }
        CHECK(full < 500);
        ota_esp_nvs_free(&nvs);
    }
}

/* ---- Power cuts -------------------------------------------------------------------------------------------------- */

typedef enum torn {
    TORN_NOT,    /* cut before the operation */
    TORN_PREFIX, /* the first half of the bytes */
    TORN_SUFFIX, /* the last half */
    TORN_BITS,   /* each bit that has to change did or did not */
    TORN_KINDS,
} torn;

static void carry_out_torn(ota_esp_nvs_op op, torn kind, uint8_t *flash) {
    for (size_t i = 0; i < op.len; i++) {
        uint8_t *byte = flash + op.offset + i;
        const uint8_t after = op.kind == OTA_ESP_NVS_ERASE ? 0xFF : op.data[i];
        const bool first_half = i < (op.len + 1) / 2;
        switch (kind) {
        case TORN_PREFIX:
            *byte = first_half ? after : *byte;
            break;
        case TORN_SUFFIX:
            *byte = first_half ? *byte : after;
            break;
        case TORN_BITS:
            *byte = (uint8_t)(*byte ^ ((*byte ^ after) & random_u32()));
            break;
        default:
            break;
        }
    }
}

/* After a cut: everything else is as it was, the key has its old or its new value; and the next writer can go on. */
static void check_after_cut(const uint8_t *flash, size_t size, const ota_esp_nvs_options *options, int n, int k,
                            const model_value *before, const model_value *after) {
    static uint8_t next[SIZE_MAX_TEST];
    ota_esp_nvs *nvs = opened(flash, size, options);
    check_model(nvs, n, k);
    const bool old = holds(nvs, n, k, before), new = holds(nvs, n, k, after);
    CHECK(old || new);
    /* A change of type across pages may leave both: each is a value somebody wrote. */
    if (old && new && before->set && after->set) {
        CHECK(before->type != after->type ||
              (before->len == after->len && memcmp(before->bytes, after->bytes, after->len) == 0));
    }
    memcpy(next, flash, size);
    const ota_status status = set_u32(nvs, "rmaker_ota", "ota_test_cnt", random_u32());
    CHECK_EQ(status, OTA_OK);
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), next, size);
    check_image(nvs, next, size);
    ota_esp_nvs_free(&nvs);
    nvs = opened(next, size, options);
    CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
    CHECK(holds(nvs, n, k, before) || holds(nvs, n, k, after));
    CHECK_EQ(ota_esp_nvs_erase(nvs, "rmaker_ota", "ota_test_cnt", NULL), OTA_OK);
    check_model(nvs, n, k);
    ota_esp_nvs_free(&nvs);
}

TEST(a_cut_between_or_inside_any_operations_leaves_the_old_or_the_new_value) {
    static uint8_t flash[SIZE_MAX_TEST], cut[SIZE_MAX_TEST];
    static model_value before, after;
    for (size_t m = 0; m < MODES; m++) {
        const size_t size = (m % 2 ? 4 : 3) * PAGE;
        size_t erases = 0;
        memset(flash, 0xFF, sizeof flash);
        memset(model, 0, sizeof model);
        for (int turn = 0; turn < 260; turn++) {
            const int n = (int)(random_u32() % NAMES), k = (int)(random_u32() % KEYS);
            ota_esp_nvs *nvs = opened(flash, size, &modes[m]);
            CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
            before = model[n][k];
            after = (model_value){0};
            ota_status status = OTA_OK;
            if (before.set && random_u32() % 5 == 0) {
                status = ota_esp_nvs_erase(nvs, names[n], key_names[k], NULL);
            } else {
                random_value(&after, turn % 3 == 0);
                status = ota_esp_nvs_set(nvs, names[n], key_names[k], after.type, after.bytes, after.len, NULL);
            }
            if (status == OTA_ERR_NVS_FULL) {
                ota_esp_nvs_free(&nvs);
                continue;
            }
            CHECK_EQ(status, OTA_OK);
            /* Long lists (a page moved) are sampled, but around page changes every operation is cut. */
            const size_t count = ota_esp_nvs_op_count(nvs);
            memcpy(cut, flash, size);
            for (size_t i = 0; i < count; i++) {
                const ota_esp_nvs_op op = ota_esp_nvs_op_at(nvs, i);
                const bool page_change = op.offset % PAGE < 32;
                if (count < 12 || page_change || random_u32() % count < 12) {
                    static uint8_t damaged[SIZE_MAX_TEST];
                    for (torn kind = TORN_NOT; kind < TORN_KINDS; kind++) {
                        if (kind != TORN_NOT && op.len == 1 && kind != TORN_BITS) {
                            continue;
                        }
                        memcpy(damaged, cut, size);
                        carry_out_torn(op, kind, damaged);
                        check_after_cut(damaged, size, &modes[m], n, k, &before, &after);
                    }
                }
                erases += op.kind == OTA_ESP_NVS_ERASE;
                CHECK_EQ(ota_esp_nvs_apply(cut, size, &op, NULL), OTA_OK);
            }
            memcpy(flash, cut, size);
            model[n][k] = after;
            ota_esp_nvs_free(&nvs);
            nvs = opened(flash, size, &modes[m]);
            check_model(nvs, -1, -1);
            ota_esp_nvs_free(&nvs);
        }
        CHECK(erases > 5); /* pages were moved */
    }
}

TEST(a_cut_in_the_repair_of_a_cut_is_repaired) {
    static uint8_t flash[3 * PAGE], cut[3 * PAGE], again[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    size_t done = 0;
    CHECK_EQ(set_string(nvs, "a", "fixed", "a text of more than one entry, so that it has a value of its own"), OTA_OK);
    for (uint32_t number = 0; number < 400; number++) {
        const size_t from = ota_esp_nvs_op_count(nvs);
        CHECK_EQ(set_u32(nvs, "a", "number", number), OTA_OK);
        const size_t to = ota_esp_nvs_op_count(nvs);
        if (to - from > 10) { /* a page is moved: cut everywhere, and cut the repair everywhere */
            carry_out(nvs, done, from, flash, sizeof flash);
            memcpy(cut, flash, sizeof cut);
            done = from;
            for (size_t i = from; i < to; i++) {
                ota_esp_nvs *repair = opened(cut, sizeof cut, NULL);
                memcpy(again, cut, sizeof again);
                CHECK_EQ(ota_esp_nvs_op_count(repair), ota_esp_nvs_repair_count(repair));
                for (size_t j = 0; j < ota_esp_nvs_repair_count(repair); j++) {
                    const ota_esp_nvs_op op = ota_esp_nvs_op_at(repair, j);
                    CHECK_EQ(ota_esp_nvs_apply(again, sizeof again, &op, NULL), OTA_OK);
                    ota_esp_nvs *third = opened(again, sizeof again, NULL);
                    CHECK(has_u32(third, "a", "number", number) || has_u32(third, "a", "number", number - 1));
                    CHECK_EQ(ota_esp_nvs_item_count(third), 2);
                    ota_esp_nvs_free(&third);
                }
                ota_esp_nvs_free(&repair);
                const ota_esp_nvs_op op = ota_esp_nvs_op_at(nvs, i);
                CHECK_EQ(ota_esp_nvs_apply(cut, sizeof cut, &op, NULL), OTA_OK);
            }
        }
    }
    ota_esp_nvs_free(&nvs);
}

TEST(a_value_that_looks_like_items_never_comes_alive_as_such) {
    /* The value of `bait` is made of items of `victim`, with right CRCs: they count when the head is gone before them. */
    static uint8_t page[PAGE], flash[3 * PAGE], cut[3 * PAGE], torn_flash[3 * PAGE];
    for (size_t count = 1; count < 12; count++) {
        memset(flash, 0xFF, sizeof flash);
        uint32_t next = 0;
        for (size_t i = 0; i < count; i++) {
            next = put_item(page, next, 1, 0x04, 0xFF, "victim", "\x66\x66\x66\x66", 4);
        }
        ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
        CHECK_EQ(set_u32(nvs, "a", "victim", 1), OTA_OK);
        CHECK_EQ(ota_esp_nvs_set(nvs, "a", "bait", OTA_ESP_NVS_BLOB, page + 64, 32 * count, NULL), OTA_OK);
        carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
        ota_esp_nvs_free(&nvs);
        nvs = opened(flash, sizeof flash, NULL);
        CHECK_EQ(ota_esp_nvs_set(nvs, "a", "bait", OTA_ESP_NVS_BLOB, page + 64, 32 * count - 1, NULL), OTA_OK);
        CHECK_EQ(ota_esp_nvs_erase(nvs, "a", "bait", NULL), OTA_OK);
        memcpy(cut, flash, sizeof cut);
        for (size_t i = 0; i < ota_esp_nvs_op_count(nvs); i++) {
            const ota_esp_nvs_op op = ota_esp_nvs_op_at(nvs, i);
            for (int turn = 0; turn < 8; turn++) {
                memcpy(torn_flash, cut, sizeof cut);
                carry_out_torn(op, turn ? TORN_BITS : TORN_NOT, torn_flash);
                ota_esp_nvs *after = opened(torn_flash, sizeof torn_flash, NULL);
                CHECK(has_u32(after, "a", "victim", 1));
                CHECK_EQ(ota_esp_nvs_damaged(after), 0);
                ota_esp_nvs_free(&after);
            }
            CHECK_EQ(ota_esp_nvs_apply(cut, sizeof cut, &op, NULL), OTA_OK);
        }
        ota_esp_nvs_free(&nvs);
    }
}

/* ---- What firmware and cuts leave behind --------------------------------------------------------------------------- */

TEST(a_half_written_value_is_passed_over_even_when_it_begins_with_ff) {
    static uint8_t flash[3 * PAGE];
    uint8_t value[100];
    memset(value, 0xFF, sizeof value);
    value[99] = 1; /* the first three entries of the value look erased */
    memset(flash, 0xFF, sizeof flash);
    put_header(flash, 0xFFFFFFFE, 0, 0xFE);
    uint32_t next = put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1);
    const uint32_t head = next;
    next = put_item(flash, next, 1, 0x21, 0xFF, "k", value, sizeof value);
    for (uint32_t i = head + 1; i < next; i++) {
        put_state(flash, i, 3);
    }
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 0);
    CHECK(ota_esp_nvs_repair_count(nvs) > 0);
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "k", OTA_ESP_NVS_BLOB, value, sizeof value, NULL), OTA_OK);
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    CHECK(has(nvs, "a", "k", OTA_ESP_NVS_BLOB, value, sizeof value));
    ota_esp_nvs_free(&nvs);
}

TEST(on_the_active_page_and_across_pages_the_later_item_counts) {
    static uint8_t flash[4 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    put_header(flash, 0xFFFFFFFC, 4, 0xFE);
    uint32_t next = put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1);
    next = put_item(flash, next, 1, 1, 0xFF, "across", "\x0A", 1);
    put_item(flash, next, 1, 1, 0xFF, "kept", "\x0B", 1);
    put_header(flash + PAGE, 0xFFFFFFFE, 5, 0xFE);
    next = put_item(flash + PAGE, 0, 1, 1, 0xFF, "same", "\x0C", 1);
    next = put_item(flash + PAGE, next, 1, 1, 0xFF, "same", "\x0D", 1);
    put_item(flash + PAGE, next, 1, 1, 0xFF, "across", "\x0E", 1);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 3);
    CHECK(has(nvs, "a", "same", OTA_ESP_NVS_U8, "\x0D", 1));
    CHECK(has(nvs, "a", "across", OTA_ESP_NVS_U8, "\x0E", 1));
    CHECK(has(nvs, "a", "kept", OTA_ESP_NVS_U8, "\x0B", 1));
    CHECK_EQ(ota_esp_nvs_repair_count(nvs), 2);
    ota_esp_nvs_free(&nvs);
}

TEST(blobs_of_format_1_are_read_and_replaced) {
    static uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    put_header(flash, 0xFFFFFFFE, 0, 0xFF);
    uint32_t next = put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1);
    put_item(flash, next, 1, 0x41, 0xFF, "old", "a blob of format 1", 18);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(ota_esp_nvs_page_at(nvs, 0).version, 0xFF);
    CHECK(has(nvs, "a", "old", OTA_ESP_NVS_BLOB, "a blob of format 1", 18));
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "old", OTA_ESP_NVS_BLOB, (const uint8_t *)"new", 3, NULL), OTA_OK);
    CHECK(has(nvs, "a", "old", OTA_ESP_NVS_BLOB, "new", 3));
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 1);
    ota_esp_nvs_free(&nvs);
}

TEST(an_index_without_its_chunks_and_chunks_without_an_index_are_gone) {
    for (int missing = 0; missing < 5; missing++) {
        const uint8_t index[] = {
            missing == 4 ? 7 : 6, 0, 0, 0, 2, 0, 0xFF, 0xFF}; /* 4: another length than they have */
        static uint8_t flash[3 * PAGE];
        memset(flash, 0xFF, sizeof flash);
        put_header(flash, 0xFFFFFFFE, 0, 0xFE);
        uint32_t next = put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1);
        next = missing == 1 ? next : put_item(flash, next, 1, 0x42, 0, "b", "abc", 3);
        next = missing == 2 ? next : put_item(flash, next, 1, 0x42, 1, "b", "def", 3);
        next = missing == 3 ? next : put_item(flash, next, 1, 0x48, 0xFF, "b", index, sizeof index);
        put_item(flash, next, 1, 0x42, 0x80, "b", "ghi", 3); /* of another version */
        ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
        CHECK_EQ(ota_esp_nvs_item_count(nvs), missing == 0);
        CHECK_EQ(has(nvs, "a", "b", OTA_ESP_NVS_BLOB, "abcdef", 6), missing == 0);
        CHECK(ota_esp_nvs_repair_count(nvs) > 0);
        ota_esp_nvs_free(&nvs);
    }
}

TEST(items_of_unknown_types_and_namespaces_are_listed_and_survive_page_moves) {
    static uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    put_header(flash, 0xFFFFFFFE, 0, 0xFE);
    uint32_t next = put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1);
    next = put_item(flash, next, 1, 0x77, 0xFF, "strange", "12345678", 8);
    next = put_item(flash, next, 9, 0x02, 0xFF, "orphan", "\x34\x12", 2);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    for (uint32_t i = 0; i < 700; i++) {
        CHECK_EQ(set_u32(nvs, "b", "counter", i), OTA_OK);
    }
    CHECK_EQ(ota_esp_nvs_namespace_at(nvs, 1).index, 2);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), 3);
    CHECK(has(nvs, "a", "strange", 0x77, "12345678", 8));
    size_t found = 0;
    for (size_t i = 0; i < 3; i++) {
        const ota_esp_nvs_item item = ota_esp_nvs_item_at(nvs, i);
        if (item.namespace_index == 9) {
            found++;
            CHECK(item.namespace_name == NULL);
            CHECK(strcmp(item.key, "orphan") == 0);
            CHECK_MEM(item.value, "\x34\x12", 2);
        }
    }
    CHECK_EQ(found, 1);
    ota_esp_nvs_free(&nvs);
}

TEST(damage_costs_the_damaged_item_only) {
    static uint8_t flash[3 * PAGE], bad[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    CHECK_EQ(set_u32(nvs, "a", "first", 1), OTA_OK);
    CHECK_EQ(set_string(nvs, "a", "text", "some text"), OTA_OK);
    CHECK_EQ(set_u32(nvs, "a", "last", 2), OTA_OK);
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    ota_esp_nvs_free(&nvs);
    for (size_t at = 64 + 2 * 32; at < 64 + 4 * 32; at++) { /* both entries of the text */
        memcpy(bad, flash, sizeof bad);
        bad[at] ^= 0x10;
        nvs = opened(bad, sizeof bad, NULL);
        CHECK(has_u32(nvs, "a", "first", 1) && has_u32(nvs, "a", "last", 2));
        const bool padding = at >= 64 + 3 * 32 + 10; /* behind the value: under no CRC */
        CHECK_EQ(ota_esp_nvs_item_count(nvs), padding ? 3 : 2);
        CHECK_EQ(ota_esp_nvs_damaged(nvs) > 0, !padding);
        CHECK_EQ(set_string(nvs, "a", "text", "new text"), OTA_OK);
        CHECK(has(nvs, "a", "text", OTA_ESP_NVS_STRING, "new text", 8));
        CHECK_EQ(ota_esp_nvs_item_count(nvs), 3);
        CHECK_EQ(ota_esp_nvs_damaged(nvs) > 0, !padding && at < 64 + 3 * 32);
        ota_esp_nvs_free(&nvs);
    }
    for (size_t at = 0; at < 32; at++) { /* the page header: the page is corrupt */
        memcpy(bad, flash, sizeof bad);
        bad[at] ^= 0x10;
        nvs = opened(bad, sizeof bad, NULL);
        CHECK_EQ(ota_esp_nvs_item_count(nvs), 0);
        CHECK_EQ(ota_esp_nvs_page_at(nvs, 0).state, OTA_ESP_NVS_PAGE_CORRUPT);
        ota_esp_nvs_free(&nvs);
    }
}

TEST(a_newer_format_and_a_partition_without_free_page_are_refused) {
    static uint8_t flash[3 * PAGE];
    ota_esp_nvs *nvs = NULL;
    ota_error error = {0};
    memset(flash, 0xFF, sizeof flash);
    put_header(flash + PAGE, 0xFFFFFFFE, 0, 0xFD);
    CHECK_EQ(ota_esp_nvs_open(flash, sizeof flash, NULL, &nvs, &error), OTA_ERR_NVS);
    CHECK_EQ(error.device_code, 0x1110);
    CHECK(nvs == NULL);

    for (uint32_t page = 0; page < 3; page++) {
        put_header(flash + page * PAGE, 0xFFFFFFFC, page, 0xFE);
    }
    put_item(flash, put_item(flash, 0, 0, 1, 0xFF, "a", "\x01", 1), 1, 1, 0xFF, "k", "\x05", 1);
    nvs = opened(flash, sizeof flash, NULL);
    CHECK(has(nvs, "a", "k", OTA_ESP_NVS_U8, "\x05", 1));
    error = (ota_error){0};
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", "k", OTA_ESP_NVS_U8, (const uint8_t *)"\x06", 1, &error), OTA_ERR_NVS);
    CHECK_EQ(error.device_code, 0x110D);
    error = (ota_error){0};
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", "k", &error), OTA_ERR_NVS);
    CHECK_EQ(ota_esp_nvs_op_count(nvs), 0);
    ota_esp_nvs_free(&nvs);

    nvs = opened(flash, 2 * PAGE, NULL); /* reading takes one page, writing three */
    CHECK(has(nvs, "a", "k", OTA_ESP_NVS_U8, "\x05", 1));
    CHECK_EQ(set_u32(nvs, "a", "n", 1), OTA_ERR_NVS);
    ota_esp_nvs_free(&nvs);
}

TEST(corrupt_pages_are_reused_when_no_blank_one_is_left) {
    static uint8_t flash[4 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    memset(flash, 0x55, 2 * PAGE);
    flash[3 * PAGE + 4000] = 0; /* looks empty, is not */
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    size_t done = 0;
    for (uint32_t i = 0; i < 900; i++) {
        CHECK_EQ(set_u32(nvs, "a", "n", i), OTA_OK);
        carry_out(nvs, done, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
        done = ota_esp_nvs_op_count(nvs);
        check_image(nvs, flash, sizeof flash);
    }
    ota_esp_nvs_free(&nvs);
}

TEST(a_full_partition_stays_as_it_is) {
    static uint8_t flash[3 * PAGE], value[600];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, NULL);
    ota_status status = OTA_OK;
    char key[16];
    int stored = 0;
    for (; status == OTA_OK; stored++) {
        snprintf(key, sizeof key, "key%d", stored);
        value[0] = (uint8_t)stored;
        status = ota_esp_nvs_set(nvs, "a", key, OTA_ESP_NVS_BLOB, value, sizeof value, NULL);
    }
    CHECK_EQ(status, OTA_ERR_NVS_FULL);
    CHECK(stored > 10);
    const size_t before = ota_esp_nvs_op_count(nvs);
    CHECK_EQ(ota_esp_nvs_item_count(nvs), stored - 1);
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", key, OTA_ESP_NVS_BLOB, value, sizeof value, NULL), OTA_ERR_NVS_FULL);
    CHECK_EQ(ota_esp_nvs_op_count(nvs), before);
    /* Erasing makes room again. */
    CHECK_EQ(ota_esp_nvs_erase(nvs, "a", "key3", NULL), OTA_OK);
    CHECK_EQ(ota_esp_nvs_set(nvs, "a", key, OTA_ESP_NVS_BLOB, value, sizeof value, NULL), OTA_OK);
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    check_image(nvs, flash, sizeof flash);
    ota_esp_nvs_free(&nvs);
}

/* ---- Encryption -------------------------------------------------------------------------------------------------- */

TEST(a_wrong_key_reads_nothing_and_writes_nothing) {
    static uint8_t flash[3 * PAGE];
    memset(flash, 0xFF, sizeof flash);
    ota_esp_nvs *nvs = opened(flash, sizeof flash, &modes[2]);
    CHECK_EQ(set_string(nvs, "a", "secret", "a text nobody may see"), OTA_OK);
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, sizeof flash);
    ota_esp_nvs_free(&nvs);
    CHECK(memmem(flash, sizeof flash, "nobody", 6) == NULL);
    ota_esp_nvs_keys wrong = keys;
    wrong.bytes[0] ^= 1;
    const ota_esp_nvs_options options[] = {{.keys = NULL}, {.keys = &wrong}};
    for (size_t i = 0; i < 2; i++) {
        nvs = opened(flash, sizeof flash, &options[i]);
        CHECK_EQ(ota_esp_nvs_item_count(nvs), 0);
        CHECK(ota_esp_nvs_damaged(nvs) > 0);
        CHECK_EQ(set_u32(nvs, "a", "n", 1), OTA_ERR_NVS);
        ota_esp_nvs_free(&nvs);
    }
    nvs = opened(flash, sizeof flash, &modes[2]);
    CHECK(has(nvs, "a", "secret", OTA_ESP_NVS_STRING, "a text nobody may see", 21));
    ota_esp_nvs_free(&nvs);
}

TEST(key_partitions_are_checked) {
    uint8_t partition[PAGE];
    ota_esp_nvs_keys out;
    memset(partition, 0xFF, sizeof partition);
    CHECK_EQ(ota_esp_nvs_keys_parse(partition, sizeof partition, &out, NULL), OTA_ERR_NVS);
    memcpy(partition, keys.bytes, 64);
    ota_store_u32le(partition + 64, ota_crc32(0xFFFFFFFFu, partition, 64));
    for (size_t len = 0; len < 68; len++) {
        CHECK_EQ(ota_esp_nvs_keys_parse(partition, len, &out, NULL), OTA_ERR_NVS);
    }
    CHECK_EQ(ota_esp_nvs_keys_parse(partition, 68, &out, NULL), OTA_OK);
    CHECK_MEM(out.bytes, keys.bytes, 64);
    partition[20] ^= 1;
    CHECK_EQ(ota_esp_nvs_keys_parse(partition, sizeof partition, &out, NULL), OTA_ERR_NVS);

    ota_esp_nvs_keys same = {0}; /* both halves the same: AES-XTS refuses */
    const ota_esp_nvs_options options = {.keys = &same};
    ota_esp_nvs *nvs = NULL;
    CHECK_EQ(ota_esp_nvs_open(partition, sizeof partition, &options, &nvs, NULL), OTA_ERR_ARGUMENT);
    CHECK(nvs == NULL);
}

/* ---- Hostile bytes ------------------------------------------------------------------------------------------------- */

/* Opens, reads all, writes what can be written; whatever the bytes are. */
static void use(const uint8_t *flash, size_t size, const ota_esp_nvs_options *options) {
    static uint8_t copy[SIZE_MAX_TEST];
    static const uint8_t value[4500];
    uint8_t *exact = malloc(size);
    memcpy(exact, flash, size);
    ota_esp_nvs *nvs = NULL;
    ota_error error = {0};
    const ota_status status = ota_esp_nvs_open(exact, size, options, &nvs, &error);
    if (status < 0) {
        CHECK_EQ(status, OTA_ERR_NVS);
        CHECK(error.text[0] != '\0');
        free(exact);
        return;
    }
    memcpy(copy, flash, size);
    uint32_t sum = 0;
    for (size_t i = 0; i < ota_esp_nvs_item_count(nvs); i++) {
        const ota_esp_nvs_item item = ota_esp_nvs_item_at(nvs, i);
        sum += ota_crc32(0, item.value, item.len) + (uint32_t)strlen(item.key);
    }
    bool ok = true;
    for (uint32_t i = 0; i < 3; i++) {
        const ota_status small = set_u32(nvs, "rmaker_ota", "mqtt_ota_off", sum + i);
        CHECK(small == OTA_OK || small == OTA_ERR_NVS || small == OTA_ERR_NVS_FULL);
        ok = small == OTA_OK;
        if (ok) {
            CHECK(has_u32(nvs, "rmaker_ota", "mqtt_ota_off", sum + i));
            const ota_status large = ota_esp_nvs_set(nvs, "b", "blob", OTA_ESP_NVS_BLOB, value, 1000 + i * 1500, NULL);
            CHECK(large == OTA_OK || large == OTA_ERR_NVS || large == OTA_ERR_NVS_FULL);
        }
    }
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), copy, size);
    size_t image_size = 0;
    CHECK_MEM(ota_esp_nvs_image(nvs, &image_size), copy, size);
    ota_esp_nvs_free(&nvs);
    if (ok) {
        nvs = opened(copy, size, options);
        CHECK(has_u32(nvs, "rmaker_ota", "mqtt_ota_off", sum + 2));
        ota_esp_nvs_free(&nvs);
    }
    free(exact);
}

TEST(a_partition_of_another_size_than_whole_pages_is_refused) {
    static uint8_t flash[SIZE_MAX_TEST];
    memset(flash, 0xFF, sizeof flash);
    for (size_t size = 0; size <= sizeof flash; size += size % PAGE > 8 && size % PAGE < PAGE - 8 ? 61 : 1) {
        ota_esp_nvs *nvs = NULL;
        ota_error error = {0};
        const ota_status status = ota_esp_nvs_open(flash, size, NULL, &nvs, &error);
        CHECK_EQ(status, size > 0 && size % PAGE == 0 ? OTA_OK : OTA_ERR_ARGUMENT);
        ota_esp_nvs_free(&nvs);
    }
}

/* A partition with some history, for mutation. */
static void make_history(uint8_t *flash, size_t size, const ota_esp_nvs_options *options) {
    static model_value value;
    memset(flash, 0xFF, size);
    ota_esp_nvs *nvs = opened(flash, size, options);
    for (int turn = 0; turn < 120; turn++) {
        const int n = (int)(random_u32() % NAMES), k = (int)(random_u32() % KEYS);
        random_value(&value, true);
        const ota_status status =
            ota_esp_nvs_set(nvs, names[n], key_names[k], value.type, value.bytes, value.len, NULL);
        CHECK(status == OTA_OK || status == OTA_ERR_NVS_FULL);
    }
    carry_out(nvs, 0, ota_esp_nvs_op_count(nvs), flash, size);
    ota_esp_nvs_free(&nvs);
}

TEST(flipped_bytes_and_cut_off_pages_do_no_harm) {
    static uint8_t flash[SIZE_MAX_TEST], bad[SIZE_MAX_TEST];
    for (size_t m = 0; m < MODES; m++) {
        const size_t size = 4 * PAGE;
        make_history(flash, size, &modes[m]);
        for (size_t pages = 1; pages <= 4; pages++) {
            use(flash, pages * PAGE, &modes[m]);
        }
        for (int turn = 0; turn < 400; turn++) {
            memcpy(bad, flash, size);
            for (uint32_t i = random_u32() % 6 + 1; i > 0; i--) {
                const uint32_t page = random_u32() % 4;
                const uint32_t at = random_u32() % 3 ? random_u32() % 96 : random_u32() % PAGE;
                bad[page * PAGE + at] = (uint8_t)(random_u32() % 4 ? random_u32() : 0xFF);
            }
            use(bad, size, &modes[m]);
        }
    }
}

TEST(well_formed_nonsense_does_no_harm) {
    static uint8_t flash[SIZE_MAX_TEST];
    static const uint32_t states[] = {0xFFFFFFFE, 0xFFFFFFFE, 0xFFFFFFFC, 0xFFFFFFFC,
                                      0xFFFFFFF8, 0xFFFFFFF0, 0xFFFFFFFF};
    static const uint8_t types[] = {1, 0x11, 2, 4, 8, 0x21, 0x41, 0x42, 0x42, 0x42, 0x48, 0x48, 0x24, 0x77, 0x00};
    for (int turn = 0; turn < 1200; turn++) {
        const uint32_t pages = 1 + random_u32() % PAGES_MAX;
        memset(flash, 0xFF, sizeof flash);
        for (uint32_t p = 0; p < pages; p++) {
            uint8_t *page = flash + p * PAGE;
            if (random_u32() % 4 == 0) {
                continue;
            }
            put_header(page, states[random_u32() % 7],
                       random_u32() % 20 ? random_u32() % 4 : 0xFFFFFFFFu - random_u32() % 3, 0xFE);
            for (uint32_t entry = 0; entry < 126 && random_u32() % 40;) {
                uint8_t data[600];
                for (size_t i = 0; i < sizeof data; i++) {
                    data[i] = (uint8_t)random_u32();
                }
                const uint8_t type = types[random_u32() % sizeof types];
                size_t len = 8;
                if (type == 0x48) {
                    ota_store_u32le(data, random_u32() % 3 * 40);
                    data[4] = (uint8_t)(random_u32() % 4);
                    data[5] = (uint8_t)(random_u32() % 2 ? 0x80 : 0);
                } else if (type == 0x21 || type == 0x41 || type == 0x42) {
                    len = random_u32() % 3 * 40;
                    if (entry + 1 + (len + 31) / 32 > 126) {
                        break;
                    }
                } else if (random_u32() % 2) {
                    memset(data, (int)(random_u32() % 4), 8);
                }
                const char key[2] = {(char)('a' + random_u32() % 3), '\0'};
                const uint8_t chunk = type == 0x42 ? (uint8_t)(random_u32() % 3 | (random_u32() % 2 ? 0x80 : 0)) : 0xFF;
                const uint32_t next = put_item(page, entry, (uint8_t)(random_u32() % 4), type, chunk, key, data, len);
                if (random_u32() % 6 == 0) { /* another span than its type has, under a right CRC */
                    uint8_t *head = page + 64 + 32 * entry;
                    head[2] = (uint8_t)random_u32();
                    ota_store_u32le(head + 4, ota_crc32(ota_crc32(0xFFFFFFFFu, head, 4), head + 8, 24));
                }
                if (random_u32() % 6 == 0) {
                    put_state(page, entry + random_u32() % (next - entry), random_u32() % 4);
                }
                entry = next;
            }
        }
        use(flash, pages * PAGE, NULL);
    }
}

TEST(operations_that_do_not_fit_are_refused) {
    uint8_t flash[2 * PAGE];
    ota_error error = {0};
    memset(flash, 0xF0, sizeof flash);
    ota_esp_nvs_op op = {.kind = OTA_ESP_NVS_PROGRAM, .offset = 10, .len = 2, .data = (const uint8_t *)"\x70\x01"};
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, &error), OTA_ERR_STATE);
    CHECK_EQ(error.offset, 11);
    CHECK_EQ(flash[10], 0xF0);
    op.data = (const uint8_t *)"\x70\x10";
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, NULL), OTA_OK);
    CHECK_EQ(flash[11], 0x10);
    op.offset = sizeof flash - 1;
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, NULL), OTA_ERR_ARGUMENT);
    op = (ota_esp_nvs_op){.kind = OTA_ESP_NVS_ERASE, .offset = 100, .len = PAGE};
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, NULL), OTA_ERR_ARGUMENT);
    op.offset = PAGE;
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, NULL), OTA_OK);
    CHECK(blank(flash + PAGE, PAGE));
    op.kind = (ota_esp_nvs_op_kind)3;
    CHECK_EQ(ota_esp_nvs_apply(flash, sizeof flash, &op, NULL), OTA_ERR_ARGUMENT);
}

int main(void) {
    RUN(an_erased_partition_is_empty_and_takes_its_first_value);
    RUN(every_type_comes_back);
    RUN(strings_and_blobs_of_every_length_come_back);
    RUN(the_same_value_writes_nothing);
    RUN(another_type_of_the_same_key_replaces_the_old_one);
    RUN(erase_takes_a_key_or_a_namespace);
    RUN(namespaces_take_the_lowest_free_index_until_all_are_taken);
    RUN(any_series_of_changes_leaves_what_a_dictionary_would_hold);
    RUN(a_cut_between_or_inside_any_operations_leaves_the_old_or_the_new_value);
    RUN(a_cut_in_the_repair_of_a_cut_is_repaired);
    RUN(a_value_that_looks_like_items_never_comes_alive_as_such);
    RUN(a_half_written_value_is_passed_over_even_when_it_begins_with_ff);
    RUN(on_the_active_page_and_across_pages_the_later_item_counts);
    RUN(blobs_of_format_1_are_read_and_replaced);
    RUN(an_index_without_its_chunks_and_chunks_without_an_index_are_gone);
    RUN(items_of_unknown_types_and_namespaces_are_listed_and_survive_page_moves);
    RUN(damage_costs_the_damaged_item_only);
    RUN(a_newer_format_and_a_partition_without_free_page_are_refused);
    RUN(corrupt_pages_are_reused_when_no_blank_one_is_left);
    RUN(a_full_partition_stays_as_it_is);
    RUN(a_wrong_key_reads_nothing_and_writes_nothing);
    RUN(key_partitions_are_checked);
    RUN(a_partition_of_another_size_than_whole_pages_is_refused);
    RUN(flipped_bytes_and_cut_off_pages_do_no_harm);
    RUN(well_formed_nonsense_does_no_harm);
    RUN(operations_that_do_not_fit_are_refused);
    return DONE();
}
