// The record: how an event lies in memory and in a file, one behind the other.
//
// What it does: lays out and checks a header: CRC, size, and when the event was added (by the clock
// of this start, so it means something in memory only). What it does not: look at the bytes.
// Invariant: what was not written as a record by this version is not taken for one.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

constexpr size_t kRecordHeadBytes = 10;
constexpr uint32_t kFormat = 0x484C5401;  // "HLT", version 1

inline void put32(uint8_t* at, uint32_t value) {
  for (int i = 0; i < 4; i++) at[i] = static_cast<uint8_t>(value >> (8 * i));
}

inline uint32_t get32(const uint8_t* at) {
  uint32_t value = 0;
  for (int i = 3; i >= 0; i--) value = value << 8 | at[i];
  return value;
}

// CRC-32 as in Ethernet and zlib, begun with the format.
inline uint32_t crc32(const uint8_t* bytes, size_t size) {
  uint32_t crc = ~kFormat;
  for (size_t i = 0; i < size; i++) {
    crc ^= bytes[i];
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

inline size_t recordSize(const uint8_t* record) {
  return static_cast<size_t>(record[4]) | static_cast<size_t>(record[5]) << 8;
}

inline void sealRecord(uint8_t* record, size_t size, uint32_t now_ms) {
  record[4] = static_cast<uint8_t>(size);
  record[5] = static_cast<uint8_t>(size >> 8);
  put32(record + 6, now_ms);
  put32(record, crc32(record + kRecordHeadBytes, size) ^ static_cast<uint32_t>(size));
}

inline bool isRecord(const uint8_t* record, size_t available) {
  if (available < kRecordHeadBytes) return false;
  const size_t size = recordSize(record);
  if (size == 0 || size > available - kRecordHeadBytes) return false;
  return get32(record) == (crc32(record + kRecordHeadBytes, size) ^ static_cast<uint32_t>(size));
}

}  // namespace homelab
