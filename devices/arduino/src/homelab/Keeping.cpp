// The store: which files there are, and in which order they change, so that the power may end
// anywhere.
//
//   0  identity   salt and boot; replaced at each boot, before an id of that boot is used
//   1  dropped    runs of lost events that no event tells of yet; written before they are removed
//   2...          events, up to kBatchMax in a file; never changed, only removed, or merged
//
// A file that replaces others is written before they are removed. Cut in between, an event is there
// twice, with the same bytes, and is answered `stored` twice.
#include <string.h>

#include "Outbox.h"
#include "Record.h"

namespace homelab {
namespace {

constexpr uint32_t kIdentity = 0;
constexpr uint32_t kDropped = 1;
constexpr uint32_t kFirstFile = 2;
// Beyond it there is no next number: such a file is not ours.
constexpr uint32_t kLastFile = UINT32_MAX - 1;
constexpr uint32_t kStorePauseMs = 10000;
// One block of most flash file systems, with room for what they add.
constexpr size_t kFileBytesMax = 4000;
constexpr size_t kRunBytes = 16;
constexpr size_t kRunsMax = 16;

uint32_t checkOf(const Resume& resume) {
  uint8_t bytes[12];
  put32(bytes, resume.salt);
  put32(bytes + 4, resume.boot);
  put32(bytes + 8, resume.sequence);
  return crc32(bytes, sizeof bytes);
}

}  // namespace

void writeFileName(uint32_t number, char (&into)[kFileNameBytes]) {
  for (int i = 7; i >= 0; i--, number >>= 4) into[i] = "0123456789abcdef"[number & 15];
  into[8] = '\0';
}

bool parseFileName(const char* name, uint32_t& number) {
  number = 0;
  size_t i = 0;
  for (; name[i] != '\0' && i < kFileNameBytes; i++) {
    const char* const digit = strchr("0123456789abcdef", name[i]);
    if (digit == nullptr) return false;
    number = number << 4 | static_cast<uint32_t>(digit - "0123456789abcdef");
  }
  return i == kFileNameBytes - 1;
}

bool writePath(const char* folder, const char* name, char* into, size_t size) {
  const size_t folder_bytes = strlen(folder), name_bytes = strlen(name);
  if (folder_bytes + name_bytes + 2 > size) return false;
  memcpy(into, folder, folder_bytes);
  into[folder_bytes] = '/';
  memcpy(into + folder_bytes + 1, name, name_bytes + 1);
  return true;
}

bool writePath(const char* folder, uint32_t number, char* into, size_t size) {
  char name[kFileNameBytes];
  writeFileName(number, name);
  return writePath(folder, name, into, size);
}

// --- begin ------------------------------------------------------------------------------

// What countFile() works with. Files are removed after the listing, not while it runs.
struct Outbox::Scan {
  Outbox* outbox;
  uint32_t doomed[16];
  size_t doomed_count;
};

// A way over the records of a file.
struct Outbox::Walk {
  // Why there is no more: the end; what is no record; a record larger than a packet; an error.
  enum class End : uint8_t { kWhole, kDamaged, kTooLarge, kFailed };
  explicit Walk(uint32_t file) : number(file) {}
  const char* json() const { return reinterpret_cast<const char*>(record + kRecordHeadBytes); }

  uint32_t number;
  uint32_t next = 0;       // where the next record begins in the file
  size_t at = 0;           // and in packet_,
  size_t filled = 0;       // which holds so much
  bool is_last = false;    // and the file no more
  uint32_t offset = 0;     // this record
  const uint8_t* record = nullptr;
  size_t size = 0;  // of its event
  End end = End::kWhole;
};

void Outbox::beginStore() {
  store_good_ = store_ != nullptr && store_->begin();
  if (store_ != nullptr && !store_good_) store_errors_++;
  if (!store_good_) return;
  tail_ = kFirstFile - 1;
  readRuns();
  Scan scan;
  scan.outbox = this;
  scan.doomed_count = 0;
  if (!store_->list(countFile, &scan)) storeFailed();
  for (size_t i = 0; i < scan.doomed_count; i++) store_->remove(scan.doomed[i]);
}

void Outbox::countFile(uint32_t number, void* context) {
  Scan& scan = *static_cast<Scan*>(context);
  Outbox& self = *scan.outbox;
  if (number < kFirstFile || number > kLastFile) return;
  if (number > self.tail_) self.tail_ = number;
  Walk walk(number);
  size_t count = 0;
  bool noted = true, foreign = false;
  while (self.step(walk)) {
    Key key;
    if (keyOf(self.device_id_, walk.json(), walk.size, key)) {
      count++;
      noted = noted && self.isNoted(key);
    } else {
      foreign = true;
    }
  }
  const bool empty = walk.end == Walk::End::kWhole && walk.next == 0;  // as a power cut leaves it
  if (empty || (count > 0 && noted)) {  // to drop it was begun, and is done now
    if (scan.doomed_count < 16) scan.doomed[scan.doomed_count++] = number;
    return;
  }
  if (walk.end != Walk::End::kWhole || foreign) self.damaged_++;
  // One that holds more than can be sent waits for a program that can.
  if (count == 0 || walk.end == Walk::End::kTooLarge) return;
  self.files_++;
  self.kept_ += count;
}

void Outbox::beginBoot() {
  uint8_t identity[kRecordHeadBytes + 8];
  const bool resumes = resume_ != nullptr && resume_->check == checkOf(*resume_) && resume_->boot > 0;
  salt_ = nextRandom();
  boot_ = 1;
  if (!store_good_) {
    if (resumes) {
      salt_ = resume_->salt;
      boot_ = resume_->boot;
      sequence_ = resume_->sequence;
    }
    return;
  }
  const int32_t read = store_->read(kIdentity, 0, identity, sizeof identity);
  if (read == static_cast<int32_t>(sizeof identity) && isRecord(identity, sizeof identity)) {
    const uint32_t salt = get32(identity + kRecordHeadBytes);
    const uint32_t boot = get32(identity + kRecordHeadBytes + 4);
    if (resumes && resume_->salt == salt && resume_->boot == boot) {
      salt_ = salt;
      boot_ = boot;
      sequence_ = resume_->sequence;
      return;
    }
    if (boot < UINT32_MAX) {
      salt_ = salt;
      boot_ = boot + 1;
    }
  }
  put32(identity + kRecordHeadBytes, salt_);
  put32(identity + kRecordHeadBytes + 4, boot_);
  sealRecord(identity, 8, 0);
  if (store_->write(kIdentity, identity, sizeof identity) == Store::Result::kDone) return;
  // This boot could not be counted, so the next one would have its number: another salt.
  store_errors_++;
  salt_ = nextRandom();
  boot_ = 1;
}

void Outbox::rememberResume() {
  if (resume_ == nullptr) return;
  resume_->salt = salt_;
  resume_->boot = boot_;
  resume_->sequence = sequence_;
  resume_->check = checkOf(*resume_);
}

// --- reading ----------------------------------------------------------------------------

bool Outbox::storeUsable() const { return storeWorks() && store_failed_ms_ == 0; }

uint32_t Outbox::nowOrOne() const { return now_ms_ != 0 ? now_ms_ : 1; }

// Reading or removing failed.
void Outbox::storeFailed() {
  store_errors_++;
  store_failed_ms_ = nowOrOne();
}

void Outbox::tryStoreAgain() {
  if (store_failed_ms_ != 0 && now_ms_ - store_failed_ms_ >= kStorePauseMs) store_failed_ms_ = 0;
  if (write_failed_ms_ != 0 && now_ms_ - write_failed_ms_ >= kStorePauseMs) write_failed_ms_ = 0;
  // What is told in memory only is still noted in the store.
  if (ram_count_ == 0) keepRuns();
}

// Return the least number of a file of events from `from` on, or 0.
uint32_t Outbox::nextFile(uint32_t from) {
  struct Least {
    uint32_t from;
    uint32_t found;
  } least = {from < kFirstFile ? kFirstFile : from, 0};
  const auto look = [](uint32_t number, void* context) {
    Least& best = *static_cast<Least*>(context);
    if (number < best.from || number > kLastFile) return;
    if (best.found == 0 || number < best.found) best.found = number;
  };
  if (!store_->list(look, &least)) storeFailed();
  return least.found;
}

// Go to the next record; false behind the last. As much of the file as fits is in packet_.
bool Outbox::step(Walk& walk) {
  for (int tries = 0; tries < 2; tries++) {
    const uint8_t* const record = packet_ + walk.at;
    const size_t left = walk.filled - walk.at;
    if (left >= kRecordHeadBytes && recordSize(record) <= left - kRecordHeadBytes) {
      walk.end = Walk::End::kDamaged;
      if (!isRecord(record, left)) return false;
      walk.offset = walk.next;
      walk.record = record;
      walk.size = recordSize(record);
      walk.at += kRecordHeadBytes + walk.size;
      walk.next += static_cast<uint32_t>(kRecordHeadBytes + walk.size);
      return true;
    }
    walk.end = left == 0 ? Walk::End::kWhole : Walk::End::kDamaged;
    if (walk.is_last) return false;
    walk.end = Walk::End::kFailed;
    const int32_t read = store_->read(walk.number, walk.next, packet_, packet_bytes_);
    if (read < 0) return false;
    walk.at = 0;
    walk.filled = static_cast<size_t>(read);
    walk.is_last = walk.filled < packet_bytes_;
  }
  // So it says; but is it as long as that?
  const uint32_t behind = walk.next + static_cast<uint32_t>(kRecordHeadBytes + recordSize(packet_));
  uint8_t last[1];
  const bool is_there = store_->read(walk.number, behind - 1, last, 1) == 1;
  walk.end = is_there ? Walk::End::kTooLarge : Walk::End::kDamaged;
  return false;
}

// Read the whole file if it fits, and is whole; return how many records it has, else 0.
size_t Outbox::readFile(uint32_t number, uint8_t* into, size_t capacity, size_t& bytes) {
  const int32_t read = store_->read(number, 0, into, capacity);
  bytes = read > 0 ? static_cast<size_t>(read) : 0;
  if (bytes == capacity) return 0;  // perhaps there is more
  size_t count = 0;
  for (size_t at = 0; at < bytes; at += kRecordHeadBytes + recordSize(into + at)) {
    if (!isRecord(into + at, bytes - at)) return 0;
    count++;
  }
  return count;
}

bool Outbox::loadFromStore() {
  if (!storeUsable() || files_ == 0) return false;
  for (uint32_t number = nextFile(store_cursor_); number != 0; number = nextFile(number + 1)) {
    const size_t before = window_count_;
    Walk walk(number);
    while (step(walk)) {
      Slot slot = {{0, 0, 0},
                   number,
                   get32(walk.record),
                   static_cast<uint16_t>(walk.offset),
                   static_cast<uint16_t>(walk.size),
                   0,
                   State::kWaiting};
      if (!keyOf(device_id_, walk.json(), walk.size, slot.key)) continue;
      if (window_count_ == kBatchMax) {  // the whole file or none of it
        window_count_ = before;
        return true;
      }
      window_[window_count_++] = slot;
    }
    // What was not read must not be removed.
    if (walk.end == Walk::End::kFailed) storeFailed();
    if (walk.end == Walk::End::kFailed || walk.end == Walk::End::kTooLarge) window_count_ = before;
    const size_t of = window_count_ - before;
    for (size_t i = before; i < window_count_; i++) window_[i].of = static_cast<uint8_t>(of);
    store_cursor_ = number + 1;
    if (window_count_ == kBatchMax) break;
  }
  return window_count_ > 0;
}

// --- writing ----------------------------------------------------------------------------

// Write the memory to the store, oldest first; true if something was written.
bool Outbox::keep() {
  if (!storeUsable() || write_failed_ms_ != 0) return false;
  bool kept = false;
  while (ram_count_ > 0) {
    if (!makeFileRoom()) {
      write_failed_ms_ = nowOrOne();
      break;
    }
    Key keys[kBatchMax];
    size_t bytes = 0, count = 0;
    while (bytes < ram_used_ && count < kBatchMax) {
      const size_t size = recordSize(ram_ + bytes);
      if (count > 0 && bytes + kRecordHeadBytes + size > kFileBytesMax) break;
      const char* const json = reinterpret_cast<const char*>(ram_ + bytes + kRecordHeadBytes);
      keyOf(device_id_, json, size, keys[count++]);
      bytes += kRecordHeadBytes + size;
    }
    Store::Result result = store_->write(tail_ + 1, ram_, bytes);
    while (result == Store::Result::kFull && drops_ && dropOldestFile()) {
      result = store_->write(tail_ + 1, ram_, bytes);
    }
    if (result != Store::Result::kDone) {
      store_errors_++;
      write_failed_ms_ = nowOrOne();
      break;
    }
    tail_++;
    files_++;
    kept_ += count;
    takeFromRam(0, bytes);
    ram_count_ -= count;
    kept = true;
    for (size_t i = 0; i < count; i++) tell(on_kept_, kept_context_, keys[i]);
  }
  if (kept) moveWindow();
  return kept;
}

// What was looked at in memory is in the store now: look at it there, and do not forget what is on
// its way.
void Outbox::moveWindow() {
  if (window_count_ == 0 || window_[0].file != 0) return;
  Key sent[kBatchMax];
  size_t sent_count = 0;
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].state == State::kSent) sent[sent_count++] = window_[i].key;
  }
  const bool awaits = awaits_;
  leaveWindow();
  loadFromStore();
  for (size_t i = 0; i < window_count_; i++) {
    for (size_t j = 0; j < sent_count; j++) {
      if (!(window_[i].key == sent[j])) continue;
      window_[i].state = State::kSent;
      awaits_ = awaits;
    }
  }
}

void Outbox::removeAnswered(uint32_t number) {
  size_t count = 0, of = 0;
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].file != number) continue;
    of = window_[i].of;
    if (window_[i].state == State::kAnswered) count++;
  }
  if (count < of) return;
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].file == number) window_[i].state = State::kDone;
  }
  if (store_->remove(number)) {
    files_--;
  } else {
    kept_ += of;  // it will be sent once more
    storeFailed();
  }
}

// --- a store that is full ---------------------------------------------------------------

bool Outbox::makeFileRoom() {
  if (files_ < files_max_ || mergeOldest()) return true;
  return drops_ && dropOldestFile();
}

// Make one file of several small ones that follow each other, in the place of the last.
bool Outbox::mergeOldest() {
  uint32_t from = merge_from_;
  // What is looked at now stays where it is.
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].file >= from) from = window_[i].file + 1;
  }
  uint32_t merged[kBatchMax];
  size_t files = 0, used = 0, count = 0;
  for (uint32_t number = nextFile(from); number != 0; number = nextFile(number + 1)) {
    size_t bytes = 0;
    const size_t more = readFile(number, packet_ + used, packet_bytes_ - used, bytes);
    if (more > 0 && count + more <= kBatchMax && used + bytes <= kFileBytesMax) {
      merged[files++] = number;
      used += bytes;
      count += more;
      if (count < kBatchMax) continue;
    }
    if (files > 1) break;
    // Nothing to merge this one with, or with the one before: begin here, or behind it.
    merge_from_ = number;
    used = count = files = 0;
    const size_t alone = readFile(number, packet_, packet_bytes_, bytes);
    if (alone == 0 || alone >= kBatchMax) continue;
    merged[files++] = number;
    used = bytes;
    count = alone;
  }
  if (files < 2) return false;
  if (store_->write(merged[files - 1], packet_, used) != Store::Result::kDone) {
    store_errors_++;
    return false;
  }
  merge_from_ = merged[files - 1];
  for (size_t i = 0; i + 1 < files; i++) {
    if (store_->remove(merged[i])) files_--;
  }
  return true;
}

bool Outbox::isPartlyAnswered(uint32_t number) const {
  for (size_t i = 0; i < window_count_; i++) {
    if (window_[i].file == number && window_[i].state == State::kAnswered) return true;
  }
  return false;
}

bool Outbox::dropOldestFile() {
  uint32_t number = kFirstFile - 1;
  size_t count = 0;
  Key keys[kBatchMax];
  while (count == 0) {  // what holds no event of ours is left alone
    number = nextFile(number + 1);
    if (number == 0) return false;
    if (isPartlyAnswered(number)) continue;  // it will be gone soon, and is not lost
    Walk walk(number);
    while (count < kBatchMax && step(walk)) {
      if (keyOf(device_id_, walk.json(), walk.size, keys[count])) count++;
    }
    if (walk.end == Walk::End::kFailed) return false;
  }
  if (noteFile(number) != count) return false;
  writeRuns();
  bool looked_at = false;
  for (size_t i = 0; i < window_count_; i++) looked_at = looked_at || window_[i].file == number;
  if (looked_at) leaveWindow();
  if (!store_->remove(number)) {
    storeFailed();
    return false;
  }
  files_--;
  kept_ -= count;
  for (size_t i = 0; i < count; i++) tell(on_dropped_, dropped_context_, keys[i]);
  return true;
}

// --- what is lost -----------------------------------------------------------------------

// Return how many events of the file are noted as lost.
size_t Outbox::noteFile(uint32_t number) {
  Walk walk(number);
  size_t count = 0;
  while (step(walk)) {
    Key key;
    if (!keyOf(device_id_, walk.json(), walk.size, key)) continue;
    noteDropped(key, walk.record + kRecordHeadBytes, walk.size);
    count++;
  }
  return count;
}

bool Outbox::isNoted(const Key& key) const {
  for (size_t i = 0; i < run_count_; i++) {
    const Run& run = runs_[i];
    if (run.salt != key.salt || run.boot != key.boot || run.from == 0) continue;
    if (run.from <= key.sequence && key.sequence <= run.to) return true;
  }
  return false;
}

void Outbox::noteDropped(const Key& key, const uint8_t* bytes, size_t size) {
  dropped_++;
  Run told;
  // What this one was to tell is untold again.
  if (readDropped(reinterpret_cast<const char*>(bytes), size, told)) noteRun(told);
  noteRun({key.salt, key.boot, key.sequence, key.sequence});
}

void Outbox::noteRun(const Run& added) {
  Run run = added;
  for (size_t i = 0; i < run_count_;) {
    const Run& other = runs_[i];
    const bool same = other.salt == run.salt && other.boot == run.boot && other.from != 0 &&
                      run.from != 0 && other.from - 1 <= run.to && run.from - 1 <= other.to;
    if (!same) {
      i++;
      continue;
    }
    if (other.from < run.from) run.from = other.from;
    if (other.to > run.to) run.to = other.to;
    runs_[i] = runs_[--run_count_];
    i = 0;  // larger now, it may touch another
  }
  if (run.from != 0 && run_count_ < kRunsMax - 1) {
    runs_[run_count_++] = run;
    return;
  }
  // Too many boots at once to tell them apart: the last one tells how many.
  const uint32_t lost = run.from == 0 ? run.to : run.to - run.from + 1;
  for (size_t i = 0; i < run_count_; i++) {
    if (runs_[i].from != 0) continue;
    runs_[i].to += lost;
    return;
  }
  runs_[run_count_++] = {0, 0, 0, lost};
}

void Outbox::readRuns() {
  uint8_t record[kRecordHeadBytes + kRunsMax * kRunBytes];
  int32_t read = store_->read(kDropped, 0, record, sizeof record);
  // It is mostly absent; but if that was a failure, a second try costs little.
  if (read < 0) read = store_->read(kDropped, 0, record, sizeof record);
  if (read < 0 || !isRecord(record, static_cast<size_t>(read))) return;
  const size_t size = recordSize(record);
  for (size_t at = 0; at + kRunBytes <= size; at += kRunBytes) {
    const uint8_t* const run = record + kRecordHeadBytes + at;
    noteRun({get32(run), get32(run + 4), get32(run + 8), get32(run + 12)});
  }
}

// What is noted in the store has changed in memory: runs are told, or were dropped from there.
void Outbox::keepRuns() {
  if (!runs_changed_ || !storeUsable()) return;
  runs_changed_ = false;
  writeRuns();
}

void Outbox::writeRuns() {
  if (!store_good_) return;
  if (run_count_ == 0) {
    if (!store_->remove(kDropped)) store_errors_++;
    return;
  }
  uint8_t record[kRecordHeadBytes + kRunsMax * kRunBytes];
  for (size_t i = 0; i < run_count_; i++) {
    uint8_t* const run = record + kRecordHeadBytes + i * kRunBytes;
    put32(run, runs_[i].salt);
    put32(run + 4, runs_[i].boot);
    put32(run + 8, runs_[i].from);
    put32(run + 12, runs_[i].to);
  }
  sealRecord(record, run_count_ * kRunBytes, 0);
  const size_t size = kRecordHeadBytes + run_count_ * kRunBytes;
  if (store_->write(kDropped, record, size) != Store::Result::kDone) store_errors_++;
}

}  // namespace homelab
