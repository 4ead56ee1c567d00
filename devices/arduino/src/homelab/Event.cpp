#include "Event.h"

#include <string.h>

#include "Json.h"
#include "Number.h"

namespace homelab {
namespace {

constexpr char kHead[] = "{\"schema\":1,\"event_id\":\"";
constexpr char kDroppedType[] = "outbox_dropped";
constexpr size_t kTypeCharactersMax = 100;
constexpr size_t kUnitCharactersMax = 50;

void writeHex(uint32_t value, char (&into)[9]) {
  for (int i = 7; i >= 0; i--, value >>= 4) into[i] = "0123456789abcdef"[value & 15];
  into[8] = '\0';
}

// Reads what was written, from the front; stays at the first difference.
class Reader {
 public:
  Reader(const char* text, size_t size) : at_(text), end_(text + size), good_(true) {}

  bool literal(const char* text) {
    const size_t size = strlen(text);
    good_ = good_ && static_cast<size_t>(end_ - at_) >= size && memcmp(at_, text, size) == 0;
    if (good_) at_ += size;
    return good_;
  }

  uint32_t hex() {
    uint32_t value = 0;
    for (int i = 0; i < 8; i++) {
      const char c = at_ < end_ ? *at_ : '\0';
      const bool digit = c >= '0' && c <= '9';
      good_ = good_ && (digit || (c >= 'a' && c <= 'f'));
      if (!good_) return 0;
      value = value << 4 | static_cast<uint32_t>(digit ? c - '0' : c - 'a' + 10);
      at_++;
    }
    return value;
  }

  // From 1, without a leading zero, of 32 bits.
  uint32_t decimal() {
    uint64_t value = 0;
    good_ = good_ && at_ < end_ && *at_ != '0';
    const char* const first = at_;
    while (good_ && at_ < end_ && *at_ >= '0' && *at_ <= '9') {
      value = value * 10 + static_cast<uint64_t>(*at_++ - '0');
      good_ = value <= UINT32_MAX;
    }
    good_ = good_ && at_ > first;
    return good_ ? static_cast<uint32_t>(value) : 0;
  }

  bool good() const { return good_; }
  const char* at() const { return at_; }
  bool atEnd() const { return at_ == end_; }

 private:
  const char* at_;
  const char* end_;
  bool good_;
};

bool readKey(Reader& reader, const char* device_id, Key& key) {
  reader.literal(device_id);
  reader.literal("-");
  key.salt = reader.hex();
  reader.literal("-");
  key.boot = reader.decimal();
  reader.literal("-");
  key.sequence = reader.decimal();
  return reader.good();
}

void writeKey(Writer& writer, const char* device_id, const Key& key) {
  char salt[9];
  writeHex(key.salt, salt);
  writer.raw(device_id);
  writer.raw("-");
  writer.raw(salt);
  writer.raw("-");
  writer.number(key.boot);
  writer.raw("-");
  writer.number(key.sequence);
}

void writePadded(Writer& writer, uint32_t value, uint32_t digits) {
  for (uint32_t least = digits == 4 ? 1000 : digits == 3 ? 100 : 10; least > 1; least /= 10) {
    if (value < least) writer.raw("0");
  }
  writer.number(value);
}

}  // namespace

size_t Value::write(char (&into)[25]) const {
  static_assert(sizeof into == kNumberBytes, "a number has room");
  if (kind_ == Kind::kInteger) return writeInteger(integer_, negative_, into);
  return kind_ == Kind::kFloat ? writeNumber(float_, into) : writeNumber(double_, into);
}

bool isDeviceId(const char* text) {
  const size_t size = strlen(text);
  if (size == 0 || size > kDeviceIdBytesMax) return false;
  for (size_t i = 0; i < size; i++) {
    const char c = text[i];
    const bool alphanumeric =
        (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    if (!alphanumeric && c != '_' && c != '.' && c != ':' && c != '-') return false;
  }
  return true;
}

size_t writeId(const char* device_id, const Key& key, char* into, size_t capacity) {
  Writer writer(into, capacity);
  writeKey(writer, device_id, key);
  writer.raw("", 1);
  return writer.fits() && writer.size() - 1 <= kEventIdBytesMax ? writer.size() - 1 : 0;
}

bool parseId(const char* device_id, const char* text, size_t size, Key& key) {
  Reader reader(text, size);
  return readKey(reader, device_id, key) && reader.atEnd();
}

bool isPlausible(int64_t unix_ms) {
  constexpr int64_t k2024 = INT64_C(1704067200000), k2100 = INT64_C(4102444800000);
  constexpr int64_t kEmptyNtpFrom = INT64_C(2085868800000), kEmptyNtpTo = INT64_C(2086128000000);
  if (unix_ms >= kEmptyNtpFrom && unix_ms < kEmptyNtpTo) return false;
  return unix_ms >= k2024 && unix_ms < k2100;
}

size_t writeTime(int64_t unix_ms, char (&into)[25]) {
  const uint32_t seconds = static_cast<uint32_t>(unix_ms / 1000);  // plausible, so before 2106
  const uint32_t milliseconds = static_cast<uint32_t>(unix_ms % 1000);
  const uint32_t second_of_day = seconds % 86400;
  // Days since 0000-03-01, so that the leap day is the last of its year; 400 years are 146,097.
  const uint32_t days = seconds / 86400 + 719468;
  const uint32_t era = days / 146097, day_of_era = days % 146097;
  const uint32_t year_of_era =
      (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
  const uint32_t day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
  const uint32_t month_from_march = (5 * day + 2) / 153;
  const uint32_t month = month_from_march < 10 ? month_from_march + 3 : month_from_march - 9;
  Writer writer(into, sizeof into - 1);
  writePadded(writer, era * 400 + year_of_era + (month <= 2 ? 1 : 0), 4);
  writer.raw("-");
  writePadded(writer, month, 2);
  writer.raw("-");
  writePadded(writer, day - (153 * month_from_march + 2) / 5 + 1, 2);
  writer.raw("T");
  writePadded(writer, second_of_day / 3600, 2);
  writer.raw(":");
  writePadded(writer, second_of_day / 60 % 60, 2);
  writer.raw(":");
  writePadded(writer, second_of_day % 60, 2);
  if (milliseconds != 0) {
    writer.raw(".");
    writePadded(writer, milliseconds, 3);
  }
  writer.raw("Z");
  into[writer.size()] = '\0';
  return writer.size();
}

bool isValid(const Fields& fields) {
  if (fields.type == nullptr || !isText(fields.type, 1, kTypeCharactersMax, false)) return false;
  if (fields.unit != nullptr && !isText(fields.unit, 0, kUnitCharactersMax, false)) return false;
  if (fields.meta != nullptr && !isObject(fields.meta)) return false;
  if (fields.value.kind() == Value::Kind::kNone) return true;
  if (fields.value.kind() == Value::Kind::kText) {
    return isText(fields.value.text(), 0, SIZE_MAX, true);
  }
  char number[kNumberBytes];
  return fields.value.write(number) > 0;
}

size_t writeEvent(const char* device_id, const Key& key, const Fields& fields, char* into,
                  size_t capacity) {
  Writer writer(into, capacity);
  writer.raw(kHead);
  writeKey(writer, device_id, key);
  writer.raw("\",\"device_id\":\"");
  writer.raw(device_id);
  writer.raw("\",\"event_type\":");
  writer.quoted(fields.type);
  if (fields.value.kind() == Value::Kind::kText) {
    writer.raw(",\"value\":");
    writer.quoted(fields.value.text());
  } else if (fields.value.kind() != Value::Kind::kNone) {
    char number[kNumberBytes];
    const size_t size = fields.value.write(number);
    writer.raw(",\"value\":");
    writer.raw(number, size);
  }
  if (fields.unit != nullptr) {
    writer.raw(",\"unit\":");
    writer.quoted(fields.unit);
  }
  if (isPlausible(fields.unix_ms)) {
    char time[25];
    const size_t size = writeTime(fields.unix_ms, time);
    writer.raw(",\"ts_device\":\"");
    writer.raw(time, size);
    writer.raw("\"");
  }
  if (fields.meta != nullptr) {
    writer.raw(",\"meta\":");
    writer.raw(fields.meta);
  }
  writer.raw("}");
  return writer.size();
}

bool keyOf(const char* device_id, const char* json, size_t size, Key& key) {
  Reader reader(json, size);
  reader.literal(kHead);
  return readKey(reader, device_id, key) && reader.literal("\"");
}

size_t writeDropped(const char* device_id, const Key& key, const Run& run, char* into,
                    size_t capacity) {
  char text[sizeof "{'salt':'00000000','boot':4294967295,'from':4294967295,'to':4294967295}"];
  if (run.from == 0) {
    return writeEvent(device_id, key, {kDroppedType, Value(run.to), nullptr, 0, nullptr}, into,
                      capacity);
  }
  char salt[9];
  writeHex(run.salt, salt);
  Writer meta(text, sizeof text);
  meta.raw("{\"salt\":\"");
  meta.raw(salt);
  meta.raw("\",\"boot\":");
  meta.number(run.boot);
  meta.raw(",\"from\":");
  meta.number(run.from);
  meta.raw(",\"to\":");
  meta.number(run.to);
  meta.raw("}", sizeof "}");
  const uint64_t lost = static_cast<uint64_t>(run.to) - run.from + 1;
  const Value how_many(static_cast<unsigned long long>(lost));
  return writeEvent(device_id, key, {kDroppedType, how_many, nullptr, 0, text}, into, capacity);
}

bool readDropped(const char* json, size_t size, Run& run) {
  static const char kType[] = "\",\"event_type\":\"outbox_dropped\",\"value\":";
  // The first of its kind stands behind the device id, which holds no quotes.
  for (const char* at = json; at + sizeof kType < json + size; at++) {
    if (memcmp(at, kType, sizeof kType - 1) != 0) continue;
    at += sizeof kType - 1;
    Reader reader(at, static_cast<size_t>(json + size - at));
    const uint32_t lost = reader.decimal();
    run = {0, 0, 0, lost};
    if (!reader.good()) return false;
    if (static_cast<size_t>(json + size - reader.at()) == 1) return true;  // no meta: a number only
    reader.literal(",\"meta\":{\"salt\":\"");
    run.salt = reader.hex();
    reader.literal("\",\"boot\":");
    run.boot = reader.decimal();
    reader.literal(",\"from\":");
    run.from = reader.decimal();
    reader.literal(",\"to\":");
    run.to = reader.decimal();
    return reader.literal("}}") && reader.atEnd() && run.from <= run.to;
  }
  return false;
}

}  // namespace homelab
