// Heads of bfloat16 by 32 numbers, as a vector of those at even places and one of those at odd
// places: two instructions make both of what is in memory, and neighbours need no exchange.
#pragma once
#include "cpu/numbers.h"

namespace mmfast::MMFAST_ISA {

#if defined(__AVX512BF16__)

struct Pair {
  vf even, odd;
};

MMFAST_INLINE Pair load_pair(const float* at) {
  return {load<vf>(at), load<vf>(at + 16)};
}

MMFAST_INLINE void store_pair(float* at, Pair v) {
  store(at, v.even);
  store(at + 16, v.odd);
}

// 32 numbers that follow each other.
MMFAST_INLINE Pair split_pair(const float* at) {
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 low = _mm512_loadu_ps(at), high = _mm512_loadu_ps(at + 16);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(vf)_mm512_permutex2var_ps(low, even, high), (vf)_mm512_permutex2var_ps(low, odd, high)};
}

// A head of E numbers; the last block overlaps the one before it.
struct PairBlocks {
  static constexpr int64_t width = 32;
  int64_t E, count;

  __attribute__((always_inline)) int64_t place(int64_t j) const {
    return j + 1 < count ? j * width : E - width;
  }

  // Of block j, the numbers that no other has: the last ones.
  __attribute__((always_inline)) int64_t own(int64_t j) const {
    return j + 1 < count ? width : E - (count - 1) * width;
  }

  // The numbers of a head in the order of its blocks, evens first.
  void arrange(float* to, const float* from) const {
    for (int64_t j = 0; j < count; ++j) store_pair(to + j * width, split_pair(from + place(j)));
  }

  // Adds numbers in that order to those of a head.
  void add_back(float* to, const float* from) const {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < width / 2; ++i) {
        to[place(j) + 2 * i] += from[j * width + i];
        to[place(j) + 2 * i + 1] += from[j * width + width / 2 + i];
      }
  }
};

MMFAST_INLINE Pair read_pair(const char* at) {
  const __m512i both = _mm512_loadu_si512(at);
  return {(vf)_mm512_slli_epi32(both, 16),
          (vf)_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000))};
}

// Rounds to nearest even; denormals become zeros.
MMFAST_INLINE void write_pair(char* at, Pair v, bool past_cache) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)v.odd, (__m512)v.even);
  const __m512i mixed = _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)rounded);
  if (past_cache)
    _mm512_stream_si512((__m512i*)at, mixed);
  else
    _mm512_storeu_si512(at, mixed);
}

// Zeros for the numbers before the last `count` of a block.
MMFAST_INLINE Pair last(int64_t count, Pair v) {
  if (count == PairBlocks::width) return v;
  const __mmask16 kept = (__mmask16)(0xFFFFu << (16 - count / 2));
  return {(vf)_mm512_maskz_mov_ps(kept, (__m512)v.even),
          (vf)_mm512_maskz_mov_ps(kept, (__m512)v.odd)};
}

// Adds the squares of the last `count` numbers of a block. Squares below the normal numbers are lost.
MMFAST_INLINE vf add_squares(vf sum, const char* at, int64_t count) {
  const __mmask32 kept = (__mmask32)(~uint64_t(0) << (PairBlocks::width - count));
  const __m512i both = count == PairBlocks::width ? _mm512_loadu_si512(at)
                                                  : _mm512_maskz_loadu_epi16(kept, at);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)both);
}

#endif

// Sums of the lanes of each of 16 vectors, all in one order.
MMFAST_INLINE void sum_lanes_of(const vf* v, float* to) {
#if defined(__AVX512F__)
  // Each step adds halves of what is left of two vectors, and keeps both in one.
  __m512 a[8];
  for (int i = 0; i < 8; ++i) {
    const __m512 p = (__m512)v[i], q = (__m512)v[i + 8];
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  }
  __m512 b[4];
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 4]), _mm512_unpackhi_ps(a[i], a[i + 4]));
  // Each quarter of b[i] has a partial sum of vectors i, i + 4, i + 8 and i + 12 in some order.
  __m512 c[2];
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 2], 0x88),
                         _mm512_shuffle_f32x4(b[i], b[i + 2], 0xDD));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                                 _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
  // Quarters have vectors 0, 4, 8, 12; 2, 6, ...; 1, 5, ...; 3, 7, ...
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  _mm512_storeu_ps(to, _mm512_permutexvar_ps(order, d));
#else
  for (int i = 0; i < 16; ++i) to[i] = sum_lanes(v[i]);
#endif
}

}  // namespace mmfast::MMFAST_ISA
