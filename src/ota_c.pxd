# What the border sees of C, room by room, declaration by declaration. The headers are the manual.

from libc.stddef cimport size_t
from libc.stdint cimport UINT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<stdbool.h>" nogil:
    ctypedef bint c_bool "bool"  # where a pointer to a function has to have the very type

# ---- base ------------------------------------------------------------------------------------------------------------

cdef extern from "base/status.h" nogil:
    ctypedef int ota_status
    ctypedef int ota_stage
    enum:
        OTA_STAGE_SOURCE
        OTA_STAGE_TARGET
        OTA_STAGE_HEADER
    enum:
        OTA_OK
        OTA_DONE
        OTA_ERR_CALLBACK
        OTA_ERR_CANCELLED
        OTA_ERR_REJECTED
    ctypedef struct ota_error:
        ota_status status
        ota_stage stage
        uint64_t offset
        int64_t device_code
        char text[256]
    ctypedef struct ota_status_info:
        ota_status status
        const char *name
        int32_t esp_err
        const char *text
    const ota_status_info *ota_status_table(size_t *count)
    const char *ota_status_name(ota_status status)
    const char *ota_stage_name(ota_stage stage)
    int32_t ota_status_esp_err(ota_status status)
    ota_status ota_error_set(ota_error *error, ota_status status, ota_stage stage, uint64_t offset, int64_t device_code,
                             const char *format, ...)
    ota_status ota_error_set_errno(ota_error *error, ota_stage stage, uint64_t offset, int errnum, const char *what)

# ---- port ------------------------------------------------------------------------------------------------------------

cdef extern from "port/port.h" nogil:
    enum:
        OTA_FAULT_READ
        OTA_FAULT_WRITE
        OTA_FAULT_SYNC
        OTA_FAULT_ERASE
        OTA_FAULT_OPEN
        OTA_FAULT_LINES
        OTA_FAULT_BAUD
    ctypedef struct ota_fault:
        uint32_t ops
        uint64_t after
        uint64_t count
        int errnum
        uint64_t reaches
        bint power_cut
        uint64_t torn_len
        uint64_t seen
        bint lost
    ctypedef struct ota_flash
    ctypedef struct ota_flash_ops:
        ota_status (*read)(ota_flash *flash, uint64_t offset, void *buf, size_t len, ota_error *error) noexcept nogil
        void (*close)(ota_flash *flash) noexcept nogil
    ctypedef struct ota_flash:
        const ota_flash_ops *ops
        uint64_t size
        uint64_t reads
        uint64_t programs
        uint64_t erases
        uint64_t syncs
        uint64_t bytes_read
        uint64_t bytes_programmed
        uint64_t sectors_erased
    ota_status ota_port_flash_file_open(const char *path, bint read_only, ota_fault *fault, ota_flash **out,
                                        ota_error *error)
    void ota_port_flash_file_shut(ota_flash *flash)
    ctypedef struct ota_tty_info:
        char name[64]
        char driver[32]
        char usb_path[64]
        char serial[128]
        char manufacturer[128]
        char product[128]
        uint16_t vid
        uint16_t pid
        int interface
    int ota_port_tty_list(const char *sysfs_root, ota_tty_info **out, size_t *count)
    ctypedef struct ota_serial
    ctypedef struct ota_serial_ops:
        int (*set_baud)(ota_serial *serial, uint32_t baud) noexcept nogil
        void (*close)(ota_serial *serial) noexcept nogil
    ctypedef struct ota_serial:
        const ota_serial_ops *ops
        const char *name
        uint32_t baud
        bint has_lines
        bint is_low_latency
        uint16_t usb_vid
        uint16_t usb_pid
        uint64_t reads
        uint64_t writes
        uint64_t bytes_read
        uint64_t bytes_written
        uint64_t line_changes
        uint64_t baud_changes
        uint64_t reopens
    ctypedef struct ota_serial_options:
        uint32_t baud
        uint32_t connect_timeout_ms
        bint keep_lines
        ota_fault *fault
        int (*set_lines)(void *user, c_bool dtr, c_bool rts) noexcept
        void *lines_user
        const char *sysfs_root
        const char *dev_root
    ota_status ota_port_serial_open(const char *port, const ota_serial_options *options, ota_serial **out,
                                    ota_error *error)

# ---- flasher ---------------------------------------------------------------------------------------------------------

cdef extern from "flasher/flasher.h" nogil:
    ctypedef struct ota_flasher
    ctypedef int ota_flasher_state
    ctypedef int ota_flasher_before
    ctypedef int ota_flasher_after
    ctypedef int ota_flasher_link
    ctypedef int ota_flasher_trace
    enum:
        OTA_FLASHER_OFF
        OTA_FLASHER_READY
        OTA_FLASHER_BROKEN
        OTA_FLASHER_GONE
        OTA_FLASHER_STOPPED
    enum:
        OTA_FLASHER_DEFAULT_RESET
        OTA_FLASHER_CLASSIC_RESET
        OTA_FLASHER_USB_RESET
        OTA_FLASHER_NO_RESET
        OTA_FLASHER_NO_RESET_NO_SYNC
        OTA_FLASHER_CUSTOM_RESET
    enum:
        OTA_FLASHER_AFTER_AUTO
        OTA_FLASHER_HARD_RESET
        OTA_FLASHER_WATCHDOG_RESET
        OTA_FLASHER_AFTER_CUSTOM
        OTA_FLASHER_STAY
    enum:
        OTA_FLASHER_LINK_AUTO
        OTA_FLASHER_LINK_UART
        OTA_FLASHER_LINK_USB_JTAG
        OTA_FLASHER_LINK_USB_OTG
    enum:
        OTA_FLASHER_TRACE_SENT
        OTA_FLASHER_TRACE_RECEIVED
        OTA_FLASHER_TRACE_NOTE
    uint32_t OTA_FLASHER_UNKNOWN
    ctypedef struct ota_flasher_stub:
        const char *name
        uint32_t entry
        uint32_t text_start
        const uint8_t *text
        size_t text_len
        uint32_t data_start
        const uint8_t *data
        size_t data_len
    ctypedef struct ota_flasher_facts:
        bint is_known
        uint16_t chip_id
        uint8_t mac[6]
        uint32_t revision
        uint32_t flash_id
        uint64_t flash_size
        uint32_t baud
        uint32_t rom_clock
    ctypedef struct ota_flasher_options:
        ota_serial *serial
        const char *chip
        ota_flasher_before before
        ota_flasher_after after
        const char *before_sequence
        const char *after_sequence
        ota_flasher_link link
        uint32_t baud
        uint32_t baud_min
        int connect_attempts
        uint32_t reuse_baud
        const ota_flasher_stub *stubs
        size_t stub_count
        ota_flasher_facts facts
        uint64_t flash_size
        bint allow_encrypted
        uint32_t slow
        void (*trace)(void *user, ota_flasher_trace what, const void *data, size_t len) noexcept
        void *trace_user
    ctypedef struct ota_flasher_info:
        uint16_t chip_id
        const char *chip
        const char *title
        bint has_mac
        uint8_t mac[6]
        uint32_t revision
        uint32_t eco_version
        uint32_t flash_id
        uint64_t flash_size
        bint flash_size_known
        bint is_stub
        bint stub_was_running
        const char *stub_name
        uint32_t baud
        ota_flasher_link link
        bint was_reset
        bint secure_download
        bint secure_boot
        bint flash_encrypted
        uint32_t security_flags
        uint32_t block_size
        bint can_deflate
        bint can_verify
        ota_flasher_facts facts
    ctypedef struct ota_flasher_counts:
        uint64_t commands
        uint64_t frames_in
        uint64_t damaged
        uint64_t bytes_out
        uint64_t bytes_in
        uint64_t retries
        uint64_t resets
        uint64_t step_downs
        uint64_t connects
        uint64_t stub_uploads
        uint64_t md5_bytes
        uint64_t read_bytes
        uint64_t erased_bytes
        uint64_t written_bytes
    ctypedef struct ota_flasher_write:
        uint64_t offset
        uint64_t size
        bint deflated
        bint encrypt
        uint64_t wire_bound
    ota_status ota_flasher_new(const ota_flasher_options *options, ota_flasher **out, ota_error *error)
    void ota_flasher_free(ota_flasher **flasher)
    ota_status ota_flasher_connect(ota_flasher *flasher, ota_error *error)
    ota_status ota_flasher_reopen(ota_flasher *flasher, uint32_t timeout_ms, ota_error *error)
    ota_flasher_state ota_flasher_get_state(const ota_flasher *flasher)
    const ota_flasher_info *ota_flasher_get_info(const ota_flasher *flasher)
    ota_flasher_counts ota_flasher_get_counts(const ota_flasher *flasher)
    ota_status ota_flasher_read_revision(ota_flasher *flasher, uint32_t *revision, ota_error *error)
    ota_status ota_flasher_read(ota_flasher *flasher, uint64_t offset, void *buf, size_t len, ota_error *error)
    ota_status ota_flasher_erase(ota_flasher *flasher, uint64_t offset, uint64_t len, ota_error *error)
    ota_status ota_flasher_md5(ota_flasher *flasher, uint64_t offset, uint64_t len, uint8_t *digest, ota_error *error)
    ota_status ota_flasher_write_begin(ota_flasher *flasher, const ota_flasher_write *write, ota_error *error)
    ota_status ota_flasher_write_data(ota_flasher *flasher, const void *data, size_t len, uint64_t inflated_len,
                                      ota_error *error)
    ota_status ota_flasher_write_end(ota_flasher *flasher, ota_error *error)
    void ota_flasher_write_abort(ota_flasher *flasher)
    ota_status ota_flasher_reset(ota_flasher *flasher, ota_flasher_after how, ota_error *error)
    ota_status ota_flasher_read_console(ota_flasher *flasher, void *buf, size_t len, uint32_t timeout_ms, size_t *got,
                                        ota_error *error)
    void ota_flasher_cancel(ota_flasher *flasher)
    void ota_flasher_rearm(ota_flasher *flasher)

cdef extern from "flasher/flash_serial.h" nogil:
    ota_status ota_flash_serial_new(ota_flasher *flasher, ota_flash **out, ota_error *error)

# ---- sink ------------------------------------------------------------------------------------------------------------

cdef extern from "sink/sink.h" nogil:
    ctypedef struct ota_sink_counts:
        uint64_t bytes_written
        uint64_t bytes_skipped
        uint64_t reads
        uint64_t writes
        uint64_t syncs
        uint64_t erases
        uint64_t sectors_erased
        uint64_t copies
        bint direct
    ctypedef struct ota_sink:
        uint32_t write_size
        uint32_t resume_size
        uint64_t capacity
        ota_sink_counts counts
    void ota_sink_free(ota_sink **sink)
    ctypedef struct ota_sink_file_options:
        const char *path
        bint buffered
        uint64_t max_size
        ota_fault *fault
    ota_status ota_sink_file_new(const ota_sink_file_options *options, ota_sink **out, ota_error *error)

# ---- esp -------------------------------------------------------------------------------------------------------------

cdef extern from "base/status.h" nogil:
    enum:
        OTA_ERR_IMAGE_CHECKSUM
        OTA_ERR_IMAGE_HASH

cdef extern from "esp/esp_image.h" nogil:
    enum:
        OTA_ESP_DESCRIPTOR_OFFSET
        OTA_ESP_IMAGE_APP
        OTA_ESP_IMAGE_BOOTLOADER
        OTA_ESP_IMAGE_ANY
        OTA_ESP_IMAGE_STATE_HASH
        OTA_ESP_IMAGE_STATE_COMPLETE
    const uint32_t OTA_ESP_CHIP_ANY
    const uint32_t OTA_ESP_UNSET
    ctypedef struct ota_esp_address_range:
        uint32_t low
        uint32_t high
    ctypedef struct ota_esp_chip:
        uint16_t id
        const char *name
        const char *title
        uint32_t bootloader_offset
        ota_esp_address_range mapped[2]
    const ota_esp_chip *ota_esp_chips(size_t *count)
    const ota_esp_chip *ota_esp_chip_by_id(uint32_t id)
    const ota_esp_chip *ota_esp_chip_by_name(const char *name)
    ctypedef struct ota_esp_image_header:
        uint8_t segment_count
        uint8_t spi_mode
        uint8_t spi_speed
        uint8_t spi_size
        uint32_t entry_addr
        uint8_t wp_pin
        uint8_t spi_pin_drv[3]
        uint16_t chip_id
        uint8_t min_chip_rev
        uint16_t min_chip_rev_full
        uint16_t max_chip_rev_full
        uint8_t hash_appended
    ctypedef struct ota_esp_segment:
        uint32_t header_offset
        uint32_t data_offset
        uint32_t load_addr
        uint32_t size
        bint mapped
    ctypedef struct ota_esp_app_descriptor:
        uint32_t secure_version
        char version[33]
        char project_name[33]
        char time[17]
        char date[17]
        char idf_version[33]
        uint8_t elf_sha256[32]
        uint16_t min_efuse_block_rev_full
        uint16_t max_efuse_block_rev_full
        uint8_t mmu_page_size_log2
        uint8_t spi_flash_mode
    ctypedef struct ota_esp_bootloader_descriptor:
        uint8_t secure_version
        uint32_t version
        char idf_version[33]
        char date_time[25]
    ota_status ota_esp_image_header_parse(const uint8_t *data, size_t len, ota_esp_image_header *out, ota_error *error)
    ota_status ota_esp_app_descriptor_parse(const uint8_t *data, size_t len, ota_esp_app_descriptor *out,
                                            ota_error *error)
    ctypedef struct ota_esp_image_rules:
        uint32_t chip_id
        uint32_t chip_revision
        uint32_t efuse_block_revision
        bint ignore_max_revision
        uint64_t slot_size
        uint8_t spi_flash_mode
        bint bytes_after_allowed
        uint8_t kind
    ctypedef struct ota_esp_image_check:
        int state
        ota_error error
        uint64_t offset
        uint64_t image_size
        uint64_t bytes_after
        bint has_header
        bint has_descriptor
        bint has_bootloader_descriptor
        ota_esp_image_header header
        ota_esp_app_descriptor descriptor
        ota_esp_bootloader_descriptor bootloader_descriptor
        uint8_t segment_count
        ota_esp_segment segments[16]
        uint8_t checksum_stored
        uint8_t checksum_computed
        uint8_t hash_stored[32]
        uint8_t hash_computed[32]
    ota_status ota_esp_image_check_begin(ota_esp_image_check *check, const ota_esp_image_rules *rules, ota_error *error)
    ota_status ota_esp_image_check_update(ota_esp_image_check *check, const uint8_t *data, size_t len, ota_error *error)
    ota_status ota_esp_image_check_finish(ota_esp_image_check *check, ota_error *error)
    void ota_esp_image_check_end(ota_esp_image_check *check)

cdef extern from "esp/esp_partition_table.h" nogil:
    enum:
        OTA_ESP_PARTITION_ROWS_MAX
    ctypedef struct ota_esp_partition:
        uint8_t type
        uint8_t subtype
        uint32_t offset
        uint32_t size
        char label[17]
        uint32_t flags
    ctypedef struct ota_esp_partition_table:
        uint32_t count
        ota_esp_partition rows[96]
        bint has_md5
        uint8_t md5[16]
        uint32_t end_offset
    ctypedef struct ota_esp_csv_options:
        uint32_t table_offset
        uint64_t flash_size
        uint32_t bootloader_offset
        uint32_t recovery_bootloader_offset
        bint secure_boot_v1
        const char *(*lookup)(void *user, const char *name) noexcept
        void *user
    ctypedef struct ota_esp_layout:
        const ota_esp_partition *otadata
        const ota_esp_partition *factory
        const ota_esp_partition *test
        const ota_esp_partition *slots[16]
        uint32_t slot_count
    ota_status ota_esp_partition_table_parse(const uint8_t *data, size_t len, uint64_t flash_size,
                                             ota_esp_partition_table *table, ota_error *error)
    ota_status ota_esp_partition_table_build(ota_esp_partition_table *table, uint8_t *out, ota_error *error)
    ota_status ota_esp_partition_table_from_csv(const char *text, size_t len, const ota_esp_csv_options *options,
                                                ota_esp_partition_table *table, ota_error *error)
    ota_status ota_esp_partition_table_check(const ota_esp_partition_table *table, const ota_esp_csv_options *options,
                                             ota_error *error)
    size_t ota_esp_partition_table_to_csv(const ota_esp_partition_table *table, char *out, size_t size)
    const char *ota_esp_partition_type_name(uint8_t type, char *out)
    const char *ota_esp_partition_subtype_name(uint8_t type, uint8_t subtype, char *out)
    ota_status ota_esp_layout_find(const ota_esp_partition_table *table, ota_esp_layout *layout, ota_error *error)

cdef extern from "esp/esp_otadata.h" nogil:
    enum:
        OTA_ESP_SLOT_FACTORY
        OTA_ESP_SLOT_TEST
        OTA_ESP_SLOT_NONE
        OTA_ESP_OP_ERASE
        OTA_ESP_OP_PROGRAM
    ctypedef struct ota_esp_otadata_entry:
        uint32_t seq
        uint8_t label[20]
        uint32_t state
        uint32_t crc
    ctypedef struct ota_esp_slot_facts:
        bint verifies
        bint described
        uint32_t secure_version
    ctypedef ota_status (*ota_esp_slot_probe)(void *user, int slot, c_bool full, ota_esp_slot_facts *facts,
                                              ota_error *error) noexcept
    ctypedef struct ota_esp_boot_config:
        uint32_t slot_count
        bint has_factory
        bint has_test
        bint has_otadata
        bint rollback
        bint anti_rollback
        uint32_t secure_version
        ota_esp_slot_probe probe
        void *user
    ctypedef struct ota_esp_boot_step:
        int kind
        int entry
        int slot
        uint32_t value
    ctypedef struct ota_esp_op:
        int kind
        uint8_t sector
        ota_esp_otadata_entry entry
    ctypedef struct ota_esp_plan:
        uint32_t count
        ota_esp_op ops[8]
        bint raise_secure_version
        uint32_t secure_version
    ctypedef struct ota_esp_boot_decision:
        int slot
        int start
        int active
        bint first_use
        ota_esp_otadata_entry after[2]
        ota_esp_plan plan
        uint32_t step_count
        ota_esp_boot_step steps[32]
    void ota_esp_otadata_entry_build(const ota_esp_otadata_entry *entry, uint8_t *out)
    ota_status ota_esp_otadata_parse(const uint8_t *data, size_t len, ota_esp_otadata_entry *out, ota_error *error)
    ota_esp_otadata_entry ota_esp_otadata_entry_make(uint32_t seq, uint32_t state)
    bint ota_esp_otadata_crc_ok(const ota_esp_otadata_entry *entry)
    bint ota_esp_otadata_blank(const ota_esp_otadata_entry *entry)
    bint ota_esp_otadata_dead(const ota_esp_otadata_entry *entry)
    bint ota_esp_otadata_live(const ota_esp_otadata_entry *entry)
    int ota_esp_otadata_slot(const ota_esp_otadata_entry *entry, uint32_t slot_count)
    const char *ota_esp_otadata_state_name(uint32_t state)
    const char *ota_esp_slot_name(int slot)
    ota_status ota_esp_boot_decide(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config,
                                   ota_esp_boot_decision *decision, ota_error *error)
    const char *ota_esp_boot_step_text(const ota_esp_boot_step *step, char *out, size_t size)
    int ota_esp_next_slot(uint32_t slot_count, int running)
    ota_status ota_esp_slot_state(const ota_esp_otadata_entry *entries, uint32_t slot_count, int slot, uint32_t *state,
                                  ota_error *error)
    ota_status ota_esp_plan_begin(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config, int running,
                                  int slot, ota_esp_plan *plan, ota_error *error)
    ota_status ota_esp_plan_set_boot(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config,
                                     int running, int slot, ota_esp_plan *plan, ota_error *error)
    ota_status ota_esp_plan_mark_valid(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config,
                                       int running, ota_esp_plan *plan, ota_error *error)
    ota_status ota_esp_plan_mark_invalid(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config,
                                         int running, ota_esp_plan *plan, ota_error *error)
    ota_status ota_esp_can_rollback(const ota_esp_otadata_entry *entries, const ota_esp_boot_config *config,
                                    int running, int *to, ota_error *error)
    int ota_esp_last_invalid(const ota_esp_otadata_entry *entries, uint32_t slot_count)
    void ota_esp_plan_apply(const ota_esp_plan *plan, ota_esp_otadata_entry *entries)

# ---- nvs -------------------------------------------------------------------------------------------------------------

cdef extern from "esp/esp_nvs.h" nogil:
    enum:
        OTA_ESP_NVS_KEYS_SIZE
        OTA_ESP_NVS_U8
        OTA_ESP_NVS_I8
        OTA_ESP_NVS_U16
        OTA_ESP_NVS_I16
        OTA_ESP_NVS_U32
        OTA_ESP_NVS_I32
        OTA_ESP_NVS_U64
        OTA_ESP_NVS_I64
        OTA_ESP_NVS_FLOAT
        OTA_ESP_NVS_DOUBLE
        OTA_ESP_NVS_STRING
        OTA_ESP_NVS_BLOB
        OTA_ESP_NVS_ANY
        OTA_ESP_NVS_ERASE
        OTA_ESP_NVS_PROGRAM
    ctypedef int ota_esp_nvs_page_state
    ctypedef int ota_esp_nvs_op_kind
    ctypedef struct ota_esp_nvs:
        pass
    ctypedef struct ota_esp_nvs_page:
        ota_esp_nvs_page_state state
        uint32_t seq
        uint8_t version
        uint16_t written
    ctypedef struct ota_esp_nvs_namespace:
        uint8_t index
        char name[17]
    ctypedef struct ota_esp_nvs_item:
        const char *namespace_name
        uint8_t namespace_index
        uint8_t type
        char key[17]
        const uint8_t *value
        size_t len
    ctypedef struct ota_esp_nvs_keys:
        uint8_t bytes[64]
    ctypedef struct ota_esp_nvs_options:
        const ota_esp_nvs_keys *keys
        bint purge
    ctypedef struct ota_esp_nvs_op:
        ota_esp_nvs_op_kind kind
        size_t offset
        size_t len
        const uint8_t *data
    ota_status ota_esp_nvs_keys_parse(const uint8_t *data, size_t len, ota_esp_nvs_keys *out, ota_error *error)
    ota_status ota_esp_nvs_open(
        const uint8_t *data, size_t size, const ota_esp_nvs_options *options, ota_esp_nvs **out, ota_error *error
    )
    void ota_esp_nvs_free(ota_esp_nvs **nvs)
    size_t ota_esp_nvs_page_count(const ota_esp_nvs *nvs)
    ota_esp_nvs_page ota_esp_nvs_page_at(const ota_esp_nvs *nvs, size_t index)
    size_t ota_esp_nvs_namespace_count(const ota_esp_nvs *nvs)
    ota_esp_nvs_namespace ota_esp_nvs_namespace_at(const ota_esp_nvs *nvs, size_t index)
    size_t ota_esp_nvs_item_count(const ota_esp_nvs *nvs)
    ota_esp_nvs_item ota_esp_nvs_item_at(const ota_esp_nvs *nvs, size_t index)
    size_t ota_esp_nvs_damaged(const ota_esp_nvs *nvs)
    ota_status ota_esp_nvs_get(
        const ota_esp_nvs *nvs,
        const char *namespace_name,
        const char *key,
        uint8_t type,
        ota_esp_nvs_item *out,
        ota_error *error
    )
    ota_status ota_esp_nvs_set(
        ota_esp_nvs *nvs,
        const char *namespace_name,
        const char *key,
        uint8_t type,
        const uint8_t *value,
        size_t len,
        ota_error *error
    )
    ota_status ota_esp_nvs_erase(ota_esp_nvs *nvs, const char *namespace_name, const char *key, ota_error *error)
    size_t ota_esp_nvs_op_count(const ota_esp_nvs *nvs)
    ota_esp_nvs_op ota_esp_nvs_op_at(const ota_esp_nvs *nvs, size_t index)
    size_t ota_esp_nvs_repair_count(const ota_esp_nvs *nvs)
    const uint8_t *ota_esp_nvs_image(const ota_esp_nvs *nvs, size_t *size)
    ota_status ota_esp_nvs_apply(uint8_t *partition, size_t size, const ota_esp_nvs_op *op, ota_error *error)

# ---- target ----------------------------------------------------------------------------------------------------------

cdef extern from "target/esp_target.h" nogil:
    ctypedef struct ota_esp_target_options:
        ota_flash *flash
        uint64_t table_offset
        ota_esp_image_rules rules
        bint rollback
        bint anti_rollback
        uint32_t secure_version
        int running
        bint stopped
    ctypedef struct ota_esp_slot:
        int number
        const char *name
        char label[17]
        uint64_t offset
        uint64_t size
    ctypedef struct ota_esp_target
    ota_status ota_esp_target_new(const ota_esp_target_options *options, ota_esp_target **out, ota_error *error)
    void ota_esp_target_free(ota_esp_target **target)
    const ota_esp_slot *ota_esp_target_slots(const ota_esp_target *target, size_t *count)
    const ota_esp_partition_table *ota_esp_target_table(const ota_esp_target *target)
    int ota_esp_target_running(ota_esp_target *target)
    uint32_t ota_esp_target_secure_version(ota_esp_target *target)
    ota_status ota_esp_target_next_slot(ota_esp_target *target, int *slot, ota_error *error)
    ota_status ota_esp_target_describe(ota_esp_target *target, int slot, ota_esp_image_header *header,
                                       ota_esp_app_descriptor *descriptor, ota_error *error)
    ota_status ota_esp_target_verify(ota_esp_target *target, int slot, uint64_t *image_size, ota_error *error)
    ota_status ota_esp_target_entries(ota_esp_target *target, ota_esp_otadata_entry *entries, ota_error *error)
    ota_status ota_esp_target_state(ota_esp_target *target, int slot, uint32_t *state, ota_error *error)
    ota_status ota_esp_target_sink_new(ota_esp_target *target, int slot, bint activate, bint rewrite_same,
                                       ota_sink **out, ota_error *error)
    ctypedef struct ota_esp_hooks:
        uint64_t offset
        uint64_t size
        ota_status (*begin)(void *user, ota_error *error) noexcept nogil
        ota_status (*commit)(void *user, const uint8_t *image, size_t len, ota_error *error) noexcept nogil
        void (*end)(void *user) noexcept nogil
        void *user
    ota_status ota_esp_target_get_hooks(ota_esp_target *target, int slot, ota_esp_hooks *hooks, ota_error *error)
    ota_status ota_esp_target_set_boot(ota_esp_target *target, int slot, ota_error *error)
    ota_status ota_esp_target_mark_valid(ota_esp_target *target, ota_error *error)
    ota_status ota_esp_target_retry(ota_esp_target *target, ota_error *error)
    ota_status ota_esp_target_mark_invalid(ota_esp_target *target, ota_error *error)
    ota_status ota_esp_target_can_rollback(ota_esp_target *target, int *to, ota_error *error)
    ota_status ota_esp_target_choose(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error)
    ota_status ota_esp_target_boot(ota_esp_target *target, ota_esp_boot_decision *decision, ota_error *error)

cdef extern from "sink/image_store.h" nogil:
    ctypedef struct ota_image_store_counts:
        uint64_t appended
        uint64_t compressed
        uint64_t stream_bytes
        uint64_t digested
        uint64_t streams
        uint64_t shared
        bint cached

cdef extern from "sink/sink_serial.h" nogil:
    ctypedef int ota_serial_phase
    enum:
        OTA_SERIAL_PHASES
        OTA_SINK_SERIAL_MAX
    const char *ota_serial_phase_name(ota_serial_phase phase)
    ctypedef struct ota_sink_serial_device:
        const char *name
        ota_flasher *flasher
        ota_serial *serial
        ota_flash *flash
        uint64_t offset
        uint64_t size
        ota_status (*begin)(void *user, ota_error *error) noexcept nogil
        ota_status (*commit)(void *user, const uint8_t *image, size_t len, ota_error *error) noexcept nogil
        void (*end)(void *user) noexcept nogil
        void *user
    ctypedef struct ota_sink_serial_options:
        const ota_sink_serial_device *devices
        size_t device_count
        bint skip_identical
        bint skip_blank
        bint sector_diff
        bint pre_erase
        int level
        size_t jobs
        uint32_t reconnects
        uint32_t reopen_ms
        const char *cache_dir
        const uint8_t *sha256
        const uint8_t *md5
    ctypedef struct ota_sink_serial_result:
        ota_error error
        ota_serial_phase phase
        bint identical
        bint verified
        bint committed
        uint64_t done
        uint64_t size
        uint64_t wire_out
        uint64_t wire_in
        uint64_t commands
        uint64_t retries
        uint64_t programmed
        uint64_t skipped
        uint64_t blank
        uint64_t erased
        uint64_t probes
        uint64_t reconnects
        uint64_t resumed_at
        uint64_t phase_ms[1]  # OTA_SERIAL_PHASES
    ota_status ota_sink_serial_new(const ota_sink_serial_options *options, ota_sink **out, ota_error *error)
    bint ota_sink_serial_exclude(ota_sink *sink, size_t device, const ota_error *error)
    void ota_sink_serial_announce(ota_sink *sink, const uint8_t *sha256, const uint8_t *md5)
    bint ota_sink_serial_get_result(ota_sink *sink, size_t device, ota_sink_serial_result *result)
    void ota_sink_serial_get_store_counts(ota_sink *sink, ota_image_store_counts *counts)

# ---- source ----------------------------------------------------------------------------------------------------------

cdef extern from "source/source.h" nogil:
    uint64_t OTA_SIZE_UNKNOWN
    ctypedef struct ota_source_info:
        uint64_t size
        uint64_t offset
        char entity_tag[128]
    ctypedef struct ota_source
    ctypedef struct ota_source_ops:
        ota_status (*open)(ota_source *source, uint64_t offset, ota_source_info *info, ota_error *error) noexcept nogil
        ota_status (*read)(ota_source *source, void *buf, size_t capacity, size_t *len, ota_error *error) noexcept nogil
        void (*cancel)(ota_source *source) noexcept nogil
        void (*close)(ota_source *source) noexcept nogil
    ctypedef struct ota_source:
        const ota_source_ops *ops
        uint64_t bytes_read
        uint64_t requests
    void ota_source_free(ota_source **source)
    ctypedef struct ota_http_options:
        const char *url
        const char *ca_file
        const char *ca_pem
        const char *client_cert_file
        const char *client_key_file
        const char *proxy
        const char *user_agent
        const char *entity_tag
        const char *connect_to
        bint allow_http
        bint skip_common_name_check
        uint32_t connect_timeout_ms
        uint32_t stall_timeout_ms
        uint64_t deadline_ms
        uint64_t max_bytes_per_s
        uint32_t max_redirects
        uint32_t receive_buffer
    ota_status ota_source_http_new(const ota_http_options *options, ota_source **out, ota_error *error)
    ota_status ota_source_file_new(const char *path, ota_source **out, ota_error *error)
    ota_status ota_source_fd_new(int fd, ota_source **out, ota_error *error)
    ota_status ota_source_memory_new(const void *data, size_t len, ota_source **out, ota_error *error)
    ota_status ota_source_push_new(size_t capacity, uint64_t size, uint64_t offset, ota_source **out, ota_error *error)
    ota_status ota_source_push_write(ota_source *source, const void *data, size_t len, ota_error *error)
    ota_status ota_source_push_drain(ota_source *source, ota_error *error)
    void ota_source_push_end(ota_source *source)
    void ota_source_push_fail(ota_source *source, const ota_error *error)

cdef extern from "source/http_fields.h" nogil:
    void ota_http_public_url(const char *url, char *out, size_t size)

# ---- verify ----------------------------------------------------------------------------------------------------------

cdef extern from "verify/verify.h" nogil:
    enum:
        OTA_DIGEST_SHA256
        OTA_DIGEST_MD5
    ctypedef struct ota_verify:
        uint64_t offset
    void ota_verify_free(ota_verify **verify)
    ota_status ota_verify_digest_new(int kind, const uint8_t *expected, ota_verify **out, ota_error *error)
    ota_status ota_verify_digest_value(const ota_verify *verify, uint8_t *value, size_t *len)
    ctypedef ota_esp_image_rules ota_image_rules
    ota_status ota_verify_image_new(const ota_image_rules *rules, ota_verify **out, ota_error *error)

# ---- engine ----------------------------------------------------------------------------------------------------------

cdef extern from "engine/pipeline.h" nogil:
    ctypedef int ota_phase
    ctypedef struct ota_header:
        const uint8_t *data
        size_t len
        uint64_t size
        uint64_t offset
        const char *entity_tag
    ctypedef struct ota_checkpoint:
        uint64_t offset
        uint8_t sha256[32]
        const char *entity_tag
    ctypedef struct ota_pipeline_callbacks:
        void *user
        ota_status (*header)(void *user, const ota_header *header) noexcept
        ota_status (*phase)(void *user, ota_phase phase) noexcept
        ota_status (*checkpoint)(void *user, const ota_checkpoint *checkpoint) noexcept
        ota_status (*tick)(void *user) noexcept
    ctypedef struct ota_pipeline_options:
        ota_source *source
        ota_sink *sink
        int transform
        uint64_t max_image_size
        ota_verify *file[4]
        ota_verify *image[4]
        ota_verify *file_sha256
        ota_verify *image_sha256
        uint64_t file_size
        uint32_t header_size
        bint header_required
        bint read_back
        bint single_thread
        uint32_t chunk_count
        uint32_t chunk_size
        uint32_t tick_ms
        uint32_t flush_ms
        uint64_t checkpoint_bytes
        uint32_t checkpoint_ms
        uint64_t resume_offset
        uint8_t resume_sha256[32]
    ctypedef struct ota_progress:
        ota_phase phase
        uint64_t position
        uint64_t size
        uint64_t image_bytes
    ctypedef struct ota_run_counts:
        uint64_t image_size
        uint64_t file_size
        uint64_t resumed_from
        uint64_t copies
        uint64_t chunks
        uint64_t checkpoints
        uint64_t waits_reader
        uint64_t waits_verifier
        uint64_t waits_writer
        int transform
    ctypedef struct ota_pipeline:
        pass
    ota_status ota_pipeline_new(const ota_pipeline_options *options, ota_pipeline **out, ota_error *error)
    ota_status ota_pipeline_run(ota_pipeline *pipeline, const ota_pipeline_callbacks *callbacks, ota_error *error)
    void ota_pipeline_cancel(ota_pipeline *pipeline)
    void ota_pipeline_progress(const ota_pipeline *pipeline, ota_progress *progress)
    void ota_pipeline_counts(const ota_pipeline *pipeline, ota_run_counts *counts)
    void ota_pipeline_free(ota_pipeline **pipeline)
