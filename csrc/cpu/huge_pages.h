// Outputs so large that the allocator maps new memory for each.
#pragma once
#include <sys/mman.h>

#include <cstdint>

#include "cpu/glue.h"

namespace mmfast {

// tensor, new and not touched yet. Its pages are cleared by the kernel that first writes them: 2 MiB
// at a time take a third of the time of 4 KiB. Smaller tensors get memory that was in use before
// (glibc maps no chunk below 32 MiB for good), whose pages are there.
inline Tensor on_huge_pages(Tensor tensor) {
  constexpr int64_t least = 32 << 20, page = 2 << 20;
  const int64_t bytes = tensor.numel() * size_of(dtype_of(tensor));
  if (bytes < least) return tensor;
  const uintptr_t start = (uintptr_t)tensor.data_ptr();
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: it may fail
  return tensor;
}

}  // namespace mmfast
