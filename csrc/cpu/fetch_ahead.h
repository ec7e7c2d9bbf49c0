// Lines of the caches asked for before they are wanted: the processor's own prefetching stops at each
// page of 4 KiB, and asks late for what is written.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t fetched_ahead = 1024;  // bytes

// The line so far behind p, which may lie behind what there is.
MMFAST_INLINE void fetch_ahead(const void* p) {
  _mm_prefetch((const char*)((uintptr_t)p + fetched_ahead), _MM_HINT_T0);
}

}  // namespace mmfast::MMFAST_ISA
