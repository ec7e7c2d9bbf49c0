// Rows into outputs, which are contiguous, in any dtype. Numbers are rounded as torch does it:
// float64 goes to the half precisions by way of float32.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

MMFAST_INLINE uint16_t float_to_half(float value) {
  uint32_t bits = load<uint32_t>(&value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // 65520, half way to 2^16
  if (bits < 0x38800000) {
    // A denormal is a multiple of 2^-24, which is what float32 rounds to from 0.5 to 1.
    const float shifted = load<float>(&bits) + 0.5f;
    return (uint16_t)(sign | (load<uint32_t>(&shifted) - 0x3F000000));
  }
  bits += 0xFFF + ((bits >> 13) & 1);
  return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

// The first halves of the numbers' bits, rounded.
MMFAST_INLINE i16x8 to_bfloat16(f8 v) {
  using u32x8 = uint32_t __attribute__((vector_size(32)));
  const u32x8 bits = (u32x8)v;
  const u32x8 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const u32x8 nan = (u32x8)(v != v);
  return __builtin_convertvector((i32x8)((rounded & ~nan) | (nan & 0x7FC0)), i16x8);
}

MMFAST_INLINE i16x8 to_half(f8 v) {
#if defined(__F16C__)
  return (i16x8)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  i16x8 halves;
  for (int i = 0; i < 8; ++i) halves[i] = (int16_t)float_to_half(v[i]);
  return halves;
#endif
}

// Eight numbers to p; returns where the next ones go.
MMFAST_INLINE char* write_eight(char* p, Dtype dtype, d8 v) {
  switch (dtype) {
    case Dtype::float64: store(p, v); break;
    case Dtype::float32: store(p, narrow(v)); break;
    case Dtype::float16: store(p, to_half(narrow(v))); break;
    case Dtype::bfloat16: store(p, to_bfloat16(narrow(v))); break;
  }
  return p + 8 * size_of(dtype);
}

template <class T>
static void write_row(char* out, Dtype dtype, const T* values, int64_t width) {
  int64_t d = 0;
  if (dtype == Dtype::float32)
    for (; d + 8 <= width; d += 8) out = write_eight(out, Dtype::float32, load_wide(values + d));
  for (; d + 8 <= width; d += 8) out = write_eight(out, dtype, load_wide(values + d));
  if (d == width) return;
  T rest[8]{};
  std::memcpy(rest, values + d, (size_t)(width - d) * sizeof(T));
  char last[sizeof(d8)];
  write_eight(last, dtype, load_wide(rest));
  std::memcpy(out, last, (size_t)((width - d) * size_of(dtype)));
}

// Row i, rounded to dtype. buffer: [width].
static void convert_row(char* out, Dtype dtype, const Rows& rows, int64_t i, double* buffer) {
  if (rows.dtype != dtype) {
    write_row(out, dtype, read_row<double>(rows, i, buffer), rows.width);
    return;
  }
  const char* p = rows.row(i);
  const int64_t size = size_of(dtype);
  if (rows.step == size) {
    std::memcpy(out, p, (size_t)(rows.width * size));
    return;
  }
  for (int64_t d = 0; d < rows.width; ++d, p += rows.step, out += size)
    if (size == 2)
      std::memcpy(out, p, 2);
    else if (size == 4)
      std::memcpy(out, p, 4);
    else
      std::memcpy(out, p, 8);
}

}  // namespace mmfast::MMFAST_ISA
