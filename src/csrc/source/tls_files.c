/* See tls_files.h. */
#include "source/tls_files.h"

#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <string.h>

static ota_status refuse(ota_error *error, int errnum, const char *what, const char *name, const char *why) {
    ERR_clear_error(); /* or the next handshake on this thread finds it */
    return ota_error_set(error, OTA_ERR_HTTP_TLS_FILE, OTA_STAGE_SOURCE, 0, errnum, "%s %s: %s", what, name, why);
}

/* Without it OpenSSL asks on the terminal. */
static int no_password(char *buf, int size, int writing, void *asked) {
    (void)buf, (void)size, (void)writing;
    *(int *)asked = 1;
    return -1;
}

static ota_status open_file(const char *what, const char *path, BIO **out, ota_error *error) {
    errno = 0;
    *out = BIO_new_file(path, "rb");
    return *out != NULL ? OTA_OK
                        : refuse(error, errno, what, path, errno != 0 ? strerror(errno) : "it cannot be opened");
}

/* The first certificate of a file; NULL: none. */
static X509 *first_certificate(BIO *bio) {
    int asked = 0;
    return PEM_read_bio_X509_AUX(bio, NULL, no_password, &asked);
}

static ota_status check_authorities(const char *file, const char *pem, ota_error *error) {
    static const char what[] = "certificate authorities";
    BIO *bio = NULL;
    if (pem != NULL) {
        bio = BIO_new_mem_buf(pem, -1);
        if (bio == NULL) {
            return ota_error_set_errno(error, OTA_STAGE_SOURCE, 0, ENOMEM, "reading certificates");
        }
    } else {
        ota_status status = open_file(what, file, &bio, error);
        if (status != OTA_OK) {
            return status;
        }
    }
    X509 *first = first_certificate(bio);
    BIO_free(bio);
    if (first == NULL) {
        return refuse(error, 0, what, pem != NULL ? "given as text" : file, "no PEM certificate found");
    }
    X509_free(first);
    return OTA_OK;
}

static ota_status check_identity(const char *cert_file, const char *key_file, ota_error *error) {
    const char *key_name = key_file != NULL ? key_file : cert_file;
    BIO *cert_bio = NULL, *key_bio = NULL;
    X509 *cert = NULL;
    EVP_PKEY *key = NULL;
    int asked = 0;
    ota_status status = open_file("client certificate", cert_file, &cert_bio, error);
    if (status != OTA_OK) {
        goto out;
    }
    cert = first_certificate(cert_bio);
    if (cert == NULL) {
        status = refuse(error, 0, "client certificate", cert_file, "no PEM certificate found");
        goto out;
    }
    status = open_file("client key", key_name, &key_bio, error);
    if (status != OTA_OK) {
        goto out;
    }
    key = PEM_read_bio_PrivateKey(key_bio, NULL, no_password, &asked);
    if (key == NULL) {
        status = refuse(error, 0, "client key", key_name,
                        asked ? "it is protected by a password" : "no PEM private key found");
        goto out;
    }
    if (X509_check_private_key(cert, key) != 1) {
        status = refuse(error, 0, "client key", key_name, "it does not belong to the client certificate");
    }
out:
    EVP_PKEY_free(key);
    BIO_free(key_bio);
    X509_free(cert);
    BIO_free(cert_bio);
    return status;
}

ota_status ota_tls_files_check(const char *ca_file, const char *ca_pem, const char *cert_file, const char *key_file,
                               ota_error *error) {
    ota_status status = OTA_OK;
    if (ca_file != NULL || ca_pem != NULL) {
        status = check_authorities(ca_file, ca_pem, error);
    }
    if (status == OTA_OK && cert_file != NULL) {
        status = check_identity(cert_file, key_file, error);
    }
    return status;
}
