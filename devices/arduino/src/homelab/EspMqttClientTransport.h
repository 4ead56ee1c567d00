// The way through espMqttClient, or AsyncMqttClient, whose interface it has.
//
// What it does: hands each ACK from the client's task to loop() through a mailbox. What it does not:
// configure or connect; the sketch passes three callbacks on.
// Invariant: events are published with QoS 0, so that the client's own queue never grows.
#pragma once

#include <string.h>

#include "Mailbox.h"
#include "Transport.h"

namespace homelab {

template <typename Client, size_t ACK_BYTES = 2048>
class EspMqttClientTransport final : public Transport {
 public:
  explicit EspMqttClientTransport(Client& client) : client_(client) {}

  // From the client's callbacks of the same names.
  void onConnect() {
    count_ = count_ == UINT32_MAX ? 1 : count_ + 1;
    __atomic_store_n(&connection_, count_, __ATOMIC_RELEASE);
  }
  void onDisconnect() { __atomic_store_n(&connection_, 0, __ATOMIC_RELEASE); }
  void onMessage(const char* topic, const uint8_t* bytes, size_t size, size_t offset,
                 size_t total) {
    if (topic_ != nullptr && strcmp(topic, topic_) == 0) acks_.put(bytes, size, offset, total);
  }

  // In loop(), before Outbox::loop().
  template <typename Outbox>
  void deliver(Outbox& outbox) {
    acks_.take([&outbox](const uint8_t* bytes, size_t size) {
      outbox.onMessage(outbox.acksTopic(), bytes, size);
    });
  }

  uint32_t connection() override { return __atomic_load_n(&connection_, __ATOMIC_ACQUIRE); }
  bool subscribe(const char* topic) override {
    topic_ = topic;
    return client_.subscribe(topic, 1) != 0;
  }
  // The packet id is 0 if it was not taken, and 1 for QoS 0.
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    return client_.publish(topic, 0, false, payload, size) != 0;
  }
  void disconnect() override { client_.disconnect(true); }
  size_t sendBytes(const char*) override { return SIZE_MAX; }
  size_t receiveBytes(const char*) override { return ACK_BYTES; }

 private:
  Client& client_;
  const char* topic_ = nullptr;
  uint32_t connection_ = 0;
  uint32_t count_ = 0;  // of the client's task
  Mailbox<ACK_BYTES> acks_;
};

}  // namespace homelab
