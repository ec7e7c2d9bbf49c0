// Vectors of float or double, from and to numbers of any dtype, without rounding more than once.
#pragma once
#include "cpu/simd.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

using vd = double __attribute__((vector_size(4 * lanes)));

template <class T>
struct Native;
template <>
struct Native<float> {
  using V = vf;
  static constexpr Dtype dtype = Dtype::float32;
};
template <>
struct Native<double> {
  using V = vd;
  static constexpr Dtype dtype = Dtype::float64;
};

// Numbers in a vector.
template <class T>
constexpr int64_t native_width = 4 * lanes / (int64_t)sizeof(T);

MMFAST_INLINE vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
  return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

using bits16 = uint16_t __attribute__((vector_size(2 * lanes)));
using bits32 = uint32_t __attribute__((vector_size(4 * lanes)));

MMFAST_INLINE void read_numbers(const char* at, Dtype dtype, vf& v) {
  using bits16 [[maybe_unused]] = uint16_t __attribute__((vector_size(2 * lanes)));
  using bits32 [[maybe_unused]] = uint32_t __attribute__((vector_size(4 * lanes)));
  switch (dtype) {
    case Dtype::float32: v = load<vf>(at); return;
    case Dtype::bfloat16:
#if defined(__AVX512F__)
      // GCC 12 converts in halves.
      v = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
#else
      v = (vf)(__builtin_convertvector(load<bits16>(at), bits32) << 16);
#endif
      return;
    case Dtype::float16:
#if defined(__AVX512F__)
      v = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__F16C__)
      v = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at));
#else
      for (int i = 0; i < lanes; ++i) v[i] = half_to_float(load<uint16_t>(at + 2 * i));
#endif
      return;
    case Dtype::float64:
      for (int i = 0; i < lanes; ++i) v[i] = (float)load<double>(at + 8 * i);
  }
}

MMFAST_INLINE void read_numbers(const char* at, Dtype dtype, vd& v) {
  if (dtype == Dtype::float64) {
    v = load<vd>(at);
    return;
  }
  if (dtype == Dtype::float32) {
    using half = float __attribute__((vector_size(2 * lanes)));
    v = __builtin_convertvector(load<half>(at), vd);
    return;
  }
  for (int i = 0; i < native_width<double>; ++i)
    v[i] = load_one<double>(at + i * size_of(dtype), dtype);
}

MMFAST_INLINE void write_numbers(char* at, Dtype dtype, vf v) {
  using bits32 = uint32_t __attribute__((vector_size(4 * lanes)));
  using bits16 [[maybe_unused]] = uint16_t __attribute__((vector_size(2 * lanes)));
  switch (dtype) {
    case Dtype::float32: store(at, v); return;
    case Dtype::bfloat16: {
#if defined(__AVX512BF16__)
      // Rounds as below, but for NaN and what is below the normal numbers.
      constexpr int odd = 0x80 | 0x20 | 0x01;
      if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, odd) == 0, 1)) {
        store(at, _mm512_cvtneps_pbh((__m512)v));
        return;
      }
#endif
      const bits32 bits = (bits32)v;
      const bits32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
      // GCC 12 makes vectors of its masks.
      const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
      const __m512i kept = _mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7FC0));
      store(at, _mm512_cvtepi32_epi16(kept));
#else
      const bits32 nan = (bits32)(v != v);
      store(at, __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), bits16));
#endif
      return;
    }
    case Dtype::float16:
#if defined(__AVX512F__)
      store(at, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      store(at, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
      for (int i = 0; i < lanes; ++i) store(at + 2 * i, float_to_half(v[i]));
#endif
      return;
    case Dtype::float64:
      for (int i = 0; i < lanes; ++i) store(at + 8 * i, (double)v[i]);
  }
}

MMFAST_INLINE void write_numbers(char* at, Dtype dtype, vd v) {
  if (dtype == Dtype::float64) {
    store(at, v);
    return;
  }
  if (dtype == Dtype::float32) {
    using half = float __attribute__((vector_size(2 * lanes)));
    store(at, __builtin_convertvector(v, half));
    return;
  }
  vf narrowed{};
  for (int i = 0; i < native_width<double>; ++i) narrowed[i] = (float)v[i];
  char written[2 * sizeof(vf)];
  write_numbers(written, dtype, narrowed);
  std::memcpy(at, written, (size_t)(native_width<double> * size_of(dtype)));
}

// Neighbours exchanged: b a d c ...
MMFAST_INLINE vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xB1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0xB1);
#else
  return (vf)_mm_shuffle_ps((__m128)v, (__m128)v, 0xB1);
#endif
}
MMFAST_INLINE vd swap_pairs(vd v) {
#if defined(__AVX512F__)
  return (vd)_mm512_permute_pd((__m512d)v, 0x55);
#elif defined(__AVX2__)
  return (vd)_mm256_permute_pd((__m256d)v, 0x5);
#else
  return (vd)_mm_shuffle_pd((__m128d)v, (__m128d)v, 1);
#endif
}

MMFAST_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return b[0] + b[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
MMFAST_INLINE double sum_lanes(vd v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double total = v[0];
  for (int i = 1; i < native_width<double>; ++i) total += v[i];
  return total;
#endif
}

// The first `bytes` bytes at p, zeros behind them.
template <class R>
MMFAST_INLINE R load_first(const void* p, int64_t bytes) {
  if (bytes >= (int64_t)sizeof(R)) return load<R>(p);
#if defined(__AVX512BW__)
  if constexpr (sizeof(R) == 64) {
    const __m512i found = _mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
    R v;
    std::memcpy(&v, &found, sizeof v);
    return v;
  }
#endif
  R v{};
  std::memcpy(&v, p, (size_t)bytes);
  return v;
}

template <class R>
MMFAST_INLINE void store_first(void* p, R v, int64_t bytes) {
  if (bytes >= (int64_t)sizeof(R)) {
    store(p, v);
    return;
  }
#if defined(__AVX512BW__)
  if constexpr (sizeof(R) == 64) {
    __m512i given;
    std::memcpy(&given, &v, sizeof v);
    _mm512_mask_storeu_epi8(p, (1ull << bytes) - 1, given);
    return;
  }
#endif
  std::memcpy(p, &v, (size_t)bytes);
}

// The first count numbers of a row, zeros behind them.
template <class V>
MMFAST_INLINE V read_first(const char* at, Dtype dtype, int64_t count) {
  constexpr int per = sizeof(V) / sizeof(V{}[0]);
  V v;
  if (count >= per) {
    read_numbers(at, dtype, v);
    return v;
  }
  const int64_t bytes = count * size_of(dtype);
  V padded[2]{};
  if (bytes <= (int64_t)sizeof(V))
    padded[0] = load_first<V>(at, bytes);
  else
    std::memcpy(padded, at, (size_t)bytes);
  read_numbers((const char*)padded, dtype, v);
  return v;
}

template <class V>
MMFAST_INLINE void write_first(char* at, Dtype dtype, V v, int64_t count) {
  constexpr int per = sizeof(V) / sizeof(V{}[0]);
  if (count >= per) {
    write_numbers(at, dtype, v);
    return;
  }
  V written[2];
  write_numbers((char*)written, dtype, v);
  const int64_t bytes = count * size_of(dtype);
  if (bytes <= (int64_t)sizeof(V))
    store_first(at, written[0], bytes);
  else
    std::memcpy(at, written, (size_t)bytes);
}

// e^x for any x. Polynomial of Cephes' expf; the power of two is applied in halves, so that
// neither overflows before the result does.
MMFAST_INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
  // Either returns the second of two operands where one is NaN, which then stays.
  const vf bounded = (vf)_mm512_max_ps(_mm512_set1_ps(-104.f),
                                       _mm512_min_ps(_mm512_set1_ps(89.f), (__m512)x));
#else
  const vf bounded = x > 89.f ? vf{} + 89.f : x < -104.f ? vf{} - 104.f : x;
#endif
  const vf magic = vf{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = fma(bounded, vf{} + 1.44269504f, magic);
  const vf n = shifted - magic;
  vf r = fma(n, vf{} - 0.693359375f, bounded);
  r = fma(n, vf{} + 2.12194440e-4f, r);
  vf p = fma(vf{} + 1.9875691500e-4f, r, vf{} + 1.3981999507e-3f);
  p = fma(p, r, vf{} + 8.3334519073e-3f);
  p = fma(p, r, vf{} + 4.1665795894e-2f);
  p = fma(p, r, vf{} + 1.6666665459e-1f);
  p = fma(p, r, vf{} + 5.0000001201e-1f);
  p = fma(p * r, r, r + 1.f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  using vw = int32_t __attribute__((vector_size(4 * lanes)));
  const vw power = (vw)shifted - (vw)magic, half = power >> 1;
  const vf first = (vf)((half + 127) << 23), second = (vf)((power - half + 127) << 23);
  const vf result = p * first * second;
  return x != x ? x : result;
#endif
}
MMFAST_INLINE vd exponential(vd x) {
  for (int i = 0; i < native_width<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace mmfast::MMFAST_ISA
