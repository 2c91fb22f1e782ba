/* See image_store.h.
 *
 * Two kinds of locks: the store's, over how much there is, the failure and the list of streams; and each stream's, over its
 * compressor. Nobody waits for bytes with a stream's lock held. A stream's lock may be held when the store's is taken, never
 * the other way round. Image bytes and compressed bytes never move and never change once they are counted as there. */
#include "sink/image_store.h"

#include <errno.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "port/port.h"

#define CAPACITY_MAX (1u << 30)
#define STEP 65536u /* image bytes compressed at a time */
#define SHA256_SIZE 32u
#define STREAM_BOUND(n) ((n) + (n) / 512 + 1024) /* above what deflate with its default memory needs at most (zlib.h) */

/* After `consumed` image bytes went in, `len` stream bytes were there. */
typedef struct stream_mark {
    uint64_t len, consumed;
} stream_mark;

struct ota_image_stream {
    ota_image_store *store;
    ota_image_stream *next; /* in the store's list, newest first; under the store's lock */
    uint64_t start, end;    /* of the run; OTA_SIZE_UNKNOWN: to the end of the image */
    uint32_t holders;       /* under the store's lock */
    pthread_mutex_t lock;   /* of everything below */
    z_stream zlib;
    bool running; /* zlib wants to be ended */
    bool done;
    ota_status broken; /* OTA_OK, or why nothing more comes */
    uint8_t *bytes;    /* room for STREAM_BOUND of the run; never moves */
    uint64_t room, len;
    uint64_t consumed; /* image bytes of the run that went in */
    stream_mark *marks;
    size_t mark_count, mark_room;
};

struct ota_image_store {
    pthread_mutex_t lock; /* of everything below but the bytes */
    pthread_cond_t changed;
    uint8_t *bytes; /* `capacity` of them */
    uint64_t capacity, announced, available;
    bool complete;
    ota_error failure;
    int level;
    char *cache_dir;             /* NULL: none */
    uint8_t sha256[SHA256_SIZE]; /* as announced, when the cache has its stream */
    ota_image_stream *streams;
    ota_image_store_counts counts;
    pthread_mutex_t digest_lock; /* of what follows */
    uint8_t *md5s;               /* of the sectors, then of the blocks, then of the whole image */
    uint8_t *md5_known;          /* one for each of them */
    uint64_t sector_count, block_count;
};

/* ---- Helpers --------------------------------------------------------------------------------------------------------- */

static ota_status repeat(const ota_error *from, ota_error *error) {
    return ota_error_set(error, from->status, from->stage, from->offset, from->device_code, "%s", from->text);
}

static ota_status no_memory(ota_error *error) {
    return ota_error_set(error, OTA_ERR_NO_MEMORY, OTA_STAGE_SINK, 0, 0, "no memory for an image");
}

/* Under the lock. */
static void fail_locked(ota_image_store *store, const ota_error *error) {
    if (store->failure.status == OTA_OK) {
        store->failure = *error;
        pthread_cond_broadcast(&store->changed);
    }
}

static ota_status fail_store(ota_image_store *store, ota_status status, uint64_t offset, const char *text,
                             ota_error *error) {
    ota_error cause = {0};
    ota_error_set(&cause, status, OTA_STAGE_SINK, offset, 0, "%s", text);
    ota_image_store_fail(store, &cause);
    return repeat(&cause, error);
}

static void free_stream(ota_image_stream *stream) {
    if (stream->running) {
        deflateEnd(&stream->zlib);
    }
    pthread_mutex_destroy(&stream->lock);
    free(stream->marks);
    free(stream->bytes);
    free(stream);
}

static ota_image_stream *make_stream(ota_image_store *store, uint64_t start, uint64_t end, uint64_t room) {
    ota_image_stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL || (stream->bytes = malloc((size_t)room)) == NULL) {
        free(stream);
        return NULL;
    }
    pthread_mutex_init(&stream->lock, NULL);
    stream->store = store;
    stream->start = start;
    stream->end = end;
    stream->room = room;
    return stream;
}

static bool add_mark(ota_image_stream *stream, uint64_t len, uint64_t consumed) {
    if (stream->mark_count == stream->mark_room) {
        size_t room = stream->mark_room == 0 ? 64 : stream->mark_room * 2;
        stream_mark *marks = realloc(stream->marks, room * sizeof *marks);
        if (marks == NULL) {
            return false;
        }
        stream->marks = marks;
        stream->mark_room = room;
    }
    stream->marks[stream->mark_count++] = (stream_mark){.len = len, .consumed = consumed};
    return true;
}

/* Image bytes that come out of the first `position` stream bytes at most. */
static uint64_t inflated_at(const ota_image_stream *stream, uint64_t position) {
    size_t low = 0, high = stream->mark_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (stream->marks[middle].len >= position) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low < stream->mark_count ? stream->marks[low].consumed : stream->consumed;
}

/* ---- The cache ------------------------------------------------------------------------------------------------------- */

static int cache_path(const ota_image_store *store, const uint8_t *sha256, const char *suffix, char *path,
                      size_t size) {
    char hex[2 * SHA256_SIZE + 1];
    for (size_t i = 0; i < SHA256_SIZE; i++) {
        snprintf(hex + 2 * i, 3, "%02x", sha256[i]);
    }
    int len = snprintf(path, size, "%s/%s.zlib%s", store->cache_dir, hex, suffix);
    return len > 0 && (size_t)len < size ? 0 : ENAMETOOLONG;
}

/* Inflates all of it, writes down what comes out where, and says whether that is the image with this digest. */
static bool stream_is_of(ota_image_stream *stream, uint64_t size, uint64_t capacity, const uint8_t *sha256) {
    uint8_t *out = malloc(STEP), digest[SHA256_SIZE];
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    z_stream zlib = {0};
    bool right = false;
    if (out != NULL && context != NULL && EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
        inflateInit(&zlib) == Z_OK) {
        zlib.next_in = stream->bytes;
        zlib.avail_in = (uInt)stream->len;
        int result = Z_OK;
        bool ok = true;
        while (result == Z_OK && ok) {
            zlib.next_out = out;
            zlib.avail_out = STEP;
            result = inflate(&zlib, Z_NO_FLUSH);
            size_t got = STEP - zlib.avail_out;
            stream->consumed += got;
            ok = (result == Z_OK || result == Z_STREAM_END) && stream->consumed <= capacity &&
                 (got > 0 || result == Z_STREAM_END) && EVP_DigestUpdate(context, out, got) == 1 &&
                 add_mark(stream, stream->len - zlib.avail_in, stream->consumed);
        }
        inflateEnd(&zlib);
        right = ok && result == Z_STREAM_END && zlib.avail_in == 0 && stream->consumed > 0 &&
                (size == OTA_SIZE_UNKNOWN || size == stream->consumed) &&
                EVP_DigestFinal_ex(context, digest, NULL) == 1 && memcmp(digest, sha256, SHA256_SIZE) == 0;
    }
    EVP_MD_CTX_free(context);
    free(out);
    return right;
}

/* Takes the whole image's stream from the cache, where it is. */
static void load_cached(ota_image_store *store, const uint8_t *sha256) {
    char path[4096];
    ota_file *file = NULL;
    if (cache_path(store, sha256, "", path, sizeof path) != 0 ||
        ota_port_file_open(path, OTA_FILE_READ, NULL, &file) != 0) {
        return;
    }
    ota_image_stream *stream = NULL;
    size_t got = 0;
    if (file->size > 0 && file->size <= STREAM_BOUND(store->capacity) &&
        (stream = make_stream(store, 0, OTA_SIZE_UNKNOWN, file->size)) != NULL &&
        file->ops->read_at(file, stream->bytes, (size_t)file->size, 0, &got) == 0 && got == file->size) {
        stream->len = got;
        stream->done = true;
        if (stream_is_of(stream, store->announced, store->capacity, sha256)) {
            memcpy(store->sha256, sha256, SHA256_SIZE);
            store->streams = stream;
            store->counts.cached = true;
            stream = NULL;
        }
    }
    if (stream != NULL) {
        free_stream(stream);
    }
    file->ops->close(file);
}

static ota_image_stream *whole_stream(ota_image_store *store, bool held) {
    for (ota_image_stream *stream = store->streams; stream != NULL; stream = stream->next) {
        if (stream->start == 0 && stream->end == OTA_SIZE_UNKNOWN && (!held || stream->holders > 0)) {
            return stream;
        }
    }
    return NULL;
}

ota_status ota_image_store_keep(ota_image_store *store, ota_error *error) {
    uint8_t digest[SHA256_SIZE];
    char path[4096], part[4096];
    pthread_mutex_lock(&store->lock);
    ota_image_stream *stream =
        store->cache_dir != NULL && store->complete && !store->counts.cached ? whole_stream(store, false) : NULL;
    uint64_t size = store->available;
    if (stream != NULL) {
        stream->holders++;
    }
    pthread_mutex_unlock(&store->lock);
    if (stream == NULL) {
        return OTA_DONE;
    }
    pthread_mutex_lock(&stream->lock);
    bool done = stream->done;
    pthread_mutex_unlock(&stream->lock);
    ota_status status = OTA_OK;
    if (!done) {
        status = OTA_DONE;
    } else if (EVP_Digest(store->bytes, (size_t)size, digest, NULL, EVP_sha256(), NULL) != 1) {
        status = ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_SINK, 0, 0, "libcrypto cannot do SHA-256");
    } else {
        char suffix[64];
        ota_file *file = NULL;
        size_t written;
        /* Unique in this process by the stream's address; two processes that share a name write the same bytes. */
        snprintf(suffix, sizeof suffix, ".%p.part", (void *)stream);
        int errnum = cache_path(store, digest, "", path, sizeof path);
        errnum = errnum != 0 ? errnum : cache_path(store, digest, suffix, part, sizeof part);
        errnum = errnum != 0 ? errnum : ota_port_file_open(part, OTA_FILE_WRITE | OTA_FILE_CREATE, NULL, &file);
        if (errnum == 0) {
            errnum = file->ops->resize(file, 0);
            errnum = errnum != 0 ? errnum : file->ops->write_at(file, stream->bytes, (size_t)stream->len, 0, &written);
            errnum = errnum != 0 ? errnum : file->ops->sync(file);
            file->ops->close(file);
            errnum = errnum != 0 ? errnum : ota_port_file_rename(part, path);
            if (errnum != 0) {
                (void)ota_port_file_remove(part);
            }
        }
        if (errnum != 0) {
            status = ota_error_set_errno(error, OTA_STAGE_SINK, 0, errnum, "keeping a compressed image");
        }
    }
    ota_image_stream_release(&stream);
    return status;
}

/* ---- Making ---------------------------------------------------------------------------------------------------------- */

ota_status ota_image_store_new(const ota_image_store_options *options, ota_image_store **out, ota_error *error) {
    *out = NULL;
    if (options->capacity == 0 || options->capacity > CAPACITY_MAX || options->level < 0 || options->level > 9) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, 0, 0,
                             "an image store of %llu bytes at level %d cannot be made",
                             (unsigned long long)options->capacity, options->level);
    }
    if (options->size != OTA_SIZE_UNKNOWN && options->size > options->capacity) {
        return ota_error_set(error, OTA_ERR_TOO_LARGE, OTA_STAGE_SINK, 0, 0, "the image has %llu bytes, the slot %llu",
                             (unsigned long long)options->size, (unsigned long long)options->capacity);
    }
    ota_image_store *store = calloc(1, sizeof *store);
    if (store == NULL) {
        return no_memory(error);
    }
    pthread_mutex_init(&store->lock, NULL);
    pthread_mutex_init(&store->digest_lock, NULL);
    pthread_cond_init(&store->changed, NULL);
    store->capacity = options->capacity;
    store->announced = options->size;
    store->level = options->level != 0 ? options->level : 6;
    store->sector_count = (store->capacity + OTA_STORE_SECTOR - 1) / OTA_STORE_SECTOR;
    store->block_count = (store->capacity + OTA_STORE_BLOCK - 1) / OTA_STORE_BLOCK;
    size_t digests = (size_t)(store->sector_count + store->block_count + 1);
    store->bytes = malloc((size_t)store->capacity);
    store->md5s = malloc(digests * OTA_STORE_MD5);
    store->md5_known = calloc(digests, 1);
    store->cache_dir = options->cache_dir != NULL ? strdup(options->cache_dir) : NULL;
    if (store->bytes == NULL || store->md5s == NULL || store->md5_known == NULL ||
        (options->cache_dir != NULL && store->cache_dir == NULL)) {
        ota_image_store_free(&store);
        return no_memory(error);
    }
    if (store->cache_dir != NULL && options->sha256 != NULL) {
        load_cached(store, options->sha256);
    }
    *out = store;
    return OTA_OK;
}

void ota_image_store_free(ota_image_store **store) {
    ota_image_store *self = *store;
    *store = NULL;
    if (self == NULL) {
        return;
    }
    while (self->streams != NULL) {
        ota_image_stream *stream = self->streams;
        self->streams = stream->next;
        free_stream(stream);
    }
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->digest_lock);
    pthread_mutex_destroy(&self->lock);
    free(self->cache_dir);
    free(self->md5_known);
    free(self->md5s);
    free(self->bytes);
    free(self);
}

/* ---- Writer ---------------------------------------------------------------------------------------------------------- */

ota_status ota_image_store_append(ota_image_store *store, const void *data, size_t len, ota_error *error) {
    pthread_mutex_lock(&store->lock);
    uint64_t at = store->available;
    bool complete = store->complete;
    ota_status status = store->failure.status != OTA_OK ? repeat(&store->failure, error) : OTA_OK;
    pthread_mutex_unlock(&store->lock);
    if (status < 0) {
        return status;
    }
    if (complete) {
        return fail_store(store, OTA_ERR_STATE, at, "the image is complete already", error);
    }
    if (store->announced != OTA_SIZE_UNKNOWN && len > store->announced - at) {
        return fail_store(store, OTA_ERR_SIZE, store->announced, "the image is larger than it was announced", error);
    }
    if (len > store->capacity - at) {
        return fail_store(store, OTA_ERR_TOO_LARGE, store->capacity, "the image is larger than the slot", error);
    }
    memcpy(store->bytes + at, data, len); /* nobody looks at these before they are counted */
    pthread_mutex_lock(&store->lock);
    store->available = at + len;
    store->counts.appended += len;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->lock);
    return OTA_OK;
}

ota_status ota_image_store_finish(ota_image_store *store, ota_error *error) {
    uint8_t digest[SHA256_SIZE];
    pthread_mutex_lock(&store->lock);
    uint64_t available = store->available;
    bool cached = store->counts.cached;
    pthread_mutex_unlock(&store->lock);
    if (cached && (EVP_Digest(store->bytes, (size_t)available, digest, NULL, EVP_sha256(), NULL) != 1 ||
                   memcmp(digest, store->sha256, SHA256_SIZE) != 0)) {
        return fail_store(store, OTA_ERR_SHA256, available, "the image is not the announced one", error);
    }
    pthread_mutex_lock(&store->lock);
    ota_status status = store->failure.status != OTA_OK ? repeat(&store->failure, error) : OTA_OK;
    if (status == OTA_OK && available > 0 && (store->announced == OTA_SIZE_UNKNOWN || available == store->announced)) {
        store->complete = true;
        pthread_cond_broadcast(&store->changed);
        pthread_mutex_unlock(&store->lock);
        return OTA_OK;
    }
    pthread_mutex_unlock(&store->lock);
    return status < 0 ? status : fail_store(store, OTA_ERR_INCOMPLETE, available, "the image is not complete", error);
}

void ota_image_store_fail(ota_image_store *store, const ota_error *error) {
    pthread_mutex_lock(&store->lock);
    fail_locked(store, error);
    pthread_mutex_unlock(&store->lock);
}

/* ---- Readers --------------------------------------------------------------------------------------------------------- */

ota_status ota_image_store_wait(ota_image_store *store, uint64_t want, uint64_t *available, ota_error *error) {
    pthread_mutex_lock(&store->lock);
    while (store->failure.status == OTA_OK && !store->complete && store->available < want) {
        pthread_cond_wait(&store->changed, &store->lock);
    }
    *available = store->available;
    ota_status status = store->failure.status != OTA_OK ? repeat(&store->failure, error)
                        : store->complete               ? OTA_DONE
                                                        : OTA_OK;
    pthread_mutex_unlock(&store->lock);
    return status;
}

uint64_t ota_image_store_available(ota_image_store *store, bool *complete) {
    pthread_mutex_lock(&store->lock);
    uint64_t available = store->available;
    *complete = store->complete;
    pthread_mutex_unlock(&store->lock);
    return available;
}

const uint8_t *ota_image_store_bytes(const ota_image_store *store) {
    return store->bytes;
}

uint64_t ota_image_store_size(ota_image_store *store) {
    bool complete;
    uint64_t available = ota_image_store_available(store, &complete);
    return complete ? available : store->announced;
}

/* Where the digest of that run is remembered; -1: nowhere. */
static int64_t memory_of(const ota_image_store *store, uint64_t start, uint64_t end, bool whole) {
    if (whole) {
        return (int64_t)(store->sector_count + store->block_count);
    }
    if (start % OTA_STORE_BLOCK == 0 && end - start == OTA_STORE_BLOCK) {
        return (int64_t)(store->sector_count + start / OTA_STORE_BLOCK);
    }
    return start % OTA_STORE_SECTOR == 0 && end - start == OTA_STORE_SECTOR ? (int64_t)(start / OTA_STORE_SECTOR) : -1;
}

ota_status ota_image_store_md5(ota_image_store *store, uint64_t start, uint64_t end, uint8_t md5[OTA_STORE_MD5],
                               ota_error *error) {
    bool complete;
    uint64_t available = ota_image_store_available(store, &complete);
    if (start > end || end > available) {
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, start, 0,
                             "image bytes %llu to %llu are not there", (unsigned long long)start,
                             (unsigned long long)end);
    }
    int64_t at = memory_of(store, start, end, complete && start == 0 && end == available);
    ota_status status = OTA_OK;
    pthread_mutex_lock(&store->digest_lock);
    if (at >= 0 && store->md5_known[at] != 0) {
        memcpy(md5, store->md5s + at * OTA_STORE_MD5, OTA_STORE_MD5);
    } else if (EVP_Digest(store->bytes + start, (size_t)(end - start), md5, NULL, EVP_md5(), NULL) != 1) {
        status = ota_error_set(error, OTA_ERR_UNSUPPORTED, OTA_STAGE_SINK, 0, 0,
                               "libcrypto cannot do MD5 here, which the chips need");
    } else {
        if (at >= 0) {
            memcpy(store->md5s + at * OTA_STORE_MD5, md5, OTA_STORE_MD5);
            store->md5_known[at] = 1;
        }
        pthread_mutex_lock(&store->lock);
        store->counts.digested += end - start;
        pthread_mutex_unlock(&store->lock);
    }
    pthread_mutex_unlock(&store->digest_lock);
    return status;
}

static bool is_blank(const uint8_t *bytes, uint64_t len) {
    return bytes[0] == 0xFF && memcmp(bytes, bytes + 1, (size_t)len - 1) == 0;
}

/* The first sector at or after `at` that is blank, or is not; `end` when there is none. */
static uint64_t find_sector(const ota_image_store *store, uint64_t at, uint64_t end, bool blank) {
    while (at < end) {
        uint64_t len = end - at < OTA_STORE_SECTOR ? end - at : OTA_STORE_SECTOR;
        if (is_blank(store->bytes + at, len) == blank) {
            return at;
        }
        at += len;
    }
    return end;
}

uint64_t ota_image_store_next_run(const ota_image_store *store, uint64_t start, uint64_t end, uint64_t min_blank,
                                  uint64_t *run_end) {
    uint64_t first = find_sector(store, start, end, false);
    *run_end = find_sector(store, first, end, true);
    while (*run_end < end) {
        uint64_t next = find_sector(store, *run_end, end, false);
        if (next - *run_end >= min_blank || next == end) {
            break;
        }
        *run_end = find_sector(store, next, end, true);
    }
    return first;
}

/* ---- Streams --------------------------------------------------------------------------------------------------------- */

/* Frees the oldest streams that nobody holds until the rest is no larger than the store. Under the store's lock. */
static void drop_old_streams(ota_image_store *store) {
    uint64_t sum = 0;
    ota_image_stream **link = &store->streams;
    while (*link != NULL) {
        ota_image_stream *stream = *link;
        if (stream->holders == 0) {
            sum += stream->len;
            if (sum > store->capacity) {
                *link = stream->next;
                free_stream(stream);
                continue;
            }
        }
        link = &stream->next;
    }
}

ota_status ota_image_store_stream(ota_image_store *store, uint64_t start, uint64_t end, ota_image_stream **out,
                                  ota_error *error) {
    *out = NULL;
    pthread_mutex_lock(&store->lock);
    if (end != OTA_SIZE_UNKNOWN && store->complete && end == store->available) {
        end = OTA_SIZE_UNKNOWN; /* one name for one run */
    }
    if (end == OTA_SIZE_UNKNOWN ? start >= store->capacity : start >= end || end > store->capacity) {
        pthread_mutex_unlock(&store->lock);
        return ota_error_set(error, OTA_ERR_ARGUMENT, OTA_STAGE_SINK, start, 0,
                             "an empty run, or not inside the image");
    }
    ota_image_stream *stream = store->streams;
    while (stream != NULL && (stream->start != start || stream->end != end)) {
        stream = stream->next;
    }
    if (stream != NULL) {
        store->counts.shared++;
    } else {
        uint64_t last = end != OTA_SIZE_UNKNOWN                ? end
                        : store->announced != OTA_SIZE_UNKNOWN ? store->announced
                        : store->complete                      ? store->available
                                                               : store->capacity;
        stream = start < last ? make_stream(store, start, end, STREAM_BOUND(last - start)) : NULL;
        if (stream != NULL && deflateInit(&stream->zlib, store->level) != Z_OK) {
            free_stream(stream);
            stream = NULL;
        }
        if (stream != NULL) {
            stream->running = true;
            stream->next = store->streams;
            store->streams = stream;
            store->counts.streams++;
        }
    }
    if (stream != NULL) {
        stream->holders++;
    }
    pthread_mutex_unlock(&store->lock);
    *out = stream;
    return stream != NULL ? OTA_OK : no_memory(error);
}

void ota_image_stream_release(ota_image_stream **stream) {
    ota_image_stream *self = *stream;
    *stream = NULL;
    if (self != NULL) {
        ota_image_store *store = self->store;
        pthread_mutex_lock(&store->lock);
        self->holders--;
        if (self->holders == 0) {
            drop_old_streams(store);
        }
        pthread_mutex_unlock(&store->lock);
    }
}

/* Compresses one step; false: there is nothing to do now. Under the stream's lock. */
static bool compress_step(ota_image_stream *stream) {
    ota_image_store *store = stream->store;
    if (stream->done || stream->broken != OTA_OK) {
        return false;
    }
    bool complete;
    uint64_t available = ota_image_store_available(store, &complete);
    uint64_t end = stream->end != OTA_SIZE_UNKNOWN ? stream->end : complete ? available : store->announced;
    uint64_t at = stream->start + stream->consumed;
    uint64_t until = available < end ? available : end;
    uint64_t take = until > at ? until - at : 0;
    take = take < STEP ? take : STEP;
    bool last = end != OTA_SIZE_UNKNOWN && at + take >= end;
    if (take < STEP && !last) {
        return false; /* whole steps, so that small pieces cost no more */
    }
    z_stream *zlib = &stream->zlib;
    zlib->next_in = store->bytes + at;
    zlib->avail_in = (uInt)take;
    zlib->next_out = stream->bytes + stream->len;
    zlib->avail_out = (uInt)(stream->room - stream->len);
    uint64_t before = zlib->avail_out;
    int result = deflate(zlib, last ? Z_FINISH : Z_NO_FLUSH);
    if (zlib->avail_in != 0 || result != (last ? Z_STREAM_END : Z_OK)) {
        stream->broken = OTA_ERR_STATE;
        return false;
    }
    uint64_t made = before - zlib->avail_out;
    stream->len += made;
    stream->consumed += take;
    if (!add_mark(stream, stream->len, stream->consumed)) {
        stream->broken = OTA_ERR_NO_MEMORY;
        return false;
    }
    if (last) {
        deflateEnd(zlib);
        stream->running = false;
        stream->done = true;
    }
    pthread_mutex_lock(&store->lock);
    store->counts.compressed += take;
    store->counts.stream_bytes += made;
    pthread_mutex_unlock(&store->lock);
    return true;
}

ota_status ota_image_stream_read(ota_image_stream *stream, uint64_t position, size_t want, const uint8_t **data,
                                 size_t *len, uint64_t *inflated, ota_error *error) {
    for (;;) {
        pthread_mutex_lock(&stream->lock);
        while (stream->len < position + want && compress_step(stream)) {
        }
        uint64_t there = stream->len > position ? stream->len - position : 0;
        bool done = stream->done;
        ota_status broken = stream->broken;
        uint64_t next = stream->start + stream->consumed + STEP;
        *data = stream->bytes + position;
        *len = there < want ? (size_t)there : want;
        *inflated = inflated_at(stream, position + *len);
        pthread_mutex_unlock(&stream->lock);
        if (broken != OTA_OK) {
            return ota_error_set(error, broken, OTA_STAGE_SINK, next - STEP, 0, "the image cannot be compressed");
        }
        if (there >= want && !(done && there == want)) {
            return OTA_OK;
        }
        if (done) {
            return OTA_DONE;
        }
        if (stream->end != OTA_SIZE_UNKNOWN && next > stream->end) {
            next = stream->end;
        }
        uint64_t available;
        ota_status status = ota_image_store_wait(stream->store, next, &available, error);
        if (status < 0) {
            return status;
        }
        if (status == OTA_DONE && stream->end != OTA_SIZE_UNKNOWN && available < stream->end) {
            return ota_error_set(error, OTA_ERR_INCOMPLETE, OTA_STAGE_SINK, available, 0,
                                 "the image ends before the run that was asked for");
        }
    }
}

bool ota_image_stream_ready(ota_image_stream *stream, uint64_t position, size_t want) {
    pthread_mutex_lock(&stream->lock);
    while (stream->len < position + want && compress_step(stream)) {
    }
    bool ready = stream->done || stream->broken != OTA_OK || stream->len >= position + want;
    pthread_mutex_unlock(&stream->lock);
    return ready;
}

uint64_t ota_image_stream_size(ota_image_stream *stream) {
    pthread_mutex_lock(&stream->lock);
    uint64_t size = stream->done ? stream->len : OTA_SIZE_UNKNOWN;
    pthread_mutex_unlock(&stream->lock);
    return size;
}

bool ota_image_store_advance(ota_image_store *store, uint32_t steps) {
    pthread_mutex_lock(&store->lock);
    ota_image_stream *stream = whole_stream(store, true);
    if (stream != NULL) {
        stream->holders++;
    }
    pthread_mutex_unlock(&store->lock);
    bool worked = false;
    if (stream != NULL && pthread_mutex_trylock(&stream->lock) == 0) {
        while (steps > 0 && compress_step(stream)) {
            worked = true;
            steps--;
        }
        pthread_mutex_unlock(&stream->lock);
    }
    ota_image_stream_release(&stream);
    return worked;
}

void ota_image_store_get_counts(ota_image_store *store, ota_image_store_counts *counts) {
    pthread_mutex_lock(&store->lock);
    *counts = store->counts;
    pthread_mutex_unlock(&store->lock);
}
