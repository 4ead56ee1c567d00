// The way through libmosquitto, for programs on a computer. One thread, mosquitto_loop().
//
// What it does: publishes with QoS 1, and counts connections. What it does not: connect, or read;
// the program calls mosquitto_loop() and passes its callbacks on.
// Invariant: nothing here waits for the network.
#pragma once

#include <mosquitto.h>

#include "Transport.h"

namespace homelab {

class MosquittoTransport final : public Transport {
 public:
  explicit MosquittoTransport(mosquitto* client) : client_(client) {}

  // From the callbacks of the same names.
  void onConnect() { connection_ = ++count_; }
  void onDisconnect() { connection_ = 0; }

  uint32_t connection() override { return connection_; }
  bool subscribe(const char* topic) override {
    return mosquitto_subscribe(client_, nullptr, topic, 1) == MOSQ_ERR_SUCCESS;
  }
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    const int bytes = static_cast<int>(size);
    return mosquitto_publish(client_, nullptr, topic, bytes, payload, 1, false) == MOSQ_ERR_SUCCESS;
  }
  void disconnect() override { mosquitto_disconnect(client_); }
  size_t sendBytes(const char*) override { return 262144; }  // what the ingester takes
  size_t receiveBytes(const char*) override { return 262144; }

 private:
  mosquitto* client_;
  uint32_t connection_ = 0;
  uint32_t count_ = 0;
};

}  // namespace homelab
