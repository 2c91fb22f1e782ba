# What the border sees of C, room by room, declaration by declaration. The headers are the manual.

from libc.stddef cimport size_t
from libc.stdint cimport UINT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# ---- base ------------------------------------------------------------------------------------------------------------

cdef extern from "base/status.h" nogil:
    ctypedef int ota_status
    ctypedef int ota_stage
    enum:
        OTA_STAGE_SOURCE
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

# ---- port ------------------------------------------------------------------------------------------------------------

cdef extern from "port/port.h" nogil:
    enum:
        OTA_FAULT_READ
        OTA_FAULT_WRITE
        OTA_FAULT_SYNC
        OTA_FAULT_ERASE
        OTA_FAULT_OPEN
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

# ---- target ----------------------------------------------------------------------------------------------------------

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
    uint32_t OTA_ESP_CHIP_ANY
    ctypedef struct ota_verify:
        uint64_t offset
    void ota_verify_free(ota_verify **verify)
    ota_status ota_verify_digest_new(int kind, const uint8_t *expected, ota_verify **out, ota_error *error)
    ota_status ota_verify_digest_value(const ota_verify *verify, uint8_t *value, size_t *len)
    ctypedef struct ota_image_rules:
        uint32_t chip_id
        uint32_t chip_revision
        uint32_t efuse_block_revision
        bint ignore_max_revision
        uint64_t slot_size
        uint8_t spi_flash_mode
        bint bytes_after_allowed
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
