// Declarations only: see README.md.
#pragma once
#include "Arduino.h"

enum wl_status_t { WL_CONNECTED = 3 };
struct Radio {
  void begin(const char* ssid, const char* password);
  wl_status_t status();
};
extern Radio WiFi;

class Client {};
class WiFiClient : public Client {
 public:
  void setNoDelay(bool on);
};
