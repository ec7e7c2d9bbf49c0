// Outputs whose pages nobody has written yet.
#pragma once
#include <sys/mman.h>

#include <cstdint>

#include "cpu/glue.h"

namespace mmfast {

// Whether the page of 4 KiB that address lies in is there, or unknown.
inline bool is_there(uintptr_t address) {
  constexpr uintptr_t page = 4 << 10;
  unsigned char state = 1;
  return mincore((void*)(address / page * page), page, &state) || (state & 1);
}

inline int64_t bytes_of_number(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

// tensor, new and not touched yet. Pages that are not there are cleared by the kernel that first
// writes them: 2 MiB at a time take a third of the time of 4 KiB. glibc hands out memory that was in
// use before, whose pages are there, but maps chunks from 32 MiB on anew, and gives back what is free
// at the end of its heap: a tensor can begin on pages that are there and end on others.
inline Tensor on_huge_pages(Tensor tensor) {
  constexpr int64_t least = 4 << 20, page = 2 << 20;
  const int64_t bytes = tensor.numel() * bytes_of_number(tensor);
  if (bytes < least) return tensor;
  const uintptr_t start = (uintptr_t)tensor.data_ptr();
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  for (uintptr_t at = first; at < last; at += page) {
    if (is_there(at + page / 2)) continue;
    madvise((void*)at, last - at, MADV_HUGEPAGE);  // advice: it may fail
    break;
  }
  return tensor;
}

}  // namespace mmfast
