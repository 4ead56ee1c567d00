#include "Ack.h"

#include <string.h>

#include "Json.h"

namespace homelab {

AckReader::AckReader(const char* device_id, const char* payload, size_t size)
    : device_id_(device_id), at_(nullptr), end_(payload + size), array_(false) {
  const char* const begin = skipBlanks(payload, end_);
  const char* const behind = skipValue(begin, end_);
  if (behind == nullptr || skipBlanks(behind, end_) != end_) return;
  array_ = *begin == '[';
  at_ = skipBlanks(array_ ? begin + 1 : begin, end_);
}

// The whole is known to be JSON: from here on skipValue() finds an end.
bool AckReader::next(Answer& answer) {
  while (at_ != nullptr && *at_ != ']') {
    const char* const element = at_;
    at_ = skipBlanks(skipValue(element, end_), end_);
    if (!array_) {
      at_ = nullptr;
    } else if (*at_ == ',') {
      at_ = skipBlanks(at_ + 1, end_);
    }
    if (*element == '{' && read(element, answer)) return true;
  }
  return false;
}

bool AckReader::read(const char* object, Answer& answer) const {
  bool has_schema = false, has_id = false, is_ours = false;
  char status[sizeof "rejected"] = "";
  answer.reason[0] = '\0';
  const char* at = skipBlanks(object + 1, end_);
  while (*at != '}') {
    char name[sizeof "event_id ?"];
    const bool whole = readString(at, end_, name, sizeof name);
    const char* value = skipBlanks(skipValue(at, end_), end_);  // on the colon
    value = skipBlanks(value + 1, end_);
    at = skipValue(value, end_);
    const bool string = *value == '"';
    char text[kEventIdBytesMax + 1] = "";
    const bool read = string && readString(value, end_, text, sizeof text);
    if (whole && strcmp(name, "schema") == 0) {
      has_schema = at - value == 1 && *value == '1';
    } else if (whole && strcmp(name, "event_id") == 0) {
      has_id = read && parseId(device_id_, text, strlen(text), answer.key);
    } else if (whole && strcmp(name, "device_id") == 0) {
      is_ours = read && strcmp(text, device_id_) == 0;
    } else if (whole && strcmp(name, "status") == 0) {
      const bool known = read && (strcmp(text, "stored") == 0 || strcmp(text, "rejected") == 0);
      strcpy(status, known ? text : "");
    } else if (whole && string && strcmp(name, "reason") == 0) {
      readString(value, end_, answer.reason, sizeof answer.reason);
    }
    at = skipBlanks(at, end_);
    if (*at == ',') at = skipBlanks(at + 1, end_);
  }
  answer.stored = strcmp(status, "stored") == 0;
  return has_schema && has_id && is_ours && status[0] != '\0';
}

}  // namespace homelab
