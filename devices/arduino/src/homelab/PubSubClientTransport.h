// The way through PubSubClient (2.8, or PubSubClient3).
//
// What it does: publishes with QoS 0, all that this client can; the ACK is what counts. What it does
// not: connect, or own the client's callback. The sketch calls onConnect() after each connect().
// Invariant: nothing larger than the client's buffer is sent or asked for.
#pragma once

#include <PubSubClient.h>
#include <string.h>

#include "Transport.h"

namespace homelab {

class PubSubClientTransport final : public Transport {
 public:
  explicit PubSubClientTransport(PubSubClient& client) : client_(client) {}
  uint32_t connection() override { return client_.connected() ? 1 : 0; }
  bool subscribe(const char* topic) override { return client_.subscribe(topic, 1); }
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    return client_.publish(topic, payload, static_cast<unsigned>(size), false);
  }
  void disconnect() override { client_.disconnect(); }
  size_t sendBytes(const char* topic) override { return receiveBytes(topic); }
  // Of the buffer, 5 bytes are the header, 2 the topic's length, 2 a packet id.
  size_t receiveBytes(const char* topic) override {
    const size_t buffer = client_.getBufferSize(), others = strlen(topic) + 9;
    return buffer > others ? buffer - others : 0;
  }

 private:
  PubSubClient& client_;
};

}  // namespace homelab
