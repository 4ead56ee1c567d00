// Compiles what no example includes: the adapter for espMqttClient, and that for esp-mqtt.
#include "homelab/EspMqttClientTransport.h"
#include "homelab/EspMqttTransport.h"
#include "homelab/Outbox.h"

// As espMqttClient 1.7 declares it; AsyncMqttClient has the same calls.
struct EspMqttClient {
  uint16_t subscribe(const char* topic, uint8_t qos);
  uint16_t publish(const char* topic, uint8_t qos, bool retain, const uint8_t* payload,
                   size_t size);
  bool disconnect(bool force);
};

void useAdapters(EspMqttClient& client, homelab::Outbox& outbox, const esp_mqtt_event_t& event) {
  static homelab::EspMqttClientTransport<EspMqttClient> first(client);
  static homelab::EspMqttTransport<> second;
  first.onConnect();
  first.onMessage("t", nullptr, 0, 0, 0);
  first.onDisconnect();
  first.deliver(outbox);
  second.handle(event);
  second.deliver(outbox);
  outbox.begin("d", first, nullptr, 1);
  outbox.begin("d", second, nullptr, 1);
}
