// Stores that go past the cache: what lies there in memory is not read first.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

// p is a multiple of v's size. Others see the numbers after an _mm_sfence.
template <class V>
MMFAST_INLINE void store_past_cache(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    _mm512_stream_si512((__m512i*)p, (__m512i)v);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) {
    _mm256_stream_si256((__m256i*)p, (__m256i)v);
    return;
  }
#endif
  if constexpr (sizeof v == 16)
    _mm_stream_si128((__m128i*)p, (__m128i)v);
  else
    store(p, v);
}

}  // namespace mmfast::MMFAST_ISA
