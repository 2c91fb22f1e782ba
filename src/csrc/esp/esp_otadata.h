/* otadata: the two select entries that say which slot boots. Parse, build, the boot loader's decision, and plans for every
 * change an update makes. No I/O: a probe supplied by the caller says what lies in the slots, and a plan is a list of erases
 * and programs the caller carries out in order, with a sync after each.
 *
 * Slots have numbers: 0.. for ota_0.., and the names below for the others.
 * Source: ESP-IDF esp_flash_partitions.h (entry), bootloader_utility.c (decision), esp_ota_ops.c (changes). */
#ifndef OTA_ESP_ESP_OTADATA_H
#define OTA_ESP_ESP_OTADATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    OTA_ESP_OTADATA_ENTRY_SIZE = 32,
    OTA_ESP_OTADATA_SIZE = 0x2000, /* two sectors of 4096 bytes, one entry at the start of each */
};

enum {
    OTA_ESP_SLOT_FACTORY = -1,
    OTA_ESP_SLOT_TEST = -2,
    OTA_ESP_SLOT_NONE = -99, /* nothing boots; not known which slot runs */
};

typedef enum ota_esp_otadata_state {
    OTA_ESP_STATE_NEW = 0,
    OTA_ESP_STATE_PENDING_VERIFY = 1,
    OTA_ESP_STATE_VALID = 2,
    OTA_ESP_STATE_INVALID = 3,
    OTA_ESP_STATE_ABORTED = 4,
    /* UNDEFINED is 0xFFFFFFFF; every number that is not above boots like it */
} ota_esp_otadata_state;

#define OTA_ESP_STATE_UNDEFINED 0xFFFFFFFFu
#define OTA_ESP_SEQ_UNUSED 0xFFFFFFFFu

/* One select entry of otadata, as it lies in flash: 32 bytes, little-endian. */
typedef struct ota_esp_otadata_entry {
    uint32_t seq;      /* 1, 2, ...; slot = (seq - 1) mod 2^32 mod slot count; 0xFFFFFFFF: never written */
    uint8_t label[20]; /* not read by the boot loader; 0xFF when firmware writes it */
    uint32_t state;    /* ota_esp_otadata_state; not covered by the CRC */
    uint32_t crc;      /* CRC-32 of seq alone, started from 0xFFFFFFFF; kept as it was found */
} ota_esp_otadata_entry;

/* ---- Entries ----------------------------------------------------------------------------------------------------- */

void ota_esp_otadata_entry_parse(const uint8_t data[OTA_ESP_OTADATA_ENTRY_SIZE], ota_esp_otadata_entry *out);
void ota_esp_otadata_entry_build(const ota_esp_otadata_entry *entry, uint8_t out[OTA_ESP_OTADATA_ENTRY_SIZE]);
/* Both entries of an otadata partition read as a whole. ERR_OTADATA: shorter than two sectors. */
ota_status ota_esp_otadata_parse(const uint8_t *data, size_t len, ota_esp_otadata_entry out[2], ota_error *error);

uint32_t ota_esp_otadata_crc(uint32_t seq);
/* An entry with the right CRC and a label of 0xFF. */
ota_esp_otadata_entry ota_esp_otadata_entry_make(uint32_t seq, uint32_t state);
bool ota_esp_otadata_crc_ok(const ota_esp_otadata_entry *entry);
/* All 32 bytes are 0xFF. */
bool ota_esp_otadata_blank(const ota_esp_otadata_entry *entry);
/* seq unused, or state INVALID or ABORTED; the CRC is not looked at. */
bool ota_esp_otadata_dead(const ota_esp_otadata_entry *entry);
/* Not dead and the CRC is right. */
bool ota_esp_otadata_live(const ota_esp_otadata_entry *entry);
/* Slot an entry names, 0 .. slot_count - 1; OTA_ESP_SLOT_NONE when slot_count is 0. Looks at seq alone. */
int ota_esp_otadata_slot(const ota_esp_otadata_entry *entry, uint32_t slot_count);
/* Index of the live entry with the larger seq, the first on a tie; -1: none is live. */
int ota_esp_otadata_active(const ota_esp_otadata_entry entries[2]);
/* "NEW", "PENDING_VERIFY", ...; "UNDEFINED" for everything else. */
const char *ota_esp_otadata_state_name(uint32_t state);
/* "ota_0", "factory", "test", "none"; valid until the program ends. */
const char *ota_esp_slot_name(int slot);

/* ---- What the caller knows --------------------------------------------------------------------------------------- */

typedef struct ota_esp_slot_facts {
    bool verifies;           /* a whole, right image for this chip, as the boot loader checks it */
    bool described;          /* its app descriptor can be read (needed with anti-rollback only) */
    uint32_t secure_version; /* of that descriptor */
} ota_esp_slot_facts;

/* Looks into a slot (0.., FACTORY or TEST; never one the layout lacks). An error ends the decision and is its result. `full`
 * false: only described and secure_version are wanted, which saves reading the whole image. */
typedef ota_status (*ota_esp_slot_probe)(void *user, int slot, bool full, ota_esp_slot_facts *facts, ota_error *error);

/* The chip as far as the boot choice goes. */
typedef struct ota_esp_boot_config {
    uint32_t slot_count; /* OTA slots, contiguous from ota_0; 0..16 */
    bool has_factory, has_test, has_otadata;
    bool rollback;           /* boot loader and app built with app rollback */
    bool anti_rollback;      /* built with secure version checks; implies rollback */
    uint32_t secure_version; /* of the eFuses; smaller images do not boot with anti_rollback */
    ota_esp_slot_probe probe;
    void *user;
} ota_esp_boot_config;

/* ---- Boot -------------------------------------------------------------------------------------------------------- */

typedef enum ota_esp_boot_step_kind {
    OTA_ESP_BOOT_NO_OTADATA = 1, /* the table has no otadata partition: factory */
    OTA_ESP_BOOT_ABORTED,        /* entry `entry` was PENDING_VERIFY: written as ABORTED */
    OTA_ESP_BOOT_FIRST_USE,      /* neither entry was ever written, or both CRCs are wrong */
    OTA_ESP_BOOT_BOTH_DEAD,      /* no usable entry: slot `slot` is where to start */
    OTA_ESP_BOOT_SECURE_VERSION, /* entry `entry` or slot `slot` passed over: secure version `value` too small */
    OTA_ESP_BOOT_ACTIVE,         /* entry `entry` is the active one and names slot `slot` */
    OTA_ESP_BOOT_NO_ACTIVE,      /* entries are there but none counts (CRC): every slot is tried */
    OTA_ESP_BOOT_PENDING,        /* entry `entry` was NEW: written as PENDING_VERIFY */
    OTA_ESP_BOOT_EFUSE,          /* the eFuse secure version is raised to `value` */
    OTA_ESP_BOOT_NOT_BOOTABLE,   /* slot `slot` has no image that boots */
    OTA_ESP_BOOT_BOOTS,          /* slot `slot` boots */
    OTA_ESP_BOOT_RECORDED,       /* first use: entry 0 written for slot `slot`, VALID */
    OTA_ESP_BOOT_NOTHING,        /* nothing boots: reset loop */
} ota_esp_boot_step_kind;

typedef struct ota_esp_boot_step {
    ota_esp_boot_step_kind kind;
    int entry, slot;
    uint32_t value;
} ota_esp_boot_step;

typedef enum ota_esp_op_kind {
    OTA_ESP_OP_ERASE = 1,   /* sector `sector` of otadata; needless where the whole sector reads 0xFF already */
    OTA_ESP_OP_PROGRAM = 2, /* 32 bytes of `entry` at the start of that sector, in one call */
} ota_esp_op_kind;

typedef struct ota_esp_op {
    ota_esp_op_kind kind;
    uint8_t sector; /* 0 or 1 */
    ota_esp_otadata_entry entry;
} ota_esp_op;

enum {
    OTA_ESP_OPS_MAX = 8,
    OTA_ESP_BOOT_STEPS_MAX = 32,
};

/* Changes of otadata in the order they have to reach the medium, each before the next. Cut between or inside any of them, the
 * chip boots the image it runs now or the new one. */
typedef struct ota_esp_plan {
    uint32_t count; /* 0: nothing to do */
    ota_esp_op ops[OTA_ESP_OPS_MAX];
    bool raise_secure_version; /* afterwards the eFuse secure version becomes `secure_version` */
    uint32_t secure_version;
} ota_esp_plan;

typedef struct ota_esp_boot_decision {
    int slot;   /* that boots; OTA_ESP_SLOT_NONE: nothing does */
    int start;  /* where the search began */
    int active; /* entry that was chosen; -1: none */
    bool first_use;
    ota_esp_otadata_entry after[2]; /* both entries afterwards */
    ota_esp_plan plan;              /* what is written */
    uint32_t step_count;
    ota_esp_boot_step
        steps[OTA_ESP_BOOT_STEPS_MAX]; /* how it came to that; the last one is BOOTS, RECORDED or NOTHING */
} ota_esp_boot_decision;

/* What the boot loader does at one power-on: OTA_OK with the decision (also when nothing boots), or the probe's error. */
ota_status ota_esp_boot_decide(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                               ota_esp_boot_decision *decision, ota_error *error);

/* One sentence for a step, cut to `size`; returns out. */
const char *ota_esp_boot_step_text(const ota_esp_boot_step *step, char *out, size_t size);

/* ---- Changes an update makes -------------------------------------------------------------------------------------- */

/* The slot an update goes to: the OTA slot after the running one, the first one from the last, from factory and from
 * elsewhere; OTA_ESP_SLOT_NONE without OTA slots. With one slot that is the running one: the caller refuses it. */
int ota_esp_next_slot(uint32_t slot_count, int running);

/* State of an OTA slot: that of the active entry when it names the slot, else of the first sector whose CRC is right and
 * which names it. (Firmware always takes the first sector: the same unless both name the slot.) ERR_NOT_FOUND: no such
 * entry; ERR_UNSUPPORTED: not an OTA slot. */
ota_status ota_esp_slot_state(const ota_esp_otadata_entry entries[2], uint32_t slot_count, int slot, uint32_t *state,
                              ota_error *error);

/* Before the first byte of `slot` is erased: afterwards the running slot boots, by an entry of its own where it is an OTA
 * slot, and no entry makes another one boot. `running` NONE (not known): only a live entry for `slot` goes. ERR_SLOT_RUNNING;
 * ERR_PENDING_VERIFY (rollback: the running image is not confirmed yet); ERR_STATE (the running image was marked invalid and
 * a restart would leave it); ERR_ARGUMENT: not an OTA slot.
 *
 * Firmware (rollback builds since IDF 5.5) drops the inactive entry; so does this. More than firmware: where the active entry
 * names a slot that did not boot, or the running slot has no live entry, the entry of the running slot is written first, so
 * that a complete but not yet chosen image never boots and an aborted one never boots twice. */
ota_status ota_esp_plan_begin(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                              int slot, ota_esp_plan *plan, ota_error *error);

/* Makes `slot` the next one to boot: state NEW with rollback, UNDEFINED without. The caller has verified the image. The
 * entry of the running slot is never touched, and is written first where it is missing; `running` NONE: not known.
 *   - A slot that is active already, running or running not known: seq + slot_count into the other sector.
 *   - A slot that is active but not running: its entry is rewritten in place, or left alone when it says so already.
 *   - The running slot while another one is chosen: that choice is taken back, the running slot keeps its state.
 *   - Factory: both entries are erased, the active one last.
 * ERR_ARGUMENT: no such slot, or test; ERR_NOT_FOUND: no otadata; ERR_STATE as above; ERR_SECURE_VERSION by the probe's facts
 * (firmware would erase the slot as well, this does not). */
ota_status ota_esp_plan_set_boot(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                 int slot, ota_esp_plan *plan, ota_error *error);

/* Confirms the running slot. ERR_STATE: no entry is active (the factory app runs), or the active entry names another slot
 * than the running one, as after a fallback. Nothing to do when it is VALID already. */
ota_status ota_esp_plan_mark_valid(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                   int running, ota_esp_plan *plan, ota_error *error);

/* Gives the running image its trial again: PENDING_VERIFY becomes NEW, so that the boot loader starts it once more instead of
 * aborting it. For an image that did not fail but was stopped from outside. Nothing to do in any other state, and without an
 * entry. A cut in the middle leaves the image without an entry: the one before boots. */
ota_status ota_esp_plan_retry(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                              ota_esp_plan *plan, ota_error *error);

/* Marks the running slot invalid, so that the next boot takes the other one. ERR_ROLLBACK: there is nothing to go back to;
 * ERR_STATE as above. */
ota_status ota_esp_plan_mark_invalid(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config,
                                     int running, ota_esp_plan *plan, ota_error *error);

/* Whether mark_invalid would be allowed, and in `*to` (may be NULL) the slot that would boot. OTA_OK, ERR_ROLLBACK,
 * ERR_STATE or the probe's error. */
ota_status ota_esp_can_rollback(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config, int running,
                                int *to, ota_error *error);

/* Slot of the last image that was rolled back: of the entries with a right CRC that are INVALID or ABORTED the one with the
 * smaller seq; OTA_ESP_SLOT_NONE: none. Whether its image still verifies is for the caller to see. */
int ota_esp_last_invalid(const ota_esp_otadata_entry entries[2], uint32_t slot_count);

/* Slot whose image ran last, as far as the entries tell without a look into the slots: for a chip that was stopped, not one
 * that is off. That of the active entry; with rollback, where that one is NEW, its image never ran, and it is the slot before
 * the choice: of the other live entry, else factory. Without an active entry factory, else ota_0. NONE: cannot be told. */
int ota_esp_last_run(const ota_esp_otadata_entry entries[2], const ota_esp_boot_config *config);

/* Carries a plan out on the two entries in memory. */
void ota_esp_plan_apply(const ota_esp_plan *plan, ota_esp_otadata_entry entries[2]);

#endif
