// The algorithm is that of Steele and White, with integers of a fixed size: a fraction r/s, and how
// far the neighbours are. See "Printing Floating-Point Numbers Quickly and Accurately" (Burger and
// Dybvig), whose names r, s, m+ and m- are used here.
#include "Number.h"

#include <string.h>

namespace homelab {
namespace {

// An unsigned integer of up to 1,184 bits; a double needs 1,131.
class Big {
 public:
  explicit Big(uint64_t value) : used_(2) {
    word_[0] = static_cast<uint32_t>(value);
    word_[1] = static_cast<uint32_t>(value >> 32);
    trim();
  }

  void multiply(uint32_t factor) {
    uint64_t carry = 0;
    for (size_t i = 0; i < used_; i++) {
      carry += static_cast<uint64_t>(word_[i]) * factor;
      word_[i] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    if (carry != 0 && used_ < kWords) word_[used_++] = static_cast<uint32_t>(carry);
  }

  void shiftLeft(unsigned bits) {
    for (; bits >= 31; bits -= 31) multiply(UINT32_C(1) << 31);
    multiply(UINT32_C(1) << bits);
  }

  void add(const Big& other) {
    uint64_t carry = 0;
    const size_t words = used_ > other.used_ ? used_ : other.used_;
    for (size_t i = 0; i < words; i++) {
      carry += static_cast<uint64_t>(at(i)) + other.at(i);
      word_[i] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    used_ = words;
    if (carry != 0 && used_ < kWords) word_[used_++] = static_cast<uint32_t>(carry);
  }

  // Only where this is not less than the other.
  void subtract(const Big& other) {
    uint64_t borrow = 0;
    for (size_t i = 0; i < used_; i++) {
      const uint64_t taken = other.at(i) + borrow;
      borrow = word_[i] < taken ? 1 : 0;
      word_[i] = static_cast<uint32_t>(word_[i] - taken);
    }
    trim();
  }

  int compare(const Big& other) const {
    for (size_t i = used_ > other.used_ ? used_ : other.used_; i-- > 0;) {
      if (at(i) != other.at(i)) return at(i) < other.at(i) ? -1 : 1;
    }
    return 0;
  }

 private:
  static constexpr size_t kWords = 37;
  uint32_t at(size_t i) const { return i < used_ ? word_[i] : 0; }
  void trim() {
    while (used_ > 0 && word_[used_ - 1] == 0) used_--;
  }
  uint32_t word_[kWords];
  size_t used_;
};

struct Digits {
  char text[18];
  size_t count;
  int exponent;  // the number is 0.DIGITS times ten to this
};

bool exceeds(const Big& r, const Big& m, const Big& s, bool even) {
  Big sum = r;
  sum.add(m);
  const int compared = sum.compare(s);
  return even ? compared >= 0 : compared > 0;
}

// Find the digits of fraction * 2^exponent; `gap` if the neighbour below is half as far.
void findDigits(uint64_t fraction, int exponent, bool gap, Digits& into) {
  const bool even = (fraction & 1) == 0;
  Big r(fraction), s(1), above(1), below(1);
  const unsigned up = exponent > 0 ? static_cast<unsigned>(exponent) : 0;
  const unsigned down = exponent < 0 ? static_cast<unsigned>(-exponent) : 0;
  r.shiftLeft(up + (gap ? 2 : 1));
  s.shiftLeft(down + (gap ? 2 : 1));
  above.shiftLeft(up + (gap ? 1 : 0));
  below.shiftLeft(up);
  into.exponent = 0;
  while (exceeds(r, above, s, even)) {
    s.multiply(10);
    into.exponent++;
  }
  for (;;) {  // until the first digit is not 0
    Big ten = r, more = above;
    ten.multiply(10);
    more.multiply(10);
    if (exceeds(ten, more, s, even)) break;
    r.multiply(10);
    above.multiply(10);
    below.multiply(10);
    into.exponent--;
  }
  into.count = 0;
  for (;;) {
    r.multiply(10);
    above.multiply(10);
    below.multiply(10);
    char digit = '0';
    for (; r.compare(s) >= 0; digit++) r.subtract(s);
    const int low = r.compare(below);
    const bool near_below = even ? low <= 0 : low < 0;
    const bool near_above = exceeds(r, above, s, even);
    if (near_below || near_above) {
      Big twice = r;
      twice.multiply(2);
      const int half = twice.compare(s);
      const bool rounds_up = half > 0 || (half == 0 && (digit & 1) != 0);
      if (near_above && (!near_below || rounds_up)) digit++;
      into.text[into.count++] = digit;
      return;
    }
    into.text[into.count++] = digit;
  }
}

size_t layOut(const Digits& digits, bool negative, char* into) {
  char* out = into;
  if (negative) *out++ = '-';
  const int point = digits.exponent;  // how many digits stand before it
  const int count = static_cast<int>(digits.count);
  if (point < -3 || point > 16) {
    *out++ = digits.text[0];
    if (count > 1) *out++ = '.';
    for (int i = 1; i < count; i++) *out++ = digits.text[i];
    int exponent = point - 1;
    *out++ = 'e';
    *out++ = exponent < 0 ? '-' : '+';
    if (exponent < 0) exponent = -exponent;
    if (exponent >= 100) *out++ = static_cast<char>('0' + exponent / 100);
    *out++ = static_cast<char>('0' + exponent / 10 % 10);
    *out++ = static_cast<char>('0' + exponent % 10);
  } else {
    int i = point < 0 ? point : 0;
    if (point <= 0) *out++ = '0';
    for (; i < count || i < point; i++) {
      if (i == (point < 0 ? point : 0) && point <= 0) *out++ = '.';
      if (i == point && point > 0) *out++ = '.';
      *out++ = i < 0 || i >= count ? '0' : digits.text[i];
    }
    if (count <= point) {
      *out++ = '.';
      *out++ = '0';
    }
  }
  *out = '\0';
  return static_cast<size_t>(out - into);
}

size_t write(uint64_t fraction, int exponent, bool gap, bool negative, char* into) {
  if (fraction == 0) {
    memcpy(into, negative ? "-0.0" : "0.0", negative ? 5 : 4);
    return negative ? 4 : 3;
  }
  Digits digits;
  findDigits(fraction, exponent, gap, digits);
  return layOut(digits, negative, into);
}

}  // namespace

size_t writeNumber(double number, char (&into)[kNumberBytes]) {
  uint64_t bits = 0;
  static_assert(sizeof number == sizeof bits, "a double has 64 bits");
  memcpy(&bits, &number, sizeof number);
  const uint64_t stored = bits & ((UINT64_C(1) << 52) - 1);
  const int exponent = static_cast<int>(bits >> 52 & 0x7FF);
  if (exponent == 0x7FF) return 0;
  const uint64_t fraction = exponent == 0 ? stored : stored | UINT64_C(1) << 52;
  return write(fraction, (exponent == 0 ? 1 : exponent) - 1075, stored == 0 && exponent > 1,
               bits >> 63 != 0, into);
}

size_t writeNumber(float number, char (&into)[kNumberBytes]) {
  uint32_t bits = 0;
  memcpy(&bits, &number, sizeof bits);
  const uint32_t stored = bits & ((UINT32_C(1) << 23) - 1);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF);
  if (exponent == 0xFF) return 0;
  const uint32_t fraction = exponent == 0 ? stored : stored | UINT32_C(1) << 23;
  return write(fraction, (exponent == 0 ? 1 : exponent) - 150, stored == 0 && exponent > 1,
               bits >> 31 != 0, into);
}

size_t writeInteger(uint64_t magnitude, bool negative, char (&into)[kNumberBytes]) {
  char* out = into + sizeof into;
  *--out = '\0';
  do {
    *--out = static_cast<char>('0' + magnitude % 10);
    magnitude /= 10;
  } while (magnitude != 0);
  if (negative) *--out = '-';
  const size_t size = static_cast<size_t>(into + sizeof into - out) - 1;
  memmove(into, out, size + 1);
  return size;
}

}  // namespace homelab
