/* Feeds a fuzz entry without a fuzzer: short random bytes, every file named, and mutations of it; the same in every run.
 *
 *     program MUTATIONS FILE...
 *
 * Each file counts as it is, cut at a few lengths, and MUTATIONS times changed (fewer times when it is large). Every input
 * lies in a block of exactly its length, so that AddressSanitizer sees a read behind it. When a sanitizer or an abort ends
 * the program, the file and the number of the input are printed: the same number fails again in the next run. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

#define BYTES_A_FILE (8ul << 20) /* so much is fed of mutations of one file: a few seconds under sanitizers */
#define RANDOM_INPUTS 256

static const char *current_file = "(random bytes)";
static unsigned long current_number;
static unsigned long fed;

static void say_which(void) {
    fprintf(stderr, "failing input: %s, number %lu\n", current_file, current_number);
    fflush(stderr);
}

static void on_abort(int number) {
    say_which();
    signal(number, SIG_DFL);
    raise(number);
}

static void feed(const uint8_t *data, size_t len) {
    uint8_t *exact = malloc(len ? len : 1);
    if (exact == NULL) {
        exit(2);
    }
    memcpy(exact, data, len);
    LLVMFuzzerTestOneInput(exact, len);
    free(exact);
    fed++;
    current_number++;
}

/* xorshift64* (Vigna 2016): small, and the same on every machine. */
static uint64_t state;

static uint64_t draw(uint64_t below) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545F4914F6CDD1DULL >> 11) % below;
}

static const uint32_t interesting[] = {0,          1,          2,          0x7F,       0x80,       0xFF,
                                       0x100,      0x7FFF,     0x8000,     0xFFFF,     0x10000,    0x7FFFFFFF,
                                       0x80000000, 0xFFFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF, 0x00001000, 0xE9};

static void put(uint8_t *data, size_t len, size_t at, uint32_t value, size_t width) {
    for (size_t i = 0; i < width && at + i < len; i++) {
        data[at + i] = (uint8_t)(value >> (8 * i));
    }
}

/* Changes `data` in place, which has room for twice `len`; returns the new length. Half of all changes fall into the first
 * 512 bytes, where the headers are. */
static size_t mutate(uint8_t *data, size_t len) {
    uint64_t changes = 1 + draw(4);
    while (changes-- > 0 && len > 0) {
        size_t reach = draw(2) && len > 512 ? 512 : len;
        size_t at = (size_t)draw(reach);
        size_t run = 1 + (size_t)draw(32);
        run = run < len - at ? run : len - at;
        switch (draw(8)) {
        case 0:
            data[at] ^= (uint8_t)(1u << draw(8));
            break;
        case 1:
            data[at] = (uint8_t)draw(256);
            break;
        case 2:
            put(data, len, at, interesting[draw(sizeof interesting / sizeof interesting[0])], (size_t)1 << draw(3));
            break;
        case 3:
            put(data, len, at & ~(size_t)3, interesting[draw(sizeof interesting / sizeof interesting[0])], 4);
            break;
        case 4: /* cut out */
            memmove(data + at, data + at + run, len - at - run);
            len -= run;
            break;
        case 5: /* double */
            memmove(data + at + run, data + at, len - at);
            len += run;
            break;
        case 6:
            len = at;
            break;
        default:
            memset(data + at, draw(2) ? 0xFF : 0, run);
            break;
        }
    }
    return len;
}

static void feed_file(const char *path, unsigned long mutations) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        exit(2);
    }
    size_t len = (size_t)ftell(file);
    rewind(file);
    uint8_t *original = malloc(len + 1);
    uint8_t *changed = malloc(2 * len + 256);
    if (original == NULL || changed == NULL || fread(original, 1, len, file) != len) {
        perror(path);
        exit(2);
    }
    fclose(file);
    current_file = path;
    current_number = 0;
    state = 0x9E3779B97F4A7C15ULL + len;
    feed(original, len);
    for (unsigned shift = 1; shift < 8; shift++) {
        feed(original, len - (len >> shift));
        feed(original, len >> shift);
    }
    unsigned long affordable = BYTES_A_FILE / (len + 64);
    for (unsigned long i = 0; i < mutations && i < affordable; i++) {
        memcpy(changed, original, len);
        size_t changed_len = mutate(changed, len);
        feed(changed, changed_len);
    }
    free(original);
    free(changed);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MUTATIONS FILE...\n", argv[0]);
        return 2;
    }
    signal(SIGABRT, on_abort);
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(say_which);
    }
    unsigned long mutations = strtoul(argv[1], NULL, 10);
    state = 1;
    for (size_t i = 0; i < RANDOM_INPUTS; i++) {
        uint8_t bytes[RANDOM_INPUTS];
        for (size_t at = 0; at < i; at++) {
            bytes[at] = (uint8_t)draw(256);
        }
        feed(bytes, i);
    }
    for (int i = 2; i < argc; i++) {
        feed_file(argv[i], mutations);
    }
    printf("%lu inputs\n", fed);
    return 0;
}
