// The rate of the instructions that multiply: the ceiling that benchmarks hold nearest_code against.
#pragma once
#if MMFAST_MATRIX
#include "cpu/nearest_code_matrix_sweep.h"
#endif
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

// Makes `rounds` rounds of independent dot products; returns how many multiply-adds they were, 0
// if this instruction set has none of the kind.
constexpr int product_chains = lanes == 4 ? 8 : 12;  // hide the latency, leave registers for factors

[[maybe_unused]] static int64_t integer_products(int64_t rounds) {
  vi acc[product_chains], a = vset(0), b = vset(0);
#pragma GCC unroll 12
  for (int c = 0; c < product_chains; ++c) acc[c] = vset(0);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int c = 0; c < product_chains; ++c) {
      __asm__ volatile("" : "+v"(a), "+v"(b));  // opaque, or one product would serve all
      acc[c] = vdot16(acc[c], a, b);
    }
#pragma GCC unroll 12
  for (int c = 0; c < product_chains; ++c) __asm__ volatile("" ::"v"(acc[c]));
  return rounds * product_chains * lanes * 2;
}

[[maybe_unused]] static int64_t bfloat16_products(int64_t rounds) {
#if defined(__AVX512BF16__)
  vi acc[product_chains], a = vset(0), b = vset(0);
#pragma GCC unroll 12
  for (int c = 0; c < product_chains; ++c) acc[c] = vset(0);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int c = 0; c < product_chains; ++c)
      __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(acc[c]) : "v"(a), "v"(b));
#pragma GCC unroll 12
  for (int c = 0; c < product_chains; ++c) __asm__ volatile("" ::"v"(acc[c]));
  return rounds * product_chains * lanes * 2;
#else
  return 0;
#endif
}

// The same for products of bfloat16 matrices.
[[maybe_unused]] static int64_t matrix_products(int64_t rounds) {
#if MMFAST_MATRIX
  const MatrixRegisters registers;
  for (int64_t r = 0; r < rounds; ++r) {
    matrix_multiply<0, 4, 6>();
    matrix_multiply<1, 4, 7>();
    matrix_multiply<2, 5, 6>();
    matrix_multiply<3, 5, 7>();
  }
  return rounds * 4 * matrix_rows * lanes * matrix_depth;
#else
  return 0;
#endif
}

}  // namespace mmfast::MMFAST_ISA
