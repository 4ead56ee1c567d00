// The way through esp-mqtt, the client of ESP-IDF (MQTT_EVENT_... events from its own task).
//
// What it does: hands each ACK from that task to loop() through a mailbox. What it does not: start
// or configure the client; the sketch's event handler passes its events to handle().
// Invariant: esp-mqtt keeps no copy: events are enqueued with QoS 0, and the outbox sends again.
#pragma once

#include <mqtt_client.h>

#include "TaskTransport.h"

namespace homelab {

template <size_t ACK_BYTES = 2048>
class EspMqttTransport final : public TaskTransport<ACK_BYTES> {
 public:
  // Once it is known.
  void client(esp_mqtt_client_handle_t client) { client_ = client; }

  // In the event handler, for every event of this client.
  void handle(const esp_mqtt_event_t& event) {
    if (event.event_id == MQTT_EVENT_CONNECTED) {
      this->connected();
    } else if (event.event_id == MQTT_EVENT_DISCONNECTED) {
      this->disconnected();
    } else if (event.event_id == MQTT_EVENT_DATA) {
      // Only the first piece of a message has the topic.
      if (event.current_data_offset == 0) {
        is_ack_ = this->isAck(event.topic, static_cast<size_t>(event.topic_len));
      }
      if (!is_ack_) return;
      this->acks_.put(reinterpret_cast<const uint8_t*>(event.data),
                      static_cast<size_t>(event.data_len),
                      static_cast<size_t>(event.current_data_offset),
                      static_cast<size_t>(event.total_data_len));
    }
  }

  bool subscribe(const char* topic) override {
    this->topic_ = topic;
    return esp_mqtt_client_subscribe(client_, topic, 1) >= 0;
  }
  // Into its queue, as publish() waits for the network.
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    const char* const data = reinterpret_cast<const char*>(payload);
    return esp_mqtt_client_enqueue(client_, topic, data, static_cast<int>(size), 0, 0, true) >= 0;
  }
  // Its reconnect() would do nothing while it believes to be connected; after this it connects anew.
  void disconnect() override { esp_mqtt_client_disconnect(client_); }

 private:
  esp_mqtt_client_handle_t client_ = nullptr;
  bool is_ack_ = false;
};

}  // namespace homelab
