// An ESP32 that sleeps for ten minutes between two readings. What is not answered before it falls
// asleep is in the flash, and is sent after one of the next wakes.
#include <LittleFS.h>
#include <PubSubClient.h>  // 2.8
#include <WiFi.h>

#include <HomelabTelemetry.h>
#include <homelab/FolderStore.h>
#include <homelab/PubSubClientTransport.h>

const char* const WIFI_SSID = "...";
const char* const WIFI_PASSWORD = "...";
const char* const MQTT_SERVER = "192.168.1.10";
const char* const DEVICE_ID = "esp32-02";
const uint64_t SLEEP_US = 600000000;
const uint32_t AWAKE_MS_MAX = 15000;

WiFiClient net;
PubSubClient mqtt(net);
homelab::PubSubClientTransport transport(mqtt);
homelab::FolderStore store("/littlefs/telemetry");
homelab::Telemetry<> telemetry;
homelab::Backoff backoff;
char clientId[80];
// Stays over a deep sleep, so that a wake needs no boot number of its own, which would be written.
RTC_DATA_ATTR homelab::Resume resume;

void onMessage(char* topic, uint8_t* payload, unsigned int length) {
  telemetry.onMessage(topic, payload, length);
}

void connectIfNeeded() {
  if (mqtt.connected() || WiFi.status() != WL_CONNECTED) return;
  if (!backoff.due(millis(), esp_random())) return;
  if (!mqtt.connect(clientId)) return;
  backoff.succeeded();
  telemetry.onConnect();
}

void setup() {
  WiFi.begin(WIFI_SSID, WIFI_PASSWORD);
  configTime(0, 0, "pool.ntp.org");
  mqtt.setServer(MQTT_SERVER, 1883);
  mqtt.setBufferSize(1280);
  mqtt.setSocketTimeout(4);
  mqtt.setCallback(onMessage);
  snprintf(clientId, sizeof clientId, "%s-%08lx", DEVICE_ID,
           static_cast<unsigned long>(ESP.getEfuseMac() >> 16));
  homelab::Store* const used = LittleFS.begin(false) ? &store : nullptr;
  telemetry.hold(AWAKE_MS_MAX);  // save() keeps what is left
  telemetry.begin(DEVICE_ID, transport, used, esp_random(), &resume);
  telemetry.add("temperature", 23.5f, "C");  // your sensor here
}

void loop() {
  connectIfNeeded();
  mqtt.loop();
  telemetry.loop();
  if (telemetry.waiting() == 0 || millis() >= AWAKE_MS_MAX) {
    telemetry.save();
    esp_sleep_enable_timer_wakeup(SLEEP_US);
    esp_deep_sleep_start();
  }
  delay(10);
}
