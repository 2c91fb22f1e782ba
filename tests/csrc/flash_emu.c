#include "flash_emu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

void flash_emu_lose_power(flash_emu *emu) {
    if (emu->cache == FLASH_EMU_NO_CACHE) {
        return;
    }
    for (uint64_t at = 0; at < emu->flash.size; at += OTA_FLASH_SECTOR) {
        if (memcmp(emu->bytes + at, emu->synced + at, OTA_FLASH_SECTOR) == 0) {
            continue;
        }
        emu->seed = emu->seed * 1664525u + 1013904223u;
        if (emu->cache == FLASH_EMU_LOSES_ALL || (emu->seed >> 16 & 1) != 0) {
            memcpy(emu->bytes + at, emu->synced + at, OTA_FLASH_SECTOR);
        }
    }
    memcpy(emu->synced, emu->bytes, emu->flash.size);
}

/* When the plan took the power in this operation. */
static void lose(flash_emu *emu) {
    if (emu->fault != NULL && emu->fault->lost) {
        flash_emu_lose_power(emu);
    }
}

static ota_status report(ota_error *error, uint64_t offset, int errnum, const char *what) {
    return errnum == 0 ? OTA_OK : ota_error_set_errno(error, OTA_STAGE_TARGET, offset, errnum, what);
}

static ota_status refuse(flash_emu *emu, ota_error *error, uint64_t offset) {
    emu->refused++;
    return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, offset, 0, "not inside the flash");
}

static ota_status emu_read(ota_flash *flash, uint64_t offset, void *buf, size_t len, ota_error *error) {
    flash_emu *emu = (flash_emu *)flash;
    uint64_t take;
    if (!ota_range_inside(offset, len, flash->size)) {
        return refuse(emu, error, offset);
    }
    int errnum = ota_fault_check(emu->fault, OTA_FAULT_READ, offset, len, &take);
    lose(emu);
    if (errnum == 0) {
        flash->reads++;
        flash->bytes_read += len;
        memcpy(buf, emu->bytes + offset, len);
    }
    return report(error, offset, errnum, "reading flash");
}

static ota_status emu_erase(ota_flash *flash, uint64_t offset, uint64_t len, ota_error *error) {
    flash_emu *emu = (flash_emu *)flash;
    uint64_t take;
    if (offset % OTA_FLASH_SECTOR != 0 || len % OTA_FLASH_SECTOR != 0 || !ota_range_inside(offset, len, flash->size)) {
        return refuse(emu, error, offset);
    }
    int errnum = ota_fault_check(emu->fault, OTA_FAULT_ERASE, offset, len, &take);
    memset(emu->bytes + offset, 0xFF, take);
    for (uint64_t at = offset; at < offset + take; at += OTA_FLASH_SECTOR) {
        emu->erased[at / OTA_FLASH_SECTOR]++;
    }
    lose(emu);
    if (errnum == 0) {
        flash->erases++;
        flash->sectors_erased += len / OTA_FLASH_SECTOR;
    }
    return report(error, offset, errnum, "erasing flash");
}

static ota_status emu_program(ota_flash *flash, uint64_t offset, const void *buf, size_t len, ota_error *error) {
    flash_emu *emu = (flash_emu *)flash;
    const uint8_t *data = buf;
    uint64_t take;
    if (!ota_range_inside(offset, len, flash->size)) {
        return refuse(emu, error, offset);
    }
    int errnum = ota_fault_check(emu->fault, OTA_FAULT_WRITE, offset, len, &take);
    for (uint64_t i = 0; i < take; i++) {
        emu->clashes += (emu->bytes[offset + i] & data[i]) != data[i];
        emu->bytes[offset + i] &= data[i];
        emu->programmed[offset + i]++;
    }
    lose(emu);
    if (errnum == 0) {
        flash->programs++;
        flash->bytes_programmed += len;
    }
    return report(error, offset, errnum, "programming flash");
}

static ota_status emu_sync(ota_flash *flash, ota_error *error) {
    flash_emu *emu = (flash_emu *)flash;
    uint64_t take;
    int errnum = ota_fault_check(emu->fault, OTA_FAULT_SYNC, 0, 0, &take);
    lose(emu);
    if (errnum == 0) {
        flash->syncs++;
        memcpy(emu->synced, emu->bytes, flash->size);
    }
    return report(error, 0, errnum, "syncing flash");
}

static void emu_close(ota_flash *flash) {
    (void)flash;
}

static const ota_flash_ops emu_ops = {emu_read, emu_erase, emu_program, emu_sync, emu_close};

void flash_emu_init(flash_emu *emu, uint64_t size) {
    memset(emu, 0, sizeof *emu);
    emu->flash.ops = &emu_ops;
    emu->flash.size = size;
    emu->bytes = malloc(size);
    emu->synced = malloc(size);
    emu->programmed = calloc(1, size);
    emu->erased = calloc(1, size / OTA_FLASH_SECTOR);
    if (!emu->bytes || !emu->synced || !emu->programmed || !emu->erased) {
        puts("no memory for the emulated flash");
        exit(2);
    }
    memset(emu->bytes, 0xFF, size);
    memset(emu->synced, 0xFF, size);
}

void flash_emu_free(flash_emu *emu) {
    free(emu->bytes);
    free(emu->synced);
    free(emu->programmed);
    free(emu->erased);
    memset(emu, 0, sizeof *emu);
}

void flash_emu_load(flash_emu *emu, uint64_t offset, const void *data, size_t len) {
    memcpy(emu->bytes + offset, data, len);
    memcpy(emu->synced + offset, data, len);
}

void flash_emu_count_anew(flash_emu *emu) {
    memset(emu->programmed, 0, emu->flash.size);
    memset(emu->erased, 0, emu->flash.size / OTA_FLASH_SECTOR);
    emu->clashes = 0;
}

static unsigned most(const uint8_t *counts, uint64_t len) {
    unsigned most = 0;
    for (uint64_t i = 0; i < len; i++) {
        most = counts[i] > most ? counts[i] : most;
    }
    return most;
}

unsigned flash_emu_most_programmed(const flash_emu *emu) {
    return most(emu->programmed, emu->flash.size);
}

unsigned flash_emu_most_erased(const flash_emu *emu) {
    return most(emu->erased, emu->flash.size / OTA_FLASH_SECTOR);
}
