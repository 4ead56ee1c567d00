// Declarations only: see README.md.
#pragma once
#include "WiFi.h"

class PubSubClient {
 public:
  explicit PubSubClient(Client& client);
  PubSubClient& setServer(const char* domain, uint16_t port);
  PubSubClient& setCallback(void (*callback)(char*, uint8_t*, unsigned int));
  PubSubClient& setSocketTimeout(uint16_t seconds);
  bool setBufferSize(uint16_t size);
  uint16_t getBufferSize();
  bool connect(const char* id);
  void disconnect();
  bool publish(const char* topic, const uint8_t* payload, unsigned int size, bool retained);
  bool subscribe(const char* topic, uint8_t qos);
  bool loop();
  bool connected();
};
