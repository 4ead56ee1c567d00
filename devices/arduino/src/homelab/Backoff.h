// When to try to connect again: at longer and longer intervals, up to a minute, each with a random
// part, so that a thousand devices do not come back at once.
//
// What it does: says whether it is time. What it does not: connect, or wait.
// Invariant: right across the wrap of millis().
#pragma once

#include <stdint.h>

namespace homelab {

class Backoff {
 public:
  // True if it is time for an attempt, which begins now.
  bool due(uint32_t now_ms, uint32_t random) {
    if (wait_ms_ != 0 && now_ms - tried_ms_ < wait_ms_) return false;
    next_ms_ = next_ms_ < 32000 ? next_ms_ * 2 : 60000;
    wait_ms_ = next_ms_ / 2 + random % next_ms_;
    tried_ms_ = now_ms;
    return true;
  }
  void succeeded() {
    wait_ms_ = 0;
    next_ms_ = 1000;
  }

 private:
  uint32_t tried_ms_ = 0;
  uint32_t wait_ms_ = 0;
  uint32_t next_ms_ = 1000;
};

}  // namespace homelab
