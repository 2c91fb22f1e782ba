/* An ESP32's flash as a whole: which slots there are, which image runs and which boots next, and a sink for the others.
 *
 * Everything that is written goes through the ota_flash: otadata one operation at a time with a sync after each, in the order
 * the plans of esp/esp_otadata.h give, so that a power cut anywhere leaves a chip that boots the old or the new image. An image
 * becomes bootable only after it was read back and found whole.
 *
 * Slots have the numbers of esp/esp_otadata.h: 0.. for ota_0.., OTA_ESP_SLOT_FACTORY, OTA_ESP_SLOT_TEST.
 * Functions may be called from any thread; a target does one thing at a time. */
#ifndef OTA_TARGET_ESP_TARGET_H
#define OTA_TARGET_ESP_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "esp/esp_image.h"
#include "esp/esp_otadata.h"
#include "esp/esp_partition_table.h"
#include "port/port.h"
#include "sink/sink.h"

#define OTA_ESP_TARGET_SLOTS_MAX (OTA_ESP_OTA_SLOTS_MAX + 2) /* ota_0.., factory, test */

typedef struct ota_esp_target_options {
    ota_flash *flash;          /* borrowed, outlives the target */
    uint64_t table_offset;     /* of the partition table in flash; 0: 0x8000 */
    ota_esp_image_rules rules; /* the chip; slot_size, spi_flash_mode, bytes_after_allowed and kind are not used */
    bool rollback;             /* boot loader and app were built with app rollback */
    bool anti_rollback;        /* with secure version checks too */
    uint32_t secure_version;   /* of the eFuses */
    int running; /* slot whose image runs; OTA_ESP_SLOT_NONE or one the table lacks: the chip is off. Then what would boot
                    now counts as running, and whatever changes the chip first switches it on: the boot loader makes its
                    choice, with all it writes */
    bool
        stopped; /* with `running` NONE: the chip is not off, a debugger or flasher holds it. What ran last counts as running
                     (ota_esp_last_run), and its entry stays as it is. Its slot is looked at for an app's header and
                     descriptor alone; only where they are missing, all images are read to find what boots */
} ota_esp_target_options;

typedef struct ota_esp_slot {
    int number;
    const char *name; /* "ota_0", "factory", "test"; lives for ever */
    char label[17];   /* of the partition table */
    uint64_t offset, size;
} ota_esp_slot;

typedef struct ota_esp_target ota_esp_target;

/* Reads the partition table, and where needed otadata and images to find out what runs. Writes nothing. The plan's errors
 * are ERR_PARTITION_TABLE, ERR_OTADATA, and whatever the flash reports. */
ota_status ota_esp_target_new(const ota_esp_target_options *options, ota_esp_target **out, ota_error *error);
/* After the last sink of it is free. */
void ota_esp_target_free(ota_esp_target **target);

/* ---- What is there ------------------------------------------------------------------------------------------------ */

/* Slots in the order ota_0 .., factory, test; `*count` rows that live as long as the target. */
const ota_esp_slot *ota_esp_target_slots(const ota_esp_target *target, size_t *count);
const ota_esp_partition_table *ota_esp_target_table(const ota_esp_target *target);

/* Slot whose image runs, or of a chip that is off would run; OTA_ESP_SLOT_NONE: nothing boots. */
int ota_esp_target_running(ota_esp_target *target);
/* The smallest secure version accepted. It rises when a boot or mark_valid burns eFuses; whoever keeps them looks afterwards. */
uint32_t ota_esp_target_secure_version(ota_esp_target *target);

/* The slot an update goes to. ERR_NOT_FOUND: there is none but the running one. */
ota_status ota_esp_target_next_slot(ota_esp_target *target, int *slot, ota_error *error);

/* Image header and app descriptor of what lies in a slot, whole image or not. ERR_IMAGE_MAGIC, ERR_IMAGE_DESCRIPTOR, ... */
ota_status ota_esp_target_describe(ota_esp_target *target, int slot, ota_esp_image_header *header,
                                   ota_esp_app_descriptor *descriptor, ota_error *error);

/* Reads a slot's image and checks all of it as the boot loader does. `*image_size` (may be NULL): its bytes. */
ota_status ota_esp_target_verify(ota_esp_target *target, int slot, uint64_t *image_size, ota_error *error);

/* Both otadata entries. ERR_NOT_FOUND: the table has no otadata. */
ota_status ota_esp_target_entries(ota_esp_target *target, ota_esp_otadata_entry entries[2], ota_error *error);

/* State of a slot's entry. ERR_NOT_FOUND: it has none; ERR_UNSUPPORTED: factory and test never have one. */
ota_status ota_esp_target_state(ota_esp_target *target, int slot, uint32_t *state, ota_error *error);

/* ---- Changes ------------------------------------------------------------------------------------------------------ */

/* A sink for a slot. Nothing is changed before its open, which makes sure that only the running image boots from then on (ERR_SLOT_RUNNING, ERR_PENDING_VERIFY,
 * also told here already; ERR_BUSY: the slot is being written), its commit does what set_boot does when `activate`. */
ota_status ota_esp_target_sink_new(ota_esp_target *target, int slot, bool activate, bool rewrite_same, ota_sink **out,
                                   ota_error *error);

/* What a sink that writes a slot by other means than the target's flash has to call; all from one thread at a time. */
typedef struct ota_esp_hooks {
    uint64_t offset, size; /* of the slot in flash */
    /* Before the first erase: makes sure that only the running image boots from then on. May be called again after the chip
     * was away, once `end` was. */
    ota_status (*begin)(void *user, ota_error *error);
    /* Does what set_boot does. `image`: the image's `len` bytes, when the chip's own digest said that the slot holds them; they
     * are checked in place of what would be read back. NULL: it is read back. May be called again when it failed. */
    ota_status (*commit)(void *user, const uint8_t *image, size_t len, ota_error *error);
    void (*end)(void *user); /* once after each begin that succeeded */
    void *user;              /* part of the target */
} ota_esp_hooks;

/* Changes nothing. The errors of ota_esp_target_sink_new. */
ota_status ota_esp_target_get_hooks(ota_esp_target *target, int slot, ota_esp_hooks *hooks, ota_error *error);

/* Verifies the slot's image as it lies in flash, then makes it the next one to boot. The image's own errors, ERR_SECURE_VERSION
 * (and as the firmware does, the slot is erased then, unless it runs), ERR_ARGUMENT. */
ota_status ota_esp_target_set_boot(ota_esp_target *target, int slot, ota_error *error);

/* Confirms the running image. ERR_STATE: the active entry does not name the running slot. */
ota_status ota_esp_target_mark_valid(ota_esp_target *target, ota_error *error);

/* Before a chip that was stopped is restarted: an image on trial gets its trial again. Writes nothing otherwise. */
ota_status ota_esp_target_retry(ota_esp_target *target, ota_error *error);

/* Marks the running image invalid; the next boot takes another one. ERR_ROLLBACK with nothing changed: there is none. */
ota_status ota_esp_target_mark_invalid(ota_esp_target *target, ota_error *error);

/* Whether mark_invalid would be allowed, and which slot would boot (`to` may be NULL). OTA_OK, ERR_ROLLBACK, ERR_STATE. */
ota_status ota_esp_target_can_rollback(ota_esp_target *target, int *to, ota_error *error);

/* ---- Boot --------------------------------------------------------------------------------------------------------- */

/* What the boot loader would do now; changes nothing. */
ota_status ota_esp_target_choose(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error);

/* A restart: the boot loader's choice with all it writes. The slot that boots is the running one from then on. */
ota_status ota_esp_target_boot(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error);

#endif
