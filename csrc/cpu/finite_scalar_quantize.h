// What the finite_scalar_quantize kernels of every instruction set are given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct ScalarLevels {
  const double* thresholds;  // [count - 1], ascending: a number's level is how many it reaches
  int32_t count;
  int32_t width;  // level l has the value (2 l - width) / width
  int32_t basis;  // of the level in the index
  double shift;   // before the tanh
  double gain;    // behind it
};

struct FiniteScalarQuantizeArgs {
  Rows z;                      // (N, D)
  Rows noise;                  // (N, D); no data where it is absent
  const ScalarLevels* levels;  // [D]
  bool hard_clamp;
  char* quantized;   // (N, D), of z's dtype
  int32_t* indices;  // (N,)
};

// Polynomials of (1 - tanh^2)(x width) where x is nearest to an integer below segments, in the
// difference; relative errors are below 2e-7.
struct SlopeTable {
  static constexpr int degree = 4, segments = 32;
  static constexpr float width = 3.f / 16;
  float coefficients[degree + 1][segments];
};

struct FiniteScalarQuantizeBwdArgs {
  FiniteScalarQuantizeArgs forward;  // without its outputs
  const SlopeTable* slope;
  Rows grad;                         // (N, D)
  char* result;                      // (N, D), of z's dtype
};

}  // namespace mmfast
