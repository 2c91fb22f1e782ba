/* The engine: one installation, from a source through a transform and verifiers into a sink.
 *
 *     source -> transform -> [ring] -> verifiers -> sink          the header gate stands before the verifiers
 *
 * With threads, the calling thread only waits and makes the callbacks; three threads read, verify and write. Without, the
 * calling thread does all of it. Both do the same steps in the same order: a byte is verified before it is written, the gate
 * is passed before the first one is, and commit comes after the last verifier said yes. A failure anywhere ends the run with
 * the first error found. */
#ifndef OTA_ENGINE_PIPELINE_H
#define OTA_ENGINE_PIPELINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "port/port.h"
#include "sink/sink.h"
#include "source/source.h"
#include "transform/transform.h"
#include "verify/verify.h"

#define OTA_HEADER_MAX 4096 /* bytes the gate can ask for at most */
#define OTA_VERIFY_MAX 4    /* verifiers of each kind */

/* Where a run is. Numbers are pinned. */
typedef enum ota_phase {
    OTA_PHASE_CONNECTING = 0, /* the source is being opened */
    OTA_PHASE_HEADER = 1,     /* open; the first bytes are gathered and judged */
    OTA_PHASE_RECEIVING = 2,  /* accepted: bytes go to the sink */
    OTA_PHASE_RECEIVED = 3,   /* the whole body is here and written; no verdict yet */
    OTA_PHASE_VERIFYING = 4,  /* verifiers, sync, read back */
    OTA_PHASE_COMMITTING = 5, /* becoming bootable */
    OTA_PHASE_DONE = 6,
} ota_phase;

/* What the gate is shown. Valid during the callback. */
typedef struct ota_header {
    const uint8_t *data; /* first bytes of the image; of a resumed one as they are on the slot */
    size_t len;          /* header_size, or less when the image is shorter and header_required is not set */
    uint64_t size;       /* bytes of the image; OTA_SIZE_UNKNOWN */
    uint64_t offset;     /* bytes that are on the slot already; 0: not resumed */
    const char *entity_tag;
} ota_header;

/* Bytes that are on the medium for good: what a resume needs. */
typedef struct ota_checkpoint {
    uint64_t offset;
    uint8_t sha256[32]; /* of the image up to offset */
    const char *entity_tag;
} ota_checkpoint;

/* All are called on the thread that called run. OTA_OK goes on; any error ends the run with that status (a callback that
 * keeps its own reason returns OTA_ERR_CALLBACK or OTA_ERR_REJECTED). NULL: not wanted. */
typedef struct ota_pipeline_callbacks {
    void *user;
    ota_status (*header)(void *user, const ota_header *header);
    ota_status (*phase)(void *user, ota_phase phase);
    ota_status (*checkpoint)(void *user, const ota_checkpoint *checkpoint);
    ota_status (*tick)(void *user); /* about every tick_ms while the run lasts */
} ota_pipeline_callbacks;

typedef struct ota_pipeline_options {
    ota_source *source; /* borrowed, as are sink and verifiers: they outlive the pipeline */
    ota_sink *sink;
    ota_transform_kind transform;
    uint64_t max_image_size;           /* a transform that makes more is OTA_ERR_EXPANSION; 0: the sink's capacity */
    ota_verify *file[OTA_VERIFY_MAX];  /* of the file as served, before the transform; unused ones NULL */
    ota_verify *image[OTA_VERIFY_MAX]; /* of the image, after the transform */
    ota_verify *file_sha256;  /* SHA-256 of the file; checkpoints, resume and read_back need it. NULL: none of these */
    ota_verify *image_sha256; /* SHA-256 of the image, used where a transform makes it another one; NULL: not wanted */
    uint64_t file_size; /* announced size of the file; OTA_SIZE_UNKNOWN. A source that tells another one is OTA_ERR_SIZE
                               before anything is written */
    uint32_t header_size; /* bytes the gate wants, 1..OTA_HEADER_MAX; 0: 288 */
    bool header_required; /* a shorter image is OTA_ERR_INCOMPLETE in stage header */
    bool read_back;       /* after the sync, read the image from the medium and compare its SHA-256 */
    bool single_thread;
    uint32_t chunk_count;      /* 0: 8 */
    uint32_t chunk_size;       /* bytes, multiple of 4096; 0: 1 MiB */
    uint32_t tick_ms;          /* 0: 100 */
    uint32_t flush_ms;         /* a chunk that fills more slowly is handed on in part; 0: 1000 */
    uint64_t checkpoint_bytes; /* 0: no checkpoints by size */
    uint32_t checkpoint_ms;    /* 0: no checkpoints by time. Both 0: none at all */
    uint64_t resume_offset;    /* bytes on the slot from an earlier run; multiple of sink->resume_size; 0: none */
    uint8_t resume_sha256[32]; /* their digest as the checkpoint told */
    const ota_clock *clock;    /* NULL: ota_port_clock */
} ota_pipeline_options;

/* Counters, read at any time from any thread. */
typedef struct ota_progress {
    ota_phase phase;
    uint64_t position;    /* bytes of the file read, those on the slot already included */
    uint64_t size;        /* of the file; OTA_SIZE_UNKNOWN */
    uint64_t image_bytes; /* bytes of the image the sink took, those on the slot already included */
} ota_progress;

/* What a run did; complete once run has returned. */
typedef struct ota_run_counts {
    uint64_t image_size;   /* bytes of the image */
    uint64_t file_size;    /* bytes of the file */
    uint64_t resumed_from; /* bytes taken over from an earlier run */
    uint64_t copies;       /* bytes copied between buffers of the engine */
    uint64_t chunks;
    uint64_t checkpoints;
    uint64_t waits_reader, waits_verifier, waits_writer;
    ota_transform_kind transform;
} ota_run_counts;

typedef struct ota_pipeline ota_pipeline;

ota_status ota_pipeline_new(const ota_pipeline_options *options, ota_pipeline **out, ota_error *error);
/* Once. Returns the status recorded in `*error`, or OTA_OK. */
ota_status ota_pipeline_run(ota_pipeline *pipeline, const ota_pipeline_callbacks *callbacks, ota_error *error);
/* Any thread, any time, again and again. The run ends with OTA_ERR_CANCELLED unless it has begun to commit. */
void ota_pipeline_cancel(ota_pipeline *pipeline);
void ota_pipeline_progress(const ota_pipeline *pipeline, ota_progress *progress);
void ota_pipeline_counts(const ota_pipeline *pipeline, ota_run_counts *counts);
void ota_pipeline_free(ota_pipeline **pipeline);

#endif
