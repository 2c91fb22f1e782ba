/* sources: source/http_fields.c */
/* Any bytes as a header line and as a URL: what is taken is what it claims to be, and secrets stay inside. */
#include <stdlib.h>
#include <string.h>

#include "source/http_fields.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *line = (const char *)data, *value = NULL;
    size_t value_len = 0;
    ota_http_range range;
    uint64_t number = 0;
    char tag[20], shown[40];

    if (ota_http_field(line, size, "ETag", &value, &value_len) && (value < line || value + value_len > line + size)) {
        abort();
    }
    if (ota_http_parse_content_range(line, size, &range) && !(range.first <= range.last && range.last < range.total)) {
        abort();
    }
    if (ota_http_parse_length(line, size, &number) && number > INT64_MAX) {
        abort();
    }
    if (ota_http_parse_entity_tag(line, size, tag, sizeof tag)) {
        const size_t len = strlen(tag);
        if (len < 2 || len >= sizeof tag || tag[0] != '"' || strchr(tag + 1, '"') != tag + len - 1) {
            abort();
        }
    } else if (tag[0] != '\0') {
        abort();
    }
    char *url = malloc(size + 1);
    if (size > 0) {
        memcpy(url, data, size);
    }
    url[size] = '\0';
    const size_t room = size > 0 ? data[0] % (sizeof shown + 1) : sizeof shown;
    memset(shown, 'x', sizeof shown);
    ota_http_public_url(url, shown, room);
    if (room > 0 && memchr(shown, '\0', room) == NULL) {
        abort();
    }
    for (size_t i = 0; i < room && shown[i] != '\0'; i++) {
        if (shown[i] < 0x20 || shown[i] == 0x7F) {
            abort();
        }
    }
    free(url);
    return 0;
}
