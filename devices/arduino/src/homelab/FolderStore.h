// A store in a folder, through POSIX calls: LittleFS on the ESP32 (mounted by the sketch), or a computer.
//
// What it does: writes to a new file, syncs it, and renames it, checking each step. What it does
// not: mount or format.
// Invariant: that of Store.
#pragma once

#include "Store.h"

namespace homelab {

class FolderStore final : public Store {
 public:
  // The folder is made if it is not there; its parent must be: "/littlefs/telemetry".
  explicit FolderStore(const char* folder) : folder_(folder) {}
  bool begin() override;
  bool list(void (*found)(uint32_t number, void* context), void* context) override;
  int32_t read(uint32_t number, uint32_t offset, uint8_t* into, size_t size) override;
  Result write(uint32_t number, const uint8_t* bytes, size_t size) override;
  bool remove(uint32_t number) override;

 private:
  static constexpr size_t kPathBytes = 256;
  // Of a name, or of the file of a number.
  template <typename Name>
  bool path(Name name, char (&into)[kPathBytes]) const {
    return writePath(folder_, name, into, sizeof into);
  }
  bool syncFolder() const;
  const char* folder_;
};

}  // namespace homelab
