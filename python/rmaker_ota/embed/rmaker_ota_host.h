/* What a Linux program says that a chip need not: which node it is, when it runs, where its log goes.
 *
 *     if (rmaker_ota_open("node.toml") != ESP_OK || esp_rmaker_ota_enable_default() != ESP_OK ||
 *         rmaker_ota_start() != ESP_OK) {
 *         fprintf(stderr, "%s\n", rmaker_ota_last_error());
 *         return 1;
 *     }
 *     rmaker_ota_end_t end;
 *     esp_err_t err = rmaker_ota_wait(-1, &end);
 *     rmaker_ota_stop();
 *
 * The library runs its node in Python, in this process, which is started by the first function that needs it. It finds
 * the environment it was installed in; RMAKER_OTA_PYTHON in the process's environment names another interpreter. The
 * program's locale, signals and standard streams are left alone, but for SIGPIPE: where nothing else is set, it is
 * ignored from rmaker_ota_open() on. A child made by fork() must not call the library unless it calls exec() first.
 */

/* The version of the library, such as "0.1.0". Needs no node; static. */
const char *rmaker_ota_version(void);

/* The sentence to the last call of this thread that did not return ESP_OK: what, where, expected, found. "" before any.
 * Valid until this thread's next failing call. */
const char *rmaker_ota_last_error(void);

/* ---- Life -------------------------------------------------------------------------------------------------------- */

/* Makes the process's node as a configuration file says (the same as for `rmaker-ota agent`). It is what power-on is to
 * a chip: a target whose boot loader is software chooses its slot now. Nothing is connected yet.
 * Returns ESP_ERR_INVALID_ARG: path is NULL, or wrong configuration, whose last_error names file, key and what was
 * expected; ESP_ERR_INVALID_STATE: a node is open; ESP_FAIL: the state file, the target or Python cannot be used. */
esp_err_t rmaker_ota_open(const char *config_file);

/* Connects, and returns. Once for each open node.
 * Returns ESP_ERR_INVALID_STATE: no node, or it is started; ESP_ERR_INVALID_ARG: the credentials cannot be used. */
esp_err_t rmaker_ota_start(void);

/* How a wait ended. */
typedef enum {
    RMAKER_OTA_END_STOPPED = 0, /* by rmaker_ota_stop() */
    RMAKER_OTA_END_RESTART = 1, /* the node wants to be restarted ([restart] mode = "none"): rmaker_ota_restart() */
    RMAKER_OTA_END_FAILED = 2,  /* something made it stop; last_error says what */
    RMAKER_OTA_END_WOKEN = 3,   /* by rmaker_ota_wake(); the node runs on */
} rmaker_ota_end_t;

/* Waits until the node has ended, which is not undone by waiting: stop it, or restart.
 * timeout_ms: negative: for ever.
 * end: how; NULL: not wanted.
 * Returns ESP_ERR_TIMEOUT: it has not; ESP_ERR_INVALID_STATE: no node was opened. */
esp_err_t rmaker_ota_wait(int timeout_ms, rmaker_ota_end_t *end);

/* Makes one rmaker_ota_wait() return, the current or the next. May be called from a signal handler. */
void rmaker_ota_wake(void);

/* Ends the node in order: a download is cut short where it can go on later, accepted messages are sent, the state is
 * kept. Takes a few seconds at most; a callback that does not return is left behind. Afterwards a node may be opened
 * again. An exit() does the same by itself. Returns ESP_ERR_INVALID_STATE: there is no node. */
esp_err_t rmaker_ota_stop(void);

/* Stops the node and starts this program anew: same file, same arguments. It is what restarting is to a chip, and what
 * happens by itself with [restart] mode = "process". Returns only when it fails: ESP_FAIL. */
esp_err_t rmaker_ota_restart(void);

/* ---- What runs --------------------------------------------------------------------------------------------------- */

/* The node and its running image. Texts are cut at the field's size and always end with NUL. */
typedef struct {
    char node_id[129];
    char project[64];
    char version[64];
    char slot[32];  /* "ota_0"; "" where the target has no slots to choose from */
    bool connected; /* MQTT */
} rmaker_ota_info_t;

/* Returns ESP_ERR_INVALID_STATE: there is no node; ESP_ERR_INVALID_ARG: info is NULL. */
esp_err_t rmaker_ota_info(rmaker_ota_info_t *info);

/* ---- Events ------------------------------------------------------------------------------------------------------ */

extern esp_event_base_t const RMAKER_COMMON_EVENT; /* "RMAKER_COMMON_EVENT" */
extern esp_event_base_t const RMAKER_EVENT;        /* "RMAKER_EVENT" */

/* Events of RMAKER_COMMON_EVENT that are posted here, by their numbers in the firmware. */
typedef enum {
    RMAKER_EVENT_REBOOT = 0,            /* data: int8_t, seconds until the restart */
    RMAKER_MQTT_EVENT_CONNECTED = 3,    /* no data */
    RMAKER_MQTT_EVENT_DISCONNECTED = 4, /* no data */
    RMAKER_MQTT_EVENT_PUBLISHED = 5,    /* data: int, number of the message the broker acknowledged */
} rmaker_common_event_t;

/* Events of RMAKER_EVENT that are posted here. No data. */
typedef enum {
    RMAKER_EVENT_INIT_DONE = 1,        /* rmaker_ota_start() */
    RMAKER_EVENT_STARTED = 9,          /* configuration reported, jobs are taken */
    RMAKER_EVENT_CONFIG_REPORTED = 10, /* the node's configuration was published */
} esp_rmaker_event_t;

#define RMAKER_OTA_ANY_EVENT -1

/* Called for an event, on the event thread, one at a time and in order. `event_data` is valid until it returns. The
 * first four arguments are those of the firmware's handlers. */
typedef void (*rmaker_ota_event_handler_t)(void *handler_arg, esp_event_base_t event_base, int32_t event_id,
                                           void *event_data, size_t event_data_size);

/* Has a handler called for events from now on, with or without a node, until it is unregistered.
 * event_base: NULL: of every base. event_id: RMAKER_OTA_ANY_EVENT: every one.
 * Returns ESP_ERR_INVALID_ARG: handler is NULL. */
esp_err_t rmaker_ota_event_handler_register(esp_event_base_t event_base, int32_t event_id,
                                            rmaker_ota_event_handler_t handler, void *handler_arg);

/* Ends what a registration with the same three arguments began. When it returns, the handler does not run any more and
 * will not again; inside a handler it returns at once.
 * Returns ESP_ERR_NOT_FOUND: there is no such registration. */
esp_err_t rmaker_ota_event_handler_unregister(esp_event_base_t event_base, int32_t event_id,
                                              rmaker_ota_event_handler_t handler);

/* ---- Log --------------------------------------------------------------------------------------------------------- */

typedef enum {
    RMAKER_OTA_LOG_NONE = 0,
    RMAKER_OTA_LOG_ERROR = 1,
    RMAKER_OTA_LOG_WARN = 2,
    RMAKER_OTA_LOG_INFO = 3,
    RMAKER_OTA_LOG_DEBUG = 4,
} rmaker_ota_log_level_t;

/* Called with each entry, on a thread of its own, one at a time and in order; never with secrets. `tag` is a dotted name
 * such as "rmaker_ota.rainmaker.node", `text` has one or more lines without a newline at the end. Both are valid until
 * it returns. */
typedef void (*rmaker_ota_log_t)(void *log_arg, rmaker_ota_log_level_t level, const char *tag, const char *text);

/* Says what is logged and where. Before the first call: warnings and errors, to standard error.
 * level: entries less severe are dropped. log: NULL: standard error.
 * Entries wait for a slow callback; beyond 1000 the newest are dropped, and their number is logged. rmaker_ota_stop()
 * and the next rmaker_ota_set_log() wait up to 2 s for them to be taken; when the latter returns, the earlier callback
 * is not called any more unless it hangs. Returns ESP_ERR_INVALID_ARG: no such level. */
esp_err_t rmaker_ota_set_log(rmaker_ota_log_level_t level, rmaker_ota_log_t log, void *log_arg);
