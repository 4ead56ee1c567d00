// Declarations only: see README.md.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct esp_mqtt_client* esp_mqtt_client_handle_t;
typedef const char* esp_event_base_t;
typedef enum {
  MQTT_EVENT_ANY = -1,
  MQTT_EVENT_CONNECTED = 1,
  MQTT_EVENT_DISCONNECTED = 2,
  MQTT_EVENT_DATA = 6
} esp_mqtt_event_id_t;
typedef struct {
  esp_mqtt_event_id_t event_id;
  char* data;
  int data_len;
  int total_data_len;
  int current_data_offset;
  char* topic;
  int topic_len;
} esp_mqtt_event_t;
typedef esp_mqtt_event_t* esp_mqtt_event_handle_t;
typedef struct {
  struct {
    struct {
      const char* uri;
    } address;
  } broker;
} esp_mqtt_client_config_t;
typedef void (*esp_event_handler_t)(void*, esp_event_base_t, int32_t, void*);

extern "C" {
esp_mqtt_client_handle_t esp_mqtt_client_init(const esp_mqtt_client_config_t* config);
int esp_mqtt_client_register_event(esp_mqtt_client_handle_t client, esp_mqtt_event_id_t event,
                                   esp_event_handler_t handler, void* argument);
int esp_mqtt_client_start(esp_mqtt_client_handle_t client);
int esp_mqtt_client_disconnect(esp_mqtt_client_handle_t client);
int esp_mqtt_client_subscribe(esp_mqtt_client_handle_t client, const char* topic, int qos);
int esp_mqtt_client_enqueue(esp_mqtt_client_handle_t client, const char* topic, const char* data,
                            int size, int qos, int retain, bool store);
}
