// Declarations only: see README.md.
#pragma once
#include <stdint.h>
extern "C" uint32_t esp_random();
