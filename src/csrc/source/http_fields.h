/* Values of HTTP fields and URLs, taken apart. Everything here comes from a server: no length is trusted. No I/O. */
#ifndef OTA_SOURCE_HTTP_FIELDS_H
#define OTA_SOURCE_HTTP_FIELDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A Content-Range of a 206 answer: bytes first..last of total (RFC 9110, 14.4). */
typedef struct ota_http_range {
    uint64_t first;
    uint64_t last;  /* inclusive; first <= last < total */
    uint64_t total; /* UINT64_MAX: "*", not told */
} ota_http_range;

/* Parses `len` bytes of a field value, blanks around it allowed. False: not a byte range, or one that contradicts itself. */
bool ota_http_parse_content_range(const char *value, size_t len, ota_http_range *range);

/* Parses a Content-Length: decimal digits below 2^63 and nothing else. */
bool ota_http_parse_length(const char *value, size_t len, uint64_t *number);

/* Copies a strong entity tag, quotes included, NUL-terminated. False, and an empty `tag`: weak, malformed or too long. */
bool ota_http_parse_entity_tag(const char *value, size_t len, char *tag, size_t tag_size);

/* True when the `len` bytes of a header line are the field `name`; `value` and `value_len` are what follows the colon without
 * the blanks and the line end around it. */
bool ota_http_field(const char *line, size_t len, const char *name, const char **value, size_t *value_len);

/* What may be shown of a URL: without user, password, query and fragment, and without control characters; what does not
 * fit into `size` bytes, NUL included, is cut and ends in "...". */
void ota_http_public_url(const char *url, char *out, size_t size);

#endif
