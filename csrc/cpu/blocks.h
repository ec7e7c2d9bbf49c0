// Work in blocks whose bounds, and therefore sums, do not depend on the threads.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t block_rows = 256;

static int64_t blocks_of(int64_t rows) { return (rows + block_rows - 1) / block_rows; }

struct Block {
  int64_t begin, end;  // rows
};

static Block block_of(int64_t block, int64_t rows) {
  const int64_t begin = block * block_rows;
  return {begin, begin + block_rows < rows ? begin + block_rows : rows};
}

// Calls work(block) for every block.
template <class Work>
static void for_blocks(int64_t blocks, const Work& work, const Parallel& parallel) {
  if (blocks == 1)
    work(0);
  else
    parallel.run(
        blocks,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) (*(const Work*)context)(block);
        },
        (void*)&work);
}

}  // namespace mmfast::MMFAST_ISA
