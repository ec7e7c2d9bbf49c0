// What the residual_quantize kernels of every instruction set are given.
#pragma once
#include "cpu/nearest_code.h"
#include "cpu/tensor_view.h"

namespace mmfast {

struct ResidualQuantizeArgs {
  Rows x;               // (N, D)
  const Rows* codes;    // [Q] of (K_q, D)
  int64_t stages;       // Q
  int64_t most_codes;   // K, the largest K_q
  Metric metric;
  const bool* mask;     // (N,) or null
  int64_t* indices;     // (N, Q)
  void* quantized;      // (N, D); this and the others float64 if wide, else float32
  void* losses;         // (Q,)
  void* counts;         // (Q, K)
  bool wide;
};

struct ResidualQuantizeBwdArgs {
  Rows x;                   // (N, D)
  Rows codes;               // (all K_q, D)
  const int64_t* starts;    // [Q] the first code of each stage
  int64_t stages;           // Q
  const int64_t* indices;   // (N, Q)
  const Rows* quantized;    // gradient (N, D), or null for zeros
  const double* commitment;  // [Q] gradients of the losses, or null for zeros
  const double* codebook;    // [Q]
  bool straight_through;    // whether the gradient of quantized goes to x, else to the codes
  void* grad_x;             // (N, D) or null; float64 if wide, else float32
  void* grad_codes;         // (all K_q, D) or null
  bool wide;
};

}  // namespace mmfast
