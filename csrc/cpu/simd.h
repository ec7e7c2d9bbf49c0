// Vectors of one instruction set. Included only by the kernels compiled for it; MMFAST_ISA names
// the namespace. Integer products need intrinsics, the rest is the compiler's vector extension.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/tensor_view.h"

#if defined(__AMX_BF16__)
#define MMFAST_MATRIX 1  // instructions that multiply matrices of bfloat16
#else
#define MMFAST_MATRIX 0
#endif

// Products of bytes at twice the rate of those of int16.
#if defined(__AVX512VNNI__)
#define MMFAST_BYTES 1
#else
#define MMFAST_BYTES 0
#endif

#define MMFAST_INLINE static inline __attribute__((always_inline))

namespace mmfast::MMFAST_ISA {

// Eight at a time in every instruction set: narrower ones split these.
using f8 = float __attribute__((vector_size(32)));
using d8 = double __attribute__((vector_size(64)));
using i8x8 = int8_t __attribute__((vector_size(8)));
using i16x8 = int16_t __attribute__((vector_size(16)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using i64x8 = int64_t __attribute__((vector_size(64)));

template <class V>
MMFAST_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
MMFAST_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// x in every lane. Not V{} + x: an addition each time, as it is not the same of -0.
template <class V, class T>
MMFAST_INLINE V every(T x) {
  return x - V{};
}

template <class V>
MMFAST_INLINE auto sum(V v) -> std::remove_reference_t<decltype(v[0])> {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

MMFAST_INLINE d8 widen(f8 v) {
#if defined(__AVX512F__)
  return (d8)_mm512_cvtps_pd((__m256)v);  // GCC 12 converts in halves
#else
  return __builtin_convertvector(v, d8);
#endif
}

MMFAST_INLINE f8 narrow(d8 v) {
#if defined(__AVX512F__)
  return (f8)_mm512_cvtpd_ps((__m512d)v);
#else
  return __builtin_convertvector(v, f8);
#endif
}

MMFAST_INLINE d8 load_wide(const float* p) { return widen(load<f8>(p)); }
MMFAST_INLINE d8 load_wide(const double* p) { return load<d8>(p); }

MMFAST_INLINE d8 sqrt(d8 v) {
#if defined(__AVX512F__)
  return (d8)_mm512_sqrt_pd((__m512d)v);
#else
  for (int i = 0; i < 8; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// Lanes of int32: the scores of as many codes.
#if defined(__AVX512F__)
using vi = __m512i;
constexpr int lanes = 16;
MMFAST_INLINE vi vload(const void* p) { return _mm512_loadu_si512(p); }
MMFAST_INLINE void vstore(void* p, vi v) { _mm512_storeu_si512(p, v); }
MMFAST_INLINE vi vset(int32_t v) { return _mm512_set1_epi32(v); }
MMFAST_INLINE vi vadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
MMFAST_INLINE vi vmax(vi a, vi b) { return _mm512_max_epi32(a, b); }
MMFAST_INLINE vi vmin(vi a, vi b) { return _mm512_min_epi32(a, b); }
// (a & ~mask) | id
MMFAST_INLINE vi vtag(vi a, vi mask, vi id) { return _mm512_ternarylogic_epi32(a, mask, id, 0xBA); }
MMFAST_INLINE uint32_t vge(vi a, vi b) { return _mm512_cmpge_epi32_mask(a, b); }
MMFAST_INLINE int32_t vhmax(vi a) { return _mm512_reduce_max_epi32(a); }
// Nearest integers of p[...] * scale; what is below the range becomes INT32_MIN.
MMFAST_INLINE vi vscale(const float* p, float scale) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(scale)));
}
// acc + a0 b0 + a1 b1, int16 pairs in each lane.
MMFAST_INLINE vi vdot16(vi acc, vi a, vi b) {
  // Intrinsics make GCC copy and spill the accumulators of a full register tile.
#if defined(__AVX512VNNI__)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#else
  vi product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
#endif
  return acc;
}
#if MMFAST_BYTES
MMFAST_INLINE __m128i low_bytes(vi a) { return _mm512_cvtepi32_epi8(a); }
// acc + a0 b0 + a1 b1 + a2 b2 + a3 b3 in each lane, of bytes: a's without a sign.
MMFAST_INLINE vi vdot8(vi acc, vi a, vi b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#endif
#elif defined(__AVX2__)
using vi = __m256i;
constexpr int lanes = 8;
MMFAST_INLINE vi vload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
MMFAST_INLINE void vstore(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, v); }
MMFAST_INLINE vi vset(int32_t v) { return _mm256_set1_epi32(v); }
MMFAST_INLINE vi vadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
MMFAST_INLINE vi vmax(vi a, vi b) { return _mm256_max_epi32(a, b); }
MMFAST_INLINE vi vmin(vi a, vi b) { return _mm256_min_epi32(a, b); }
MMFAST_INLINE vi vtag(vi a, vi mask, vi id) {
  return _mm256_or_si256(_mm256_andnot_si256(mask, a), id);
}
MMFAST_INLINE uint32_t vge(vi a, vi b) {
  return 0xFFu & ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)));
}
MMFAST_INLINE int32_t vhmax(vi a) {
  int32_t v[8];
  vstore(v, a);
  int32_t m = v[0];
  for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
MMFAST_INLINE vi vscale(const float* p, float scale) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p), _mm256_set1_ps(scale)));
}
MMFAST_INLINE vi vdot16(vi acc, vi a, vi b) {
  // Or GCC adds in another order and spills the products.
  vi product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(product)
          : "x"(a), "xm"(b));
  return acc;
}
#else
using vi = __m128i;
constexpr int lanes = 4;
MMFAST_INLINE vi vload(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
MMFAST_INLINE void vstore(void* p, vi v) { _mm_storeu_si128((__m128i*)p, v); }
MMFAST_INLINE vi vset(int32_t v) { return _mm_set1_epi32(v); }
MMFAST_INLINE vi vadd(vi a, vi b) { return _mm_add_epi32(a, b); }
MMFAST_INLINE vi vselect(vi mask, vi a, vi b) {
  return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
}
MMFAST_INLINE vi vmax(vi a, vi b) { return vselect(_mm_cmpgt_epi32(a, b), a, b); }
MMFAST_INLINE vi vmin(vi a, vi b) { return vselect(_mm_cmpgt_epi32(a, b), b, a); }
MMFAST_INLINE vi vtag(vi a, vi mask, vi id) { return _mm_or_si128(_mm_andnot_si128(mask, a), id); }
MMFAST_INLINE uint32_t vge(vi a, vi b) {
  return 0xFu & ~(uint32_t)_mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(b, a)));
}
MMFAST_INLINE int32_t vhmax(vi a) {
  int32_t v[4];
  vstore(v, a);
  int32_t m = v[0];
  for (int i = 1; i < 4; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
MMFAST_INLINE vi vscale(const float* p, float scale) {
  return _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(p), _mm_set1_ps(scale)));
}
MMFAST_INLINE vi vdot16(vi acc, vi a, vi b) { return _mm_add_epi32(acc, _mm_madd_epi16(a, b)); }
#endif

// As many float32.
using vf = float __attribute__((vector_size(4 * lanes)));
MMFAST_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
MMFAST_INLINE vf sqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  return (vf)_mm_sqrt_ps((__m128)a);
#endif
}
MMFAST_INLINE uint32_t le(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ));
#else
  return (uint32_t)_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b));
#endif
}

MMFAST_INLINE float vsum(vf a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a);
#elif defined(__AVX2__)
  return sum(a);
#else
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

// The 32 bits at p, in every lane.
MMFAST_INLINE vi vbroadcast(const void* p) { return vset(load<int32_t>(p)); }

MMFAST_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Shift exponent and mantissa into place and let a multiplication do the rebias; it also
  // normalises denormals. Infinities and NaNs need their exponent set by hand.
  uint32_t bits = (uint32_t)(h & 0x7FFF) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((h & 0x7C00) == 0x7C00) bits |= 0x7F800000;
  bits |= (uint32_t)(h & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

template <class T>
MMFAST_INLINE T load_one(const char* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return (T)load<float>(p);
    case Dtype::float64: return (T)load<double>(p);
    case Dtype::float16: return (T)half_to_float(load<uint16_t>(p));
    case Dtype::bfloat16: {
      const uint32_t bits = (uint32_t)load<uint16_t>(p) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return (T)value;
    }
  }
  return 0;
}

// A row as contiguous numbers of type T: in place where it already is, else copied to buffer.
template <class T>
static const T* read_row(const Rows& rows, int64_t i, T* buffer) {
  const char* p = rows.row(i);
  constexpr Dtype native = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
  if (rows.dtype == native && rows.step == (int64_t)sizeof(T)) return (const T*)p;
  int64_t d = 0;
  if constexpr (sizeof(T) == 8)
    if (rows.step == 4 && rows.dtype == Dtype::float32)
      for (; d + 8 <= rows.width; d += 8) store(buffer + d, widen(load<f8>(p + 4 * d)));
  if (rows.step == 2 && rows.dtype == Dtype::bfloat16) {
    for (; d < rows.width; ++d) buffer[d] = load_one<T>(p + 2 * d, Dtype::bfloat16);
    return buffer;
  }
#if defined(__F16C__)
  if (rows.step == 2 && rows.dtype == Dtype::float16)
    for (; d + 8 <= rows.width; d += 8) {
      const f8 v = (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 2 * d)));
      if constexpr (sizeof(T) == 4)
        store(buffer + d, v);
      else
        store(buffer + d, widen(v));
    }
#endif
  for (; d < rows.width; ++d) buffer[d] = load_one<T>(p + d * rows.step, rows.dtype);
  return buffer;
}

}  // namespace mmfast::MMFAST_ISA
