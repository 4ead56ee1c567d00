// The library's side of contract.json: does what a line on stdin says, and answers with a line.
//
// What it does: runs one vector at a time on a fresh outbox. What it does not: read JSON, or know
// what is right; contract.py compares.
// Invariant: words are separated by tabs, texts are in hex, "-" is an absent one.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <string>
#include <vector>

#include "homelab/Outbox.h"
#include "homelab/Record.h"

using namespace homelab;

namespace {

using Words = std::vector<std::string>;

class Wire final : public Transport {
 public:
  uint32_t connection() override { return connection_; }
  bool subscribe(const char* topic) override {
    subscribed_ = topic;
    return true;
  }
  bool publish(const char* topic, const uint8_t* payload, size_t size) override {
    if (subscribed_.empty()) abort();  // the ACK could be missed
    topic_ = topic;
    sent_.emplace_back(reinterpret_cast<const char*>(payload), size);
    return true;
  }
  void disconnect() override {}
  size_t sendBytes(const char*) override { return 65536; }
  size_t receiveBytes(const char*) override { return receive_bytes_; }

  uint32_t connection_ = 1;
  size_t receive_bytes_ = 65536;
  std::string subscribed_, topic_;
  Words sent_;
};

std::string hex(const std::string& bytes) {
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text.empty() ? "=" : text;
}

std::string unhex(const std::string& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes += static_cast<char>(strtol(text.substr(i, 2).c_str(), nullptr, 16));
  }
  return bytes;
}

// An outbox whose next event has this key.
struct Device {
  Device(const Words& words, size_t at) : outbox(memory, sizeof memory, packet, sizeof packet) {
    device_id = unhex(words[at]);
    resume = {static_cast<uint32_t>(strtoul(words[at + 1].c_str(), nullptr, 16)),
                     static_cast<uint32_t>(strtoul(words[at + 2].c_str(), nullptr, 10)),
                     static_cast<uint32_t>(strtoul(words[at + 3].c_str(), nullptr, 10)) - 1, 0};
    uint8_t bytes[12];
    put32(bytes, resume.salt);
    put32(bytes + 4, resume.boot);
    put32(bytes + 8, resume.sequence);
    resume.check = crc32(bytes, sizeof bytes);
    good = outbox.begin(device_id.c_str(), wire, nullptr, 1, &resume);
  }

  // type, value, unit, unix_ms, meta
  bool add(const Words& words, size_t at) {
    const std::string type = unhex(words[at]), text = unhex(words[at + 1].substr(1));
    const std::string unit = unhex(words[at + 2]), meta = unhex(words[at + 4]);
    Value value;
    switch (words[at + 1][0]) {
      case 'i': value = Value(strtoll(text.c_str(), nullptr, 10)); break;
      case 'd': value = Value(strtod(text.c_str(), nullptr)); break;
      case 'f': value = Value(strtof(text.c_str(), nullptr)); break;
      case 'b': value = Value(text == "true"); break;
      case 't': value = Value(text.c_str()); break;
      default: break;
    }
    return outbox.add(0, {type.c_str(), value, words[at + 2] == "-" ? nullptr : unit.c_str(),
                          strtoll(words[at + 3].c_str(), nullptr, 10),
                          words[at + 4] == "-" ? nullptr : meta.c_str()});
  }

  // What is sent in the first packet after the next connect.
  std::string firstPacket() {
    wire.sent_.clear();
    wire.connection_++;
    for (int i = 0; i < 3; i++) outbox.loop(0);
    return wire.sent_.empty() ? "" : wire.sent_[0];
  }

  std::string device_id;
  uint8_t memory[65536];
  uint8_t packet[16384];
  Resume resume;
  Wire wire;
  Outbox outbox;
  bool good;
};

std::string told;

void onStored(const char* id, void*) { told += std::string(" stored ") + id; }
void onRejected(const char* id, const char* reason, void*) {
  told += std::string(" rejected ") + id + "=" + reason;
}

// device: id, salt, boot, sequence; then what is added, five words each.
std::string added(const Words& words) {
  Device* const device = new Device(words, 1);
  std::string answer = "refused";
  bool all = device->good;
  for (size_t i = 5; i + 4 < words.size(); i += 5) all = all && device->add(words, i);
  if (all) answer = hex(device->firstPacket()) + " " + device->wire.topic_;
  delete device;
  return answer;
}

// Returns how many of ten events are sent in one packet.
std::string limit(const Words& words) {
  Device* const device = new Device(words, 1);
  device->wire.receive_bytes_ = strtoul(words[5].c_str(), nullptr, 10);
  for (int i = 0; i < 10; i++) device->outbox.add(0, {"t", Value(1), nullptr, 0, nullptr});
  const std::string packet = device->firstPacket();
  int count = 0;
  for (size_t at = 0; (at = packet.find("\"schema\"", at)) != std::string::npos; at++) count++;
  delete device;
  return std::to_string(count);
}

// device; how many payloads, the payloads; then what was added.
std::string acks(const Words& words) {
  Device* const device = new Device(words, 1);
  device->outbox.onStored(onStored).onRejected(onRejected);
  const size_t payloads = strtoul(words[5].c_str(), nullptr, 10);
  for (size_t i = 6 + payloads; i + 4 < words.size(); i += 5) device->add(words, i);
  device->firstPacket();
  told = "told";
  for (size_t i = 6; i < 6 + payloads; i++) {
    // On the heap and of its exact size, so that a sanitizer sees each byte too many.
    const std::string payload = unhex(words[i]);
    std::vector<uint8_t> bytes(payload.begin(), payload.end());
    device->outbox.onMessage(device->outbox.acksTopic(), bytes.data(), bytes.size());
  }
  const size_t waiting = device->outbox.waiting();
  const std::string answer =
      told + "\t" + std::to_string(waiting) + " " + hex(device->firstPacket()) + " " +
      device->wire.subscribed_;
  delete device;
  return answer;
}

std::string dropped(const Words& words) {
  const std::string device_id = unhex(words[1]);
  const auto number = [&words](size_t at, int base) {
    return static_cast<uint32_t>(strtoul(words[at].c_str(), nullptr, base));
  };
  const Run run = {number(5, 16), number(6, 10), number(7, 10), number(8, 10)};
  char bytes[512];
  const size_t size = writeDropped(device_id.c_str(), {number(2, 16), number(3, 10), number(4, 10)},
                                   run, bytes, sizeof bytes);
  Run again = {0, 0, 0, 0};
  const bool read = readDropped(bytes, size, again) && again.salt == run.salt &&
                    again.boot == run.boot && again.from == run.from && again.to == run.to;
  return hex(std::string(bytes, size)) + (read ? "" : " cannot be read again");
}

std::string clock(const Words& words) {
  const int64_t unix_ms = strtoll(words[1].c_str(), nullptr, 10);
  char time[25];
  return isPlausible(unix_ms) ? std::string(time, writeTime(unix_ms, time)) : "none";
}

std::string id(const Words& words) {
  const std::string device_id = unhex(words[1]);
  if (!isDeviceId(device_id.c_str())) return "none";
  const Key key = {static_cast<uint32_t>(strtoul(words[2].c_str(), nullptr, 16)),
                   static_cast<uint32_t>(strtoul(words[3].c_str(), nullptr, 10)),
                   static_cast<uint32_t>(strtoul(words[4].c_str(), nullptr, 10))};
  char text[kEventIdBytesMax + 1];
  Key again;
  const size_t size = writeId(device_id.c_str(), key, text, sizeof text);
  if (!parseId(device_id.c_str(), text, size, again) || !(again == key)) return "cannot be read";
  return text;
}

std::string run(const Words& words) {
  if (words[0] == "added") return added(words);
  if (words[0] == "limit") return limit(words);
  if (words[0] == "acks") return acks(words);
  if (words[0] == "dropped") return dropped(words);
  if (words[0] == "clock") return clock(words);
  if (words[0] == "id") return id(words);
  return "no such command";
}

}  // namespace

int main() {
  static char line[1 << 20];
  while (fgets(line, sizeof line, stdin) != nullptr) {
    line[strcspn(line, "\n")] = '\0';
    Words words;
    const std::string text = line;
    for (size_t at = 0; at <= text.size();) {
      const size_t end = text.find('\t', at);
      words.push_back(text.substr(at, end - at));
      if (end == std::string::npos) break;
      at = end + 1;
    }
    printf("%s\n", run(words).c_str());
    fflush(stdout);
  }
  return 0;
}
