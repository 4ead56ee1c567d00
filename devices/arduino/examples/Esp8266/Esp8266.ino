// An ESP8266 that sends a reading each minute, with a smaller outbox, and LittleFS.
#include <ESP8266WiFi.h>
#include <LittleFS.h>
#include <PubSubClient.h>  // 2.8

#include <HomelabTelemetry.h>
#include <homelab/LittleFSStore.h>
#include <homelab/PubSubClientTransport.h>

const char* const WIFI_SSID = "...";
const char* const WIFI_PASSWORD = "...";
const char* const MQTT_SERVER = "192.168.1.10";
const char* const DEVICE_ID = "esp8266-01";
const uint32_t READING_MS = 60000;

WiFiClient net;
PubSubClient mqtt(net);
homelab::PubSubClientTransport transport(mqtt);
homelab::LittleFSStore store(LittleFS, "/telemetry");
homelab::Telemetry<2048, 768> telemetry;
homelab::Backoff backoff;
char clientId[80];

void onMessage(char* topic, uint8_t* payload, unsigned int length) {
  telemetry.onMessage(topic, payload, length);
}

void connectIfNeeded() {
  if (mqtt.connected() || WiFi.status() != WL_CONNECTED) return;
  if (!backoff.due(millis(), ESP.random())) return;
  if (!mqtt.connect(clientId)) return;
  net.setNoDelay(true);
  backoff.succeeded();
  telemetry.onConnect();
}

void setup() {
  Serial.begin(115200);
  WiFi.begin(WIFI_SSID, WIFI_PASSWORD);
  configTime(0, 0, "pool.ntp.org");
  mqtt.setServer(MQTT_SERVER, 1883);
  mqtt.setBufferSize(1024);
  mqtt.setSocketTimeout(4);
  mqtt.setCallback(onMessage);
  // Not formatted if it cannot be mounted: examples/Format does that, once.
  LittleFS.setConfig(LittleFSConfig(false));
  const bool mounted = LittleFS.begin();
  if (!mounted) Serial.println("no LittleFS: events are kept in memory only");
  snprintf(clientId, sizeof clientId, "%s-%08lx", DEVICE_ID,
           static_cast<unsigned long>(ESP.getChipId()));
  telemetry.filesMax(48);
  telemetry.begin(DEVICE_ID, transport, mounted ? &store : nullptr, ESP.random());
}

void loop() {
  static uint32_t readAt = 0;
  static bool first = true;
  connectIfNeeded();
  mqtt.loop();
  if (first || millis() - readAt >= READING_MS) {
    first = false;
    readAt = millis();
    telemetry.add("temperature", 23.5f, "C");  // your sensor here
  }
  telemetry.loop();
  delay(10);
}
