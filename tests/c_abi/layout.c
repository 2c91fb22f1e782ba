/* Numbers and layout of esp_rmaker_ota.h, from the specification (section 1). Compiles, or does not. Where pointers have
 * P bytes, a structure is aligned to P. */
#include <esp_rmaker_ota.h>
#include <rmaker_ota_host.h>

#define P sizeof(void *)
#define IS(condition) _Static_assert(condition, #condition)
#define AT(type, field, offset) IS(offsetof(type, field) == (offset))

#ifdef BITS
IS(P * 8 == BITS);
#endif
IS(sizeof(int) == 4);
IS(sizeof(esp_rmaker_ota_handle_t) == P);
IS(sizeof(esp_rmaker_ota_cb_t) == P);

AT(esp_rmaker_ota_data_t, url, 0);
AT(esp_rmaker_ota_data_t, stream_id, P);
AT(esp_rmaker_ota_data_t, filesize, 2 * P);
AT(esp_rmaker_ota_data_t, fw_version, 3 * P);
AT(esp_rmaker_ota_data_t, file_md5, 4 * P);
AT(esp_rmaker_ota_data_t, ota_job_id, 5 * P);
AT(esp_rmaker_ota_data_t, server_cert, 6 * P);
AT(esp_rmaker_ota_data_t, priv, 7 * P);
AT(esp_rmaker_ota_data_t, metadata, 8 * P);
IS(sizeof(esp_rmaker_ota_data_t) == 9 * P);

AT(esp_rmaker_ota_config_t, ota_cb, 0);
AT(esp_rmaker_ota_config_t, ota_diag, P);
AT(esp_rmaker_ota_config_t, server_cert, 2 * P);
AT(esp_rmaker_ota_config_t, priv, 3 * P);
IS(sizeof(esp_rmaker_ota_config_t) == 4 * P);

AT(esp_rmaker_ota_diag_priv_t, state, 0);
AT(esp_rmaker_ota_diag_priv_t, rmaker_ota, 4);
IS(sizeof(esp_rmaker_ota_diag_priv_t) == 8);

AT(rmaker_ota_info_t, node_id, 0);
AT(rmaker_ota_info_t, project, 129);
AT(rmaker_ota_info_t, version, 193);
AT(rmaker_ota_info_t, slot, 257);
AT(rmaker_ota_info_t, connected, 289);
IS(sizeof(rmaker_ota_info_t) == 290);

IS(sizeof(esp_rmaker_ota_event_t) == 4);
IS(RMAKER_OTA_EVENT_INVALID == 0 && RMAKER_OTA_EVENT_STARTING == 1 && RMAKER_OTA_EVENT_IN_PROGRESS == 2);
IS(RMAKER_OTA_EVENT_SUCCESSFUL == 3 && RMAKER_OTA_EVENT_FAILED == 4 && RMAKER_OTA_EVENT_REJECTED == 5);
IS(RMAKER_OTA_EVENT_DELAYED == 6 && RMAKER_OTA_EVENT_REQ_FOR_REBOOT == 7);

IS(sizeof(ota_status_t) == 4);
IS(OTA_STATUS_IN_PROGRESS == 1 && OTA_STATUS_SUCCESS == 2 && OTA_STATUS_FAILED == 3);
IS(OTA_STATUS_DELAYED == 4 && OTA_STATUS_REJECTED == 5);

IS(sizeof(esp_rmaker_ota_type_t) == 4 && OTA_USING_PARAMS == 1 && OTA_USING_TOPICS == 2);

IS(sizeof(esp_rmaker_ota_diag_status_t) == 4);
IS(OTA_DIAG_STATUS_FAIL == 0 && OTA_DIAG_STATUS_PENDING == 1 && OTA_DIAG_STATUS_SUCCESS == 2);
IS(sizeof(esp_rmaker_ota_diag_state_t) == 4 && OTA_DIAG_STATE_INIT == 0 && OTA_DIAG_STATE_POST_MQTT == 1);

IS(RMAKER_EVENT_REBOOT == 0 && RMAKER_MQTT_EVENT_CONNECTED == 3 && RMAKER_MQTT_EVENT_DISCONNECTED == 4);
IS(RMAKER_MQTT_EVENT_PUBLISHED == 5);
IS(RMAKER_EVENT_INIT_DONE == 1 && RMAKER_EVENT_STARTED == 9 && RMAKER_EVENT_CONFIG_REPORTED == 10);

IS(ESP_OK == 0 && ESP_FAIL == -1 && ESP_ERR_NO_MEM == 0x101 && ESP_ERR_INVALID_ARG == 0x102);
IS(ESP_ERR_INVALID_STATE == 0x103 && ESP_ERR_INVALID_SIZE == 0x104 && ESP_ERR_NOT_FOUND == 0x105);
IS(ESP_ERR_NOT_SUPPORTED == 0x106 && ESP_ERR_TIMEOUT == 0x107 && ESP_ERR_INVALID_VERSION == 0x10A);
IS(ESP_ERR_NOT_FINISHED == 0x10C && ESP_ERR_NVS_BASE == 0x1100 && ESP_ERR_NVS_NOT_FOUND == 0x1102);
IS(ESP_ERR_NVS_INVALID_LENGTH == 0x110C && ESP_ERR_OTA_BASE == 0x1500 && ESP_ERR_HTTP_BASE == 0x7000);
IS(ESP_ERR_HTTPS_OTA_BASE == 0x9000 && ESP_ERR_HTTPS_OTA_IN_PROGRESS == 0x9001);
