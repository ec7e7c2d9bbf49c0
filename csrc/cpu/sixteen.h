// Sixteen numbers at a time, float or double, and the functions of them that entropies and bounds
// need.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Sixteen;
template <>
struct Sixteen<float> {
  using V = float __attribute__((vector_size(64)));
  using I = int32_t __attribute__((vector_size(64)));
};
template <>
struct Sixteen<double> {
  using V = double __attribute__((vector_size(128)));
  using I = int64_t __attribute__((vector_size(128)));
};
using f16 = Sixteen<float>::V;
using d16 = Sixteen<double>::V;

MMFAST_INLINE f16 madd(f16 a, f16 b, f16 c) {
#if defined(__AVX512F__)
  return (f16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}
MMFAST_INLINE d16 madd(d16 a, d16 b, d16 c) { return a * b + c; }

// The first count of sixteen numbers at p, zeros behind them.
template <class T>
MMFAST_INLINE typename Sixteen<T>::V load_some(const T* p, int64_t count) {
  if (count >= 16) return load<typename Sixteen<T>::V>(p);
  typename Sixteen<T>::V v{};
  std::memcpy(&v, p, (size_t)count * sizeof(T));
  return v;
}

template <class T, class V>
MMFAST_INLINE void store_some(T* p, V v, int64_t count) {
  if (count >= 16)
    store(p, v);
  else
    std::memcpy(p, &v, (size_t)count * sizeof(T));
}

MMFAST_INLINE double sum_of(f16 v) {
  f8 half[2];
  std::memcpy(half, &v, sizeof v);
  return sum(widen(half[0]) + widen(half[1]));
}
MMFAST_INLINE double sum_of(d16 v) {
  d8 half[2];
  std::memcpy(half, &v, sizeof v);
  return sum(half[0] + half[1]);
}

MMFAST_INLINE f16 absolute(f16 v) {
  return (f16)((Sixteen<float>::I)v & 0x7FFFFFFF);
}
MMFAST_INLINE d16 absolute(d16 v) { return v < 0 ? -v : v; }

// Bit i: whether number i is above 0.
MMFAST_INLINE uint32_t above_zero(f16 v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#else
  const f16 above = (f16)(v > 0.f);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    __m128 four;
    std::memcpy(&four, (const char*)&above + 16 * i, 16);
    bits |= (uint32_t)_mm_movemask_ps(four) << 4 * i;
  }
  return bits;
#endif
}
MMFAST_INLINE uint32_t above_zero(d16 v) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (uint32_t)(v[i] > 0) << i;
  return bits;
}

template <class V>
MMFAST_INLINE V backwards(V v) {
  return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// exp of what is not above 0; NaN stays. Polynomial of Cephes' expf.
MMFAST_INLINE f16 exp_below(f16 x) {
  using I = Sixteen<float>::I;
  const f16 magic = f16{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const f16 shifted = madd(x, f16{} + 1.44269504f, magic);
  const f16 n = shifted - magic;
  f16 r = madd(n, f16{} - 0.693359375f, x);
  r = madd(n, f16{} + 2.12194440e-4f, r);
  f16 p = madd(f16{} + 1.9875691500e-4f, r, f16{} + 1.3981999507e-3f);
  p = madd(p, r, f16{} + 8.3334519073e-3f);
  p = madd(p, r, f16{} + 4.1665795894e-2f);
  p = madd(p, r, f16{} + 1.6666665459e-1f);
  p = madd(p, r, f16{} + 5.0000001201e-1f);
  p = madd(p * r, r, r + 1.f);
  const f16 scaled = (f16)((I)p + (((I)shifted - (I)magic) << 23));
  const f16 tiny_is_zero = x < -87.f ? f16{} : scaled;
  return x != x ? x : tiny_is_zero;
}
MMFAST_INLINE d16 exp_below(d16 x) {
  for (int i = 0; i < 16; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// 2^x, for x at most 0; NaN stays. The polynomial, for r from 0 to 1, is off by 8e-8.
MMFAST_INLINE f16 power_of_two(f16 x) {
#if defined(__AVX512F__)
  constexpr int fraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  x = (f16)_mm512_max_ps(_mm512_set1_ps(-160.f), (__m512)x);
  const f16 r = (f16)_mm512_reduce_ps((__m512)x, fraction);
  f16 p = madd(f16{} + 1.86713008e-3f, r, f16{} + 9.01703028e-3f);
  p = madd(p, r, f16{} + 5.57999131e-2f);
  p = madd(p, r, f16{} + 2.40164450e-1f);
  p = madd(p, r, f16{} + 6.93151312e-1f);
  p = madd(p, r, f16{} + 1.f);
  return (f16)_mm512_scalef_ps((__m512)p, (__m512)x);  // by the power of its floor
#else
  return exp_below(x * 0.693147181f);
#endif
}
MMFAST_INLINE d16 power_of_two(d16 x) {
  for (int i = 0; i < 16; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// 1 / v, for v from 1 to 2.
MMFAST_INLINE f16 reciprocal(f16 v) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps((__m512)v);
  return (f16)_mm512_mul_ps(r, _mm512_fnmadd_ps((__m512)v, r, _mm512_set1_ps(2.f)));
#else
  return 1.f / v;
#endif
}
MMFAST_INLINE d16 reciprocal(d16 v) { return 1. / v; }

// log(1 + e), e from 0 to 1: twice the area tangent of e / (2 + e), which is at most a third.
MMFAST_INLINE f16 log_one_plus(f16 e) {
  const f16 s = e / (e + 2.f), q = s * s;
  f16 p = madd(q, f16{} + 1.f / 15, f16{} + 1.f / 13);
  p = madd(p, q, f16{} + 1.f / 11);
  p = madd(p, q, f16{} + 1.f / 9);
  p = madd(p, q, f16{} + 1.f / 7);
  p = madd(p, q, f16{} + 1.f / 5);
  p = madd(p, q, f16{} + 1.f / 3);
  return 2.f * madd(p * q, s, s);
}
MMFAST_INLINE d16 log_one_plus(d16 e) {
  for (int i = 0; i < 16; ++i) e[i] = __builtin_log1p(e[i]);
  return e;
}

}  // namespace mmfast::MMFAST_ISA
