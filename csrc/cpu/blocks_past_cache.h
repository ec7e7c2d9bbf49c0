// Blocks whose outputs may go past the cache.
#pragma once
#include <immintrin.h>

#include "cpu/blocks.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t past_cache_from = int64_t(16) << 20;  // bytes of an output, which no cache holds

// Calls work(block) for every block. One fence for all blocks of a thread: it waits for memory.
template <class Work>
static void for_blocks_past_cache(int64_t blocks, const Work& work, const Parallel& parallel) {
  if (blocks == 1) {
    work(0);
    _mm_sfence();
    return;
  }
  parallel.run(
      blocks,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) (*(const Work*)context)(block);
        _mm_sfence();
      },
      (void*)&work);
}

}  // namespace mmfast::MMFAST_ISA
