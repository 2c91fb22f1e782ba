/* What all sinks share. */
#include "sink/sink.h"

void ota_sink_free(ota_sink **sink) {
    if (*sink != NULL) {
        (*sink)->ops->free(*sink);
        *sink = NULL;
    }
}
