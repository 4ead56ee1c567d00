// What the ways through clients with a task of their own have in common.
//
// What it does: counts the connections, and hands each ACK from the client's task to loop() through a
// mailbox. What it does not: know a client.
// Invariant: connected(), disconnected(), isAck() and acks_ are for the client's task, the rest is for loop().
#pragma once

#include <string.h>

#include "Mailbox.h"
#include "Transport.h"

namespace homelab {

template <size_t ACK_BYTES>
class TaskTransport : public Transport {
 public:
  // In loop(), before Outbox::loop().
  template <typename Outbox>
  void deliver(Outbox& outbox) {
    acks_.take([&outbox](const uint8_t* bytes, size_t size) {
      outbox.onMessage(outbox.acksTopic(), bytes, size);
    });
  }

  uint32_t connection() override { return __atomic_load_n(&connection_, __ATOMIC_ACQUIRE); }
  size_t sendBytes(const char*) override { return SIZE_MAX; }
  size_t receiveBytes(const char*) override { return ACK_BYTES; }

 protected:
  ~TaskTransport() = default;  // never deleted through this

  void connected() {
    count_ = count_ == UINT32_MAX ? 1 : count_ + 1;
    __atomic_store_n(&connection_, count_, __ATOMIC_RELEASE);
  }
  void disconnected() { __atomic_store_n(&connection_, 0, __ATOMIC_RELEASE); }
  bool isAck(const char* topic, size_t size) const {
    return topic_ != nullptr && strlen(topic_) == size && memcmp(topic, topic_, size) == 0;
  }

  const char* topic_ = nullptr;  // of the ACKs, once subscribe() was called
  Mailbox<ACK_BYTES> acks_;

 private:
  uint32_t connection_ = 0;
  uint32_t count_ = 0;  // of the client's task
};

}  // namespace homelab
