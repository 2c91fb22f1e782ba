/* The OTA interface of ESP RainMaker, for programs on Linux: libesp_rmaker_ota.
 *
 * Names, numbers, structures and return values are those of the firmware, so that callbacks written for a chip compile
 * and behave here. What a Linux program has to say beside that (configuration, start, stop, log) is in
 * rmaker_ota_host.h, which every program needs too:
 *
 *     rmaker_ota_open("node.toml");                        the node, as switching on is to a chip
 *     esp_rmaker_ota_enable(&config, OTA_USING_TOPICS);    before the start, as on a chip
 *     rmaker_ota_start();
 *
 * Every function may be called from any thread, also inside any callback. Without an open node they return
 * ESP_ERR_INVALID_STATE. Strings are UTF-8; a function keeps no pointer it was given after it returns, `priv` excepted.
 * The sentence that belongs to a failure: rmaker_ota_last_error().
 *
 * Callbacks: ota_cb and ota_diag are called on the node's worker thread, one at a time; event handlers on its event
 * thread, so that events are heard while ota_cb waits for a download.
 */

/* ---- Errors: 0, or one of these numbers -------------------------------------------------------------------------- */

typedef int esp_err_t;

#define ESP_OK 0
#define ESP_FAIL -1
#define ESP_ERR_NO_MEM 0x101
#define ESP_ERR_INVALID_ARG 0x102
#define ESP_ERR_INVALID_STATE 0x103
#define ESP_ERR_INVALID_SIZE 0x104
#define ESP_ERR_NOT_FOUND 0x105
#define ESP_ERR_NOT_SUPPORTED 0x106
#define ESP_ERR_TIMEOUT 0x107
#define ESP_ERR_INVALID_VERSION 0x10A
#define ESP_ERR_NOT_FINISHED 0x10C
#define ESP_ERR_NVS_BASE 0x1100
#define ESP_ERR_NVS_NOT_FOUND 0x1102
#define ESP_ERR_NVS_INVALID_LENGTH 0x110C
#define ESP_ERR_OTA_BASE 0x1500
#define ESP_ERR_OTA_PARTITION_CONFLICT 0x1501
#define ESP_ERR_OTA_SELECT_INFO_INVALID 0x1502
#define ESP_ERR_OTA_VALIDATE_FAILED 0x1503
#define ESP_ERR_OTA_SMALL_SEC_VER 0x1504
#define ESP_ERR_OTA_ROLLBACK_FAILED 0x1505
#define ESP_ERR_OTA_ROLLBACK_INVALID_STATE 0x1506
#define ESP_ERR_OTA_ALREADY_IN_PROGRESS 0x1507
#define ESP_ERR_OTA_SPI_MODE_MISMATCH 0x1508
#define ESP_ERR_FLASH_OP_FAIL 0x6001
#define ESP_ERR_FLASH_OP_TIMEOUT 0x6002
#define ESP_ERR_HTTP_BASE 0x7000
#define ESP_ERR_HTTP_MAX_REDIRECT 0x7001
#define ESP_ERR_HTTP_CONNECT 0x7002
#define ESP_ERR_HTTP_WRITE_DATA 0x7003
#define ESP_ERR_HTTP_FETCH_HEADER 0x7004
#define ESP_ERR_HTTP_INVALID_TRANSPORT 0x7005
#define ESP_ERR_HTTP_CONNECTING 0x7006
#define ESP_ERR_HTTP_EAGAIN 0x7007
#define ESP_ERR_HTTP_CONNECTION_CLOSED 0x7008
#define ESP_ERR_HTTP_NOT_MODIFIED 0x7009
#define ESP_ERR_HTTP_RANGE_NOT_SATISFIABLE 0x700A
#define ESP_ERR_HTTP_READ_TIMEOUT 0x700B
#define ESP_ERR_HTTP_INCOMPLETE_DATA 0x700C
#define ESP_ERR_HTTP_REDIRECT_DOWNGRADE 0x700D
#define ESP_ERR_HTTP_HEADER_TOO_LONG 0x700E
#define ESP_ERR_HTTPS_OTA_BASE 0x9000
#define ESP_ERR_HTTPS_OTA_IN_PROGRESS 0x9001

/* The name of an error, such as "ESP_ERR_TIMEOUT"; "UNKNOWN ERROR" for a number that has none. Never NULL; static. */
const char *esp_err_to_name(esp_err_t code);

/* ---- Events: receive them with rmaker_ota_event_handler_register() ----------------------------------------------- */

/* What an event belongs to. Compare the pointers: event_base == RMAKER_OTA_EVENT. */
typedef const char *esp_event_base_t;

extern esp_event_base_t const RMAKER_OTA_EVENT; /* "RMAKER_OTA_EVENT" */

/* Events of RMAKER_OTA_EVENT. Data: the NUL-terminated text of the report (size: its length + 1); none (NULL, 0) with
 * STARTING and REQ_FOR_REBOOT. An event that mirrors a report comes after the report was handed to MQTT. */
typedef enum {
    RMAKER_OTA_EVENT_INVALID = 0,        /* a status was reported that is none */
    RMAKER_OTA_EVENT_STARTING = 1,       /* the built-in handler begins with a job */
    RMAKER_OTA_EVENT_IN_PROGRESS = 2,    /* OTA_STATUS_IN_PROGRESS was reported */
    RMAKER_OTA_EVENT_SUCCESSFUL = 3,     /* OTA_STATUS_SUCCESS */
    RMAKER_OTA_EVENT_FAILED = 4,         /* OTA_STATUS_FAILED */
    RMAKER_OTA_EVENT_REJECTED = 5,       /* OTA_STATUS_REJECTED */
    RMAKER_OTA_EVENT_DELAYED = 6,        /* OTA_STATUS_DELAYED */
    RMAKER_OTA_EVENT_REQ_FOR_REBOOT = 7, /* installed; the application is to restart (ota_disable_auto_reboot) */
} esp_rmaker_ota_event_t;

/* ---- Structures and callbacks ------------------------------------------------------------------------------------ */

/* Where jobs come from. */
typedef enum {
    OTA_USING_PARAMS = 1, /* the URL parameter of the OTA service */
    OTA_USING_TOPICS = 2, /* MQTT topics of their own; jobs have an id */
} esp_rmaker_ota_type_t;

/* What a report says. */
typedef enum {
    OTA_STATUS_IN_PROGRESS = 1, /* "in-progress" */
    OTA_STATUS_SUCCESS = 2,     /* "success"; ends the job */
    OTA_STATUS_FAILED = 3,      /* "failed"; the job may be offered again */
    OTA_STATUS_DELAYED = 4,     /* "delayed"; not now */
    OTA_STATUS_REJECTED = 5,    /* "rejected"; ends the job */
} ota_status_t;

/* A job, for those who are told of it: opaque, never NULL in a callback. It stays usable while the node is open; what
 * is reported with it goes to the job at hand, or to the last one. */
typedef void *esp_rmaker_ota_handle_t;

/* What is known of a job. Every pointer, and the structure itself, is valid until the callback returns. */
typedef struct {
    char *url;               /* of the image; NULL: none */
    char *stream_id;         /* of the image over MQTT; NULL: none */
    int filesize;            /* bytes; 0: unknown, or more than an int holds */
    char *fw_version;        /* announced; NULL: not */
    char *file_md5;          /* announced, hex; NULL: not */
    char *ota_job_id;        /* NULL with OTA_USING_PARAMS */
    const char *server_cert; /* PEM, from the configuration; NULL: none */
    char *priv;              /* esp_rmaker_ota_config_t.priv */
    char *metadata;          /* JSON text of the job's metadata object; NULL: none */
} esp_rmaker_ota_data_t;

/* Called for each job, on the worker thread. It may take as long as it likes: there is one job at a time. It reports
 * the outcome itself, or lets esp_rmaker_ota_default_cb() do all of it. What it returns is ignored. */
typedef esp_err_t (*esp_rmaker_ota_cb_t)(esp_rmaker_ota_handle_t ota_handle, esp_rmaker_ota_data_t *ota_data);

/* When the diagnostics are asked. */
typedef enum {
    OTA_DIAG_STATE_INIT = 0,      /* inside esp_rmaker_ota_enable(), which waits; MQTT is not connected */
    OTA_DIAG_STATE_POST_MQTT = 1, /* at each MQTT connection, until there is a verdict */
} esp_rmaker_ota_diag_state_t;

/* The verdict on a new image. */
typedef enum {
    OTA_DIAG_STATUS_FAIL = 0,    /* it does not work: roll back and restart, now */
    OTA_DIAG_STATUS_PENDING = 1, /* not known yet: esp_rmaker_ota_mark_valid() or ..._mark_invalid() will follow */
    OTA_DIAG_STATUS_SUCCESS = 2, /* it works */
} esp_rmaker_ota_diag_status_t;

typedef struct {
    esp_rmaker_ota_diag_state_t state;
    bool rmaker_ota; /* the image under test was installed by this library */
} esp_rmaker_ota_diag_priv_t;

/* Asked, on the worker thread, whether a new image works; `priv` is esp_rmaker_ota_config_t.priv. A number that is no
 * verdict counts as OTA_DIAG_STATUS_FAIL. Without an answer in time (ota_rollback_wait_period_s) the image is rolled
 * back. */
typedef esp_rmaker_ota_diag_status_t (*esp_rmaker_post_ota_diag_t)(esp_rmaker_ota_diag_priv_t *ota_diag_priv,
                                                                   void *priv);

/* May be released once esp_rmaker_ota_enable() has returned, and so may server_cert. */
typedef struct {
    esp_rmaker_ota_cb_t ota_cb;          /* NULL: esp_rmaker_ota_default_cb */
    esp_rmaker_post_ota_diag_t ota_diag; /* NULL: every image works */
    const char *server_cert;             /* PEM to trust for downloads where use_cert_bundle is off; NULL: [ota]
                                            server_cert of the configuration file, if any, else
                                            ESP_RMAKER_OTA_DEFAULT_SERVER_CERT */
    void *priv;                          /* handed to both callbacks, never looked at */
} esp_rmaker_ota_config_t;

/* PEM text of the authorities that downloads of the public RainMaker chain up to: what is trusted where use_cert_bundle is
 * off and no other certificate was given. */
extern const char *ESP_RMAKER_OTA_DEFAULT_SERVER_CERT;

/* ---- Functions --------------------------------------------------------------------------------------------------- */

/* Switches OTA on, once for each open node, before rmaker_ota_start(). Where the running image awaits its verdict, the
 * INIT diagnostics are over when it returns.
 * ota_config: NULL stands for all fields NULL.
 * Returns ESP_ERR_INVALID_ARG: no such type; ESP_FAIL: it is on already. */
esp_err_t esp_rmaker_ota_enable(const esp_rmaker_ota_config_t *ota_config, esp_rmaker_ota_type_t type);

/* esp_rmaker_ota_enable(NULL, OTA_USING_TOPICS). */
esp_err_t esp_rmaker_ota_enable_default(void);

/* Reports a status of the job, and posts the matching event.
 * additional_info: a sentence for people; NULL counts as "".
 * Returns ESP_FAIL: ota_handle is NULL, or it was not published; ESP_ERR_INVALID_STATE: there is no job. */
esp_err_t esp_rmaker_ota_report_status(esp_rmaker_ota_handle_t ota_handle, ota_status_t status,
                                       const char *additional_info);

/* The built-in handler, to be called inside ota_cb: checks the time window, downloads, verifies, installs, reports each
 * step, and arranges the restart. Returns when that is done.
 * Returns ESP_FAIL: failed, rejected or delayed, and reported. */
esp_err_t esp_rmaker_ota_default_cb(esp_rmaker_ota_handle_t ota_handle, esp_rmaker_ota_data_t *ota_data);

/* The same over HTTPS, whatever transport is configured. ESP_FAIL and nothing else when there is no URL. */
esp_err_t esp_rmaker_ota_https_cb(esp_rmaker_ota_handle_t ota_handle, esp_rmaker_ota_data_t *ota_data);

/* The same over MQTT (AWS IoT file streams). ESP_FAIL when there is no stream id or no size, which
 * is reported. */
esp_err_t esp_rmaker_ota_mqtt_cb(esp_rmaker_ota_handle_t ota_handle, esp_rmaker_ota_data_t *ota_data);

/* Asks the cloud for a job.
 * Returns ESP_ERR_INVALID_STATE: not connected; ESP_FAIL: not sent. Either way it is tried again by itself. */
esp_err_t esp_rmaker_ota_fetch(void);

/* Asks in so many seconds; 0: at once. Returns ESP_ERR_INVALID_ARG: negative. */
esp_err_t esp_rmaker_ota_fetch_with_delay(int time);

/* Confirms the running image.
 * Returns ESP_ERR_INVALID_STATE: there is nothing to confirm; ESP_ERR_INVALID_ARG: OTA is not on; another one: the
 * target refused. */
esp_err_t esp_rmaker_ota_mark_valid(void);

/* Refuses the running image and restarts into the one before; ESP_OK may be seen before that happens.
 * Returns ESP_ERR_INVALID_STATE: it is confirmed already; ESP_ERR_OTA_ROLLBACK_FAILED: there is no other image. */
esp_err_t esp_rmaker_ota_mark_invalid(void);
