#include "Flash.h"

#include <string.h>

#include <algorithm>

const Flash::Chip kEsp32 = {"ESP32", 128, 512, 32, 512, 6};
const Flash::Chip kEsp8266 = {"ESP8266", 64, 64, 32, 16, 6};
const Flash::Chip kFull = {"full", 64, 64, 10, 16, 128};
Flash* flash = nullptr;

namespace {

constexpr lfs_size_t kBlock = 4096;

Flash& of(const lfs_config* config) { return *static_cast<Flash*>(config->context); }

uint8_t* at(const lfs_config* config, lfs_block_t block, lfs_off_t offset) {
  return of(config).bytes.data() + block * kBlock + offset;
}

int read(const lfs_config* config, lfs_block_t block, lfs_off_t offset, void* into,
         lfs_size_t size) {
  if (of(config).dead) return LFS_ERR_IO;
  memcpy(into, at(config, block, offset), size);
  return 0;
}

// Return how much of `size` bytes takes place, and what the caller is told.
int begin(Flash& self, lfs_size_t& size) {
  if (self.dead) {
    size = 0;
    return LFS_ERR_IO;
  }
  const int64_t operation = self.operations++;
  if (operation == self.cut_at) {
    self.dead = true;
    // Torn, and not always at the same place.
    size = static_cast<lfs_size_t>(operation * 2654435761U % (size + 1));
    return LFS_ERR_IO;
  }
  return 0;
}

int program(const lfs_config* config, lfs_block_t block, lfs_off_t offset, const void* from,
            lfs_size_t size) {
  Flash& self = of(config);
  const int code = begin(self, size);
  // NOR flash clears bits only; littlefs programs what it has erased.
  uint8_t* const into = at(config, block, offset);
  for (lfs_size_t i = 0; i < size; i++) {
    into[i] = static_cast<uint8_t>(into[i] & static_cast<const uint8_t*>(from)[i]);
  }
  self.programmed += size;
  return code;
}

int erase(const lfs_config* config, lfs_block_t block) {
  lfs_size_t size = kBlock;
  const int code = begin(of(config), size);
  memset(at(config, block, 0), 0xFF, size);
  of(config).erases++;
  return code;
}

int sync(const lfs_config* config) { return of(config).dead ? LFS_ERR_IO : 0; }

}  // namespace

Flash::Flash(const Chip& chip) : files_max(chip.files_max), bytes(chip.block_count * kBlock, 0xFF) {
  memset(&lfs, 0, sizeof lfs);
  memset(&config, 0, sizeof config);
  config.context = this;
  config.read = read;
  config.prog = program;
  config.erase = erase;
  config.sync = sync;
  config.read_size = config.prog_size = chip.unit;
  config.cache_size = chip.cache;
  config.block_size = kBlock;
  config.block_count = chip.block_count;
  config.lookahead_size = 64;
  config.block_cycles = chip.block_cycles;
}

void Flash::format() { lfs_format(&lfs, &config); }

bool Flash::mount() {
  mounted = lfs_mount(&lfs, &config) == 0;
  return mounted;
}

void Flash::unmount() {
  if (mounted) lfs_unmount(&lfs);
  mounted = false;
}

void Flash::powerOn() {
  dead = false;
  cut_at = fail_at = -1;
}
