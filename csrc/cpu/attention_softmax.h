// What softmax needs of vectors: the larger, powers of two, logarithms.
#pragma once
#include "cpu/numbers.h"
#include "cpu/philox.h"

namespace mmfast::MMFAST_ISA {

// The second where one is NaN.
MMFAST_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
MMFAST_INLINE vd larger(vd a, vd b) { return a > b ? a : b; }

// 2^x of what is not above 1, or so: 0 below the normal numbers. NaN stays. The polynomial is the
// minimax one of degree 5 from -1/2 to 1/2 with the constant 1: an error below 2^-23.
MMFAST_INLINE vf power_of_two(vf x) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 8);  // to the nearest, no exception
#else
  using vw = int32_t __attribute__((vector_size(4 * lanes)));
  const vf magic = vf{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic, n = shifted - magic;
#endif
  const vf r = x - n;
  vf p = fma(r, vf{} + 1.32647273e-3f, vf{} + 9.67151299e-3f);
  p = fma(p, r, vf{} + 5.55073358e-2f);
  p = fma(p, r, vf{} + 2.40222424e-1f);
  p = fma(p, r, vf{} + 6.93147004e-1f);
  p = fma(p, r, vf{} + 1.f);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
  const vf scaled = (vf)((vw)p + (((vw)shifted - (vw)magic) << 23));
  return x < -126.f ? vf{} : scaled;
#endif
}
MMFAST_INLINE vd power_of_two(vd x) {
  for (int i = 0; i < native_width<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// Of normal numbers.
MMFAST_INLINE vf natural_logarithm(vf x) { return -0.5f * minus_two_log(x); }
MMFAST_INLINE vd natural_logarithm(vd x) {
  for (int i = 0; i < native_width<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

}  // namespace mmfast::MMFAST_ISA
