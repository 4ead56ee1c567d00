// The way through espMqttClient, or AsyncMqttClient, whose interface it has.
//
// What it does: hands each ACK from the client's task to loop() through a mailbox. What it does not:
// configure or connect; the sketch passes three callbacks on.
// Invariant: events are published with QoS 0, so that the client's own queue never grows.
#pragma once

#include <string.h>

#include "TaskTransport.h"

namespace homelab {

template <typename Client, size_t ACK_BYTES = 2048>
class EspMqttClientTransport final : public TaskTransport<ACK_BYTES> {
 public:
  explicit EspMqttClientTransport(Client& client) : client_(client) {}

  // From the client's callbacks of the same names.
  void onConnect() { this->connected(); }
  void onDisconnect() { this->disconnected(); }
  void onMessage(const char* topic, const uint8_t* bytes, size_t size, size_t offset,
                 size_t total) {
    if (this->isAck(topic, strlen(topic))) this->acks_.put(bytes, size, offset, total);
  }

  bool subscribe(const char* topic) override {
    this->topic_ = topic;
    return client_.subscribe(topic, 1) != 0;
  }
  // The packet id is 0 if it was not taken, and 1 for QoS 0.
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    return client_.publish(topic, 0, false, payload, size) != 0;
  }
  void disconnect() override { client_.disconnect(true); }

 private:
  Client& client_;
};

}  // namespace homelab
