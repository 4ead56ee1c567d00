// Run this once on a new board: it makes an empty LittleFS. On a board that has one it does nothing, so
// that it never erases events that wait.
#include <Arduino.h>
#include <LittleFS.h>

void setup() {
  Serial.begin(115200);
  delay(2000);
#ifdef ESP32
  const bool mounted = LittleFS.begin(false);
#else
  LittleFS.setConfig(LittleFSConfig(false));
  const bool mounted = LittleFS.begin();
#endif
  if (mounted) {
    Serial.println("There is a LittleFS already: nothing was changed.");
  } else {
    Serial.println(LittleFS.format() ? "Formatted." : "LittleFS cannot be formatted.");
  }
}

void loop() { delay(1000); }
