#include "Json.h"

#include <string.h>

namespace homelab {
namespace {

bool isDigit(char c) { return c >= '0' && c <= '9'; }

int hexDigit(char c) {
  if (isDigit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The character at `at`, which is moved past it; -1 if it is not UTF-8. Text ends with a NUL, so
// that a character which is cut never leads beyond it.
int32_t nextCharacter(const unsigned char*& at) {
  const unsigned char first = *at++;
  if (first < 0x80) return first;
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  int32_t code = first & (0x3F >> more);
  for (int i = 0; i < more; i++, at++) {
    if ((*at & 0xC0) != 0x80) return -1;
    code = code << 6 | (*at & 0x3F);
  }
  const bool overlong = (more == 2 && code < 0x800) || (more == 3 && code < 0x10000);
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return overlong || surrogate || code > 0x10FFFF ? -1 : code;
}

const char* skipString(const char* at, const char* end) {
  for (at++; at < end; at++) {
    const unsigned char c = static_cast<unsigned char>(*at);
    if (c == '"') return at + 1;
    if (c < 0x20) return nullptr;
    if (c != '\\') continue;
    if (++at == end) return nullptr;
    if (*at == 'u') {
      if (end - at < 5) return nullptr;
      for (int i = 1; i <= 4; i++) {
        if (hexDigit(at[i]) < 0) return nullptr;
      }
      at += 4;
    } else if (*at == '\0' || strchr("\"\\/bfnrt", *at) == nullptr) {
      return nullptr;
    }
  }
  return nullptr;
}

const char* skipDigits(const char* at, const char* end) {
  if (at == end || !isDigit(*at)) return nullptr;
  while (at < end && isDigit(*at)) at++;
  return at;
}

const char* skipNumber(const char* at, const char* end) {
  if (*at == '-') at++;
  if (at < end && *at == '0') {
    at++;
  } else {
    at = skipDigits(at, end);
  }
  if (at != nullptr && at < end && *at == '.') at = skipDigits(at + 1, end);
  if (at != nullptr && at < end && (*at == 'e' || *at == 'E')) {
    at++;
    if (at < end && (*at == '+' || *at == '-')) at++;
    at = skipDigits(at, end);
  }
  return at;
}

// A string, number or word.
const char* skipScalar(const char* at, const char* end) {
  if (*at == '"') return skipString(at, end);
  if (*at == '-' || isDigit(*at)) return skipNumber(at, end);
  static const char* const kWords[] = {"true", "false", "null"};
  for (const char* word : kWords) {
    const size_t size = strlen(word);
    if (static_cast<size_t>(end - at) >= size && memcmp(at, word, size) == 0) return at + size;
  }
  return nullptr;
}

const char* skipKey(const char* at, const char* end) {
  at = skipBlanks(at, end);
  if (at == end || *at != '"') return nullptr;
  at = skipString(at, end);
  if (at == nullptr) return nullptr;
  at = skipBlanks(at, end);
  return at < end && *at == ':' ? at + 1 : nullptr;
}

// A character in UTF-8; what four hex digits can name has at most three bytes.
size_t encode(uint32_t code, char* into) {
  if (code < 0x80) {
    into[0] = static_cast<char>(code);
    return 1;
  }
  if (code < 0x800) {
    into[0] = static_cast<char>(0xC0 | code >> 6);
    into[1] = static_cast<char>(0x80 | (code & 0x3F));
    return 2;
  }
  into[0] = static_cast<char>(0xE0 | code >> 12);
  into[1] = static_cast<char>(0x80 | (code >> 6 & 0x3F));
  into[2] = static_cast<char>(0x80 | (code & 0x3F));
  return 3;
}

}  // namespace

void Writer::put(char byte) {
  if (size_ < capacity_) into_[size_] = byte;
  size_++;
}

void Writer::raw(const char* text) { raw(text, strlen(text)); }

void Writer::raw(const char* bytes, size_t size) {
  for (size_t i = 0; i < size; i++) put(bytes[i]);
}

void Writer::number(uint32_t value) {
  char text[10];
  size_t at = sizeof text;
  do {
    text[--at] = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value != 0);
  raw(text + at, sizeof text - at);
}

void Writer::quoted(const char* text) {
  static const char kHex[] = "0123456789abcdef";
  put('"');
  for (; *text != '\0'; text++) {
    const unsigned char c = static_cast<unsigned char>(*text);
    if (c == '"' || c == '\\') {
      put('\\');
      put(*text);
    } else if (c >= 0x20) {
      put(*text);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      put('\\');
      put(c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
    } else {
      raw("\\u00");
      put(kHex[c >> 4]);
      put(kHex[c & 15]);
    }
  }
  put('"');
}

bool isText(const char* text, size_t least, size_t most, bool controls) {
  const unsigned char* at = reinterpret_cast<const unsigned char*>(text);
  size_t characters = 0;
  while (*at != 0) {
    const int32_t code = nextCharacter(at);
    if (code < 0) return false;
    if (!controls && (code < 0x20 || (code >= 0x7F && code <= 0x9F))) return false;
    if (++characters > most) return false;
  }
  return characters >= least;
}

bool isObject(const char* text) {
  if (text[0] != '{' || !isText(text, 2, SIZE_MAX, true)) return false;
  const char* const end = text + strlen(text);
  return skipValue(text, end) == end;
}

const char* skipBlanks(const char* at, const char* end) {
  while (at < end && (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n')) at++;
  return at;
}

const char* skipValue(const char* at, const char* end) {
  uint32_t objects = 0;  // which levels are objects, the lowest bit being the innermost
  unsigned depth = 0;
  for (;;) {
    at = skipBlanks(at, end);
    if (at == end) return nullptr;
    bool is_complete = true;
    if (*at == '{' || *at == '[') {
      const bool object = *at == '{';
      if (depth == kNestingMax) return nullptr;
      const char* const inside = skipBlanks(at + 1, end);
      if (inside < end && *inside == (object ? '}' : ']')) {
        at = inside + 1;
      } else {
        depth++;
        objects = objects << 1 | (object ? 1U : 0U);
        at = object ? skipKey(inside, end) : inside;
        is_complete = false;
      }
    } else {
      at = skipScalar(at, end);
    }
    if (at == nullptr) return nullptr;
    while (is_complete && depth > 0) {
      at = skipBlanks(at, end);
      if (at == end) return nullptr;
      const bool object = (objects & 1) != 0;
      if (*at == ',') {
        at = object ? skipKey(at + 1, end) : at + 1;
        if (at == nullptr) return nullptr;
        is_complete = false;
      } else if (*at == (object ? '}' : ']')) {
        at++;
        depth--;
        objects >>= 1;
      } else {
        return nullptr;
      }
    }
    if (is_complete) return at;
  }
}

bool readString(const char* at, const char* end, char* into, size_t capacity) {
  static const char kEscapes[] = "b\bf\fn\nr\rt\t";
  size_t size = 0;
  bool whole = true;
  for (at++; at < end && *at != '"'; at++) {
    char bytes[3] = {*at};
    size_t count = 1;
    if (*at == '\\') {
      at++;
      bytes[0] = *at;
      if (*at == 'u') {
        uint32_t code = 0;
        for (int i = 1; i <= 4; i++) code = code << 4 | static_cast<uint32_t>(hexDigit(at[i]));
        at += 4;
        count = encode(code, bytes);
      } else if (const char* const found = strchr(kEscapes, *at)) {
        bytes[0] = found[1];
      }
    }
    whole = whole && size + count < capacity && !(count == 1 && bytes[0] == '\0');
    if (whole) memcpy(into + size, bytes, count);
    if (whole) size += count;
  }
  into[size] = '\0';
  return whole;
}

}  // namespace homelab
