/* See fake_flasher.h. */
#include "fake_flasher.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

#define SECTOR OTA_FLASH_SECTOR
#define BLOCK 65536u

void fake_flasher_init(ota_flasher *fake, uint64_t size) {
    memset(fake, 0, sizeof *fake);
    pthread_mutex_init(&fake->lock, NULL);
    pthread_cond_init(&fake->woken, NULL);
    fake->bytes = malloc((size_t)size);
    if (fake->bytes == NULL) {
        abort();
    }
    memset(fake->bytes, 0xFF, (size_t)size);
    fake->size = size;
    fake->state = OTA_FLASHER_READY;
    fake->fail_at = fake->hang_at = fake->flip_at = UINT64_MAX;
    fake->fail_state = OTA_FLASHER_BROKEN;
    fake->info = (ota_flasher_info){
        .chip_id = 5,
        .chip = "esp32c3",
        .title = "ESP32-C3",
        .has_mac = true,
        .mac = {1, 2, 3, 4, 5, 6},
        .flash_size = size,
        .flash_size_known = true,
        .is_stub = true,
        .block_size = 0x4000,
        .can_deflate = true,
        .can_verify = true,
    };
}

void fake_flasher_end(ota_flasher *fake) {
    ota_flasher_write_abort(fake);
    pthread_cond_destroy(&fake->woken);
    pthread_mutex_destroy(&fake->lock);
    free(fake->bytes);
    fake->bytes = NULL;
}

void fake_flasher_await_hang(ota_flasher *fake) {
    pthread_mutex_lock(&fake->lock);
    while (!fake->hanging) {
        pthread_cond_wait(&fake->woken, &fake->lock);
    }
    pthread_mutex_unlock(&fake->lock);
}

/* One command; OTA_OK: it gets through. */
static ota_status command(ota_flasher *fake, ota_error *error) {
    pthread_mutex_lock(&fake->lock);
    uint64_t number = fake->commands;
    if (fake->state != OTA_FLASHER_READY) {
        pthread_mutex_unlock(&fake->lock);
        return ota_error_set(error, OTA_ERR_STATE, OTA_STAGE_TARGET, 0, 0, "not connected");
    }
    fake->commands++;
    fake->counts.commands++;
    while (number == fake->hang_at && !fake->cancelled) {
        fake->hanging = true;
        pthread_cond_broadcast(&fake->woken);
        pthread_cond_wait(&fake->woken, &fake->lock);
    }
    ota_status status = OTA_OK;
    if (fake->cancelled) {
        fake->state = OTA_FLASHER_STOPPED;
        status = ota_error_set(error, OTA_ERR_CANCELLED, OTA_STAGE_TARGET, 0, 0, "cancelled");
    } else if (number >= fake->fail_at && number - fake->fail_at < fake->fail_count) {
        fake->state = fake->fail_state;
        status = ota_error_set(error, OTA_ERR_SYSTEM, OTA_STAGE_TARGET, 0, 0, "the link is lost");
    }
    pthread_mutex_unlock(&fake->lock);
    if (status < 0) {
        ota_flasher_write_abort(fake);
    }
    return status;
}

ota_flasher_state ota_flasher_get_state(const ota_flasher *fake) {
    ota_flasher *self = (ota_flasher *)fake;
    pthread_mutex_lock(&self->lock);
    ota_flasher_state state = self->state;
    pthread_mutex_unlock(&self->lock);
    return state;
}

const ota_flasher_info *ota_flasher_get_info(const ota_flasher *fake) {
    return &fake->info;
}

ota_flasher_counts ota_flasher_get_counts(const ota_flasher *fake) {
    ota_flasher_counts counts = fake->counts;
    counts.bytes_out = fake->wire;
    return counts;
}

ota_status ota_flasher_connect(ota_flasher *fake, ota_error *error) {
    pthread_mutex_lock(&fake->lock);
    bool gone = fake->state == OTA_FLASHER_GONE || fake->cancelled;
    /* Connecting is a command, too, that may fail. */
    uint64_t number = fake->commands++;
    bool fails = number >= fake->fail_at && number - fake->fail_at < fake->fail_count;
    fake->state = gone ? fake->state : fails ? fake->fail_state : OTA_FLASHER_READY;
    fake->connects++;
    pthread_mutex_unlock(&fake->lock);
    if (fake->other_after) {
        fake->info.mac[5]++;
    }
    return gone || fails ? ota_error_set(error, OTA_ERR_SYSTEM, OTA_STAGE_TARGET, 0, 0, "nobody answers") : OTA_OK;
}

ota_status ota_flasher_reopen(ota_flasher *fake, uint32_t timeout_ms, ota_error *error) {
    (void)timeout_ms;
    (void)error;
    pthread_mutex_lock(&fake->lock);
    fake->state = OTA_FLASHER_OFF;
    fake->reopens++;
    pthread_mutex_unlock(&fake->lock);
    return OTA_OK;
}

void ota_flasher_cancel(ota_flasher *fake) {
    pthread_mutex_lock(&fake->lock);
    fake->cancelled = true;
    pthread_cond_broadcast(&fake->woken);
    pthread_mutex_unlock(&fake->lock);
}

ota_status ota_flasher_read(ota_flasher *fake, uint64_t offset, void *buf, size_t len, ota_error *error) {
    ota_status status = command(fake, error);
    if (status == OTA_OK) {
        memcpy(buf, fake->bytes + offset, len);
        fake->counts.read_bytes += len;
    }
    return status;
}

ota_status ota_flasher_erase(ota_flasher *fake, uint64_t offset, uint64_t len, ota_error *error) {
    ota_status status = command(fake, error);
    if (offset % SECTOR != 0 || len % SECTOR != 0 || len == 0 || !ota_range_inside(offset, len, fake->size) ||
        fake->writing) {
        fake->mistakes++;
    }
    if (status < 0) { /* as far as the link held */
        memset(fake->bytes + offset, 0xFF, SECTOR);
        return status;
    }
    memset(fake->bytes + offset, 0xFF, (size_t)len);
    fake->sectors_erased += len / SECTOR;
    fake->counts.erased_bytes += len;
    return OTA_OK;
}

ota_status ota_flasher_md5(ota_flasher *fake, uint64_t offset, uint64_t len, uint8_t digest[16], ota_error *error) {
    ota_status status = command(fake, error);
    if (fake->writing || !fake->info.can_verify) {
        fake->mistakes++;
    }
    fake->md5s++;
    if (status == OTA_OK) {
        EVP_Digest(fake->bytes + offset, (size_t)len, digest, NULL, EVP_md5(), NULL);
    }
    return status;
}

static bool is_blank(const uint8_t *bytes) {
    for (size_t i = 0; i < SECTOR; i++) {
        if (bytes[i] != 0xFF) {
            return false;
        }
    }
    return true;
}

/* Erases as the stub does until `to` is erased. */
static void erase_ahead(ota_flasher *fake, uint64_t to) {
    uint64_t end = ota_round_up(fake->end, SECTOR);
    while (fake->erased_to < to) {
        uint64_t step = fake->erased_to % BLOCK == 0 && end - fake->erased_to >= BLOCK ? BLOCK : SECTOR;
        if (!fake->dirty_seen) {
            step = SECTOR;
            fake->dirty_seen = !is_blank(fake->bytes + fake->erased_to);
        }
        if (fake->dirty_seen) {
            memset(fake->bytes + fake->erased_to, 0xFF, (size_t)step);
            fake->sectors_erased += step / SECTOR;
        }
        fake->erased_to += step;
    }
}

ota_status ota_flasher_write_begin(ota_flasher *fake, const ota_flasher_write *write, ota_error *error) {
    ota_status status = command(fake, error);
    if (write->offset % SECTOR != 0 || write->size == 0 || !ota_range_inside(write->offset, write->size, fake->size) ||
        (write->deflated && (!fake->info.can_deflate || (!fake->info.is_stub && write->wire_bound == 0)))) {
        fake->mistakes++;
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, write->offset, 0, "a bad write");
    }
    if (status < 0) { /* the first sector may be gone already */
        memset(fake->bytes + write->offset, 0xFF, SECTOR);
        return status;
    }
    ota_flasher_write_abort(fake);
    fake->begins++;
    fake->writing = true;
    fake->deflated = write->deflated;
    fake->dirty_seen = false;
    fake->told = 0;
    fake->begun_at = write->offset;
    fake->at = fake->erased_to = write->offset;
    fake->end = write->offset + write->size;
    erase_ahead(fake, write->offset + SECTOR);
    memset(&fake->zlib, 0, sizeof fake->zlib);
    if (write->deflated && inflateInit(&fake->zlib) != Z_OK) {
        abort();
    }
    return OTA_OK;
}

static void program(ota_flasher *fake, uint64_t at, const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++) {
        fake->bytes[at + i] &= bytes[i];
    }
}

static void put(ota_flasher *fake, const uint8_t *bytes, size_t len) {
    if (len > fake->end - fake->at) {
        fake->mistakes++; /* a stub would spin for ever */
        return;
    }
    erase_ahead(fake, ota_round_up(fake->at + len, SECTOR));
    program(fake, fake->at, bytes, len);
    fake->at += len;
    fake->counts.written_bytes += len;
}

ota_status ota_flasher_write_data(ota_flasher *fake, const void *bytes, size_t len, uint64_t inflated_len,
                                  ota_error *error) {
    uint8_t out[4096], wire[0x4000];
    uint64_t number = fake->commands;
    bool open = fake->writing;
    ota_status status = command(fake, error);
    fake->told += inflated_len;
    if (!open || len > sizeof wire) {
        fake->mistakes++;
    }
    if (status < 0) {
        return status;
    }
    memcpy(wire, bytes, len);
    fake->wire += len;
    if (number == fake->flip_at && !fake->deflated) {
        wire[len / 2] ^= 1;
    }
    if (!fake->deflated) {
        put(fake, wire, len);
        return OTA_OK;
    }
    if (fake->told > fake->end - fake->begun_at) {
        fake->mistakes++; /* more than was announced */
    }
    fake->zlib.next_in = wire;
    fake->zlib.avail_in = (uInt)len;
    int result = Z_OK;
    do {
        fake->zlib.next_out = out;
        fake->zlib.avail_out = sizeof out;
        result = inflate(&fake->zlib, Z_NO_FLUSH);
        size_t got = sizeof out - fake->zlib.avail_out;
        if (number == fake->flip_at && got > 0) {
            out[0] ^= 1;
            fake->flip_at = UINT64_MAX;
        }
        put(fake, out, got);
    } while (result == Z_OK && fake->zlib.avail_out == 0);
    if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
        fake->mistakes++;
    }
    return OTA_OK;
}

ota_status ota_flasher_write_end(ota_flasher *fake, ota_error *error) {
    ota_status status = command(fake, error);
    if (status == OTA_OK && (!fake->writing || fake->at != fake->end || fake->told != fake->end - fake->begun_at)) {
        fake->mistakes++;
    }
    ota_flasher_write_abort(fake);
    return status;
}

void ota_flasher_write_abort(ota_flasher *fake) {
    if (fake->writing && fake->deflated) {
        inflateEnd(&fake->zlib);
    }
    fake->writing = false;
}

ota_status ota_flasher_program(ota_flasher *fake, uint64_t offset, const void *buf, size_t len, ota_error *error) {
    ota_status status = command(fake, error);
    if (status == OTA_OK) {
        program(fake, offset, buf, len);
    }
    return status;
}
