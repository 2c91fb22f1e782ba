/* What every source has in common. */
#include "source/source.h"

void ota_source_free(ota_source **source) {
    if (*source != NULL) {
        (*source)->ops->free(*source);
        *source = NULL;
    }
}
