// A store in LittleFS through the ESP8266's own interface, which has no POSIX calls.
//
// What it does: the same as FolderStore. What it does not: mount or format; the sketch calls
// LittleFS.begin(), with LittleFSConfig(false) before it, since a failed mount would else erase it.
// Invariant: that of Store.
#pragma once

#include <LittleFS.h>

#include "Store.h"

namespace homelab {

class LittleFSStore final : public Store {
 public:
  LittleFSStore(FS& files, const char* folder) : files_(files), folder_(folder) {}

  bool begin() override {
    char name[kPathBytes];
    if (!path("new", name)) return false;
    return files_.exists(folder_) || files_.mkdir(folder_);
  }

  bool list(void (*found)(uint32_t number, void* context), void* context) override {
    Dir folder = files_.openDir(folder_);
    while (folder.next()) {
      uint32_t number = 0;
      if (parseFileName(folder.fileName().c_str(), number)) found(number, context);
    }
    return true;
  }

  int32_t read(uint32_t number, uint32_t offset, uint8_t* into, size_t size) override {
    char name[kPathBytes];
    if (!path(number, name)) return -1;
    File file = files_.open(name, "r");
    if (!file) return -1;
    const bool there = offset <= file.size() && file.seek(offset, SeekSet);
    const int got = there && offset < file.size() ? file.read(into, size) : there ? 0 : -1;
    file.close();
    return got;
  }

  Result write(uint32_t number, const uint8_t* bytes, size_t size) override {
    char name[kPathBytes], new_name[kPathBytes];
    if (!path(number, name) || !path("new", new_name)) return Result::kFailed;
    File file = files_.open(new_name, "w");
    const bool written = file && file.write(bytes, size) == size;
    if (file) {
      file.flush();
      file.close();
    }
    // close() tells of no failure here, so look whether it is all there.
    File check = files_.open(new_name, "r");
    const bool there = written && check && check.size() == size && isSame(check, bytes, size);
    if (check) check.close();
    if (there && files_.rename(new_name, name)) return Result::kDone;
    files_.remove(new_name);
    FSInfo info;
    const bool full = files_.info(info) && info.usedBytes + 4 * info.blockSize > info.totalBytes;
    return full ? Result::kFull : Result::kFailed;
  }

  bool remove(uint32_t number) override {
    char name[kPathBytes];
    if (!path(number, name)) return false;
    return files_.remove(name) || !files_.exists(name);
  }

 private:
  static constexpr size_t kPathBytes = 64;

  static bool isSame(File& file, const uint8_t* bytes, size_t size) {
    uint8_t part[64];
    for (size_t at = 0; at < size;) {
      const size_t wanted = size - at < sizeof part ? size - at : sizeof part;
      const int got = file.read(part, wanted);
      if (got != static_cast<int>(wanted) || memcmp(part, bytes + at, wanted) != 0) return false;
      at += wanted;
    }
    return true;
  }

  // Of a name, or of the file of a number.
  template <typename Name>
  bool path(Name name, char (&into)[kPathBytes]) const {
    return writePath(folder_, name, into, sizeof into);
  }

  FS& files_;
  const char* folder_;
};

}  // namespace homelab
