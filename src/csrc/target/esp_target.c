/* See esp_target.h. The decisions are made in esp/; here they are given the flash to look at and carried out. */
#include "target/esp_target.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

#define BUFFER_SIZE 65536u /* read at a time when an image is verified */

/* What a sink's hooks need; one for each slot, part of the target. */
typedef struct slot_writer {
    ota_esp_target *target;
    int slot;
    bool busy;
} slot_writer;

struct ota_esp_target {
    pthread_mutex_t lock; /* of everything below that changes; flash has its own */
    ota_flash *flash;
    ota_esp_image_rules rules;
    bool rollback, anti_rollback;
    uint32_t secure_version;
    int running;
    bool is_off; /* the boot loader has not run yet */
    ota_esp_partition_table table;
    ota_esp_layout layout; /* points into table */
    ota_esp_slot slots[OTA_ESP_TARGET_SLOTS_MAX];
    slot_writer writers[OTA_ESP_TARGET_SLOTS_MAX];
    size_t slot_count;
    uint8_t *buffer; /* BUFFER_SIZE bytes, under the lock */
};

/* ---- Looking --------------------------------------------------------------------------------------------------------- */

static const ota_esp_slot *find_slot(const ota_esp_target *target, int number) {
    for (size_t i = 0; i < target->slot_count; i++) {
        if (target->slots[i].number == number) {
            return &target->slots[i];
        }
    }
    return NULL;
}

static ota_status need_slot(const ota_esp_target *target, int number, const ota_esp_slot **slot, ota_error *error) {
    *slot = find_slot(target, number);
    return *slot != NULL ? OTA_OK
                         : ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, 0, 0,
                                         "the partition table has no slot number %d", number);
}

static ota_status read_flash(const ota_esp_target *target, uint64_t offset, void *buf, size_t len, ota_error *error) {
    return target->flash->ops->read(target->flash, offset, buf, len, error);
}

/* The two entries; blank ones where the table has no otadata. */
static ota_status read_entries(const ota_esp_target *target, ota_esp_otadata_entry entries[2], ota_error *error) {
    uint8_t data[OTA_ESP_OTADATA_ENTRY_SIZE];
    for (int i = 0; i < 2; i++) {
        memset(data, 0xFF, sizeof data);
        if (target->layout.otadata != NULL) {
            uint64_t offset = target->layout.otadata->offset + (uint64_t)i * OTA_FLASH_SECTOR;
            ota_status status = read_flash(target, offset, data, sizeof data, error);
            if (status < 0) {
                return status;
            }
        }
        ota_esp_otadata_entry_parse(data, &entries[i]);
    }
    return OTA_OK;
}

static ota_status describe(const ota_esp_target *target, const ota_esp_slot *slot, ota_esp_image_header *header,
                           ota_esp_app_descriptor *descriptor, ota_error *error) {
    uint8_t start[OTA_ESP_IMAGE_START_SIZE];
    ota_status status = read_flash(target, slot->offset, start, sizeof start, error);
    status = status < 0 ? status : ota_esp_image_header_parse(start, sizeof start, header, error);
    return status < 0 ? status
                      : ota_esp_app_descriptor_parse(start + OTA_ESP_DESCRIPTOR_OFFSET, OTA_ESP_APP_DESCRIPTOR_SIZE,
                                                     descriptor, error);
}

static ota_esp_image_rules rules_of(const ota_esp_target *target, const ota_esp_slot *slot) {
    ota_esp_image_rules rules = target->rules;
    rules.slot_size = slot->size;
    rules.spi_flash_mode = 0; /* compared before an update, not at boot */
    rules.bytes_after_allowed = true;
    rules.kind = OTA_ESP_IMAGE_ANY;
    return rules;
}

/* Reads the image to its end and checks it. `*trouble` tells errors of the flash from those of the image. */
static ota_status verify(const ota_esp_target *target, const ota_esp_slot *slot, uint64_t *image_size, bool *trouble,
                         ota_error *error) {
    ota_esp_image_rules rules = rules_of(target, slot);
    ota_esp_image_check check;
    ota_status status = ota_esp_image_check_begin(&check, &rules, error);
    *trouble = status < 0;
    if (status < 0) {
        return status;
    }
    uint64_t offset = 0;
    while (status == OTA_OK && offset < slot->size) {
        size_t len = slot->size - offset < BUFFER_SIZE ? (size_t)(slot->size - offset) : BUFFER_SIZE;
        status = read_flash(target, slot->offset + offset, target->buffer, len, error);
        *trouble = status < 0;
        status = status < 0 ? status : ota_esp_image_check_update(&check, target->buffer, len, error);
        offset += len;
    }
    status = status < 0 ? status : ota_esp_image_check_finish(&check, error);
    if (image_size != NULL) {
        *image_size = check.image_size;
    }
    ota_esp_image_check_end(&check);
    return status < 0 ? status : OTA_OK;
}

/* The same check of bytes the slot is known to hold. */
static ota_status verify_bytes(const ota_esp_target *target, const ota_esp_slot *slot, const uint8_t *image, size_t len,
                               ota_error *error) {
    ota_esp_image_rules rules = rules_of(target, slot);
    ota_esp_image_check check;
    ota_status status = ota_esp_image_check_begin(&check, &rules, error);
    if (status < 0) {
        return status;
    }
    status = ota_esp_image_check_update(&check, image, len, error);
    status = status < 0 ? status : ota_esp_image_check_finish(&check, error);
    ota_esp_image_check_end(&check);
    return status < 0 ? status : OTA_OK;
}

/* What the boot choice wants to know of a slot. Only errors of the flash are errors here. */
static ota_status probe(void *user, int number, bool full, ota_esp_slot_facts *facts, ota_error *error) {
    const ota_esp_target *target = user;
    const ota_esp_slot *slot;
    ota_status status = need_slot(target, number, &slot, error);
    if (status < 0) {
        return status;
    }
    memset(facts, 0, sizeof *facts);
    ota_esp_image_header header;
    ota_esp_app_descriptor descriptor;
    uint8_t start[OTA_ESP_IMAGE_START_SIZE];
    status = read_flash(target, slot->offset, start, sizeof start, error);
    if (status < 0) {
        return status;
    }
    ota_error found = {0};
    if (ota_esp_image_header_parse(start, sizeof start, &header, &found) == OTA_OK &&
        ota_esp_app_descriptor_parse(start + OTA_ESP_DESCRIPTOR_OFFSET, OTA_ESP_APP_DESCRIPTOR_SIZE, &descriptor,
                                     &found) == OTA_OK) {
        facts->described = true;
        facts->secure_version = descriptor.secure_version;
    }
    if (full) {
        bool trouble;
        memset(&found, 0, sizeof found);
        facts->verifies = verify(target, slot, NULL, &trouble, &found) == OTA_OK;
        if (trouble) {
            return ota_error_set(error, found.status, found.stage, found.offset, found.device_code, "%s", found.text);
        }
    }
    return OTA_OK;
}

static ota_esp_boot_config config_of(ota_esp_target *target) {
    return (ota_esp_boot_config){
        .slot_count = target->layout.slot_count,
        .has_factory = target->layout.factory != NULL,
        .has_test = target->layout.test != NULL,
        .has_otadata = target->layout.otadata != NULL,
        .rollback = target->rollback,
        .anti_rollback = target->anti_rollback,
        .secure_version = target->secure_version,
        .probe = probe,
        .user = target,
    };
}

static ota_status choose(ota_esp_target *target, ota_esp_otadata_entry entries[2], ota_esp_boot_decision *decision,
                         ota_error *error) {
    ota_esp_boot_config config = config_of(target);
    ota_status status = read_entries(target, entries, error);
    return status < 0 ? status : ota_esp_boot_decide(entries, &config, decision, error);
}

/* ---- Writing --------------------------------------------------------------------------------------------------------- */

static bool is_erased(const uint8_t *bytes, size_t len) {
    return bytes[0] == 0xFF && memcmp(bytes, bytes + 1, len - 1) == 0;
}

static ota_status erase_sector(ota_esp_target *target, uint64_t offset, ota_error *error) {
    ota_flash *flash = target->flash;
    ota_status status = read_flash(target, offset, target->buffer, OTA_FLASH_SECTOR, error);
    if (status < 0 || is_erased(target->buffer, OTA_FLASH_SECTOR)) {
        return status;
    }
    status = flash->ops->erase(flash, offset, OTA_FLASH_SECTOR, error);
    return status < 0 ? status : flash->ops->sync(flash, error);
}

static ota_status program_entry(ota_esp_target *target, uint64_t offset, const ota_esp_otadata_entry *entry,
                                ota_error *error) {
    ota_flash *flash = target->flash;
    uint8_t data[OTA_ESP_OTADATA_ENTRY_SIZE], back[OTA_ESP_OTADATA_ENTRY_SIZE];
    ota_esp_otadata_entry_build(entry, data);
    ota_status status = flash->ops->program(flash, offset, data, sizeof data, error);
    status = status < 0 ? status : flash->ops->sync(flash, error);
    status = status < 0 ? status : read_flash(target, offset, back, sizeof back, error);
    if (status == OTA_OK && memcmp(data, back, sizeof data) != 0) {
        status = ota_error_set(error, OTA_ERR_READ_BACK, OTA_STAGE_TARGET, offset, 0,
                               "the otadata entry at 0x%llx reads back as something else", (unsigned long long)offset);
    }
    return status;
}

/* Carries out a plan, each operation on the medium before the next; then the eFuses. */
static ota_status carry_out(ota_esp_target *target, const ota_esp_plan *plan, ota_error *error) {
    for (uint32_t i = 0; i < plan->count; i++) {
        const ota_esp_op *op = &plan->ops[i];
        uint64_t offset = target->layout.otadata->offset + (uint64_t)op->sector * OTA_FLASH_SECTOR;
        ota_status status = op->kind == OTA_ESP_OP_ERASE ? erase_sector(target, offset, error)
                                                         : program_entry(target, offset, &op->entry, error);
        if (status < 0) {
            return status;
        }
    }
    if (plan->raise_secure_version && plan->secure_version > target->secure_version) {
        target->secure_version = plan->secure_version;
    }
    return OTA_OK;
}

/* A restart. */
static ota_status boot(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    ota_status status = choose(target, entries, decision, error);
    status = status < 0 ? status : carry_out(target, &decision->plan, error);
    if (status == OTA_OK) {
        target->running = decision->slot;
        target->is_off = false;
    }
    return status;
}

/* Only an image that runs can change anything. */
static ota_status switch_on(ota_esp_target *target, ota_error *error) {
    ota_esp_boot_decision decision;
    return target->is_off ? boot(target, &decision, error) : OTA_OK;
}

/* The entries as they are, or of a chip that is off as the boot loader will leave them. */
static ota_status foresee_entries(ota_esp_target *target, ota_esp_otadata_entry entries[2], ota_error *error) {
    ota_esp_boot_decision decision;
    if (!target->is_off) {
        return read_entries(target, entries, error);
    }
    ota_status status = choose(target, entries, &decision, error);
    if (status == OTA_OK) {
        memcpy(entries, decision.after, sizeof decision.after);
    }
    return status;
}

static ota_status need_otadata(const ota_esp_target *target, ota_error *error) {
    return target->layout.otadata != NULL
               ? OTA_OK
               : ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, 0,
                               "the partition table has no otadata partition: the boot choice cannot be changed");
}

/* ---- A sink's hooks ---------------------------------------------------------------------------------------------------- */

static ota_status plan_begin(ota_esp_target *target, int slot, ota_esp_plan *plan, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    ota_esp_boot_config config = config_of(target);
    ota_status status = need_otadata(target, error);
    status = status < 0 ? status : foresee_entries(target, entries, error);
    return status < 0 ? status : ota_esp_plan_begin(entries, &config, target->running, slot, plan, error);
}

static ota_status writer_begin(void *user, ota_error *error) {
    slot_writer *writer = user;
    ota_esp_target *target = writer->target;
    ota_esp_plan plan;
    pthread_mutex_lock(&target->lock);
    ota_status status = OTA_OK;
    if (writer->busy) {
        status = ota_error_set(error, OTA_ERR_BUSY, OTA_STAGE_TARGET, 0, 0, "slot %s is being written already",
                               ota_esp_slot_name(writer->slot));
    }
    status = status < 0 ? status : switch_on(target, error);
    status = status < 0 ? status : plan_begin(target, writer->slot, &plan, error);
    status = status < 0 ? status : carry_out(target, &plan, error);
    if (status == OTA_OK) {
        writer->busy = true;
    }
    pthread_mutex_unlock(&target->lock);
    return status;
}

static ota_status set_boot(ota_esp_target *target, int number, const uint8_t *image, size_t len, ota_error *error);

static ota_status writer_commit_known(void *user, const uint8_t *image, size_t len, ota_error *error) {
    const slot_writer *writer = user;
    pthread_mutex_lock(&writer->target->lock);
    ota_status status = set_boot(writer->target, writer->slot, image, len, error);
    pthread_mutex_unlock(&writer->target->lock);
    return status;
}

static ota_status writer_commit(void *user, ota_error *error) {
    return writer_commit_known(user, NULL, 0, error);
}

static void writer_end(void *user) {
    slot_writer *writer = user;
    pthread_mutex_lock(&writer->target->lock);
    writer->busy = false;
    pthread_mutex_unlock(&writer->target->lock);
}

ota_status ota_esp_target_get_hooks(ota_esp_target *target, int number, ota_esp_hooks *hooks, ota_error *error) {
    const ota_esp_slot *slot;
    ota_esp_plan plan;
    pthread_mutex_lock(&target->lock);
    ota_status status = need_slot(target, number, &slot, error);
    status = status < 0 ? status : plan_begin(target, number, &plan, error);
    pthread_mutex_unlock(&target->lock);
    if (status == OTA_OK) {
        *hooks = (ota_esp_hooks){
            .offset = slot->offset,
            .size = slot->size,
            .begin = writer_begin,
            .commit = writer_commit_known,
            .end = writer_end,
            .user = &target->writers[slot - target->slots],
        };
    }
    return status;
}

ota_status ota_esp_target_sink_new(ota_esp_target *target, int number, bool activate, bool rewrite_same, ota_sink **out,
                                   ota_error *error) {
    ota_esp_hooks hooks;
    *out = NULL;
    ota_status status = ota_esp_target_get_hooks(target, number, &hooks, error);
    if (status < 0) {
        return status;
    }
    ota_sink_flash_options options = {
        .flash = target->flash,
        .offset = hooks.offset,
        .size = hooks.size,
        .rewrite_same = rewrite_same,
        .begin = hooks.begin,
        .commit = activate ? writer_commit : NULL,
        .end = hooks.end,
        .user = hooks.user,
    };
    return ota_sink_flash_new(&options, out, error);
}

/* ---- Changes ----------------------------------------------------------------------------------------------------------- */

/* `image`: what the slot is known to hold, `len` bytes; NULL: it is read. */
static ota_status set_boot(ota_esp_target *target, int number, const uint8_t *image, size_t len, ota_error *error) {
    ota_flash *flash = target->flash;
    const ota_esp_slot *slot;
    ota_esp_otadata_entry entries[2];
    ota_esp_plan plan;
    bool trouble;
    ota_status status = need_slot(target, number, &slot, error);
    status = status < 0 ? status : need_otadata(target, error);
    status = status < 0 ? status : switch_on(target, error);
    status = status < 0 ? status : flash->ops->sync(flash, error); /* what is verified is what is on the medium */
    if (status == OTA_OK) {
        status =
            image != NULL ? verify_bytes(target, slot, image, len, error) : verify(target, slot, NULL, &trouble, error);
    }
    status = status < 0 ? status : read_entries(target, entries, error);
    if (status < 0) {
        return status;
    }
    ota_esp_boot_config config = config_of(target);
    status = ota_esp_plan_set_boot(entries, &config, target->running, number, &plan, error);
    if (status == OTA_ERR_SECURE_VERSION && number != target->running) {
        /* As the firmware does. Best effort: the verdict is what the caller has to hear. */
        if (flash->ops->erase(flash, slot->offset, slot->size, NULL) == OTA_OK) {
            (void)flash->ops->sync(flash, NULL);
        }
    }
    return status < 0 ? status : carry_out(target, &plan, error);
}

ota_status ota_esp_target_set_boot(ota_esp_target *target, int slot, ota_error *error) {
    pthread_mutex_lock(&target->lock);
    ota_status status = set_boot(target, slot, NULL, 0, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

typedef ota_status (*mark_planner)(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                   int running, ota_esp_plan *plan, ota_error *error);

static ota_status mark(ota_esp_target *target, mark_planner planner, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    ota_esp_plan plan;
    pthread_mutex_lock(&target->lock);
    ota_status status = need_otadata(target, error);
    status = status < 0 ? status : switch_on(target, error);
    status = status < 0 ? status : read_entries(target, entries, error);
    ota_esp_boot_config config = config_of(target);
    status = status < 0 ? status : planner(entries, &config, target->running, &plan, error);
    status = status < 0 ? status : carry_out(target, &plan, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

ota_status ota_esp_target_mark_valid(ota_esp_target *target, ota_error *error) {
    return mark(target, ota_esp_plan_mark_valid, error);
}

ota_status ota_esp_target_retry(ota_esp_target *target, ota_error *error) {
    /* Without otadata, and for a chip that is off, there is no trial. */
    return target->layout.otadata == NULL || target->is_off ? OTA_OK : mark(target, ota_esp_plan_retry, error);
}

ota_status ota_esp_target_mark_invalid(ota_esp_target *target, ota_error *error) {
    return mark(target, ota_esp_plan_mark_invalid, error);
}

ota_status ota_esp_target_can_rollback(ota_esp_target *target, int *to, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    pthread_mutex_lock(&target->lock);
    ota_esp_boot_config config = config_of(target);
    ota_status status = read_entries(target, entries, error);
    status = status < 0 ? status : ota_esp_can_rollback(entries, &config, target->running, to, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

/* ---- Boot -------------------------------------------------------------------------------------------------------------- */

ota_status ota_esp_target_choose(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    pthread_mutex_lock(&target->lock);
    ota_status status = choose(target, entries, decision, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

ota_status ota_esp_target_boot(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error) {
    pthread_mutex_lock(&target->lock);
    ota_status status = boot(target, decision, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

/* ---- Questions --------------------------------------------------------------------------------------------------------- */

const ota_esp_slot *ota_esp_target_slots(const ota_esp_target *target, size_t *count) {
    *count = target->slot_count;
    return target->slots;
}

const ota_esp_partition_table *ota_esp_target_table(const ota_esp_target *target) {
    return &target->table;
}

int ota_esp_target_running(ota_esp_target *target) {
    pthread_mutex_lock(&target->lock);
    int running = target->running;
    pthread_mutex_unlock(&target->lock);
    return running;
}

uint32_t ota_esp_target_secure_version(ota_esp_target *target) {
    pthread_mutex_lock(&target->lock);
    uint32_t version = target->secure_version;
    pthread_mutex_unlock(&target->lock);
    return version;
}

ota_status ota_esp_target_next_slot(ota_esp_target *target, int *slot, ota_error *error) {
    int running = ota_esp_target_running(target);
    *slot = ota_esp_next_slot(target->layout.slot_count, running);
    return *slot != OTA_ESP_SLOT_NONE && *slot != running
               ? OTA_OK
               : ota_error_set(error, OTA_ERR_NOT_FOUND, OTA_STAGE_TARGET, 0, 0,
                               "the partition table has no OTA slot but the running one");
}

ota_status ota_esp_target_describe(ota_esp_target *target, int number, ota_esp_image_header *header,
                                   ota_esp_app_descriptor *descriptor, ota_error *error) {
    const ota_esp_slot *slot;
    ota_status status = need_slot(target, number, &slot, error);
    return status < 0 ? status : describe(target, slot, header, descriptor, error);
}

ota_status ota_esp_target_verify(ota_esp_target *target, int number, uint64_t *image_size, ota_error *error) {
    const ota_esp_slot *slot;
    bool trouble;
    pthread_mutex_lock(&target->lock);
    ota_status status = need_slot(target, number, &slot, error);
    status = status < 0 ? status : verify(target, slot, image_size, &trouble, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

ota_status ota_esp_target_entries(ota_esp_target *target, ota_esp_otadata_entry entries[2], ota_error *error) {
    pthread_mutex_lock(&target->lock);
    ota_status status = need_otadata(target, error);
    status = status < 0 ? status : read_entries(target, entries, error);
    pthread_mutex_unlock(&target->lock);
    return status;
}

ota_status ota_esp_target_state(ota_esp_target *target, int slot, uint32_t *state, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    ota_status status = ota_esp_target_entries(target, entries, error);
    return status < 0 ? status : ota_esp_slot_state(entries, target->layout.slot_count, slot, state, error);
}

/* ---- Making ------------------------------------------------------------------------------------------------------------ */

static void add_slot(ota_esp_target *target, int number, const ota_esp_partition *partition) {
    if (partition == NULL) {
        return;
    }
    ota_esp_slot *slot = &target->slots[target->slot_count];
    target->writers[target->slot_count] = (slot_writer){.target = target, .slot = number};
    slot->number = number;
    slot->name = ota_esp_slot_name(number);
    memcpy(slot->label, partition->label, sizeof slot->label);
    slot->offset = partition->offset;
    slot->size = partition->size;
    target->slot_count++;
}

/* What ran on a chip that was stopped. Reading a whole image through a serial line takes half a minute, its header no time. */
static ota_status find_last_run(ota_esp_target *target, ota_error *error) {
    ota_esp_otadata_entry entries[2];
    ota_esp_boot_decision decision;
    ota_esp_slot_facts facts;
    ota_esp_boot_config config = config_of(target);
    ota_status status = read_entries(target, entries, error);
    if (status < 0) {
        return status;
    }
    target->running = ota_esp_last_run(entries, &config);
    if (find_slot(target, target->running) != NULL) {
        status = probe(target, target->running, false, &facts, error);
        if (status < 0 || facts.described) {
            return status;
        }
    }
    status = ota_esp_boot_decide(entries, &config, &decision, error);
    target->running = status < 0 ? OTA_ESP_SLOT_NONE : decision.slot;
    return status;
}

static ota_status load(ota_esp_target *target, uint64_t table_offset, bool stopped, ota_error *error) {
    uint8_t *data = target->buffer;
    if (table_offset % OTA_FLASH_SECTOR != 0 ||
        !ota_range_inside(table_offset, OTA_ESP_PARTITION_TABLE_SECTOR, target->flash->size)) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_TARGET, table_offset, 0,
                             "a partition table at 0x%llx is not a sector inside the flash of %llu bytes",
                             (unsigned long long)table_offset, (unsigned long long)target->flash->size);
    }
    ota_status status = read_flash(target, table_offset, data, OTA_ESP_PARTITION_TABLE_SIZE, error);
    status = status < 0 ? status
                        : ota_esp_partition_table_parse(data, OTA_ESP_PARTITION_TABLE_SIZE, target->flash->size,
                                                        &target->table, error);
    status = status < 0 ? status : ota_esp_layout_find(&target->table, &target->layout, error);
    if (status < 0) {
        return status;
    }
    for (uint32_t i = 0; i < target->layout.slot_count; i++) {
        add_slot(target, (int)i, target->layout.slots[i]);
    }
    add_slot(target, OTA_ESP_SLOT_FACTORY, target->layout.factory);
    add_slot(target, OTA_ESP_SLOT_TEST, target->layout.test);
    if (find_slot(target, target->running) != NULL) {
        return status;
    }
    if (stopped) {
        return find_last_run(target, error);
    }
    ota_esp_otadata_entry entries[2];
    ota_esp_boot_decision decision;
    status = choose(target, entries, &decision, error);
    target->running = status < 0 ? OTA_ESP_SLOT_NONE : decision.slot;
    target->is_off = true;
    return status;
}

ota_status ota_esp_target_new(const ota_esp_target_options *options, ota_esp_target **out, ota_error *error) {
    *out = NULL;
    ota_esp_target *target = calloc(1, sizeof *target);
    if (target == NULL || (target->buffer = malloc(BUFFER_SIZE)) == NULL) {
        free(target);
        return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_TARGET, 0, 0, "no memory for a target");
    }
    pthread_mutex_init(&target->lock, NULL);
    target->flash = options->flash;
    target->rules = options->rules;
    target->rollback = options->rollback || options->anti_rollback;
    target->anti_rollback = options->anti_rollback;
    target->secure_version = options->secure_version;
    target->running = options->running;
    ota_status status =
        load(target, options->table_offset != 0 ? options->table_offset : OTA_ESP_PARTITION_TABLE_OFFSET,
             options->stopped, error);
    if (status < 0) {
        ota_esp_target_free(&target);
        return status;
    }
    *out = target;
    return OTA_OK;
}

void ota_esp_target_free(ota_esp_target **target) {
    if (*target != NULL) {
        pthread_mutex_destroy(&(*target)->lock);
        free((*target)->buffer);
        free(*target);
        *target = NULL;
    }
}
