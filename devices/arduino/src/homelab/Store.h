// Where an outbox keeps what must survive a power cut: numbered files of a few kilobytes.
//
// What it does: says what the outbox asks of a file system. What it does not: know what is in a file.
// Invariant: write() is all or nothing, also in a power cut, and what it has reported as kDone is
// still there after one.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace homelab {

class Store {
 public:
  enum class Result : uint8_t { kDone, kFull, kFailed };

  // Mount nothing and format nothing; tell whether files can be read and written.
  virtual bool begin() = 0;
  // Call found() once for the number of each file. Files of other names are not ours.
  virtual bool list(void (*found)(uint32_t number, void* context), void* context) = 0;
  // Return how many bytes were read from `offset`, 0 at the end, -1 if there is no such file.
  virtual int32_t read(uint32_t number, uint32_t offset, uint8_t* into, size_t size) = 0;
  // Make the file, or replace it.
  virtual Result write(uint32_t number, const uint8_t* bytes, size_t size) = 0;
  virtual bool remove(uint32_t number) = 0;

 protected:
  ~Store() = default;  // never deleted through this
};

// Names of files: eight hex digits.
constexpr size_t kFileNameBytes = 9;
void writeFileName(uint32_t number, char (&into)[kFileNameBytes]);
bool parseFileName(const char* name, uint32_t& number);
// The path of a name in a folder, or of the file of a number; false if it is longer than `size`.
bool writePath(const char* folder, const char* name, char* into, size_t size);
bool writePath(const char* folder, uint32_t number, char* into, size_t size);

}  // namespace homelab
