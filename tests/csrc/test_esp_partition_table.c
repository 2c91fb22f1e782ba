/* sources: esp/esp_partition_table.c base/bytes.c base/status.c */
/* libs: libcrypto zlib */
/* Partition tables, binary and CSV: the rules, each broken once, and hostile bytes. The tables of the vectors are compared in
 * tests/conformance. */
#include "esp/esp_partition_table.h"

#include <stdlib.h>

#include "check.h"
#include "esp/esp_image.h"

static ota_esp_partition_table table;
static uint8_t binary[OTA_ESP_PARTITION_TABLE_SIZE];
static char csv[8192];

static const char *const two_slots = "nvs,      data, nvs,     ,        0x4000,\n"
                                     "otadata,  data, ota,     ,        0x2000,\n"
                                     "phy_init, data, phy,     ,        0x1000,\n"
                                     "ota_0,    app,  ota_0,   ,        1M,\n"
                                     "ota_1,    app,  ota_1,   ,        1M,\n";

static ota_error from_csv(const char *text, const ota_esp_csv_options *options) {
    ota_error error = {0};
    ota_status status = ota_esp_partition_table_from_csv(text, strlen(text), options, &table, &error);
    CHECK_EQ(status, error.status);
    return error;
}

/* The CSV is refused, and the sentence has the words in it. */
static void check_refused(const char *text, const char *words, const char *more) {
    ota_error error = from_csv(text, NULL);
    CHECK_EQ(error.status, OTA_ERR_PARTITION_TABLE);
    CHECK(strstr(error.text, words) != NULL && strstr(error.text, more) != NULL);
    if (strstr(error.text, words) == NULL || strstr(error.text, more) == NULL) {
        printf("  \"%s\" lacks \"%s\" or \"%s\"\n", error.text, words, more);
    }
}

static void build(void) {
    ota_error error = {0};
    CHECK_EQ(ota_esp_partition_table_build(&table, binary, &error), OTA_OK);
}

static ota_error parse(const uint8_t *bytes, size_t len, uint64_t flash_size) {
    ota_error error = {0};
    uint8_t *copy = malloc(len + 1); /* so that ASan sees what is read beyond */
    memcpy(copy, bytes, len);
    uint8_t *exact = realloc(copy, len ? len : 1);
    ota_status status = ota_esp_partition_table_parse(exact, len, flash_size, &table, &error);
    CHECK_EQ(status, error.status);
    free(exact);
    return error;
}

/* ---- Binary ------------------------------------------------------------------------------------------------------- */

TEST(a_table_is_what_it_was_built_from) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    for (int md5 = 0; md5 < 2; md5++) {
        ota_esp_partition_table before;
        uint8_t first[sizeof binary];
        table.has_md5 = md5;
        build();
        memcpy(first, binary, sizeof binary);
        before = table;
        CHECK_EQ(parse(binary, sizeof binary, 0).status, OTA_OK);
        CHECK_EQ(table.count, before.count);
        CHECK_EQ(table.has_md5, md5);
        CHECK_EQ(table.end_offset, (5 + md5) * 32);
        CHECK_MEM(table.rows, before.rows, sizeof table.rows[0] * before.count);
        build();
        CHECK_MEM(binary, first, sizeof binary);
    }
}

TEST(labels_and_flags_come_back_byte_for_byte) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    memcpy(table.rows[0].label, "\xff\x80\0behind it\0\0\0x", 16);
    table.rows[0].flags = 0x80000003;
    table.rows[1].type = 0xFE;
    table.rows[1].subtype = 0xFF;
    build();
    uint8_t first[sizeof binary];
    memcpy(first, binary, sizeof binary);
    CHECK_EQ(parse(binary, sizeof binary, 0).status, OTA_OK);
    build();
    CHECK_MEM(binary, first, sizeof binary);
}

TEST(what_a_boot_loader_refuses_is_refused_with_row_and_field) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    build();
    uint8_t good[sizeof binary];
    memcpy(good, binary, sizeof binary);
    ota_error error;

    binary[2 * 32] = 0xAB;
    error = parse(binary, sizeof binary, 0);
    CHECK_EQ(error.offset, 64);
    CHECK(strstr(error.text, "row 2") != NULL && strstr(error.text, "magic") != NULL);

    memcpy(binary, good, sizeof binary);
    binary[5 * 32 + 20] ^= 1;
    error = parse(binary, sizeof binary, 0);
    CHECK_EQ(error.offset, 160);
    CHECK(strstr(error.text, "MD5") != NULL);

    memcpy(binary, good, sizeof binary);
    memcpy(binary + 6 * 32, binary + 5 * 32, 32);
    error = parse(binary, sizeof binary, 0);
    CHECK(strstr(error.text, "second MD5") != NULL);

    memcpy(binary, good, sizeof binary);
    memcpy(binary + 6 * 32, binary, 32);
    error = parse(binary, sizeof binary, 0);
    CHECK(strstr(error.text, "behind the MD5") != NULL);

    memset(binary, 0xFF, sizeof binary);
    error = parse(binary, sizeof binary, 0);
    CHECK(strstr(error.text, "empty") != NULL);

    for (size_t at = 0; at < sizeof binary; at += 32) {
        memcpy(binary + at, good, 32);
    }
    error = parse(binary, sizeof binary, 0);
    CHECK_EQ(error.offset, sizeof binary);
    CHECK(strstr(error.text, "no end marker") != NULL);

    memcpy(binary, good, sizeof binary);
    error = parse(binary, sizeof binary, 0x1F0000);
    CHECK_EQ(error.offset, 128);
    CHECK(strstr(error.text, "row 4") != NULL && strstr(error.text, "ota_1") != NULL &&
          strstr(error.text, "flash") != NULL);
    CHECK_EQ(parse(binary, sizeof binary, 0x210000).status, OTA_OK);
    CHECK_EQ(parse(binary, sizeof binary, 0x20FFFF).status, OTA_ERR_PARTITION_TABLE);
}

TEST(an_end_marker_is_told_by_four_bytes) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    build();
    binary[6 * 32 + 10] = 0; /* the boot loader looks at magic, type and subtype only */
    CHECK_EQ(parse(binary, sizeof binary, 0).status, OTA_OK);
    binary[6 * 32 + 3] = 0;
    CHECK_EQ(parse(binary, sizeof binary, 0).status, OTA_ERR_PARTITION_TABLE);
}

TEST(a_table_cut_before_its_end_marker_is_refused) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    build();
    for (size_t len = 0; len < 7 * 32; len++) {
        CHECK_EQ(parse(binary, len, 0).status, OTA_ERR_PARTITION_TABLE);
    }
    CHECK_EQ(parse(binary, 7 * 32, 0).status, OTA_OK);
}

TEST(offsets_and_sizes_that_wrap_are_outside_the_flash) {
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    table.has_md5 = false;
    table.rows[4].offset = 0xFFFFF000;
    table.rows[4].size = 0x2000;
    build();
    CHECK_EQ(parse(binary, sizeof binary, 0x400000).status, OTA_ERR_PARTITION_TABLE);
    CHECK_EQ(parse(binary, sizeof binary, 0).status, OTA_OK);
    ota_error error = {0};
    CHECK_EQ(ota_esp_partition_table_check(&table, NULL, &error), OTA_ERR_PARTITION_TABLE);
}

TEST(hostile_bytes_end_in_an_error_or_a_table) {
    unsigned seed = 1;
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    build();
    uint8_t good[sizeof binary], again[sizeof binary];
    memcpy(good, binary, sizeof binary);
    int tables = 0;
    for (int round = 0; round < 20000; round++) {
        memcpy(binary, good, sizeof binary);
        for (int i = rand_r(&seed) % 4; i >= 0; i--) {
            binary[rand_r(&seed) % (round % 2 ? sizeof binary : 256)] = (uint8_t)rand_r(&seed);
        }
        if (parse(binary, (size_t)rand_r(&seed) % (sizeof binary + 1), 0x400000).status == OTA_OK) {
            ota_esp_layout layout;
            ota_error error = {0};
            tables++;
            ota_esp_layout_find(&table, &layout, &error);
            ota_esp_partition_table_check(&table, NULL, &error);
            ota_esp_partition_table_to_csv(&table, csv, sizeof csv);
            build();
            CHECK_EQ(ota_esp_partition_table_parse(binary, sizeof binary, 0, &table, &error), OTA_OK);
            memcpy(again, binary, sizeof binary);
            build();
            CHECK_MEM(again, binary, sizeof binary);
        }
    }
    CHECK(tables > 100);
}

/* ---- CSV ---------------------------------------------------------------------------------------------------------- */

TEST(the_usual_tables_come_out_as_documented) {
    CHECK_EQ(from_csv("nvs,data,nvs,,0x4000\notadata,data,ota,,0x2000\nphy_init,data,phy,,0x1000\n"
                      "factory,app,factory,,1M\nota_0,app,ota_0,,1M\nota_1,app,ota_1,,1M",
                      NULL)
                 .status,
             OTA_OK);
    const uint32_t offsets[] = {0x9000, 0xD000, 0xF000, 0x10000, 0x110000, 0x210000};
    for (int i = 0; i < 6; i++) {
        CHECK_EQ(table.rows[i].offset, offsets[i]);
    }
    CHECK_EQ(from_csv("nvs,data,nvs,,0x6000\notadata,data,ota,,0x2000\nphy_init,data,phy,,0x1000\n"
                      "ota_0,app,ota_0,,1700K\nota_1,app,ota_1,,1700k\n",
                      NULL)
                 .status,
             OTA_OK);
    CHECK_EQ(table.rows[3].offset, 0x20000);
    CHECK_EQ(table.rows[4].offset, 0x1D0000);
    CHECK_EQ(table.rows[4].size, 1700 * 1024);
}

TEST(lines_are_forgiving_about_spaces_comments_and_ends) {
    CHECK_EQ(
        from_csv("\xEF\xBB\xBF# a comment\r\n\r\n   # another with $UNKNOWN\n\t nvs\t,DATA ,NVS, 0X9000 ,0X3000 , \r"
                 "a,0x40,0x1,,4k,encrypted:readonly\n \n,1,6,,1m,,,\n",
                 NULL)
            .status,
        OTA_OK);
    CHECK_EQ(table.count, 3);
    CHECK(strcmp(table.rows[0].label, "nvs") == 0);
    CHECK_EQ(table.rows[1].type, 0x40);
    CHECK_EQ(table.rows[1].flags, OTA_ESP_PARTITION_ENCRYPTED | OTA_ESP_PARTITION_READONLY);
    CHECK_EQ(table.rows[1].offset, 0xC000);
    CHECK_EQ(table.rows[2].label[0], 0);
    CHECK_EQ(table.rows[2].size, 1024 * 1024);
}

static const char *lookup(void *user, const char *name) {
    (void)user;
    return strcmp(name, "SIZE") == 0 ? "0x20" : strcmp(name, "REST") == 0 ? "ota_1,app,ota_1,,64K" : NULL;
}

TEST(variables_are_put_in) {
    ota_esp_csv_options options = {.bootloader_offset = OTA_ESP_UNSET, .lookup = lookup};
    CHECK_EQ(from_csv("ota_0,app,ota_0,,${SIZE}000\n$REST\n", &options).status, OTA_OK);
    CHECK_EQ(table.rows[0].size, 0x20000);
    CHECK_EQ(table.rows[1].size, 0x10000);
    ota_error error = from_csv("x,data,fat,,0x1000\ny,data,fat,,$OTHER\n", &options);
    CHECK(strstr(error.text, "line 2") != NULL && strstr(error.text, "OTHER") != NULL);
    CHECK_EQ(error.offset, 19);
    error = from_csv("x,data,fat,,$SIZE\n", NULL);
    CHECK(strstr(error.text, "unknown variable") != NULL);
    error = from_csv("x,data,fat,,$\n", &options);
    CHECK(strstr(error.text, "size") != NULL);
    error = from_csv("x,data,fat,,${SIZE\n", &options);
    CHECK(strstr(error.text, "size") != NULL);
}

TEST(a_negative_size_is_where_the_partition_ends) {
    CHECK_EQ(from_csv("a,data,fat,0x9000,-0x10000\nb,data,fat,,-64K\n", NULL).status, OTA_OK);
    CHECK_EQ(table.rows[0].size, 0x7000);
    CHECK_EQ(table.rows[1].offset, 0x10000);
    CHECK_EQ(table.rows[1].size, 0);
    check_refused("a,data,fat,0x10000,-0x9000\n", "line 1 (a)", "size");
}

TEST(boot_loader_and_table_find_their_own_place) {
    ota_esp_csv_options options = {.bootloader_offset = 0x1000, .recovery_bootloader_offset = 0x3F0000};
    const char *text = "boot,bootloader,primary,N/A,N/A\npt,partition_table,primary,N/A,N/A\n"
                       "nvs,data,nvs,,0x3000\nrec,bootloader,recovery,N/A,N/A\n";
    CHECK_EQ(from_csv(text, &options).status, OTA_OK);
    CHECK_EQ(table.rows[0].offset, 0x1000);
    CHECK_EQ(table.rows[0].size, 0x7000);
    CHECK_EQ(table.rows[1].offset, 0x8000);
    CHECK_EQ(table.rows[1].size, 0x1000);
    CHECK_EQ(table.rows[2].offset, 0x9000);
    CHECK_EQ(table.rows[3].offset, 0x3F0000);
    ota_esp_partition_table_to_csv(&table, csv, sizeof csv);
    CHECK(strstr(csv, "boot,bootloader,primary,0x1000,28K,\npt,partition_table,primary,0x8000,4K,\n") != NULL);
    options.table_offset = 0x10000;
    CHECK_EQ(from_csv("boot,bootloader,primary,,\nnvs,data,nvs,,0x3000\n", &options).status, OTA_OK);
    CHECK_EQ(table.rows[0].size, 0xF000);
    CHECK_EQ(table.rows[1].offset, 0x11000);
    check_refused("boot,bootloader,primary,,\n", "line 1, offset", "not given");
}

TEST(each_rule_of_the_generator_names_line_and_field) {
    check_refused("", "names no partition", "");
    check_refused("# nothing\n\n", "names no partition", "");
    check_refused("nvs\n", "line 1, type", "\"\"");
    check_refused("a,bogus,nvs,,0x3000\n", "line 1, type", "\"bogus\"");
    check_refused("a,255,nvs,,0x3000\n", "line 1, type", "\"255\"");
    check_refused("a,app,,,64K\n", "line 1, subtype", "\"\"");
    check_refused("a,app,nvs,,64K\n", "line 1, subtype", "\"nvs\"");
    check_refused("a,app,ota_16,,64K\n", "line 1, subtype", "\"ota_16\"");
    check_refused("a,app,ota_,,64K\n", "line 1, subtype", "\"ota_\"");
    check_refused("a,data,factory,,64K\n", "line 1, subtype", "\"factory\"");
    check_refused("a,data,fat,,\n", "line 1, size", "empty");
    check_refused("a,data,fat,,0x\n", "line 1, size", "\"0x\"");
    check_refused("a,data,fat,,4G\n", "line 1, size", "\"4G\"");
    check_refused("a,data,fat,,4KK\n", "line 1, size", "\"4KK\"");
    check_refused("a,data,fat,,010\n", "line 1, size", "\"010\"");
    check_refused("a,data,fat,,0x100000000\n", "line 1, size", "\"0x100000000\"");
    check_refused("a,data,fat,,4096M\n", "line 1, size", "\"4096M\"");
    check_refused("a,data,fat,,99999999999999999999999\n", "line 1, size", "");
    check_refused("a,data,fat,-4K,4K\n", "line 1, offset", "\"-4K\"");
    check_refused("a,data,fat,x,4K\n", "line 1, offset", "\"x\"");
    check_refused("a,data,fat,,4K,secret\n", "line 1, flags", "\"secret\"");
    check_refused("a,data,fat,,4K,,more\n", "line 1", "more than 6 fields");
    check_refused("seventeen_letters,data,fat,,4K\n", "line 1, name", "16 bytes");
    check_refused("a,data,fat,0x8000,4K\n", "line 1 (a), offset", "0x9000");
    check_refused("a,data,fat,0x9000,8K\nb,data,fat,0xa000,4K\n", "line 2 (b), offset", "0xb000");
    check_refused("a,data,fat,0x9800,4K\n", "line 1 (a), offset", "0x1000");
    check_refused("a,app,ota_0,0x11000,64K\n", "line 1 (a), offset", "0x10000");
    check_refused("a,app,ota_0,,0x10800\n", "line 1 (a), size", "0x1000");
    check_refused("a,data,fat,,4K\n\na,data,fat,,4K\n", "line 3 (a), name", "line 1 (a)");
    check_refused("a,data,ota,,8K\nb,data,ota,,8K\n", "line 2 (b), subtype", "line 1 (a)");
    check_refused("a,data,ota,,4K\n", "line 1 (a), size", "0x2000");
    check_refused("a,data,tee_ota,,4K\n", "line 1 (a), size", "0x2000");
    check_refused("a,data,nvs,,8K\n", "line 1 (a), size", "readonly");
    check_refused("a,data,ota,,8K,readonly\n", "line 1 (a), flags", "readonly");
    check_refused("a,data,coredump,,64K,readonly\n", "line 1 (a), flags", "readonly");
    check_refused("a,data,fat,0xfffff000,8K\n", "line 1 (a), size", "4 GiB");
    CHECK_EQ(from_csv("a,data,nvs,,8K,readonly\n", NULL).status, OTA_OK);
    CHECK_EQ(from_csv("a,data,,,4K\n", NULL).status, OTA_OK);
    CHECK_EQ(table.rows[0].subtype, OTA_ESP_DATA_UNDEFINED);
}

TEST(overlaps_are_found_in_any_order) {
    ota_esp_partition_table made = {.count = 2};
    ota_error error = {0};
    made.rows[0] = (ota_esp_partition){.type = 1, .subtype = 0x81, .offset = 0xB000, .size = 0x1000, .label = "late"};
    made.rows[1] = (ota_esp_partition){.type = 1, .subtype = 0x81, .offset = 0x9000, .size = 0x2000, .label = "early"};
    CHECK_EQ(ota_esp_partition_table_check(&made, NULL, &error), OTA_OK);
    made.rows[1].size = 0x2001;
    CHECK_EQ(ota_esp_partition_table_check(&made, NULL, &error), OTA_ERR_PARTITION_TABLE);
    CHECK(strstr(error.text, "early") != NULL && strstr(error.text, "late") != NULL);
}

TEST(options_change_the_checks) {
    ota_esp_csv_options options = {.bootloader_offset = OTA_ESP_UNSET, .flash_size = 0x210000};
    CHECK_EQ(from_csv(two_slots, &options).status, OTA_OK);
    options.flash_size = 0x200000;
    CHECK(strstr(from_csv(two_slots, &options).text, "line 5 (ota_1), size") != NULL);
    options = (ota_esp_csv_options){.secure_boot_v1 = true};
    CHECK_EQ(from_csv(two_slots, &options).status, OTA_OK);
    CHECK(strstr(from_csv("a,app,ota_0,,0x11000\n", &options).text, "0x10000") != NULL);
    options = (ota_esp_csv_options){.table_offset = 0x10000};
    CHECK_EQ(from_csv(two_slots, &options).status, OTA_OK);
    CHECK_EQ(table.rows[0].offset, 0x11000);
}

TEST(long_lines_and_nul_bytes_are_refused) {
    static char text[4000];
    ota_error error = {0};
    memset(text, ' ', sizeof text - 1);
    memcpy(text, "a,data,fat,,4K", 14);
    CHECK(strstr(from_csv(text, NULL).text, "longer than") != NULL);
    CHECK_EQ(ota_esp_partition_table_from_csv("a,data,fat\0,,4K\n", 16, NULL, &table, &error), OTA_ERR_PARTITION_TABLE);
    CHECK(strstr(error.text, "NUL") != NULL);
}

TEST(what_is_written_reads_back) {
    CHECK_EQ(from_csv("nvs,data,nvs,,0x3000,encrypted\nx,77,9,,0x123,readonly:encrypted\ntee,app,tee_1,,64K\n"
                      "o,app,ota_15,,1M\nodd,data,0x99,,0\n",
                      NULL)
                 .status,
             OTA_OK);
    ota_esp_partition_table before = table;
    size_t len = ota_esp_partition_table_to_csv(&table, csv, sizeof csv);
    CHECK_EQ(strlen(csv), len);
    CHECK_EQ(ota_esp_partition_table_to_csv(&table, NULL, 0), len);
    char small[20];
    CHECK_EQ(ota_esp_partition_table_to_csv(&table, small, sizeof small), len);
    CHECK_EQ(strlen(small), sizeof small - 1);
    CHECK(strstr(csv, "x,77,9,0xc000,0x123,encrypted:readonly\n") != NULL);
    CHECK(strstr(csv, "odd,data,153,0x") != NULL);
    CHECK_EQ(from_csv(csv, NULL).status, OTA_OK);
    CHECK_EQ(table.count, before.count);
    CHECK_MEM(table.rows, before.rows, sizeof table.rows[0] * before.count);
}

TEST(hostile_csv_ends_in_an_error_or_a_table) {
    unsigned seed = 7;
    static const char letters[] = "0123456789xXKMkm-,,,,:\n\r\t $${}_abcdefnvsotapp#\"\\\xff";
    int tables = 0;
    for (int round = 0; round < 20000; round++) {
        char text[256];
        size_t len = strlen(two_slots);
        memcpy(text, two_slots, len);
        for (int i = rand_r(&seed) % 6; i >= 0; i--) {
            text[(size_t)rand_r(&seed) % len] = letters[(size_t)rand_r(&seed) % sizeof letters];
        }
        len = (size_t)rand_r(&seed) % 4 ? len : (size_t)rand_r(&seed) % len;
        char *exact = malloc(len ? len : 1);
        memcpy(exact, text, len);
        ota_error error = {0};
        if (ota_esp_partition_table_from_csv(exact, len, NULL, &table, &error) == OTA_OK) {
            tables++;
            build();
        } else {
            CHECK_EQ(error.status, OTA_ERR_PARTITION_TABLE);
            CHECK(error.text[0] != '\0');
            CHECK(error.offset <= len);
        }
        free(exact);
    }
    CHECK(tables > 100);
}

/* ---- Slots -------------------------------------------------------------------------------------------------------- */

static ota_error find(const char *text, ota_esp_layout *layout) {
    ota_error error = from_csv(text, NULL);
    CHECK_EQ(error.status, OTA_OK);
    ota_status status = ota_esp_layout_find(&table, layout, &error);
    CHECK_EQ(status, error.status);
    return error;
}

TEST(slots_are_found_by_their_number) {
    ota_esp_layout layout;
    CHECK_EQ(
        find("otadata,data,ota,,8K\nb,app,ota_1,,64K\na,app,ota_0,,64K\nf,app,factory,,64K\nt,app,test,,64K\n", &layout)
            .status,
        OTA_OK);
    CHECK_EQ(layout.slot_count, 2);
    CHECK(strcmp(layout.slots[0]->label, "a") == 0 && strcmp(layout.slots[1]->label, "b") == 0);
    CHECK(strcmp(layout.factory->label, "f") == 0 && strcmp(layout.test->label, "t") == 0);
    CHECK(strcmp(layout.otadata->label, "otadata") == 0);
}

TEST(tables_about_which_boot_loader_and_app_disagree_are_refused) {
    ota_esp_layout layout;
    CHECK(strstr(find("a,app,ota_0,,64K\nc,app,ota_2,,64K\n", &layout).text, "gap") != NULL);
    CHECK(strstr(find("a,app,ota_1,,64K\n", &layout).text, "gap") != NULL);
    CHECK(strstr(find("a,app,ota_0,,64K\nb,app,ota_0,,64K\n", &layout).text, "the same as") != NULL);
    CHECK(strstr(find("a,data,fat,,64K\n", &layout).text, "no app") != NULL);
    CHECK_EQ(from_csv(two_slots, NULL).status, OTA_OK);
    struct {
        uint32_t *field, value;
        const char *words;
    } cases[] = {{&table.rows[1].size, 0x1000, "two sectors"},
                 {&table.rows[1].offset, 0xD800, "offset"},
                 {&table.rows[4].offset, 0x20000, "overlaps"},
                 {&table.rows[3].offset, 0xC000, "overlaps"},
                 {&table.rows[3].size, 0, "offset"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_error error = {0};
        uint32_t kept = *cases[i].field;
        *cases[i].field = cases[i].value;
        CHECK_EQ(ota_esp_layout_find(&table, &layout, &error), OTA_ERR_PARTITION_TABLE);
        CHECK(strstr(error.text, cases[i].words) != NULL);
        *cases[i].field = kept;
    }
    ota_error error = {0};
    CHECK_EQ(ota_esp_layout_find(&table, &layout, &error), OTA_OK);
}

int main(void) {
    RUN(a_table_is_what_it_was_built_from);
    RUN(labels_and_flags_come_back_byte_for_byte);
    RUN(what_a_boot_loader_refuses_is_refused_with_row_and_field);
    RUN(an_end_marker_is_told_by_four_bytes);
    RUN(a_table_cut_before_its_end_marker_is_refused);
    RUN(offsets_and_sizes_that_wrap_are_outside_the_flash);
    RUN(hostile_bytes_end_in_an_error_or_a_table);
    RUN(the_usual_tables_come_out_as_documented);
    RUN(lines_are_forgiving_about_spaces_comments_and_ends);
    RUN(variables_are_put_in);
    RUN(a_negative_size_is_where_the_partition_ends);
    RUN(boot_loader_and_table_find_their_own_place);
    RUN(each_rule_of_the_generator_names_line_and_field);
    RUN(overlaps_are_found_in_any_order);
    RUN(options_change_the_checks);
    RUN(long_lines_and_nul_bytes_are_refused);
    RUN(what_is_written_reads_back);
    RUN(hostile_csv_ends_in_an_error_or_a_table);
    RUN(slots_are_found_by_their_number);
    RUN(tables_about_which_boot_loader_and_app_disagree_are_refused);
    return DONE();
}
