// Memory that starts with a cache line: vectors in it lie in one line each.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace mmfast::MMFAST_ISA {

// Room for count numbers, to be freed with std::free; null when memory runs out.
template <class T>
static T* allocate(int64_t count) {
  const size_t lines = ((size_t)count * sizeof(T) + 63) / 64;
  return (T*)std::aligned_alloc(64, (lines ? lines : 1) * 64);
}

// Numbers from one row of `width` to the next, so that each starts with a cache line.
static int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

}  // namespace mmfast::MMFAST_ISA
