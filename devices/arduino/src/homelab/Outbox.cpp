// Adding events, and what an answer does. Sending is in Sending.cpp, the store in Keeping.cpp.
#include "Outbox.h"

#include <string.h>

#include "Ack.h"
#include "Json.h"
#include "Record.h"

namespace homelab {
namespace {

bool writeTopic(const char* root, const char* device_id, const char* end, char (&into)[128]) {
  Writer writer(into, sizeof into);
  writer.raw(root);
  writer.raw("/");
  writer.raw(device_id);
  writer.raw(end, strlen(end) + 1);
  return writer.fits();
}

}  // namespace

Outbox::Outbox(uint8_t* memory, size_t memory_bytes, uint8_t* packet, size_t packet_bytes)
    : ram_(memory), ram_bytes_(memory_bytes), packet_(packet), packet_bytes_(packet_bytes) {
  device_id_[0] = events_topic_[0] = acks_topic_[0] = '\0';
}

Outbox& Outbox::resend(uint32_t first_ms, uint32_t most_ms) {
  resend_first_ms_ = first_ms;
  resend_most_ms_ = most_ms;
  return *this;
}

Outbox& Outbox::onKept(Told told, void* context) {
  on_kept_ = told;
  kept_context_ = context;
  return *this;
}

Outbox& Outbox::onStored(Told told, void* context) {
  on_stored_ = told;
  stored_context_ = context;
  return *this;
}

Outbox& Outbox::onDropped(Told told, void* context) {
  on_dropped_ = told;
  dropped_context_ = context;
  return *this;
}

Outbox& Outbox::onRejected(Rejected told, void* context) {
  on_rejected_ = told;
  rejected_context_ = context;
  return *this;
}

bool Outbox::begin(const char* device_id, Transport& transport, Store* store, uint32_t random,
                   Resume* resume) {
  if (!isDeviceId(device_id) || ram_bytes_ < 256 || packet_bytes_ < 256) return false;
  if (!writeTopic(root_, device_id, "/events", events_topic_)) return false;
  if (!writeTopic(root_, device_id, "/acks", acks_topic_)) return false;
  strcpy(device_id_, device_id);
  transport_ = &transport;
  store_ = store;
  resume_ = resume;
  random_ = random;
  wait_ms_ = resend_first_ms_;
  beginStore();
  beginBoot();
  rememberResume();
  return true;
}

bool Outbox::hasRoom(size_t size) const {
  return ram_used_ + kRecordHeadBytes + size <= ram_bytes_;
}

bool Outbox::add(uint32_t now_ms, const Fields& fields) {
  now_ms_ = now_ms;
  const Key key = {salt_, boot_, sequence_ + 1};
  if (transport_ == nullptr || sequence_ == UINT32_MAX || !isValid(fields)) {
    refused_++;
    return false;
  }
  const size_t size = writeEvent(device_id_, key, fields, nullptr, 0);
  // Of a packet, two bytes are there for an array; a record must fit where a packet does.
  if (size + 2 > transport_->sendBytes(events_topic_) || size > UINT16_MAX ||
      kRecordHeadBytes + size > packet_bytes_ || kRecordHeadBytes + size > ram_bytes_) {
    refused_++;
    return false;
  }
  while (!hasRoom(size)) {
    if (!makeRoom()) {
      refused_++;
      return false;
    }
  }
  char* const into = reinterpret_cast<char*>(ram_ + ram_used_ + kRecordHeadBytes);
  writeEvent(device_id_, key, fields, into, size);
  appendRecord(now_ms, size);
  return true;
}

bool Outbox::makeRoom() {
  if (keep()) return true;
  if (!drops_ || ram_count_ == 0) return false;
  dropFromRam();
  return true;
}

// The event is written where the record begins; it has the next sequence.
void Outbox::appendRecord(uint32_t now_ms, size_t size) {
  sealRecord(ram_ + ram_used_, size, now_ms);
  ram_used_ += kRecordHeadBytes + size;
  ram_count_++;
  sequence_++;
  rememberResume();
}

void Outbox::takeFromRam(size_t offset, size_t bytes) {
  memmove(ram_ + offset, ram_ + offset + bytes, ram_used_ - offset - bytes);
  ram_used_ -= bytes;
}

// Return its offset, or ram_used_.
size_t Outbox::findInRam(const Key& key) const {
  for (size_t at = 0; at < ram_used_; at += kRecordHeadBytes + recordSize(ram_ + at)) {
    Key found;
    const char* const json = reinterpret_cast<const char*>(ram_ + at + kRecordHeadBytes);
    if (keyOf(device_id_, json, recordSize(ram_ + at), found) && found == key) return at;
  }
  return ram_used_;
}

void Outbox::dropFromRam() {
  const size_t size = recordSize(ram_);
  Key key;
  keyOf(device_id_, reinterpret_cast<const char*>(ram_ + kRecordHeadBytes), size, key);
  noteDropped(key, ram_ + kRecordHeadBytes, size);
  runs_changed_ = true;
  takeFromRam(0, kRecordHeadBytes + size);
  ram_count_--;
  tell(on_dropped_, dropped_context_, key);
}

void Outbox::tell(Told told, void* context, const Key& key) {
  char id[kEventIdBytesMax + 1];
  if (told == nullptr || writeId(device_id_, key, id, sizeof id) == 0) return;
  told(id, context);
}

bool Outbox::onMessage(const char* topic, const uint8_t* payload, size_t size) {
  if (transport_ == nullptr || strcmp(topic, acks_topic_) != 0) return false;
  AckReader reader(device_id_, reinterpret_cast<const char*>(payload), size);
  Answer answer;
  while (reader.next(answer)) answered(answer.key, answer.stored, answer.reason);
  return true;
}

void Outbox::answered(const Key& key, bool stored, const char* reason) {
  size_t i = 0;
  while (i < window_count_ && !(window_[i].key == key)) i++;
  const bool looked_at = i < window_count_;
  if (looked_at && window_[i].state > State::kSent) return;
  const size_t at = looked_at && window_[i].file != 0 ? ram_used_ : findInRam(key);
  const bool in_ram = at < ram_used_;
  if (!in_ram && (!looked_at || window_[i].file == 0)) return;
  if (in_ram) {
    takeFromRam(at, kRecordHeadBytes + recordSize(ram_ + at));
    ram_count_--;
  } else if (kept_ > 0) {  // it is not, if its file could not be read at begin()
    kept_--;
  }
  if (looked_at) {
    const bool was_sent = window_[i].state == State::kSent;
    window_[i].state = in_ram ? State::kDone : State::kAnswered;
    if (!in_ram) removeAnswered(window_[i].file);
    bool more = false;
    for (size_t j = 0; j < window_count_; j++) more = more || window_[j].state == State::kSent;
    if (was_sent && !more) awaits_ = false;
  }
  silences_ = tries_ = 0;
  wait_ms_ = resend_first_ms_;
  if (stored) {
    tell(on_stored_, stored_context_, key);
  } else if (on_rejected_ != nullptr) {
    char id[kEventIdBytesMax + 1];
    writeId(device_id_, key, id, sizeof id);
    on_rejected_(id, reason, rejected_context_);
  }
}

void Outbox::onConnect() {
  unsend();
  window_next_ = 0;
  subscribe_due_ = true;
  batch_max_ = kBatchMax;
  wait_ms_ = resend_first_ms_;
  tries_ = 0;
}

void Outbox::loop(uint32_t now_ms) {
  now_ms_ = now_ms;
  if (transport_ == nullptr) return;
  tryStoreAgain();
  if (ram_count_ > 0) {
    const uint32_t age_ms = now_ms - get32(ram_ + 6);  // of the oldest; wraps as millis() does
    if (age_ms >= hold_ms_ || ram_used_ > ram_bytes_ / 4 * 3) keep();
  }
  watchConnection();
  if (connection_ == 0) return;
  tellDropped();
  send();
}

bool Outbox::save() {
  store_failed_ms_ = write_failed_ms_ = 0;  // try now, whatever failed before
  keep();
  keepRuns();
  return ram_count_ == 0;
}

}  // namespace homelab
