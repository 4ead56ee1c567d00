// One payload, handed from the MQTT client's task to loop().
//
// What it does: takes pieces of a message as they come, and gives the whole to loop(). What it does
// not: hold several; while one is in hand, what comes is dropped, and answered again when the event
// is sent again.
// Invariant: one task writes, one reads; neither waits for the other.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace homelab {

template <size_t BYTES>
class Mailbox {
 public:
  // In the client's task: `size` bytes of a message of `total`, from `offset` on.
  void put(const uint8_t* bytes, size_t size, size_t offset, size_t total) {
    if (__atomic_load_n(&full_, __ATOMIC_ACQUIRE)) return;
    if (offset == 0) size_ = 0;
    if (offset != size_ || total > BYTES || size > total - offset) return;
    memcpy(bytes_ + offset, bytes, size);
    size_ = offset + size;
    if (size_ == total) __atomic_store_n(&full_, true, __ATOMIC_RELEASE);
  }

  // In loop(): hand it to take(bytes, size), if there is one.
  template <typename Take>
  void take(Take taken) {
    if (!__atomic_load_n(&full_, __ATOMIC_ACQUIRE)) return;
    taken(bytes_, size_);
    __atomic_store_n(&full_, false, __ATOMIC_RELEASE);
  }

 private:
  uint8_t bytes_[BYTES];
  size_t size_ = 0;
  bool full_ = false;
};

}  // namespace homelab
