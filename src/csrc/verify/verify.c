/* Freeing of verifiers, whatever their kind. */
#include "verify/verify.h"

void ota_verify_free(ota_verify **verify) {
    if (*verify != NULL) {
        (*verify)->ops->free(*verify);
        *verify = NULL;
    }
}
