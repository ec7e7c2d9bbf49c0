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

struct FiniteScalarQuantizeBwdArgs {
  FiniteScalarQuantizeArgs forward;  // without its outputs
  Rows grad;                         // (N, D)
  char* result;                      // (N, D), of z's dtype
};

}  // namespace mmfast
