// The event contract, as the device writes it: ids, values, times, and the bytes of an event.
//
// What it does: builds an event from its fields, and refuses what the ingester would. What it does
// not: keep or send anything, or ask for the time.
// Invariant: what it builds is valid, and the same fields give the same bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

constexpr size_t kDeviceIdBytesMax = 64;
constexpr size_t kEventIdBytesMax = 200;

// What makes an id unique beside the device: the salt is made with the store, the boot counted in
// it, and the sequence counted in memory.
struct Key {
  uint32_t salt;
  uint32_t boot;
  uint32_t sequence;
  bool operator==(const Key& other) const {
    return salt == other.salt && boot == other.boot && sequence == other.sequence;
  }
};

// A number, a text, or nothing. true and false become 1 and 0. The text must outlive the call.
class Value {
 public:
  enum class Kind : uint8_t { kNone, kInteger, kFloat, kDouble, kText };
  Value() : kind_(Kind::kNone), negative_(false), integer_(0) {}
  Value(bool value) : Value(value ? 1U : 0U) {}
  Value(int value) : Value(static_cast<long long>(value)) {}
  Value(unsigned value) : Value(static_cast<unsigned long long>(value)) {}
  Value(long value) : Value(static_cast<long long>(value)) {}
  Value(unsigned long value) : Value(static_cast<unsigned long long>(value)) {}
  Value(long long value) : kind_(Kind::kInteger), negative_(value < 0), integer_(magnitude(value)) {}
  Value(unsigned long long value) : kind_(Kind::kInteger), negative_(false), integer_(value) {}
  Value(float value) : kind_(Kind::kFloat), negative_(false), float_(value) {}
  Value(double value) : kind_(Kind::kDouble), negative_(false), double_(value) {}
  Value(const char* text)
      : kind_(text == nullptr ? Kind::kNone : Kind::kText), negative_(false), text_(text) {}

  Kind kind() const { return kind_; }
  const char* text() const { return text_; }
  // The number as JSON; its length, or 0 if it is nan or an infinity.
  size_t write(char (&into)[25]) const;

 private:
  static uint64_t magnitude(long long value) {
    return value < 0 ? UINT64_C(0) - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  }
  Kind kind_;
  bool negative_;
  union {
    uint64_t integer_;
    float float_;
    double double_;
    const char* text_;
  };
};

// The fields of an event that the sketch chooses. Null: absent. unix_ms: by the device's clock;
// what is not plausible is left out. meta: a JSON object as text.
struct Fields {
  const char* type;
  Value value;
  const char* unit;
  int64_t unix_ms;
  const char* meta;
};

bool isDeviceId(const char* text);

// "<device>-<salt>-<boot>-<sequence>"; the length, or 0 if it does not fit.
size_t writeId(const char* device_id, const Key& key, char* into, size_t capacity);
// Only the very text that writeId() writes.
bool parseId(const char* device_id, const char* text, size_t size, Key& key);

// Tell whether the clock is set: from 2024 until before 2100, without 2036-02-06 to 2036-02-08,
// where an empty NTP answer leads to.
bool isPlausible(int64_t unix_ms);
// "2026-02-10T00:00:00Z", with milliseconds where there are some.
size_t writeTime(int64_t unix_ms, char (&into)[25]);

// Tell whether the fields make an event that the ingester takes.
bool isValid(const Fields& fields);
// The bytes of an event whose fields are valid. Returns how many they are, even if they do not fit.
size_t writeEvent(const char* device_id, const Key& key, const Fields& fields, char* into,
                  size_t capacity);
// The key of an event that writeEvent() wrote.
bool keyOf(const char* device_id, const char* json, size_t size, Key& key);

// A contiguous run of events that are lost, of one boot.
struct Run {
  uint32_t salt;
  uint32_t boot;
  uint32_t from;
  uint32_t to;
};

// The event that tells of it. A run without a `from` tells how many only, which `to` is.
size_t writeDropped(const char* device_id, const Key& key, const Run& run, char* into,
                    size_t capacity);
// Tell whether the event is one that writeDropped() wrote, and of what.
bool readDropped(const char* json, size_t size, Run& run);

}  // namespace homelab
