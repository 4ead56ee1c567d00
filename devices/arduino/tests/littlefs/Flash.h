// A flash chip in memory, with real littlefs on it.
//
// What it does: counts programs and erases, and ends the power in the middle of a given one; counts
// the calls of the file system, and lets a given one fail. What it does not: any work of littlefs.
// Invariant: after the power has ended nothing changes any more, whatever is called.
#pragma once

#include <stdint.h>

#include <vector>

extern "C" {
#include "lfs.h"
}

struct Flash {
  // As the LittleFS of the board configures it.
  struct Chip {
    const char* name;
    lfs_size_t unit;   // of reading and programming
    lfs_size_t cache;
    lfs_size_t block_count;
    int32_t block_cycles;
    size_t files_max;
  };

  explicit Flash(const Chip& chip);
  Flash(const Flash&) = delete;
  void format();
  bool mount();
  void unmount();
  // Of the calls of a file system that posix.cpp and LittleFS.h make: whether this one fails.
  bool fails(bool changes = false) {
    changing.push_back(changes);
    return calls++ == fail_at;
  }
  // A new start: what was in memory is gone, and what was on the chip is as it is.
  void powerOn();

  const size_t files_max;
  lfs_t lfs;
  lfs_config config;
  std::vector<uint8_t> bytes;
  int64_t operations = 0;  // programs and erases
  int64_t cut_at = -1;     // the one at which the power ends
  int64_t calls = 0;
  std::vector<bool> changing;  // which of them change something
  int64_t fail_at = -1;  // the one that fails
  bool fails_late = false;  // after it was done, and not before
  bool dead = false;
  bool mounted = false;
  uint64_t erases = 0;
  uint64_t programmed = 0;
};

// As arduino-esp32 (esp_littlefs) and the ESP8266's core configure it, on a small partition.
extern const Flash::Chip kEsp32;
extern const Flash::Chip kEsp8266;
// So small that it is full before the outbox is.
extern const Flash::Chip kFull;

// What the POSIX calls and the FS class of boards/ work on.
extern Flash* flash;
