// The outbox: events that have not been answered yet.
//
// What it does: gives events their ids, keeps them in memory, and in a store if no ACK comes in
// time, sends them in batches until each is answered, and forgets them only then. What it does not:
// connect, read a clock, sleep, or allocate; time is passed in, memory is the caller's.
// Invariant: an event that was told as kept is in the store until it is answered or told as dropped,
// whatever instruction the power ends at; and no id is ever used for two events.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "Event.h"
#include "Store.h"
#include "Transport.h"

namespace homelab {

// Events of one packet, of one file, and of what is looked at together.
constexpr size_t kBatchMax = 16;

// What a deep sleep leaves in memory (RTC_DATA_ATTR): with it the next start goes on numbering, and
// need not write to the flash. Anything else in it is recognised, and a new boot begins.
struct Resume {
  uint32_t salt;
  uint32_t boot;
  uint32_t sequence;
  uint32_t check;
};

class Outbox {
 public:
  using Told = void (*)(const char* event_id, void* context);
  using Rejected = void (*)(const char* event_id, const char* reason, void* context);

  // `memory` holds events, `packet` one packet: an event may have ten bytes less than that.
  Outbox(uint8_t* memory, size_t memory_bytes, uint8_t* packet, size_t packet_bytes);

  // Settings, before begin().
  Outbox& hold(uint32_t ms) { return hold_ms_ = ms, *this; }  // 0: kept before it is sent
  Outbox& resend(uint32_t first_ms, uint32_t most_ms);
  Outbox& refuseNewest() { return drops_ = false, *this; }  // when full; else the oldest go
  Outbox& filesMax(size_t files) { return files_max_ = files, *this; }
  Outbox& topicRoot(const char* root) { return root_ = root, *this; }
  Outbox& onKept(Told told, void* context = nullptr);
  Outbox& onStored(Told told, void* context = nullptr);
  Outbox& onDropped(Told told, void* context = nullptr);
  Outbox& onRejected(Rejected told, void* context = nullptr);

  // False if the device id is none, or the memory too small. `store` may be null. `random` must
  // differ at every start and on every board.
  bool begin(const char* device_id, Transport& transport, Store* store, uint32_t random,
             Resume* resume = nullptr);

  // False if the event would be refused by the ingester, is too large to be sent, or has no room.
  // Writes to the store only if the memory is full.
  bool add(uint32_t now_ms, const Fields& fields);
  void loop(uint32_t now_ms);
  // After each connect of a client whose adapter cannot tell one connection from the next.
  void onConnect();
  // True if it was ours. Not from within publish(), and from no other task than loop().
  bool onMessage(const char* topic, const uint8_t* payload, size_t size);
  // Write what is in memory to the store; true if nothing is left to write.
  bool save();

  size_t waiting() const { return ram_count_ + kept_ + run_count_; }  // not answered yet
  size_t kept() const { return kept_; }         // of these, in the store
  uint32_t dropped() const { return dropped_; }  // lost to an overflow, since begin()
  uint32_t refused() const { return refused_; }  // add() returned false
  uint32_t damaged() const { return damaged_; }  // files of the store that cannot be read
  uint32_t storeErrors() const { return store_errors_; }
  bool storeWorks() const { return store_ != nullptr && store_good_; }
  // Nothing would be lost: all is answered, or in the store.
  bool sleepAllowed() const { return ram_count_ == 0; }
  const char* eventsTopic() const { return events_topic_; }
  const char* acksTopic() const { return acks_topic_; }

 private:
  enum class State : uint8_t { kWaiting, kSent, kAnswered, kDone };
  // An event that is looked at: in the file, or in memory if that is 0.
  struct Slot {
    Key key;
    uint32_t file;
    uint32_t check;  // the record's CRC
    uint16_t offset;
    uint16_t size;
    uint8_t of;  // how many events the file has
    State state;
  };
  struct Scan;

  // Outbox.cpp: adding, answers.
  bool hasRoom(size_t size) const;
  bool makeRoom();
  void appendRecord(uint32_t now_ms, size_t size);
  void takeFromRam(size_t offset, size_t bytes);
  size_t findInRam(const Key& key) const;
  void dropFromRam();
  void answered(const Key& key, bool stored, const char* reason);
  void tell(Told told, void* context, const Key& key);
  // Sending.cpp
  void watchConnection();
  void send();
  void unsend();
  void silence();
  bool loadWindow();
  bool loadFromStore();
  bool loadFromRam();
  void leaveWindow();
  size_t compose();
  bool readEvent(const Slot& slot, uint8_t* into, size_t capacity, size_t& size);
  void tellDropped();
  uint32_t jittered(uint32_t ms);
  uint32_t nextRandom();
  // Keeping.cpp
  void beginStore();
  void beginBoot();
  static void countFile(uint32_t number, void* context);
  void readRuns();
  void keepRuns();
  void writeRuns();
  void noteRun(const Run& run);
  bool isNoted(const Key& key) const;
  size_t noteFile(uint32_t number);
  void noteDropped(const Key& key, const uint8_t* bytes, size_t size);
  bool keep();
  void moveWindow();
  bool makeFileRoom();
  bool mergeOldest();
  bool isPartlyAnswered(uint32_t number) const;
  bool dropOldestFile();
  size_t readFile(uint32_t number, uint8_t* into, size_t capacity, size_t& bytes);
  struct Walk;
  bool step(Walk& walk);
  uint32_t nextFile(uint32_t from);
  void removeAnswered(uint32_t number);
  void storeFailed();
  void tryStoreAgain();
  uint32_t nowOrOne() const;
  bool storeUsable() const;
  void rememberResume();

  uint8_t* ram_;
  size_t ram_bytes_;
  size_t ram_used_ = 0;
  size_t ram_count_ = 0;
  uint8_t* packet_;
  size_t packet_bytes_;

  uint32_t hold_ms_ = 30000;
  uint32_t resend_first_ms_ = 10000;
  uint32_t resend_most_ms_ = 300000;
  size_t files_max_ = 128;
  bool drops_ = true;
  const char* root_ = "qs/v1";
  Told on_kept_ = nullptr;
  Told on_stored_ = nullptr;
  Told on_dropped_ = nullptr;
  Rejected on_rejected_ = nullptr;
  void* kept_context_ = nullptr;
  void* stored_context_ = nullptr;
  void* dropped_context_ = nullptr;
  void* rejected_context_ = nullptr;

  Transport* transport_ = nullptr;
  Store* store_ = nullptr;
  Resume* resume_ = nullptr;
  char device_id_[kDeviceIdBytesMax + 1];
  char events_topic_[128];
  char acks_topic_[128];
  uint32_t salt_ = 0;
  uint32_t boot_ = 0;
  uint32_t sequence_ = 0;
  uint32_t random_ = 0;
  uint32_t now_ms_ = 0;

  // The store.
  bool store_good_ = false;
  uint32_t store_failed_ms_ = 0;  // reading or removing; 0: it has not
  uint32_t write_failed_ms_ = 0;  // writing, or finding room
  uint32_t tail_ = 0;  // the greatest number of a file
  size_t files_ = 0;
  size_t kept_ = 0;
  uint32_t merge_from_ = 0;

  // The connection, and what was sent on it.
  uint32_t connection_ = 0;
  bool subscribe_due_ = true;
  bool awaits_ = false;
  uint32_t sent_ms_ = 0;
  uint32_t wait_ms_ = 0;
  size_t batch_max_ = kBatchMax;
  unsigned tries_ = 0;     // of this batch without an answer
  unsigned silences_ = 0;  // since the last answer
  Slot window_[kBatchMax];
  size_t window_count_ = 0;
  size_t window_next_ = 0;      // the first to be sent next
  uint32_t store_cursor_ = 0;   // the first file behind the window
  uint32_t ram_cursor_ = 0;     // the last sequence of the window, if that is of the memory

  // What is lost and not told yet. The last may have only a number: see writeDropped().
  Run runs_[16];
  size_t run_count_ = 0;
  bool runs_changed_ = false;  // what the store has of them is old
  uint32_t dropped_ = 0;
  uint32_t refused_ = 0;
  uint32_t damaged_ = 0;
  uint32_t store_errors_ = 0;
};

}  // namespace homelab
