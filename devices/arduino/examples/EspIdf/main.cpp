// The same for ESP-IDF, with its own client esp-mqtt. Wi-Fi, NTP and the mount of LittleFS at
// /littlefs are your program's; call telemetryStart() after them.
#include <esp_random.h>
#include <esp_timer.h>
#include <freertos/FreeRTOS.h>
#include <freertos/task.h>
#include <mqtt_client.h>
#include <sys/time.h>

#include "HomelabTelemetry.h"
#include "homelab/EspMqttTransport.h"
#include "homelab/FolderStore.h"

static homelab::EspMqttTransport<> transport;
static homelab::FolderStore store("/littlefs/telemetry");
static homelab::Telemetry<> telemetry;

static void onEvent(void*, esp_event_base_t, int32_t, void* data) {
  transport.handle(*static_cast<esp_mqtt_event_handle_t>(data));
}

static void telemetryTask(void*) {
  uint32_t read_ms = 0;
  for (;; vTaskDelay(pdMS_TO_TICKS(10))) {
    const uint32_t now_ms = static_cast<uint32_t>(esp_timer_get_time() / 1000);
    if (now_ms - read_ms >= 60000) {
      read_ms = now_ms;
      timeval now;
      gettimeofday(&now, nullptr);
      const int64_t unix_ms = static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_usec / 1000;
      telemetry.add(now_ms, {"temperature", 23.5f, "C", unix_ms, nullptr});  // your sensor here
    }
    transport.deliver(telemetry);
    telemetry.loop(now_ms);
  }
}

void telemetryStart(const char* device_id, const char* uri) {
  esp_mqtt_client_config_t config = {};
  config.broker.address.uri = uri;
  esp_mqtt_client_handle_t client = esp_mqtt_client_init(&config);
  transport.client(client);
  esp_mqtt_client_register_event(client, MQTT_EVENT_ANY, onEvent, nullptr);
  telemetry.begin(device_id, transport, &store, esp_random());
  esp_mqtt_client_start(client);
  xTaskCreate(telemetryTask, "telemetry", 6144, nullptr, 5, nullptr);
}
