// The POSIX calls of FolderStore on real littlefs, as the ESP32's VFS has them: linked with --wrap.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "Flash.h"

namespace {

constexpr int kFirst = 1000;  // never a true descriptor
lfs_file_t files[4];
bool used[4];

struct Folder {
  lfs_dir_t dir;
  dirent entry;
};

int told(int code) {
  if (code >= 0) return code;
  errno = -code;  // littlefs has the numbers of errno
  return -1;
}

// Do it, or do it and say that it failed, or do not do it.
template <typename Call>
int made(Call call, bool changes = true) {
  if (!flash->fails(changes)) return told(call());
  if (flash->fails_late) call();
  return told(LFS_ERR_IO);
}

}  // namespace

extern "C" {

int __wrap_open(const char* path, int flags, ...) {
  int how = (flags & O_ACCMODE) == O_RDONLY ? LFS_O_RDONLY : LFS_O_WRONLY;
  if ((flags & O_CREAT) != 0) how |= LFS_O_CREAT;
  if ((flags & O_TRUNC) != 0) how |= LFS_O_TRUNC;
  for (int i = 0; i < 4; i++) {
    if (used[i]) continue;
    if (flash->fails()) return told(LFS_ERR_IO);
    const int code = lfs_file_open(&flash->lfs, &files[i], path, how);
    if (code < 0) return told(code);
    used[i] = true;
    return kFirst + i;
  }
  errno = EMFILE;
  return -1;
}

ssize_t __wrap_read(int file, void* into, size_t size) {
  return made([=] { return lfs_file_read(&flash->lfs, &files[file - kFirst], into, size); }, false);
}

ssize_t __wrap_write(int file, const void* from, size_t size) {
  return made([=] { return lfs_file_write(&flash->lfs, &files[file - kFirst], from, size); });
}

off_t __wrap_lseek(int file, off_t offset, int) {
  const lfs_soff_t to = static_cast<lfs_soff_t>(offset);
  return told(lfs_file_seek(&flash->lfs, &files[file - kFirst], to, LFS_SEEK_SET));
}

int __wrap_fsync(int file) {
  return made([=] { return lfs_file_sync(&flash->lfs, &files[file - kFirst]); });
}

// A file is closed in any case; that it was not written is what may fail.
int __wrap_close(int file) {
  used[file - kFirst] = false;
  const int code = lfs_file_close(&flash->lfs, &files[file - kFirst]);
  return told(flash->fails() ? LFS_ERR_IO : code);
}

int __wrap_rename(const char* from, const char* to) {
  return made([=] { return lfs_rename(&flash->lfs, from, to); });
}

int __wrap_unlink(const char* path) {
  return made([=] { return lfs_remove(&flash->lfs, path); });
}

int __wrap_mkdir(const char* path, mode_t) {
  return made([=] { return lfs_mkdir(&flash->lfs, path); });
}

int __wrap_stat(const char* path, struct stat* into) {
  lfs_info info;
  const int code = lfs_stat(&flash->lfs, path, &info);
  if (code == 0) into->st_mode = info.type == LFS_TYPE_DIR ? S_IFDIR : S_IFREG;
  return told(code);
}

DIR* __wrap_opendir(const char* path) {
  Folder* const folder = new Folder;
  const int code = flash->fails() ? LFS_ERR_IO : lfs_dir_open(&flash->lfs, &folder->dir, path);
  if (code == 0) return reinterpret_cast<DIR*>(folder);
  delete folder;
  told(code);
  return nullptr;
}

dirent* __wrap_readdir(DIR* opened) {
  Folder* const folder = reinterpret_cast<Folder*>(opened);
  lfs_info info;
  const int code = lfs_dir_read(&flash->lfs, &folder->dir, &info);
  if (code <= 0) {
    told(code);
    return nullptr;
  }
  memcpy(folder->entry.d_name, info.name, strlen(info.name) + 1);
  return &folder->entry;
}

int __wrap_closedir(DIR* opened) {
  Folder* const folder = reinterpret_cast<Folder*>(opened);
  const int code = lfs_dir_close(&flash->lfs, &folder->dir);
  delete folder;
  return told(code);
}

}  // extern "C"
