// Decimal text of a number, the shortest that reads back as the same number.
//
// What it does: writes floats and doubles as Python's repr() does, so that every library of the
// contract writes the same bytes. What it does not: printf, whose "%g" takes memory from the heap
// on newlib.
// Invariant: exact; no rounding error, whatever the number.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

// The longest is "-2.2250738585072014e-308"; an integer of 64 bits is shorter.
constexpr size_t kNumberBytes = 25;

// Write the text and a terminating NUL; return its length, or 0 for nan and the infinities.
size_t writeNumber(double number, char (&into)[kNumberBytes]);
size_t writeNumber(float number, char (&into)[kNumberBytes]);
size_t writeInteger(uint64_t magnitude, bool negative, char (&into)[kNumberBytes]);

}  // namespace homelab
