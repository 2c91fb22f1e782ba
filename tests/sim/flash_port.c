/* Writes files to a chip at a port with the flasher, checks each by MD5 and by reading it back, erases and reads on request.
 *
 *     flash_port PORT CHIP BAUD STUB [CHIP-STUB...] -- COMMAND...
 *
 * STUB: "-", or five words: ENTRY TEXT_START TEXT_FILE DATA_START DATA_FILE. Commands, in order: `write OFFSET FILE`,
 * `deflate OFFSET FILE`, `erase OFFSET SIZE`, `program OFFSET FILE`, `info`, `reset`. Ends with one line of counts, or with the
 * error and exit status 1.
 *
 * sources: flasher/chip.c flasher/flasher.c flasher/rom_command.c flasher/rom_exchange.c flasher/rom_loader.c
 *     flasher/rom_write.c flasher/slip.c port/port_posix_serial.c port/port_posix_tty.c port/port_posix_clock.c port/fault.c
 *     base/bytes.c base/status.c
 * libs: zlib libcrypto */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include <openssl/evp.h>

#include "flasher/flasher.h"
#include "port/port.h"

static uint8_t *read_file(const char *path, size_t *len) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(2);
    }
    fseek(file, 0, SEEK_END);
    *len = (size_t)ftell(file);
    rewind(file);
    uint8_t *bytes = malloc(*len + 1);
    if (bytes == NULL || fread(bytes, 1, *len, file) != *len) {
        perror(path);
        exit(2);
    }
    fclose(file);
    return bytes;
}

static ota_status check(ota_flasher *flasher, uint64_t offset, const uint8_t *bytes, size_t len, ota_error *error) {
    uint8_t want[EVP_MAX_MD_SIZE], got[16];
    EVP_Digest(bytes, len, want, NULL, EVP_md5(), NULL);
    ota_status status = ota_flasher_md5(flasher, offset, len, got, error);
    if (status < 0)
        return status;
    if (memcmp(want, got, 16) != 0) {
        printf("error: MD5 differs at %#" PRIx64 "\n", offset);
        exit(1);
    }
    if (!ota_flasher_get_info(flasher)->is_stub && len > 4096)
        len = 4096; /* 64 bytes each command */
    uint8_t *copy = malloc(len);
    if (copy == NULL)
        exit(2);
    status = ota_flasher_read(flasher, offset, copy, len, error);
    if (status >= 0 && memcmp(copy, bytes, len) != 0) {
        printf("error: read back differs at %#" PRIx64 "\n", offset);
        exit(1);
    }
    free(copy);
    return status;
}

static ota_status write_file(ota_flasher *flasher, uint64_t offset, const char *path, bool deflated, ota_error *error) {
    size_t len;
    uint8_t *bytes = read_file(path, &len);
    uLongf packed_len = compressBound((uLong)len);
    uint8_t *packed = malloc(packed_len);
    if (packed == NULL || compress2(packed, &packed_len, bytes, (uLong)len, 9) != Z_OK)
        exit(2);
    ota_flasher_write write = {
        .offset = offset,
        .size = len,
        .deflated = deflated,
        .wire_bound = deflated ? packed_len : 0,
    };
    ota_status status = ota_flasher_write_begin(flasher, &write, error);
    if (status >= 0)
        status = deflated ? ota_flasher_write_data(flasher, packed, packed_len, len, error)
                          : ota_flasher_write_data(flasher, bytes, len, len, error);
    if (status >= 0)
        status = ota_flasher_write_end(flasher, error);
    if (status >= 0)
        status = check(flasher, offset, bytes, len, error);
    free(packed);
    free(bytes);
    return status;
}

static ota_status program_file(ota_flasher *flasher, uint64_t offset, const char *path, ota_error *error) {
    size_t len;
    uint8_t *bytes = read_file(path, &len);
    ota_status status = ota_flasher_program(flasher, offset, bytes, len, error);
    free(bytes);
    return status;
}

static void print_info(const ota_flasher_info *info) {
    printf("%s mac %02x%02x%02x%02x%02x%02x flash %06" PRIx32 " size %" PRIu64 " stub %d baud %" PRIu32 "\n",
           info->chip, info->mac[0], info->mac[1], info->mac[2], info->mac[3], info->mac[4], info->mac[5],
           info->flash_id, info->flash_size, info->is_stub, info->baud);
}

int main(int argc, char **argv) {
    if (argc < 6)
        return 2;
    const char *port = argv[1];
    ota_flasher_stub stub = {.name = argv[2]};
    int next = 4;
    bool has_stub = strcmp(argv[next], "-") != 0;
    if (has_stub) {
        if (argc < next + 6)
            return 2;
        stub.entry = (uint32_t)strtoul(argv[next], NULL, 0);
        stub.text_start = (uint32_t)strtoul(argv[next + 1], NULL, 0);
        stub.text = read_file(argv[next + 2], &stub.text_len);
        stub.data_start = (uint32_t)strtoul(argv[next + 3], NULL, 0);
        stub.data = read_file(argv[next + 4], &stub.data_len);
        next += 4;
    }
    next++;

    ota_error error = {0};
    ota_serial *serial = NULL;
    ota_flasher *flasher = NULL;
    ota_status status = ota_port_serial_open(port, NULL, &serial, &error);
    if (status >= 0) {
        ota_flasher_options options = {
            .serial = serial,
            .before = OTA_FLASHER_NO_RESET,
            .after = OTA_FLASHER_STAY,
            .baud = (uint32_t)strtoul(argv[3], NULL, 0),
            .stubs = &stub,
            .stub_count = has_stub ? 1 : 0,
        };
        status = ota_flasher_new(&options, &flasher, &error);
    }
    if (status >= 0)
        status = ota_flasher_connect(flasher, &error);
    while (status >= 0 && next < argc) {
        const char *command = argv[next++];
        bool is_write = strcmp(command, "write") == 0;
        if (strcmp(command, "info") == 0) {
            print_info(ota_flasher_get_info(flasher));
            continue;
        }
        if (strcmp(command, "reset") == 0) {
            status = ota_flasher_reset(flasher, OTA_FLASHER_WATCHDOG_RESET, &error);
            continue;
        }
        if (next + 2 > argc)
            return 2;
        uint64_t offset = strtoull(argv[next], NULL, 0);
        const char *what = argv[next + 1];
        next += 2;
        if (is_write || strcmp(command, "deflate") == 0)
            status = write_file(flasher, offset, what, !is_write, &error);
        else if (strcmp(command, "program") == 0)
            status = program_file(flasher, offset, what, &error);
        else if (strcmp(command, "erase") == 0)
            status = ota_flasher_erase(flasher, offset, strtoull(what, NULL, 0), &error);
        else
            return 2;
    }
    int result = 0;
    if (status < 0) {
        printf("error: %s: %s\n", ota_status_name(status), error.text);
        result = 1;
    } else {
        ota_flasher_counts counts = ota_flasher_get_counts(flasher);
        printf("commands %" PRIu64 " retries %" PRIu64 " out %" PRIu64 "\n", counts.commands, counts.retries,
               counts.bytes_out);
    }
    ota_flasher_free(&flasher);
    if (serial != NULL)
        serial->ops->close(serial);
    free((void *)(uintptr_t)stub.text);
    free((void *)(uintptr_t)stub.data);
    return result;
}
