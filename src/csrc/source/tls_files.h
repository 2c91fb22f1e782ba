/* Looks at the certificates and the key a TLS connection is to use before anything is connected: what is wrong with a file
 * is then said with its name, and is not a failed handshake. Reads files; keeps nothing. */
#ifndef OTA_SOURCE_TLS_FILES_H
#define OTA_SOURCE_TLS_FILES_H

#include "base/status.h"

/* Each may be NULL. `ca_pem` is text and takes the place of `ca_file`; `key_file` NULL: the key is in `cert_file`, if there is
 * one. Every file has to hold what it should in PEM, the key without a password, and key and certificate have to belong
 * together. Whether a certificate is good is for the other side to say.
 * Returns OTA_ERR_HTTP_TLS_FILE with an errno as the device code, if there was one. */
ota_status ota_tls_files_check(const char *ca_file, const char *ca_pem, const char *cert_file, const char *key_file,
                               ota_error *error);

#endif
