// The power ends at every operation of the flash, and everything that was kept is still delivered.
//
// What it does: runs the shipped stores and the outbox on real littlefs, counts the operations of a
// run (add, keep, overflow, merge, send, ACK, save, boot), and does the same run again for each
// operation k, at which the power ends in the middle of a program or an erase; and for each call of
// the file system, which fails, before or after it has had its effect. Then it starts anew and
// delivers what waits. What it does not: time, or the broker.
//
// power_cut STEP does so at each STEPth of them, and prints how many there were, or the first that
// lost, invented, changed or repeated something.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "Flash.h"
#include "homelab/FolderStore.h"
#include "homelab/LittleFSStore.h"
#include "homelab/Outbox.h"

using namespace homelab;

namespace {

FS files;
std::string where;

[[noreturn]] void wrong(const std::string& what) {
  printf("power_cut: %s: %s\n", where.c_str(), what.c_str());
  exit(1);
}

// The server, which remembers what it has stored, and everything that was ever told.
struct World {
  std::map<std::string, std::string> stored;  // event id: its bytes
  std::map<long, std::string> id_of;          // value: the one id that it came with
  std::set<long> added;
  std::set<std::string> kept, answered, dropped, told_dropped;
  long next_value = 1;
  bool watching = true;  // not once the power is off
};

World* world;

void onKept(const char* id, void*) {
  if (!flash->dead && !world->kept.insert(id).second) wrong(std::string("kept again: ") + id);
}
void onStored(const char* id, void*) {
  if (!flash->dead) world->answered.insert(id);
}
void onRejected(const char* id, const char*, void*) {
  if (!flash->dead) world->answered.insert(id);
}
void onDropped(const char* id, void*) {
  if (!flash->dead) world->dropped.insert(id);
}

class Wire final : public Transport {
 public:
  uint32_t connection() override { return connection_; }
  bool subscribe(const char*) override { return true; }
  bool publish(const char*, const uint8_t* payload, size_t size) override {
    if (!flash->dead) packets.emplace_back(reinterpret_cast<const char*>(payload), size);
    return true;
  }
  void disconnect() override { connection_++; }
  size_t sendBytes(const char*) override { return 800; }
  size_t receiveBytes(const char*) override { return 1000; }
  uint32_t connection_ = 0;
  std::vector<std::string> packets;
};

std::string between(const std::string& text, const std::string& before, char after) {
  const size_t at = text.find(before);
  if (at == std::string::npos) return "";
  return text.substr(at + before.size(), text.find(after, at + before.size()) - at - before.size());
}

std::vector<std::string> eventsOf(const std::string& packet) {
  std::vector<std::string> events;
  for (size_t at = packet.find("{\"schema\""); at != std::string::npos;) {
    const size_t next = packet.find(",{\"schema\"", at);
    const size_t end = next != std::string::npos ? next : packet.rfind('}') + 1;
    events.push_back(packet.substr(at, end - at));
    at = next == std::string::npos ? next : next + 1;
  }
  return events;
}

std::string padding(long value) { return std::string(static_cast<size_t>(value * 7 % 60), 'x'); }

// What the server does with an event: the same id must have the same bytes, for ever.
std::string receive(const std::string& event) {
  const std::string id = between(event, "\"event_id\":\"", '"');
  const auto before = world->stored.find(id);
  if (before != world->stored.end()) {
    if (before->second != event) wrong("other bytes under one id: " + before->second + event);
    return id;
  }
  world->stored[id] = event;
  if (event.find("\"event_type\":\"outbox_dropped\"") != std::string::npos) {
    const std::string head = "d-" + between(event, "\"salt\":\"", '"') + "-" +
                             between(event, "\"boot\":", ',') + "-";
    const long from = atol(between(event, "\"from\":", ',').c_str());
    const long to = atol(between(event, "\"to\":", '}').c_str());
    if (from < 1 || to < from) wrong("told of nothing: " + event);
    for (long i = from; i <= to; i++) world->told_dropped.insert(head + std::to_string(i));
    return id;
  }
  const long value = atol(between(event, "\"value\":", ',').c_str());
  const std::string whole = "{\"schema\":1,\"event_id\":\"" + id +
                            "\",\"device_id\":\"d\",\"event_type\":\"t\",\"value\":" +
                            std::to_string(value) + ",\"unit\":\"C\",\"meta\":{\"pad\":\"" +
                            padding(value) + "\"}}";
  if (event != whole) wrong("altered: " + event);
  if (world->added.count(value) == 0) wrong("invented: " + event);
  if (!world->id_of.emplace(value, id).second) wrong("one event under two ids: " + event);
  return id;
}

// A device from its start to its end.
struct Device {
  explicit Device(bool posix, uint32_t random)
      : folder("t"), little(files, "t"), outbox(memory, sizeof memory, packet, sizeof packet) {
    outbox.hold(1000).resend(100, 1000).filesMax(flash->files_max).onKept(onKept).onStored(onStored);
    outbox.onDropped(onDropped).onRejected(onRejected);
    Store* const store = posix ? static_cast<Store*>(&folder) : static_cast<Store*>(&little);
    if (!outbox.begin("d", wire, store, random)) wrong("cannot begin");
  }

  void add(int count) {
    for (int i = 0; i < count && !flash->dead; i++) {
      const long value = world->next_value++;
      const std::string meta = "{\"pad\":\"" + padding(value) + "\"}";
      world->added.insert(value);
      outbox.add(now_ms, {"t", Value(value), "C", 0, meta.c_str()});
    }
  }

  // Let time pass; answer what is sent, all but every `silent`th packet.
  void run(uint32_t ms, unsigned silent) {
    for (uint32_t past_ms = 0; past_ms < ms && !flash->dead; past_ms += 50, now_ms += 50) {
      outbox.loop(now_ms);
      std::vector<std::string> packets;
      packets.swap(wire.packets);
      for (const std::string& packet : packets) {
        std::string acks;
        for (const std::string& event : eventsOf(packet)) {
          acks += (acks.empty() ? "" : ", ") + answer(receive(event));
        }
        if (silent != 0 && ++packet_count % silent == 0) continue;
        acks = "[" + acks + "]";
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(acks.data());
        outbox.onMessage(outbox.acksTopic(), bytes, acks.size());
      }
    }
  }

  static std::string answer(const std::string& id) {
    const bool rejected = id.size() > 1 && id.back() == '7';
    const char* const status = rejected ? "rejected\", \"reason\": \"not_storable" : "stored";
    return "{\"schema\": 1, \"event_id\": \"" + id + "\", \"device_id\": \"d\", \"status\": \"" +
           status + "\"}";
  }

  uint8_t memory[1024];
  uint8_t packet[800];
  Wire wire;
  FolderStore folder;
  LittleFSStore little;
  Outbox outbox;
  uint32_t now_ms = UINT32_MAX - 2000;  // millis() wraps in the middle of it
  unsigned packet_count = 0;
};

// Three boots: offline until it overflows, online with silences, and a save before a sleep.
void play(bool posix) {
  for (uint32_t boot = 1; boot <= 3 && !flash->dead; boot++) {
    if (!flash->mounted && !flash->mount()) return;  // the power ended, or the operation failed
    Device* const device = new Device(posix, boot * 7919);
    for (int i = 0; i < 10; i++) {
      device->add(boot == 1 ? 3 : 1);
      device->run(1100, 0);
    }
    device->wire.connection_ = 1;
    device->add(4);
    device->run(1500, 3);
    device->add(2);
    device->run(200, 2);
    device->add(3);
    device->outbox.save();
    delete device;
    flash->unmount();  // frees what littlefs has in memory; without power it changes nothing
  }
}

// After a start without any fault: everything that waits is delivered.
void drain(bool posix) {
  flash->powerOn();
  if (!flash->mount()) wrong("cannot be mounted");
  Device* const device = new Device(posix, 104729);
  if (device->outbox.damaged() != 0) wrong("left a damaged file");
  device->wire.connection_ = 1;
  device->add(2);
  for (int i = 0; i < 60 && device->outbox.waiting() > 0; i++) device->run(1000, 0);
  if (device->outbox.waiting() != 0 || device->outbox.kept() != 0) {
    wrong(std::to_string(device->outbox.waiting()) + " are still waiting, of them kept " +
          std::to_string(device->outbox.kept()));
  }
  if (device->outbox.storeErrors() != 0) wrong("the store failed without a fault");
  delete device;
  flash->unmount();
}

void compare(bool cut, bool faulty) {
  for (const std::string& id : world->kept) {
    const bool told = world->told_dropped.count(id) != 0;
    if (world->stored.count(id) == 0 && !told) wrong("kept, and lost: " + id);
  }
  for (const std::string& id : world->dropped) {
    // From memory only: then the note of it is lost with a power cut, or a note that fails.
    if (world->kept.count(id) == 0 && faulty) continue;
    if (world->told_dropped.count(id) == 0) wrong("dropped, and not told: " + id);
  }
  // A file that was given up, and then could not be removed, is sent after all.
  for (const std::string& id : world->told_dropped) {
    if (cut && world->answered.count(id) != 0 && world->dropped.count(id) == 0) {
      wrong("answered, and told as dropped: " + id);
    }
  }
}

enum class Fault { kNone, kCut, kFail, kFailLate };
const char* const kFaults[] = {"without a fault", "cut", "fail", "fail late"};

struct Counts {
  int64_t operations;
  std::vector<bool> changing;  // of the calls, which change something
};

// One run with this fault, and everything that is held against it.
Counts once(const Flash::Chip& chip, bool posix, Fault fault, int64_t at) {
  where = std::string(chip.name) + " " + kFaults[static_cast<int>(fault)] + " " + std::to_string(at);
  Flash* const made = new Flash(chip);
  flash = made;
  world = new World;
  flash->format();
  flash->operations = 0;
  if (fault == Fault::kCut) flash->cut_at = at;
  if (fault == Fault::kFail || fault == Fault::kFailLate) flash->fail_at = at;
  flash->fails_late = fault == Fault::kFailLate;
  play(posix);
  const Counts counts = {flash->operations, flash->changing};
  drain(posix);
  compare(fault == Fault::kCut, fault != Fault::kNone);
  if (fault == Fault::kNone && (world->dropped.empty() || world->told_dropped.empty())) {
    wrong("the run has no overflow");
  }
  delete world;
  delete made;
  return counts;
}

// With a fault at each `step`th operation and call.
void all(const Flash::Chip& chip, bool posix, int64_t step) {
  const Counts counts = once(chip, posix, Fault::kNone, 0);
  const int64_t calls = static_cast<int64_t>(counts.changing.size());
  for (int64_t k = 0; k < counts.operations; k += step) once(chip, posix, Fault::kCut, k);
  for (int64_t k = 0; k < calls; k += step) once(chip, posix, Fault::kFail, k);
  for (int64_t k = 0; k < calls; k += step) {
    if (counts.changing[static_cast<size_t>(k)]) once(chip, posix, Fault::kFailLate, k);
  }
  printf("power_cut: %s (%s), %d blocks: the power ended at %d operations, and %d calls failed: "
         "nothing lost, invented, altered or repeated\n",
         chip.name, posix ? "FolderStore" : "LittleFSStore", static_cast<int>(chip.block_count), static_cast<int>((counts.operations + step - 1) / step),
         static_cast<int>((calls + step - 1) / step));
  fflush(stdout);
}

}  // namespace

int main(int count, char** words) {
  const int64_t step = count == 2 ? atol(words[1]) : 0;
  if (step < 1) return 2;
  all(kEsp32, true, step);
  all(kEsp8266, false, step);
  all(kFull, true, step);
  all(kFull, false, step);
  return 0;
}
