// What the vector_quantize kernels of every instruction set are given.
#pragma once
#include "cpu/nearest_code.h"
#include "cpu/tensor_view.h"

namespace mmfast {

struct VectorQuantizeArgs {
  Rows x;            // (N, D)
  Rows codes;        // (K, D)
  Metric metric;
  const bool* mask;  // (N,) or null
  char* quantized;   // (N, D), of x's dtype
  int64_t* indices;  // (N,)
  // One number each, and (K,): float64 if wide, else float32.
  void *commitment, *codebook_loss, *counts;
  bool wide;
};

enum class Gradient : int32_t { straight_through, rotation, none };

// A number in a tensor; no data where it is absent.
struct Number {
  const char* data;
  Dtype dtype;
};

struct VectorQuantizeBwdArgs {
  Rows quantized;    // (N, D), its gradient; no data where it is absent
  Number commitment, codebook_loss;  // their gradients
  Rows x;            // (N, D)
  Rows codes;        // (K, D)
  const int64_t* indices;  // (N,)
  Rows counts;       // (1, K)
  Gradient gradient;
  char* x_gradient;         // (N, D), of x's dtype; or null
  char* codebook_gradient;  // (K, D), of the codes' dtype; or null
};

}  // namespace mmfast
