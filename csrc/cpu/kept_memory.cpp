#include "cpu/kept_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace mmfast {
namespace {

constexpr int64_t page = 4 << 10, large_page = 2 << 20;

// At the start of a piece of mapped memory, which starts with a large page.
struct Piece {
  int64_t bytes;  // mapped
  int64_t first;  // of what is handed out

  char* memory() { return (char*)this + first; }
  int64_t room() const { return bytes - first; }
};

Piece* piece_of(void* memory) { return (Piece*)((uintptr_t)memory / large_page * large_page); }

void unmap(Piece* piece) { munmap(piece, piece->bytes); }

// bytes of room. Where the memory begins in its first pages differs from piece to piece: numbers at
// the same place of several tensors would share few sets of the caches, and stores would seem to
// overlap with loads.
Piece* map(int64_t bytes, int64_t place) {
  const int64_t first = 64 + place % 16 * (2 * page + 256);
  const int64_t needed = (first + bytes + page - 1) / page * page, more = large_page - page;
  void* mapped = mmap(nullptr, needed + more, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const int64_t before = -(intptr_t)mapped & (large_page - 1);
  Piece* piece = (Piece*)((char*)mapped + before);
  if (before) munmap(mapped, before);
  if (before < more) munmap((char*)piece + needed, more - before);
  madvise(piece, needed / large_page * large_page, MADV_HUGEPAGE);  // advice: it may fail
  *piece = {needed, first};
  return piece;
}

class Kept {
  struct Free {
    int64_t room;  // beside the pointer: a piece's own lies in a page of its own
    Piece* piece;
  };

 public:
  // The smallest piece that fits without much waste, of those the one kept last: it may be in a cache.
  Piece* take(int64_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return map(bytes, 0);
    const int64_t most = bytes + std::max(bytes / 8, least_kept / 8);
    auto best = free_.end();
    for (auto free = free_.begin(); free != free_.end(); ++free) {
      if (free->room < bytes || free->room > most) continue;
      if (best == free_.end() || free->room <= best->room) best = free;
    }
    if (best == free_.end()) return map(bytes, mapped_++);
    Piece* piece = best->piece;
    free_.erase(best);
    bytes_ -= piece->bytes;
    return piece;
  }

  void give(Piece* piece) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || piece->bytes > most_kept_bytes()) return unmap(piece);
    free_.push_back({piece->room(), piece});
    bytes_ += piece->bytes;
    release(most_kept_bytes());
  }

  void release() {
    const std::unique_lock lock(mutex_);
    release(0);
  }

  int64_t bytes() {
    const std::unique_lock lock(mutex_);
    return bytes_;
  }

 private:
  // Those kept longest, until at most this many bytes are kept.
  void release(int64_t most) {
    auto free = free_.begin();
    for (; bytes_ > most; ++free) {
      bytes_ -= free->piece->bytes;
      unmap(free->piece);
    }
    free_.erase(free_.begin(), free);
  }

  // Never waited for where tensors are made and die: a process that was forked while another thread
  // held it must go on.
  std::mutex mutex_;
  std::vector<Free> free_;  // kept longest first
  int64_t bytes_ = 0, mapped_ = 0;
};

// Outlives all tensors.
Kept& kept() {
  static Kept& kept = *new Kept;
  return kept;
}

}  // namespace

void* take_memory(int64_t bytes) {
  Piece* piece = kept().take(bytes);
  return piece ? piece->memory() : nullptr;
}

void give_memory(void* memory) { kept().give(piece_of(memory)); }

void release_kept_memory() { kept().release(); }

int64_t kept_bytes() { return kept().bytes(); }

int64_t most_kept_bytes() {
  static const int64_t most = [] {
    const char* given = std::getenv("MMFAST_KEPT_MIB");
    return (given ? std::max(0ll, std::atoll(given)) : 256) << 20;
  }();
  return most;
}

}  // namespace mmfast
