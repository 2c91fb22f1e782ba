/* See flash_serial.h. Reads of up to a sector are kept: partition table, otadata and app descriptors are asked for again and
 * again. Whatever is written is forgotten first, so what is read back after a write comes from the chip.
 *
 * Otadata stays power-safe although a program through the boot ROM erases the sectors it touches once more before it writes:
 * the plans of esp/esp_otadata.h program an entry into a sector that is erased already (the sector's rest is blank, so
 * ota_flasher_program reads nothing back into it), and touch the other sector only in an operation of its own. A cut between
 * that erase and the program leaves what a cut before the program would, a blank entry; a cut inside the program leaves an
 * entry whose CRC does not fit, which counts as blank. Both are states the plans are made for. */
#include "flasher/flash_serial.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

#define KEPT_MAX 16 /* reads kept: partition table, two otadata entries, starts of the slots */

typedef struct kept_read {
    uint64_t offset;
    size_t len; /* 0: free */
    uint8_t bytes[OTA_FLASH_SECTOR];
} kept_read;

typedef struct flash_serial {
    ota_flash flash;
    ota_flasher *flasher;
    uint32_t next; /* the kept read that makes room */
    kept_read kept[KEPT_MAX];
} flash_serial;

static bool overlaps(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len) {
    return a < b + b_len && b < a + a_len;
}

static ota_status outside(ota_error *error, const ota_flash *flash, uint64_t offset, uint64_t len) {
    return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, offset, 0,
                         "%llu bytes at 0x%llx are not inside the flash of %llu bytes, or not whole sectors",
                         (unsigned long long)len, (unsigned long long)offset, (unsigned long long)flash->size);
}

static void forget_range(flash_serial *self, uint64_t offset, uint64_t len) {
    for (size_t i = 0; i < KEPT_MAX; i++) {
        if (overlaps(self->kept[i].offset, self->kept[i].len, offset, len)) {
            self->kept[i].len = 0;
        }
    }
}

/* What answers a read without the chip; NULL: nothing does. */
static const uint8_t *find(const flash_serial *self, uint64_t offset, size_t len) {
    for (size_t i = 0; i < KEPT_MAX; i++) {
        const kept_read *kept = &self->kept[i];
        if (offset >= kept->offset && ota_range_inside(offset - kept->offset, len, kept->len)) {
            return kept->bytes + (offset - kept->offset);
        }
    }
    return NULL;
}

static ota_status flash_serial_read(ota_flash *flash, uint64_t offset, void *buf, size_t len, ota_error *error) {
    flash_serial *self = (flash_serial *)flash;
    if (!ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    const uint8_t *there = find(self, offset, len);
    if (there != NULL) {
        memcpy(buf, there, len);
        return OTA_OK;
    }
    ota_status status = ota_flasher_read(self->flasher, offset, buf, len, error);
    if (status < 0) {
        return status;
    }
    flash->reads++;
    flash->bytes_read += len;
    if (len <= OTA_FLASH_SECTOR) {
        kept_read *kept = &self->kept[self->next];
        self->next = (self->next + 1) % KEPT_MAX;
        kept->offset = offset;
        kept->len = len;
        memcpy(kept->bytes, buf, len);
    }
    return OTA_OK;
}

static ota_status flash_serial_erase(ota_flash *flash, uint64_t offset, uint64_t len, ota_error *error) {
    flash_serial *self = (flash_serial *)flash;
    if (offset % OTA_FLASH_SECTOR != 0 || len % OTA_FLASH_SECTOR != 0 || !ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    forget_range(self, offset, len);
    ota_status status = len > 0 ? ota_flasher_erase(self->flasher, offset, len, error) : OTA_OK;
    if (status >= 0) {
        flash->erases++;
        flash->sectors_erased += len / OTA_FLASH_SECTOR;
    }
    return status;
}

static ota_status flash_serial_program(ota_flash *flash, uint64_t offset, const void *buf, size_t len,
                                       ota_error *error) {
    flash_serial *self = (flash_serial *)flash;
    if (!ota_range_inside(offset, len, flash->size)) {
        return outside(error, flash, offset, len);
    }
    /* All of the sectors: the rest of them may be erased and written again. */
    uint64_t start = ota_round_down(offset, OTA_FLASH_SECTOR);
    forget_range(self, start, ota_round_up(offset + len, OTA_FLASH_SECTOR) - start);
    ota_status status = len > 0 ? ota_flasher_program(self->flasher, offset, buf, len, error) : OTA_OK;
    if (status >= 0) {
        flash->programs++;
        flash->bytes_programmed += len;
    }
    return status;
}

/* A chip answers when the bytes are in flash. */
static ota_status flash_serial_sync(ota_flash *flash, ota_error *error) {
    (void)error;
    flash->syncs++;
    return OTA_OK;
}

static void flash_serial_close(ota_flash *flash) {
    free(flash);
}

static const ota_flash_ops flash_serial_ops = {
    .read = flash_serial_read,
    .erase = flash_serial_erase,
    .program = flash_serial_program,
    .sync = flash_serial_sync,
    .close = flash_serial_close,
};

ota_status ota_flash_serial_new(ota_flasher *flasher, ota_flash **out, ota_error *error) {
    *out = NULL;
    if (ota_flasher_get_state(flasher) != OTA_FLASHER_READY) {
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "the chip is not connected");
    }
    const ota_flasher_info *info = ota_flasher_get_info(flasher);
    if (info->secure_download) {
        return ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_TARGET, 0, 0,
                             "%s is in secure download mode: its flash cannot be read", info->title);
    }
    flash_serial *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for a flash");
    }
    self->flash.ops = &flash_serial_ops;
    self->flash.size = info->flash_size;
    self->flasher = flasher;
    *out = &self->flash;
    return OTA_OK;
}

ota_flasher *ota_flash_serial_flasher(const ota_flash *flash) {
    return ((const flash_serial *)flash)->flasher;
}

void ota_flash_serial_forget(ota_flash *flash) {
    flash_serial *self = (flash_serial *)flash;
    for (size_t i = 0; i < KEPT_MAX; i++) {
        self->kept[i].len = 0;
    }
}
