// JSON as far as a device needs it: a writer into a fixed buffer, and a scanner without recursion.
//
// What it does: writes an event byte for byte as contract.json has it, tells whether a text is
// JSON, and finds its way through an ACK. What it does not: allocate, or build a tree.
// Invariant: never reads or writes outside of what it was given, whatever the bytes are.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

// Counts what does not fit too, so that the caller learns how much room it needs.
class Writer {
 public:
  Writer(char* into, size_t capacity) : into_(into), capacity_(capacity), size_(0) {}
  void raw(const char* text);
  void raw(const char* bytes, size_t size);
  void quoted(const char* text);  // with the quotes around it
  void number(uint32_t value);
  size_t size() const { return size_; }
  bool fits() const { return size_ <= capacity_; }

 private:
  void put(char byte);
  char* into_;
  size_t capacity_;
  size_t size_;
};

// UTF-8 of `least` to `most` characters. Control characters (C0, DEL, C1) only if allowed.
bool isText(const char* text, size_t least, size_t most, bool controls);

// One JSON object and nothing else, in UTF-8, nested at most kNestingMax deep.
bool isObject(const char* text);

constexpr unsigned kNestingMax = 32;

// The whole of one JSON value at `at`: return what follows it, or null if it is none. Numbers,
// words and escapes are held to the grammar; that texts are UTF-8 is not checked.
const char* skipValue(const char* at, const char* end);
const char* skipBlanks(const char* at, const char* end);

// Of a string that skipValue() has passed, `at` on its opening quote: the text, cut to `capacity`
// less one and terminated. Return false if it was cut, or holds U+0000.
bool readString(const char* at, const char* end, char* into, size_t capacity);

}  // namespace homelab
