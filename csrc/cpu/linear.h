// What the kernels of linear layers of every instruction set are given.
#pragma once
#include "cpu/gated_activation.h"
#include "cpu/tensor_view.h"

namespace mmfast {

// A dense matrix, or a row, that a kernel writes; without data where nothing asks for it.
struct LinearOutput {
  char* data;
  Dtype dtype;
};

// out = act(x) weight^T + bias, and its gradients. Numbers of a row lie one after another, rows are
// equally far apart.
struct LinearArgs {
  Dtype dtype;  // of what is multiplied
  Rows x;       // (M, K)
  Rows weight;  // (N, K)
  Rows grad;    // (M, N), of out; for the gradients only
  const char* bias;  // (N,), or null
  Dtype bias_dtype;
  bool activated;
  Activation activation;     // of x
  LinearOutput out;          // (M, N)
  LinearOutput grad_x;       // (M, K)
  LinearOutput grad_weight;  // (N, K)
  LinearOutput grad_bias;    // (N,)
};

}  // namespace mmfast
