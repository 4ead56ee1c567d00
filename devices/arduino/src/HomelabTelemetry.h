// Homelab telemetry: events that are sent until the database has them.
//
// What it does: an outbox with its memory, and with the board's clocks. Beside it the sketch includes
// one transport for its MQTT client, and a store if events are to outlive a power cut:
// homelab/PubSubClientTransport.h, homelab/EspMqttTransport.h, homelab/EspMqttClientTransport.h;
// homelab/FolderStore.h (ESP32), homelab/LittleFSStore.h (ESP8266).
// What it does not: Wi-Fi, MQTT, or a task of its own.
// Invariant: all memory is in the object; nothing is allocated.
#pragma once

#include <time.h>

#include "homelab/Backoff.h"
#include "homelab/Outbox.h"

#ifdef ARDUINO
#include <Arduino.h>
#endif

namespace homelab {

template <size_t MEMORY_BYTES = 4096, size_t PACKET_BYTES = 1024>
class Telemetry : public Outbox {
 public:
  Telemetry() : Outbox(memory_, sizeof memory_, packet_, sizeof packet_) {}

  using Outbox::add;
  using Outbox::loop;

#ifdef ARDUINO
  // The time is the clock's, if that is set. `meta` is a JSON object as text.
  bool add(const char* type, const Value& value = Value(), const char* unit = nullptr,
           const char* meta = nullptr) {
    return add(type, value, unit, static_cast<int64_t>(time(nullptr)) * 1000, meta);
  }
  // At another time, in milliseconds since 1970; 0: without one.
  bool add(const char* type, const Value& value, const char* unit, int64_t unix_ms,
           const char* meta) {
    return Outbox::add(millis(), {type, value, unit, unix_ms, meta});
  }
  void loop() { Outbox::loop(millis()); }
#endif

 private:
  uint8_t memory_[MEMORY_BYTES];
  uint8_t packet_[PACKET_BYTES];
};

}  // namespace homelab
