// Declarations only: see ../README.md.
#pragma once
#include <stdint.h>
#define pdMS_TO_TICKS(ms) (ms)
