/* What host.c, the generated forward.c and bodies.py share. Not installed. */
#ifndef RMAKER_OTA_EMBED_HOST_H
#define RMAKER_OTA_EMBED_HOST_H

#include <rmaker_ota_host.h> /* of include/, not the declarations beside this file */

/* Makes sure that Python runs and the bodies are defined. On failure returns false and has set the thread's error. */
bool rmaker_ota_c_python(void);

/* ---- for bodies.py */

/* Sets the calling thread's error. */
void rmaker_ota_c_set_error(const char *text);

/* A node was opened: rmaker_ota_wait() has something to wait for. */
void rmaker_ota_c_opened(void);

/* It ended. text: what made it fail, or "". */
void rmaker_ota_c_ended(rmaker_ota_end_t end, const char *text);

/* Runs this process's program anew. Returns errno. */
int rmaker_ota_c_exec(void);

/* ---- generated: names of errors */

typedef struct rmaker_ota_c_name {
    esp_err_t code;
    const char *name;
} rmaker_ota_c_name;

extern const rmaker_ota_c_name rmaker_ota_c_names[];
extern const size_t rmaker_ota_c_name_count;

#endif
