// Declarations only: see README.md.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

unsigned long millis();
void delay(unsigned long ms);
void configTime(long offset, int daylight, const char* server);

struct SerialPort {
  void begin(unsigned long baud);
  void println(const char* text);
  int printf(const char* format, ...);
};
extern SerialPort Serial;

#ifdef ESP32
#define RTC_DATA_ATTR
uint32_t esp_random();
int esp_sleep_enable_timer_wakeup(uint64_t us);
void esp_deep_sleep_start();
#endif

struct Chip {
  uint64_t getEfuseMac();
  uint32_t getChipId();
  uint32_t random();
};
extern Chip ESP;
