#include "FolderStore.h"

// Where there is a POSIX interface. The ESP8266 has none: see LittleFSStore.h.
#if !defined(ARDUINO) || defined(ESP32) || defined(ESP_PLATFORM)

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>  // rename
#include <sys/stat.h>
#include <unistd.h>

namespace homelab {
namespace {

constexpr char kNew[] = "new";

}  // namespace

bool FolderStore::begin() {
  char name[kPathBytes];
  if (mkdir(folder_, 0777) != 0 && errno != EEXIST) return false;
  struct stat found;
  return path(kNew, name) && stat(folder_, &found) == 0 && S_ISDIR(found.st_mode);
}

bool FolderStore::list(void (*found)(uint32_t number, void* context), void* context) {
  DIR* const folder = opendir(folder_);
  if (folder == nullptr) return false;
  errno = 0;
  while (const dirent* const entry = readdir(folder)) {
    uint32_t number = 0;
    if (parseFileName(entry->d_name, number)) found(number, context);
    errno = 0;
  }
  const bool read = errno == 0;
  return closedir(folder) == 0 && read;
}

int32_t FolderStore::read(uint32_t number, uint32_t offset, uint8_t* into, size_t size) {
  char name[kPathBytes];
  if (!path(number, name)) return -1;
  const int file = open(name, O_RDONLY);
  if (file < 0) return -1;
  ssize_t got = -1;
  if (lseek(file, static_cast<off_t>(offset), SEEK_SET) >= 0) got = ::read(file, into, size);
  close(file);
  return static_cast<int32_t>(got);
}

Store::Result FolderStore::write(uint32_t number, const uint8_t* bytes, size_t size) {
  char name[kPathBytes], new_name[kPathBytes];
  if (!path(number, name) || !path(kNew, new_name)) return Result::kFailed;
  errno = 0;
  const int file = open(new_name, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  size_t done = 0;
  while (file >= 0 && done < size) {
    const ssize_t more = ::write(file, bytes + done, size - done);
    if (more <= 0) break;
    done += static_cast<size_t>(more);
  }
  bool written = file >= 0 && done == size && fsync(file) == 0;
  int error = errno;
  if (file >= 0 && close(file) != 0 && written) {
    written = false;
    error = errno;
  }
  if (written && rename(new_name, name) == 0 && syncFolder()) return Result::kDone;
  if (written) error = errno;
  unlink(new_name);
  return error == ENOSPC || error == EDQUOT ? Result::kFull : Result::kFailed;
}

bool FolderStore::remove(uint32_t number) {
  char name[kPathBytes];
  if (!path(number, name)) return false;
  return unlink(name) == 0 || errno == ENOENT;
}

// A rename is durable in LittleFS by itself; elsewhere once the folder is synced.
bool FolderStore::syncFolder() const {
#if defined(ESP_PLATFORM) || defined(ESP32)
  return true;
#else
  const int folder = open(folder_, O_RDONLY);
  if (folder < 0) return false;
  const bool synced = fsync(folder) == 0;
  close(folder);
  return synced;
#endif
}

}  // namespace homelab

#endif
