/* sources: source/tls_files.c base/status.c */
/* libs: libcrypto */
/* Files of a TLS connection: good ones pass, of others the first that is wrong is named; nothing leaks on any way out. */
#include "check.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "source/tls_files.h"

static char directory[] = "/tmp/ota_tls_files_XXXXXX";

static const char *in_directory(const char *name) {
    static char paths[4][128];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

static X509 *certificate_of(EVP_PKEY *key) {
    X509 *cert = X509_new();
    X509_gmtime_adj(X509_getm_notBefore(cert), 0);
    X509_gmtime_adj(X509_getm_notAfter(cert), 3600);
    X509_set_pubkey(cert, key);
    CHECK(X509_sign(cert, key, EVP_sha256()) > 0);
    return cert;
}

static void write_files(void) {
    static const char *const names[] = {"node", "other"};
    for (int i = 0; i < 2; i++) {
        char name[32];
        EVP_PKEY *key = EVP_EC_gen("P-256");
        X509 *cert = certificate_of(key);
        snprintf(name, sizeof name, "%s.pem", names[i]);
        FILE *file = fopen(in_directory(name), "w");
        CHECK(PEM_write_X509(file, cert) == 1);
        fclose(file);
        snprintf(name, sizeof name, "%s.key", names[i]);
        file = fopen(in_directory(name), "w");
        CHECK(PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1);
        fclose(file);
        snprintf(name, sizeof name, "%s.locked", names[i]);
        file = fopen(in_directory(name), "w");
        CHECK(PEM_write_PKCS8PrivateKey(file, key, EVP_aes_256_cbc(), "secret", 6, NULL, NULL) == 1);
        fclose(file);
        snprintf(name, sizeof name, "%s.both", names[i]);
        file = fopen(in_directory(name), "w");
        CHECK(PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1 && PEM_write_X509(file, cert) == 1);
        fclose(file);
        X509_free(cert);
        EVP_PKEY_free(key);
    }
    FILE *file = fopen(in_directory("cut.pem"), "w");
    fputs("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", file);
    fclose(file);
}

TEST(good_files_pass) {
    ota_error error = {0};
    CHECK_EQ(ota_tls_files_check(NULL, NULL, NULL, NULL, &error), OTA_OK);
    CHECK_EQ(
        ota_tls_files_check(in_directory("node.pem"), NULL, in_directory("node.pem"), in_directory("node.key"), &error),
        OTA_OK);
    CHECK_EQ(ota_tls_files_check(NULL, NULL, in_directory("node.both"), NULL, &error), OTA_OK);
    CHECK_EQ(ota_tls_files_check(in_directory("node.both"), NULL, NULL, NULL, &error), OTA_OK); /* after the key */
    CHECK_EQ(error.status, OTA_OK);
}

TEST(a_text_takes_the_place_of_the_file) {
    char text[4096] = {0};
    ota_error error = {0};
    FILE *file = fopen(in_directory("node.pem"), "r");
    CHECK(fread(text, 1, sizeof text - 1, file) > 0);
    fclose(file);
    CHECK_EQ(ota_tls_files_check("/missing", text, NULL, NULL, &error), OTA_OK);
    CHECK_EQ(ota_tls_files_check(in_directory("node.pem"), "", NULL, NULL, &error), OTA_ERR_HTTP_TLS_FILE);
}

TEST(what_is_wrong_is_named) {
    const struct {
        const char *ca, *cert, *key; /* names in the directory; NULL: not given */
        const char *named, *why;
        int errnum;
    } cases[] = {
        {"none.pem", NULL, NULL, "none.pem", "No such file", ENOENT},
        {"cut.pem", NULL, NULL, "cut.pem", "no PEM certificate found", 0},
        {"node.key", NULL, NULL, "node.key", "no PEM certificate found", 0},
        {".", NULL, NULL, "certificate authorities", "", 0},
        {NULL, "none.pem", "node.key", "none.pem", "No such file", ENOENT},
        {NULL, "node.key", "node.key", "node.key", "no PEM certificate found", 0},
        {NULL, "node.pem", "none.key", "none.key", "No such file", ENOENT},
        {NULL, "node.pem", NULL, "node.pem", "no PEM private key found", 0},
        {NULL, "node.pem", "node.locked", "node.locked", "protected by a password", 0},
        {NULL, "node.pem", "other.key", "other.key", "does not belong", 0},
        {"node.pem", "node.pem", "cut.pem", "cut.pem", "no PEM private key found", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ota_error error = {0};
        const char *ca = cases[i].ca != NULL ? in_directory(cases[i].ca) : NULL;
        const char *cert = cases[i].cert != NULL ? in_directory(cases[i].cert) : NULL;
        const char *key = cases[i].key != NULL ? in_directory(cases[i].key) : NULL;
        CHECK_EQ(ota_tls_files_check(ca, NULL, cert, key, &error), OTA_ERR_HTTP_TLS_FILE);
        CHECK_EQ(error.device_code, cases[i].errnum);
        CHECK_EQ(error.stage, OTA_STAGE_SOURCE);
        CHECK(strstr(error.text, cases[i].named) != NULL);
        CHECK(strstr(error.text, cases[i].why) != NULL);
        CHECK(strstr(error.text, "secret") == NULL);
        CHECK_EQ(ERR_peek_error(), 0); /* the next handshake on this thread must not find it */
    }
}

int main(void) {
    if (mkdtemp(directory) == NULL) {
        return 1;
    }
    write_files();
    RUN(good_files_pass);
    RUN(a_text_takes_the_place_of_the_file);
    RUN(what_is_wrong_is_named);
    static const char *const written[] = {"node.pem",  "node.key",     "node.locked", "node.both", "other.pem",
                                          "other.key", "other.locked", "other.both",  "cut.pem"};
    for (size_t i = 0; i < sizeof written / sizeof written[0]; i++) {
        unlink(in_directory(written[i]));
    }
    rmdir(directory);
    return DONE();
}
