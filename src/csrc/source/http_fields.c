/* Values of HTTP fields and URLs, taken apart. */
#include "source/http_fields.h"

#include <string.h>
#include <strings.h>

static bool is_blank(char c) {
    return c == ' ' || c == '\t';
}

static void trim(const char **value, size_t *len) {
    while (*len > 0 && is_blank(**value)) {
        (*value)++;
        (*len)--;
    }
    while (*len > 0 && (is_blank((*value)[*len - 1]) || (*value)[*len - 1] == '\r' || (*value)[*len - 1] == '\n')) {
        (*len)--;
    }
}

/* Decimal digits at *at, at least one; stops at the first other character. */
static bool parse_number(const char *value, size_t len, size_t *at, uint64_t *number) {
    size_t begin = *at;
    uint64_t n = 0;
    while (*at < len && value[*at] >= '0' && value[*at] <= '9') {
        uint64_t digit = (uint64_t)(value[*at] - '0');
        if (n > (UINT64_MAX - digit) / 10) {
            return false;
        }
        n = n * 10 + digit;
        (*at)++;
    }
    *number = n;
    return *at > begin;
}

static bool parse_char(const char *value, size_t len, size_t *at, char c) {
    if (*at < len && value[*at] == c) {
        (*at)++;
        return true;
    }
    return false;
}

bool ota_http_parse_content_range(const char *value, size_t len, ota_http_range *range) {
    trim(&value, &len);
    size_t at = 5;
    if (len < 6 || strncasecmp(value, "bytes", 5) != 0 || !is_blank(value[5])) {
        return false;
    }
    while (at < len && is_blank(value[at])) {
        at++;
    }
    if (!parse_number(value, len, &at, &range->first) || !parse_char(value, len, &at, '-') ||
        !parse_number(value, len, &at, &range->last) || !parse_char(value, len, &at, '/')) {
        return false;
    }
    if (parse_char(value, len, &at, '*')) {
        range->total = UINT64_MAX;
    } else if (!parse_number(value, len, &at, &range->total)) {
        return false;
    }
    return at == len && range->first <= range->last && range->last < range->total;
}

bool ota_http_parse_length(const char *value, size_t len, uint64_t *number) {
    trim(&value, &len);
    size_t at = 0;
    return parse_number(value, len, &at, number) && at == len && *number <= INT64_MAX;
}

bool ota_http_parse_entity_tag(const char *value, size_t len, char *tag, size_t tag_size) {
    tag[0] = '\0';
    trim(&value, &len);
    if (len < 2 || len >= tag_size || value[0] != '"' || value[len - 1] != '"') {
        return false;
    }
    for (size_t i = 1; i + 1 < len; i++) {
        unsigned char c = (unsigned char)value[i];
        if (c <= 0x20 || c == '"' || c == 0x7F) {
            return false;
        }
    }
    memcpy(tag, value, len);
    tag[len] = '\0';
    return true;
}

bool ota_http_field(const char *line, size_t len, const char *name, const char **value, size_t *value_len) {
    size_t name_len = strlen(name);
    if (len <= name_len || line[name_len] != ':' || strncasecmp(line, name, name_len) != 0) {
        return false;
    }
    *value = line + name_len + 1;
    *value_len = len - name_len - 1;
    trim(value, value_len);
    return true;
}

void ota_http_public_url(const char *url, char *out, size_t size) {
    size_t end = strcspn(url, "?#");
    const char *authority = strstr(url, "://");
    size_t scheme_len = 0;
    size_t skip = 0; /* of what follows the scheme: everything up to the last @ of the authority */
    if (authority != NULL && (size_t)(authority - url) < end) {
        scheme_len = (size_t)(authority - url) + 3;
    }
    size_t authority_len = strcspn(url + scheme_len, "/?#\\");
    for (size_t i = 0; i < authority_len; i++) {
        if (url[scheme_len + i] == '@') {
            skip = i + 1;
        }
    }
    size_t at = 0;
    for (size_t i = 0; i < end; i++) {
        if (i >= scheme_len && i < scheme_len + skip) {
            continue;
        }
        if (at + 1 >= size) {
            break;
        }
        unsigned char c = (unsigned char)url[i];
        out[at++] = c < 0x20 || c >= 0x7F ? '?' : (char)c;
    }
    if (size > 0) {
        out[at] = '\0';
    }
    if (size >= 4 && at == size - 1 && end - skip > at) {
        memcpy(out + at - 3, "...", 3);
    }
}
