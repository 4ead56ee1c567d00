// What the ingester answers: one ACK, or an array of them.
//
// What it does: reads a payload from the ACK topic, and hands over each answer to an event of this
// device. What it does not: know which events wait.
// Invariant: a payload that is not wholly JSON gives no answer at all. A true answer comes whole, so
// half a one is never trusted.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "Event.h"

namespace homelab {

struct Answer {
  Key key;
  bool stored;  // else rejected
  // Of the rejection; "" if there is none, cut if it is longer than any that is known.
  char reason[40];
};

// Walks through the answers of one payload.
class AckReader {
 public:
  AckReader(const char* device_id, const char* payload, size_t size);
  bool next(Answer& answer);

 private:
  bool read(const char* object, Answer& answer) const;
  const char* device_id_;
  const char* at_;  // the next element, or null
  const char* end_;
  bool array_;
};

}  // namespace homelab
