/* RMaker OTA, the C engine: its one public header, and the way into its manual.
 *
 * An installation, from top to bottom:
 *
 *     ota_error error = {0};
 *     ota_source *source = NULL;
 *     ota_sink *sink = NULL;
 *     ota_pipeline *pipeline = NULL;
 *     ota_http_options http = {.url = "https://example.com/fw.bin"};
 *     ota_sink_file_options slot = {.path = "/dev/mmcblk0p3"};
 *
 *     ota_status status = ota_source_http_new(&http, &source, &error);
 *     if (status >= 0) status = ota_sink_file_new(&slot, &sink, &error);
 *     if (status >= 0) {
 *         ota_pipeline_options options = {.source = source, .sink = sink, .file_size = OTA_SIZE_UNKNOWN};
 *         status = ota_pipeline_new(&options, &pipeline, &error);
 *     }
 *     ota_pipeline_callbacks callbacks = {0};
 *     if (status >= 0) status = ota_pipeline_run(pipeline, &callbacks, &error);
 *     ota_pipeline_free(&pipeline);   // before what it borrows
 *     ota_sink_free(&sink);
 *     ota_source_free(&source);
 *     if (status < 0) fprintf(stderr, "%s: %s\n", ota_status_name(status), error.text);
 *
 * Rules that hold everywhere:
 *   - Every function that can fail returns an ota_status: 0 go on, above 0 a named good outcome, below 0 an error. The error
 *     that is handed in keeps the first failure, with its stage, offset and the device's own code.
 *   - new/free are pairs; free takes the address of the pointer and sets it to NULL; freeing NULL is fine.
 *   - Sizes, lengths and offsets are bytes, times end in _ms. Strings are UTF-8 and copied unless the field says otherwise.
 *   - An object belongs to one thread at a time. Exceptions: ota_pipeline_cancel, ota_pipeline_progress, the writer side of a push
 *     source, and a source's cancel, which may come from any thread.
 *   - The engine keeps no global state besides what libcurl and libcrypto keep; it never prints and never exits.
 *
 * The rooms, in the order of the flow; each header is the manual of its room. */
#ifndef OTA_OTA_H
#define OTA_OTA_H

#include "base/status.h" /* statuses, stages, errors */
#include "port/port.h"   /* files, flash, clock; faults for tests */

#include "engine/pipeline.h"     /* the run that joins them */
#include "sink/sink.h"           /* raw slot, app slot in flash */
#include "source/source.h"       /* https, file, descriptor, memory, push */
#include "transform/transform.h" /* gzip, zlib, zstd, xz */
#include "verify/verify.h"       /* SHA-256, MD5, size, ESP image */

#include "esp/esp_image.h"           /* app images */
#include "esp/esp_otadata.h"         /* select entries and the boot decision */
#include "esp/esp_partition_table.h" /* partition tables */

#endif
