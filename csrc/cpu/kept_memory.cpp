#include "cpu/kept_memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

namespace mmfast {
namespace {

constexpr int64_t line = 64, page = 4 << 10, large_page = 2 << 20;

int64_t memory_of_the_machine() { return sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE); }

// At most this many bytes stay kept.
int64_t most_kept() {
  constexpr int64_t mib = 1 << 20;
  const char* given = std::getenv("MMFAST_KEPT_MIB");
  if (given) return std::clamp<int64_t>(std::atoll(given), 0, memory_of_the_machine() / mib) * mib;
  return std::min(memory_of_the_machine() / 32, 1024 * mib);
}

// Whether the process may have only so many addresses: the arena would take them from others.
bool addresses_are_limited() {
  rlimit limit;
  return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
}

// One range of addresses, as large as the machine's memory, of which the lowest that fits is taken:
// neighbours that are free become one again, and what was written once is written again.
class Arena {
 public:
  Arena() : most_(most_kept()) {
    if (most_ == 0 || addresses_are_limited()) return;
    const int64_t size = memory_of_the_machine() / large_page * large_page;
    void* mapped = mmap(nullptr, size + large_page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return;
    base_ = (char*)mapped + (-(intptr_t)mapped & (large_page - 1));
    madvise(base_, size, MADV_HUGEPAGE);  // advice: it may fail
    free_[0] = {size, 0};
  }

  void* take(int64_t bytes) {
    // Odd numbers of lines between them: numbers at the same place of several tensors would share
    // few sets of the caches, and stores would seem to overlap with loads.
    const int64_t size = (bytes + page - 1) / page * page + 5 * line;
    const std::lock_guard lock(mutex_);
    auto found = free_.begin();
    while (found != free_.end() && found->second.size < size) ++found;
    if (found == free_.end()) return nullptr;
    const int64_t start = found->first;
    Range rest = found->second;
    free_.erase(found);
    const int64_t kept = std::min(rest.kept, size);
    kept_ -= kept;
    rest = {rest.size - size, rest.kept - kept};
    if (rest.size) free_[start + size] = rest;
    *(int64_t*)(base_ + start) = size;
    return base_ + start + line;
  }

  void give(void* memory) {
    const std::lock_guard lock(mutex_);
    const int64_t start = (char*)memory - line - base_, size = *(int64_t*)(base_ + start);
    kept_ += size;
    auto here = free_.emplace(start, Range{size, size}).first;
    join(here, std::next(here));
    if (here != free_.begin()) join(std::prev(here), here);
    release(most_);
  }

  void release() {
    const std::lock_guard lock(mutex_);
    release(0);
  }

  int64_t kept() {
    const std::lock_guard lock(mutex_);
    return kept_;
  }

  // A process that is forked while another thread is here goes on with it.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  struct Range {
    int64_t size;
    int64_t kept;  // from its start, whose pages may be there
  };
  using Place = std::map<int64_t, Range>::iterator;

  void join(Place first, Place second) {
    if (second == free_.end() || first->first + first->second.size != second->first) return;
    Range& all = first->second;
    if (second->second.kept) {
      kept_ += all.size - all.kept;  // what lies between counts as kept: it is given back with them
      all.kept = all.size + second->second.kept;
    }
    all.size += second->second.size;
    free_.erase(second);
  }

  // From the end of the highest free ranges, which are the last to be taken, until at most so many
  // bytes are kept.
  void release(int64_t most) {
    for (auto place = free_.rbegin(); place != free_.rend() && kept_ > most; ++place) {
      Range& range = place->second;
      const int64_t given = std::min(range.kept, kept_ - most);
      if (given == 0) continue;
      range.kept -= given;
      kept_ -= given;
      const int64_t first = (place->first + range.kept + page - 1) / page * page;
      const int64_t last = (place->first + range.size) / page * page;
      if (first < last) madvise(base_ + first, last - first, MADV_DONTNEED);
    }
  }

  const int64_t most_;
  char* base_ = nullptr;
  std::mutex mutex_;
  std::map<int64_t, Range> free_;  // by where they start
  int64_t kept_ = 0;
};

// Outlives all tensors.
Arena& arena() {
  static Arena& arena = *[] {
    Arena* made = new Arena;
    pthread_atfork([] { mmfast::arena().before_fork(); }, [] { mmfast::arena().after_fork(); },
                   [] { mmfast::arena().after_fork(); });
    return made;
  }();
  return arena;
}

}  // namespace

void* take_memory(int64_t bytes) { return arena().take(bytes); }

void give_memory(void* memory) { arena().give(memory); }

void release_kept_memory() { arena().release(); }

int64_t kept_bytes() { return arena().kept(); }

}  // namespace mmfast
