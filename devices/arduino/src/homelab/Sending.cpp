// Sending: a window of up to kBatchMax events walks over the store, oldest first, then over the
// memory, then begins again. Of the window one packet at a time is on its way.
#include <string.h>

#include "Json.h"
#include "Outbox.h"
#include "Record.h"

namespace homelab {
namespace {

// An answer has about 66 bytes around the two ids, and as a rejection a reason and a text.
constexpr size_t kAnswerBytes = 200;
constexpr size_t kIdAt = sizeof "{\"schema\":1,\"event_id\":\"" - 1;
constexpr uint32_t kPauseMs = 1000;
// Of the same batch without an answer; then the next one has its turn.
constexpr unsigned kTriesMax = 3;
// Of packets without an answer; then the connection is given up.
constexpr unsigned kSilencesMax = 5;

size_t idSize(const uint8_t* event, size_t size) {
  const void* const end = memchr(event + kIdAt, '"', size - kIdAt);
  return static_cast<size_t>(static_cast<const uint8_t*>(end) - event) - kIdAt;
}

}  // namespace

uint32_t Outbox::nextRandom() {
  if (random_ == 0) random_ = kFormat;
  random_ ^= random_ << 13;
  random_ ^= random_ >> 17;
  random_ ^= random_ << 5;
  return random_;
}

// Between three and five quarters, so that many devices do not stay in step.
uint32_t Outbox::jittered(uint32_t ms) {
  return ms / 4 * 3 + static_cast<uint32_t>((static_cast<uint64_t>(ms) * (nextRandom() >> 16)) >> 17);
}

void Outbox::watchConnection() {
  const uint32_t connection = transport_->connection();
  if (connection != connection_ && connection != 0) onConnect();
  if (connection != connection_ && connection == 0) unsend();
  connection_ = connection;
}

// What was sent on this connection, or in this packet, is to be sent again.
void Outbox::unsend() {
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].state == State::kSent) window_[i].state = State::kWaiting;
  }
  awaits_ = false;
}

void Outbox::silence() {
  size_t first = 0, behind = 0;
  for (size_t i = window_count_; i-- > 0;) {
    if (window_[i].state != State::kSent) continue;
    if (behind == 0) behind = i + 1;
    first = i;
  }
  unsend();
  window_next_ = first;
  // Perhaps the subscription is gone, or the ACK did not fit.
  subscribe_due_ = true;
  batch_max_ = batch_max_ > 1 ? batch_max_ / 2 : 1;
  wait_ms_ = wait_ms_ < resend_most_ms_ / 2 ? wait_ms_ * 2 : resend_most_ms_;
  if (++tries_ == kTriesMax) {
    tries_ = 0;
    window_next_ = behind;
  }
  if (++silences_ == kSilencesMax) {
    silences_ = 0;
    transport_->disconnect();
  }
}

void Outbox::send() {
  if (awaits_) {
    if (now_ms_ - sent_ms_ < wait_ms_) return;
    silence();
    return;
  }
  if (subscribe_due_ && !transport_->subscribe(acks_topic_)) return;
  subscribe_due_ = false;
  const size_t size = compose();
  if (size == 0) {
    leaveWindow();
    if (!loadWindow()) return;
    // In the next round: each round takes a bounded time.
    return;
  }
  const bool is_array = packet_[0] == '[';
  sent_ms_ = now_ms_;
  awaits_ = true;
  if (transport_->publish(events_topic_, packet_ + (is_array ? 0 : 1), size)) {
    wait_ms_ = tries_ == 0 && silences_ == 0 ? jittered(resend_first_ms_) : wait_ms_;
    return;
  }
  // It did not fit, or the connection is gone: fewer at once, soon. It never blocks the rest.
  wait_ms_ = kPauseMs;
  if (batch_max_ > 1) tries_ = 0;
}

// Put the next packet together; return its size. An array begins at packet_, a single event one
// byte behind it.
size_t Outbox::compose() {
  size_t capacity = transport_->sendBytes(events_topic_);
  if (capacity > packet_bytes_) capacity = packet_bytes_;
  const size_t receive_bytes = transport_->receiveBytes(acks_topic_);
  const size_t device_bytes = strlen(device_id_);
  size_t used = 1, answer_bytes = 2, count = 0;
  for (size_t i = window_next_; i < window_count_ && count < batch_max_; i++) {
    if (window_[i].state != State::kWaiting) continue;
    if (used + 1 >= capacity) break;
    size_t size = 0;
    if (!readEvent(window_[i], packet_ + used, capacity - used - 1, size)) {
      if (size == 0) window_[i].state = State::kDone;  // not there any more, or cannot be read
      if (size == 0 || count == 0) continue;           // one that is too large keeps nobody waiting
      break;
    }
    answer_bytes += idSize(packet_ + used, size) + device_bytes + kAnswerBytes;
    if (count > 0 && answer_bytes > receive_bytes) break;
    window_[i].state = State::kSent;
    used += size;
    packet_[used++] = ',';
    count++;
  }
  if (count == 0) return 0;
  packet_[0] = count > 1 ? '[' : ' ';
  packet_[used - 1] = ']';
  return count > 1 ? used : used - 2;
}

// Copy the event; false with its size if it does not fit, with 0 if it cannot be read.
bool Outbox::readEvent(const Slot& slot, uint8_t* into, size_t capacity, size_t& size) {
  size = 0;
  if (slot.file != 0) {
    if (!storeUsable()) return false;
    if (slot.size > capacity) {
      size = slot.size;
      return false;
    }
    const uint32_t at = slot.offset + static_cast<uint32_t>(kRecordHeadBytes);
    const int32_t read = store_->read(slot.file, at, into, slot.size);
    if (read == slot.size && slot.check == (crc32(into, slot.size) ^ slot.size)) {
      size = slot.size;
      return true;
    }
    storeFailed();
    return false;
  }
  const size_t at = findInRam(slot.key);
  if (at == ram_used_) return false;
  size = recordSize(ram_ + at);
  if (size > capacity) return false;
  memcpy(into, ram_ + at + kRecordHeadBytes, size);
  return true;
}

bool Outbox::loadWindow() {
  for (int round = 0; round < 2; round++) {
    if (loadFromStore() || loadFromRam()) return true;
    store_cursor_ = ram_cursor_ = 0;
  }
  return false;
}

bool Outbox::loadFromRam() {
  // Kept before it is sent; unless the store fails, as then to send is all that can be done.
  if (hold_ms_ == 0 && storeUsable() && write_failed_ms_ == 0) return false;
  for (size_t at = 0; at < ram_used_ && window_count_ < kBatchMax;
       at += kRecordHeadBytes + recordSize(ram_ + at)) {
    Slot slot = {{0, 0, 0}, 0, 0, 0, 0, 0, State::kWaiting};
    const char* const json = reinterpret_cast<const char*>(ram_ + at + kRecordHeadBytes);
    if (!keyOf(device_id_, json, recordSize(ram_ + at), slot.key)) continue;
    if (slot.key.sequence <= ram_cursor_) continue;
    window_[window_count_++] = slot;
    ram_cursor_ = slot.key.sequence;
  }
  return window_count_ > 0;
}

void Outbox::leaveWindow() {
  for (size_t i = 0; i < window_count_; i++) {
    // Its file stays for the others' sake, so that it will be sent again, and answered again.
    if (window_[i].state == State::kAnswered) kept_++;
  }
  window_count_ = window_next_ = 0;
  awaits_ = false;
}

void Outbox::tellDropped() {
  if (run_count_ == 0 || ram_used_ > ram_bytes_ / 2 || sequence_ == UINT32_MAX) return;
  const Run run = runs_[0];
  const Key key = {salt_, boot_, sequence_ + 1};
  const size_t size = writeDropped(device_id_, key, run, nullptr, 0);
  if (!hasRoom(size)) return;
  char* const into = reinterpret_cast<char*>(ram_ + ram_used_ + kRecordHeadBytes);
  writeDropped(device_id_, key, run, into, size);
  appendRecord(now_ms_, size);
  run_count_--;
  memmove(runs_, runs_ + 1, run_count_ * sizeof runs_[0]);
  // The note of it in the store goes when the event is answered, or in the store itself: cut in
  // between, it is told twice rather than never.
  runs_changed_ = true;
}

}  // namespace homelab
