// An ESP32 that sends a reading each minute, and none is lost: not by a Wi-Fi gap, a broker restart, or
// a power cut. Change the five lines below; put your sensor into readCelsius().
#include <LittleFS.h>
#include <PubSubClient.h>  // 2.8
#include <WiFi.h>

#include <HomelabTelemetry.h>
#include <homelab/FolderStore.h>
#include <homelab/PubSubClientTransport.h>

const char* const WIFI_SSID = "...";
const char* const WIFI_PASSWORD = "...";
const char* const MQTT_SERVER = "192.168.1.10";
const char* const DEVICE_ID = "esp32-01";  // A-Z a-z 0-9 _ . : -
const uint32_t READING_MS = 60000;

WiFiClient net;
PubSubClient mqtt(net);
homelab::PubSubClientTransport transport(mqtt);
homelab::FolderStore store("/littlefs/telemetry");
homelab::Telemetry<> telemetry;
homelab::Backoff backoff;
char clientId[80];

float readCelsius() {
  return 23.5f;  // your sensor here
}

void onMessage(char* topic, uint8_t* payload, unsigned int length) {
  telemetry.onMessage(topic, payload, length);
}

void connectIfNeeded() {
  if (mqtt.connected() || WiFi.status() != WL_CONNECTED) return;
  if (!backoff.due(millis(), esp_random())) return;
  if (!mqtt.connect(clientId)) return;
  net.setNoDelay(true);  // else an event right behind a PUBACK waits 40 ms
  backoff.succeeded();
  telemetry.onConnect();
}

void setup() {
  Serial.begin(115200);
  WiFi.begin(WIFI_SSID, WIFI_PASSWORD);  // first: with the radio on, esp_random() is truly random
  configTime(0, 0, "pool.ntp.org");
  mqtt.setServer(MQTT_SERVER, 1883);
  mqtt.setBufferSize(1280);
  mqtt.setSocketTimeout(4);
  mqtt.setCallback(onMessage);
  // Not formatted if it cannot be mounted, as that would erase what waits in it: examples/Format
  // does that, once.
  const bool mounted = LittleFS.begin(false);
  if (!mounted) Serial.println("no LittleFS: events are kept in memory only");
  snprintf(clientId, sizeof clientId, "%s-%08lx", DEVICE_ID,
           static_cast<unsigned long>(ESP.getEfuseMac() >> 16));
  telemetry.onRejected([](const char* id, const char* reason, void*) {
    Serial.printf("%s was rejected: %s\n", id, reason);
  });
  if (!telemetry.begin(DEVICE_ID, transport, mounted ? &store : nullptr, esp_random())) {
    Serial.println("DEVICE_ID is no device id");
  }
}

void loop() {
  static uint32_t readAt = 0;
  static bool first = true;
  connectIfNeeded();
  mqtt.loop();
  if (first || millis() - readAt >= READING_MS) {
    first = false;
    readAt = millis();
    if (!telemetry.add("temperature", readCelsius(), "C")) Serial.println("not added");
  }
  telemetry.loop();
  delay(10);
}
