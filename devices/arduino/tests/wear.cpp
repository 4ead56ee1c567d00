// How much an event wears the flash: erases and bytes programmed, on real littlefs.
//
// What it does: runs the shipped stores with events of about 220 bytes, in a good network and
// offline, and prints a row for each. It fails if a good network touches the flash at all.
// What it does not: the wear of a real chip.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "Flash.h"
#include "homelab/FolderStore.h"
#include "homelab/LittleFSStore.h"
#include "homelab/Outbox.h"

using namespace homelab;

namespace {

FS files;
constexpr int kEvents = 500;

class Wire final : public Transport {
 public:
  uint32_t connection() override { return connection_; }
  bool subscribe(const char*) override { return true; }
  bool publish(const char*, const uint8_t* payload, size_t size) override {
    packet.assign(reinterpret_cast<const char*>(payload), size);
    return true;
  }
  void disconnect() override {}
  size_t sendBytes(const char*) override { return 1024; }
  size_t receiveBytes(const char*) override { return 1024; }
  uint32_t connection_ = 0;
  std::string packet;
};

void answer(Outbox& outbox, Wire& wire) {
  std::string acks;
  for (size_t at = 0; (at = wire.packet.find("\"event_id\":\"", at)) != std::string::npos;) {
    at += strlen("\"event_id\":\"");
    acks += acks.empty() ? "[" : ", ";
    acks += "{\"schema\": 1, \"event_id\": \"" + wire.packet.substr(at, wire.packet.find('"', at) - at) +
            "\", \"device_id\": \"esp32-01\", \"status\": \"stored\"}";
  }
  wire.packet.clear();
  if (acks.empty()) return;
  acks += "]";
  outbox.onMessage(outbox.acksTopic(), reinterpret_cast<const uint8_t*>(acks.data()), acks.size());
}

// An event each second, kept after `hold_ms`; then, if it was offline, all of it is sent.
void measure(const Flash::Chip& chip, bool posix, const char* name, bool online, uint32_t hold_ms) {
  Flash* const made = new Flash(chip);
  flash = made;
  flash->format();
  flash->mount();
  FolderStore folder("t");
  LittleFSStore little(files, "t");
  uint8_t memory[4096], packet[1024];  // the defaults
  Wire wire;
  Outbox outbox(memory, sizeof memory, packet, sizeof packet);
  outbox.hold(hold_ms);
  Store* const store = posix ? static_cast<Store*>(&folder) : static_cast<Store*>(&little);
  outbox.begin("esp32-01", wire, store, 1);
  const uint64_t erases = flash->erases, programmed = flash->programmed;
  wire.connection_ = online ? 1 : 0;
  const char* const meta = "{\"room\":\"cellar\",\"sensor\":\"bme280\",\"battery\":3.71}";
  uint32_t now_ms = 0;
  for (int i = 0; i < kEvents; i++, now_ms += 1000) {
    outbox.add(now_ms, {"temperature", Value(20 + i * 0.01), "C", INT64_C(1770681600000), meta});
    for (int j = 0; j < 3; j++) outbox.loop(now_ms);
    answer(outbox, wire);
  }
  const uint64_t kept_erases = flash->erases - erases, kept = flash->programmed - programmed;
  wire.connection_ = 1;
  for (int i = 0; i < 10000 && outbox.waiting() > 0; i++) {
    outbox.loop(now_ms += 10);
    answer(outbox, wire);
  }
  if (outbox.waiting() != 0) exit(1);
  const double n = kEvents;
  printf("%-8s %-38s %6.3f erases %7.0f bytes to keep, %6.3f erases %7.0f bytes with sending; "
         "lost to an overflow %u\n",
         chip.name, name, static_cast<double>(kept_erases) / n, static_cast<double>(kept) / n,
         static_cast<double>(flash->erases - erases) / n,
         static_cast<double>(flash->programmed - programmed) / n, static_cast<unsigned>(outbox.dropped()));
  if (online && flash->programmed != programmed) exit(1);
  flash->unmount();
  delete made;
}

}  // namespace

int main() {
  Flash::Chip chips[] = {kEsp32, kEsp8266};
  for (int i = 0; i < 2; i++) {
    chips[i].block_count = 352;  // 1.4 MB, as arduino-esp32 divides 4 MB
    const bool posix = i == 0;
    measure(chips[i], posix, "good network, hold 30 s", true, 30000);
    measure(chips[i], posix, "offline, hold 0: one event a file", false, 0);
    measure(chips[i], posix, "offline, hold 5 s: 6 events a file", false, 5000);
    measure(chips[i], posix, "offline, hold 1 h: as many as fit", false, 3600000);
  }
  return 0;
}
