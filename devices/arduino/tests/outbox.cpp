// The outbox where something is wrong: silence, no room, a broken store, a clock that wraps.
//
// What it does: one function for each promise, with a store and a transport in memory. What it does
// not: flash; that is power_cut.cpp. What an ACK means is in contract.json.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "homelab/Backoff.h"
#include "homelab/Mailbox.h"
#include "homelab/Outbox.h"

using namespace homelab;

namespace {

const char* running = "";

void check(bool good, int line, const char* what) {
  if (good) return;
  printf("outbox: %s: line %d: %s\n", running, line, what);
  exit(1);
}
#define CHECK(condition) check(condition, __LINE__, #condition)

using Texts = std::vector<std::string>;

class Wire final : public Transport {
 public:
  uint32_t connection() override { return connection_; }
  bool subscribe(const char* topic) override {
    said.push_back(std::string("subscribe ") + topic);
    return true;
  }
  bool publish(const char*, const uint8_t* payload, size_t size) override {
    if (!takes) return false;
    said.emplace_back(reinterpret_cast<const char*>(payload), size);
    return true;
  }
  void disconnect() override { disconnects++; }
  size_t sendBytes(const char*) override { return send_bytes; }
  size_t receiveBytes(const char*) override { return receive_bytes; }

  Texts packets() const {
    Texts found;
    for (const std::string& text : said) {
      if (text.compare(0, 9, "subscribe") != 0) found.push_back(text);
    }
    return found;
  }

  uint32_t connection_ = 1;
  size_t send_bytes = 2000, receive_bytes = 4000;
  bool takes = true;
  int disconnects = 0;
  Texts said;
};

class MemoryStore final : public Store {
 public:
  bool begin() override { return mounts; }
  bool list(void (*found)(uint32_t, void*), void* context) override {
    const std::map<uint32_t, std::string> copy = files;
    for (const auto& file : copy) found(file.first, context);
    return true;
  }
  int32_t read(uint32_t number, uint32_t offset, uint8_t* into, size_t size) override {
    const auto file = files.find(number);
    if (file == files.end()) return -1;
    if (offset >= file->second.size()) return 0;
    const std::string part = file->second.substr(offset, size);
    memcpy(into, part.data(), part.size());
    return static_cast<int32_t>(part.size());
  }
  Result write(uint32_t number, const uint8_t* bytes, size_t size) override {
    writes++;
    if (result == Result::kDone) {
      files[number] = std::string(reinterpret_cast<const char*>(bytes), size);
    }
    return result;
  }
  bool remove(uint32_t number) override {
    files.erase(number);
    return true;
  }

  bool mounts = true;
  Result result = Result::kDone;
  int writes = 0;
  std::map<uint32_t, std::string> files;
};

size_t countOf(const std::string& text, const std::string& word) {
  size_t count = 0;
  for (size_t at = 0; (at = text.find(word, at)) != std::string::npos; at++) count++;
  return count;
}

// A device with the given memory.
struct Device {
  explicit Device(size_t bytes = 4096)
      : memory(bytes), packet(2048), outbox(memory.data(), bytes, packet.data(), packet.size()) {
    outbox.hold(5000).resend(1000, 8000);
  }
  void begin(Store* store = nullptr, uint32_t random = 1, Resume* resume = nullptr) {
    CHECK(outbox.begin("dev", wire, store, random, resume));
  }
  bool add(int value) { return outbox.add(now_ms, {"t", Value(value), nullptr, 0, nullptr}); }
  void run(uint32_t ms) {
    for (uint32_t past_ms = 0; past_ms < ms; past_ms += 10, now_ms += 10) outbox.loop(now_ms);
  }
  // Answer each event of these packets.
  void answer(const Texts& packets) {
    for (const std::string& packet_text : packets) {
      std::string acks;
      for (size_t at = 0; (at = packet_text.find("\"event_id\":\"", at)) != std::string::npos;) {
        at += 12;
        const std::string id = packet_text.substr(at, packet_text.find('"', at) - at);
        acks += (acks.empty() ? "" : ",") + std::string("{\"schema\":1,\"event_id\":\"") + id +
                "\",\"device_id\":\"dev\",\"status\":\"stored\"}";
      }
      hear("[" + acks + "]");
    }
  }
  void hear(const std::string& acks) {
    outbox.onMessage("qs/v1/dev/acks", reinterpret_cast<const uint8_t*>(acks.data()), acks.size());
  }
  // Answer everything until nothing waits.
  void drain() {
    for (int i = 0; i < 10000 && outbox.waiting() > 0; i++) {
      wire.said.clear();
      run(50);
      answer(wire.packets());
    }
    CHECK(outbox.waiting() == 0);
  }

  std::vector<uint8_t> memory, packet;
  Wire wire;
  Outbox outbox;
  uint32_t now_ms = 0;
};

void subscribesAtEachConnectBeforeItSends() {
  Device device;
  device.begin();
  device.add(1);
  device.run(100);
  CHECK(device.wire.said.size() == 2 && device.wire.said[0] == "subscribe qs/v1/dev/acks");
  device.wire.connection_ = 0;
  device.run(100);
  device.wire.connection_ = 2;
  device.run(100);
  CHECK(device.wire.said.size() == 4 && device.wire.said[2] == "subscribe qs/v1/dev/acks");
  CHECK(device.wire.said[3] == device.wire.said[1]);
  device.outbox.onConnect();  // an adapter that cannot count
  device.run(100);
  CHECK(device.wire.said.size() == 6 && device.wire.said[5] == device.wire.said[1]);
}

void sendsTheSameBytesAgainLaterAndLaterAndGivesTheConnectionUp() {
  Device device;
  device.now_ms = UINT32_MAX - 3000;  // millis() wraps meanwhile
  device.begin();
  device.add(1);
  device.run(60000);
  const Texts packets = device.wire.packets();
  // After 1 s, 2 s, 4 s, then each 8 s: 1 + 2 + 4 + 6 * 8 = 55, and jitter at the first.
  CHECK(packets.size() >= 8 && packets.size() <= 11);
  for (const std::string& packet : packets) CHECK(packet == packets[0]);
  CHECK(device.wire.disconnects >= 1);
  CHECK(countOf(device.wire.said[device.wire.said.size() - 2], "subscribe") == 1);
  device.answer({packets[0]});
  CHECK(device.outbox.waiting() == 0);
}

void sendsLessAtOnceWhereTheAnswerDoesNotFit() {
  Device device;
  device.begin();
  for (int i = 0; i < 12; i++) device.add(i);
  device.wire.receive_bytes = 1000;
  device.run(100);
  CHECK(countOf(device.wire.packets()[0], "\"schema\"") == 4);
  device.run(2000);
  CHECK(countOf(device.wire.packets()[1], "\"schema\"") <= 4);
  device.run(20000);
  CHECK(countOf(device.wire.packets().back(), "\"schema\"") == 1);
}

void oneThatIsNeverAnsweredKeepsNobodyWaiting() {
  Device device;
  device.begin();
  for (int i = 0; i < 20; i++) device.add(i);
  for (int i = 0; i < 3000 && device.outbox.waiting() > 1; i++) {
    device.wire.said.clear();
    device.run(100);
    Texts heard;
    for (const std::string& packet : device.wire.packets()) {
      if (packet.find("-1-1\"") == std::string::npos) heard.push_back(packet);
    }
    device.answer(heard);
  }
  CHECK(device.outbox.waiting() == 1);
}

void anEventThatCanNeverBeSentIsRefused() {
  Device device;
  device.wire.send_bytes = 150;
  device.begin();
  CHECK(device.add(1));
  const std::string long_text(200, 'x');
  CHECK(!device.outbox.add(0, {"t", Value(long_text.c_str()), nullptr, 0, nullptr}));
  CHECK(device.outbox.refused() == 1 && device.outbox.waiting() == 1);
  CHECK(!device.outbox.add(0, {"t", Value("\xC3"), nullptr, 0, nullptr}));
  CHECK(!device.outbox.add(0, {"t", Value(1), nullptr, 0, "{\"a\":nan}"}));
  CHECK(!device.outbox.add(0, {"t", Value(1), nullptr, 0, "[]"}));
  CHECK(!device.outbox.add(0, {nullptr, Value(1), nullptr, 0, nullptr}));
  device.drain();
}

void aClientThatTakesNothingLosesNothing() {
  Device device;
  device.wire.takes = false;
  device.begin();
  device.add(1);
  device.add(2);
  device.run(30000);
  CHECK(device.outbox.waiting() == 2 && device.wire.packets().empty());
  device.wire.takes = true;
  device.drain();
}

void whatIsDroppedFromMemoryIsCountedAndTold() {
  Device device(1024);
  device.wire.connection_ = 0;
  device.begin();
  for (int i = 0; i < 50; i++) CHECK(device.add(i));
  const size_t lost = device.outbox.dropped();
  CHECK(lost > 30 && lost < 50);
  device.wire.connection_ = 1;
  std::string told;
  for (int i = 0; i < 1000 && device.outbox.waiting() > 0; i++) {
    device.wire.said.clear();
    device.run(50);
    for (const std::string& packet : device.wire.packets()) {
      if (packet.find("outbox_dropped") != std::string::npos) told += packet;
    }
    device.answer(device.wire.packets());
  }
  const std::string range = "\"from\":1,\"to\":" + std::to_string(lost) + "}";
  CHECK(countOf(told, "outbox_dropped") == 1 && told.find(range) != std::string::npos);
  CHECK(told.find("\"value\":" + std::to_string(lost) + ",") != std::string::npos);
}

void orTheNewestIsRefused() {
  Device device(1024);
  device.outbox.refuseNewest();
  device.wire.connection_ = 0;
  device.begin();
  int taken = 0;
  while (device.add(taken)) taken++;
  CHECK(taken > 5 && device.outbox.dropped() == 0 && device.outbox.refused() == 1);
  device.wire.connection_ = 1;
  device.run(50);
  CHECK(device.wire.packets()[0].find("-1-1\"") != std::string::npos);
  device.drain();
}

void aGoodNetworkDoesNotTouchTheStore() {
  Device device;
  MemoryStore store;
  device.begin(&store);
  CHECK(store.writes == 1);  // the boot
  for (int i = 0; i < 200; i++) {
    device.add(i);
    device.wire.said.clear();
    device.run(1000);
    device.answer(device.wire.packets());
  }
  CHECK(store.writes == 1 && device.outbox.waiting() == 0);
}

void holdZeroKeepsAnEventBeforeItIsSent() {
  Device device;
  MemoryStore store;
  device.outbox.hold(0);
  device.begin(&store);
  device.add(1);
  device.outbox.loop(0);
  CHECK(device.outbox.kept() == 1 && device.wire.packets().empty());
  device.run(50);
  CHECK(device.wire.packets().size() == 1);
  device.answer(device.wire.packets());
  CHECK(device.outbox.waiting() == 0 && store.files.size() == 1);
}

void whatIsOnItsWayWhenItIsKeptIsStillAnswered() {
  Device device;
  MemoryStore store;
  device.outbox.resend(60000, 60000);
  device.begin(&store);
  for (int i = 0; i < 3; i++) device.add(i);
  device.run(6000);  // sent, and then kept
  CHECK(device.outbox.kept() == 3 && device.wire.packets().size() == 1);
  device.answer(device.wire.packets());
  CHECK(device.outbox.waiting() == 0 && store.files.size() == 1);
}

void damagedEmptyAndForeignFilesAreSkippedAndCounted() {
  MemoryStore store;
  {
    Device device;
    device.wire.connection_ = 0;
    device.begin(&store);
    for (int i = 0; i < 3; i++) {
      device.add(i);
      device.outbox.save();
    }
  }
  CHECK(store.files.size() == 4);
  store.files[2][20] = static_cast<char>(store.files[2][20] + 1);  // damaged
  store.files[3] += "more";                                        // damaged behind a good event
  store.files[7] = "";
  store.files[8] = "something else";
  store.files[9] = std::string("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 12);
  const std::map<uint32_t, std::string> before = store.files;
  Device device;
  device.begin(&store, 2);
  CHECK(device.outbox.damaged() == 4 && device.outbox.kept() == 2);
  device.drain();
  CHECK(store.files.count(7) == 0);  // it held nothing
  CHECK(store.files[2] == before.at(2) && store.files[8] == before.at(8));
  CHECK(store.files.count(3) == 0 && store.files.count(4) == 0);
  device.add(1);
  CHECK(device.outbox.save() && store.files.count(10) == 1);
}

void anotherDevicesEventsAreLeftAlone() {
  MemoryStore store;
  {
    Device device;
    device.wire.connection_ = 0;
    device.begin(&store);
    device.add(1);
    device.outbox.save();
  }
  Device device;
  CHECK(device.outbox.begin("renamed", device.wire, &store, 1));
  CHECK(device.outbox.damaged() == 1 && device.outbox.waiting() == 0 && store.files.count(2) == 1);
}

std::string firstId(Device& device) {
  device.add(1);
  device.wire.said.clear();
  device.run(50);
  const std::string packet = device.wire.packets().at(0);
  const size_t at = packet.find("\"event_id\":\"") + 12;
  return packet.substr(at, packet.find('"', at) - at);
}

void idsNeverComeAgain() {
  MemoryStore store;
  std::map<std::string, int> seen;
  for (uint32_t boot = 1; boot < 40; boot++) {
    if (boot % 10 == 0) store.files.clear();                       // erased
    if (boot % 7 == 0 && store.files.count(0)) store.files[0] = "?";  // damaged
    store.result = boot % 5 == 0 ? Store::Result::kFailed : Store::Result::kDone;
    Device device;
    device.begin(&store, boot);
    CHECK(++seen[firstId(device)] == 1);
  }
}

void aDeepSleepGoesOnNumberingAndWritesNothing() {
  MemoryStore store;
  Resume resume;
  memset(&resume, 0xA5, sizeof resume);  // what is in RTC memory after power on
  std::string first, second;
  {
    Device device;
    device.begin(&store, 1, &resume);
    first = firstId(device);
  }
  const int writes = store.writes;
  {
    Device device;
    device.begin(&store, 2, &resume);
    second = firstId(device);
  }
  CHECK(store.writes == writes);
  CHECK(first.substr(0, first.size() - 1) == second.substr(0, second.size() - 1));
  CHECK(first.back() == '1' && second.back() == '2');
  store.files.clear();  // erased: the salt of the sleep is not gone on with
  Device device;
  device.begin(&store, 3, &resume);
  CHECK(firstId(device).substr(0, 13) != first.substr(0, 13));
}

void aStoreThatFailsLeavesTheMemory() {
  for (const Store::Result result : {Store::Result::kFailed, Store::Result::kFull}) {
    MemoryStore store;
    Device device;
    device.outbox.hold(0);
    device.begin(&store);
    store.result = result;
    device.add(1);
    CHECK(!device.outbox.save() && !device.outbox.sleepAllowed());
    CHECK(device.outbox.storeErrors() == 1);
    device.drain();
  }
  MemoryStore store;
  store.mounts = false;
  Device device;
  device.begin(&store);
  CHECK(!device.outbox.storeWorks() && device.outbox.storeErrors() == 1);
  device.add(1);
  device.drain();
  CHECK(store.writes == 0);
}

void aFullStoreDropsTheOldestAndMergesSmallFilesBefore() {
  MemoryStore store;
  Device device;
  device.outbox.hold(0).filesMax(4);
  device.wire.connection_ = 0;
  device.begin(&store);
  for (int i = 0; i < 200; i++) {
    device.add(i);
    device.run(10);
  }
  CHECK(store.files.size() <= 6 && device.outbox.kept() > 30);
  CHECK(device.outbox.kept() + device.outbox.dropped() == 200);
  device.wire.connection_ = 1;
  std::string told;
  for (int i = 0; i < 1000 && device.outbox.waiting() > 0; i++) {
    device.wire.said.clear();
    device.run(50);
    for (const std::string& packet : device.wire.packets()) told += packet;
    device.answer(device.wire.packets());
  }
  CHECK(told.find("\"from\":1,\"to\":" + std::to_string(device.outbox.dropped()) + "}") !=
        std::string::npos);
  CHECK(device.outbox.waiting() == 0 && device.outbox.sleepAllowed());
  device.run(50);
  CHECK(store.files.size() == 1);
}

Outbox* reentered;

void aCallbackMayAddAnEvent() {
  MemoryStore store;
  Device device(1024);
  int left = 40;
  reentered = &device.outbox;
  device.outbox.hold(0).onStored([](const char*, void* context) {
    if (--*static_cast<int*>(context) > 0) {
      reentered->add(0, {"again", Value(1), nullptr, 0, nullptr});
    }
  }, &left);
  device.begin(&store);
  for (int i = 0; i < 6; i++) device.add(i);
  device.drain();
}

void aMailboxTakesAMessageInPieces() {
  Mailbox<8> box;
  const uint8_t bytes[] = "abcdefgh";
  std::string got;
  const auto take = [&got](const uint8_t* from, size_t size) {
    got.assign(reinterpret_cast<const char*>(from), size);
  };
  box.put(bytes, 3, 0, 8);
  box.take(take);
  CHECK(got.empty());
  box.put(bytes + 3, 5, 3, 8);
  box.put(bytes, 1, 0, 1);  // not while one is in hand
  box.take(take);
  CHECK(got == "abcdefgh");
  got.clear();
  box.put(bytes, 3, 0, 9);  // too large
  box.put(bytes, 3, 3, 6);  // its beginning was not seen
  box.take(take);
  CHECK(got.empty());
}

void aBackoffGrowsAndWraps() {
  Backoff backoff;
  uint32_t now_ms = UINT32_MAX - 5000;
  int attempts = 0;
  for (int i = 0; i < 60000; i++, now_ms += 10) attempts += backoff.due(now_ms, 12345) ? 1 : 0;
  CHECK(attempts > 8 && attempts < 25);
  backoff.succeeded();
  CHECK(backoff.due(now_ms, 1));
}

struct Test {
  const char* name;
  void (*run)();
};
#define TEST(name) {#name, name}
const Test kTests[] = {
    TEST(subscribesAtEachConnectBeforeItSends),
    TEST(sendsTheSameBytesAgainLaterAndLaterAndGivesTheConnectionUp),
    TEST(sendsLessAtOnceWhereTheAnswerDoesNotFit),
    TEST(oneThatIsNeverAnsweredKeepsNobodyWaiting),
    TEST(anEventThatCanNeverBeSentIsRefused),
    TEST(aClientThatTakesNothingLosesNothing),
    TEST(whatIsDroppedFromMemoryIsCountedAndTold),
    TEST(orTheNewestIsRefused),
    TEST(aGoodNetworkDoesNotTouchTheStore),
    TEST(holdZeroKeepsAnEventBeforeItIsSent),
    TEST(whatIsOnItsWayWhenItIsKeptIsStillAnswered),
    TEST(damagedEmptyAndForeignFilesAreSkippedAndCounted),
    TEST(anotherDevicesEventsAreLeftAlone),
    TEST(idsNeverComeAgain),
    TEST(aDeepSleepGoesOnNumberingAndWritesNothing),
    TEST(aStoreThatFailsLeavesTheMemory),
    TEST(aFullStoreDropsTheOldestAndMergesSmallFilesBefore),
    TEST(aCallbackMayAddAnEvent),
    TEST(aMailboxTakesAMessageInPieces),
    TEST(aBackoffGrowsAndWraps),
};

}  // namespace

int main() {
  int count = 0;
  for (const Test& test : kTests) {
    running = test.name;
    test.run();
    count++;
  }
  printf("outbox: %d tests\n", count);
  return 0;
}
