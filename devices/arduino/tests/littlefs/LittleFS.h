// The ESP8266's LittleFS interface, as far as LittleFSStore uses it, on real littlefs.
//
// What it does: the calls of FS, File and Dir as the ESP8266's core (3.1) makes them of littlefs.
// What it does not: the rest of that interface.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <string>

#include "Flash.h"

enum SeekMode { SeekSet = 0 };

struct FSInfo {
  size_t totalBytes, usedBytes, blockSize;
};

class String {
 public:
  explicit String(const char* text) : text_(text) {}
  const char* c_str() const { return text_.c_str(); }

 private:
  std::string text_;
};

class File {
 public:
  File() {}
  File(const char* path, int flags) : file_(std::make_shared<lfs_file_t>()) {
    if (flash->fails() || lfs_file_open(&flash->lfs, file_.get(), path, flags) != 0) file_.reset();
  }
  explicit operator bool() const { return file_ != nullptr; }
  size_t write(const uint8_t* from, size_t size) {
    if (flash->fails()) size /= 2;
    const lfs_ssize_t done = lfs_file_write(&flash->lfs, file_.get(), from, size);
    return done < 0 ? 0 : static_cast<size_t>(done);
  }
  int read(uint8_t* into, size_t size) {
    return flash->fails() ? -1 : lfs_file_read(&flash->lfs, file_.get(), into, size);
  }
  bool seek(uint32_t offset, SeekMode) {
    return lfs_file_seek(&flash->lfs, file_.get(), static_cast<lfs_soff_t>(offset), LFS_SEEK_SET) >= 0;
  }
  size_t size() const {
    const lfs_soff_t bytes = lfs_file_size(&flash->lfs, file_.get());
    return bytes < 0 ? 0 : static_cast<size_t>(bytes);
  }
  void flush() {
    if (!flash->fails()) lfs_file_sync(&flash->lfs, file_.get());
  }
  void close() {
    lfs_file_close(&flash->lfs, file_.get());
    file_.reset();
  }

 private:
  std::shared_ptr<lfs_file_t> file_;
};

class Dir {
 public:
  explicit Dir(const char* path) : dir_(std::make_shared<lfs_dir_t>()) {
    if (lfs_dir_open(&flash->lfs, dir_.get(), path) != 0) dir_.reset();
  }
  ~Dir() {
    if (dir_ != nullptr && dir_.use_count() == 1) lfs_dir_close(&flash->lfs, dir_.get());
  }
  Dir(const Dir&) = default;
  bool next() {
    if (dir_ == nullptr) return false;
    do {
      if (lfs_dir_read(&flash->lfs, dir_.get(), &info_) <= 0) return false;
    } while (info_.type == LFS_TYPE_DIR);
    return true;
  }
  String fileName() const { return String(info_.name); }

 private:
  std::shared_ptr<lfs_dir_t> dir_;
  lfs_info info_;
};

class FS {
 public:
  bool exists(const char* path) {
    lfs_info info;
    return lfs_stat(&flash->lfs, path, &info) == 0;
  }
  bool mkdir(const char* path) {
    if (flash->fails()) return false;
    const int code = lfs_mkdir(&flash->lfs, path);
    return code == 0 || code == LFS_ERR_EXIST;
  }
  Dir openDir(const char* path) { return Dir(path); }
  File open(const char* path, const char* mode) {
    const int flags = mode[0] == 'r' ? LFS_O_RDONLY : LFS_O_WRONLY | LFS_O_CREAT | LFS_O_TRUNC;
    return File(path, flags);
  }
  bool rename(const char* from, const char* to) {
    const bool failed = flash->fails(true);
    if (failed && !flash->fails_late) return false;
    return lfs_rename(&flash->lfs, from, to) == 0 && !failed;
  }
  bool remove(const char* path) {
    const bool failed = flash->fails(true);
    if (failed && !flash->fails_late) return false;
    return lfs_remove(&flash->lfs, path) == 0 && !failed;
  }
  bool info(FSInfo& into) {
    const lfs_ssize_t used = lfs_fs_size(&flash->lfs);
    if (used < 0) return false;
    into.blockSize = flash->config.block_size;
    into.totalBytes = flash->config.block_count * into.blockSize;
    into.usedBytes = static_cast<size_t>(used) * into.blockSize;
    return true;
  }
};
