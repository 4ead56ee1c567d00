// Any bytes as an ACK: nothing is read outside of them, and no event is answered that did not wait.
//
// What it does: as a libFuzzer target (clang++ -fsanitize=fuzzer), tries new inputs; with a main()
// of its own (-DREPLAY), tries each line of a corpus, in hex. What it does not: know what is right
// in detail; contract.json does.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "homelab/Ack.h"
#include "homelab/Json.h"
#include "homelab/Outbox.h"

using namespace homelab;

namespace {

class Wire final : public Transport {
 public:
  uint32_t connection() override { return 1; }
  bool subscribe(const char*) override { return true; }
  bool publish(const char*, const uint8_t*, size_t) override { return true; }
  void disconnect() override {}
  size_t sendBytes(const char*) override { return 1024; }
  size_t receiveBytes(const char*) override { return 65536; }
};

unsigned told;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Wire wire;
  // Of its exact size, so that a sanitizer sees each byte too many.
  std::vector<char> exact(data, data + size);
  exact.shrink_to_fit();
  AckReader reader("d", exact.data(), size);
  Answer answer;
  while (reader.next(answer)) {
    char id[kEventIdBytesMax + 1];
    if (writeId("d", answer.key, id, sizeof id) == 0) abort();
    if (memchr(answer.reason, '\0', sizeof answer.reason) == nullptr) abort();
  }
  uint8_t memory[1024], packet[512];
  Outbox outbox(memory, sizeof memory, packet, sizeof packet);
  outbox.onStored([](const char*, void*) { told++; });
  outbox.onRejected([](const char*, const char*, void*) { told++; });
  // The first salt of this random number is 00042021: see the corpus.
  outbox.begin("d", wire, nullptr, 1);
  told = 0;
  for (int i = 0; i < 3; i++) outbox.add(0, {"t", Value(i), nullptr, 0, nullptr});
  outbox.loop(0);
  outbox.loop(0);
  outbox.onMessage("qs/v1/d/acks", reinterpret_cast<const uint8_t*>(exact.data()), size);
  if (told + outbox.waiting() != 3) abort();
  // What a sketch gives as meta is scanned as well, up to its NUL.
  const std::string text(exact.begin(), exact.end());
  isObject(text.c_str());
  isText(text.c_str(), 0, 100, false);
  return 0;
}

#ifdef REPLAY
int main(int count, char** words) {
  static char line[1 << 20];
  FILE* const file = count == 2 ? fopen(words[1], "r") : nullptr;
  if (file == nullptr) return 2;
  int inputs = 0;
  for (; fgets(line, sizeof line, file) != nullptr; inputs++) {
    std::vector<uint8_t> bytes;
    for (size_t i = 0; line[i] > ' ' && line[i + 1] > ' '; i += 2) {
      const char digits[] = {line[i], line[i + 1], '\0'};
      bytes.push_back(static_cast<uint8_t>(strtol(digits, nullptr, 16)));
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  fclose(file);
  printf("fuzz_ack: %d inputs of the corpus\n", inputs);
  return inputs > 100 ? 0 : 1;
}
#endif
