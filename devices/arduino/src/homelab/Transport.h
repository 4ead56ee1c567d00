// The way to the broker: the sketch's own MQTT client, seen through an adapter.
//
// What it does: says what the outbox asks of a client. What it does not: connect, or know Wi-Fi.
// Invariant: nothing here waits. The answer to an event comes through Outbox::onMessage().
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

class Transport {
 public:
  // 0 while there is no connection; else a number that is another one after each connect.
  virtual uint32_t connection() = 0;
  virtual bool subscribe(const char* topic) = 0;  // with QoS 1
  virtual bool publish(const char* topic, const uint8_t* payload, size_t size) = 0;
  // Give up this connection, which looks alive and is not: the sketch makes another.
  virtual void disconnect() = 0;
  // The largest payload on this topic that can be sent, and that can be heard.
  virtual size_t sendBytes(const char* topic) = 0;
  virtual size_t receiveBytes(const char* topic) = 0;

 protected:
  ~Transport() = default;
};

}  // namespace homelab
