// Declarations only: see README.md. The tests' own LittleFS.h, which works, is in ../littlefs.
#pragma once
#include "Arduino.h"

#ifdef ESP32
struct LittleFSFS {
  bool begin(bool format_on_fail);
  bool format();
};
extern LittleFSFS LittleFS;
#else
enum SeekMode { SeekSet = 0 };
struct FSInfo {
  size_t totalBytes, usedBytes, blockSize;
};
class String {
 public:
  const char* c_str() const;
};
class File {
 public:
  explicit operator bool() const;
  size_t write(const uint8_t* from, size_t size);
  int read(uint8_t* into, size_t size);
  bool seek(uint32_t offset, SeekMode mode);
  size_t size() const;
  void flush();
  void close();
};
class Dir {
 public:
  bool next();
  String fileName();
};
class LittleFSConfig {
 public:
  explicit LittleFSConfig(bool auto_format);
};
class FS {
 public:
  bool setConfig(const LittleFSConfig& config);
  bool begin();
  bool format();
  bool exists(const char* path);
  bool mkdir(const char* path);
  Dir openDir(const char* path);
  File open(const char* path, const char* mode);
  bool rename(const char* from, const char* to);
  bool remove(const char* path);
  bool info(FSInfo& into);
};
extern FS LittleFS;
#endif
