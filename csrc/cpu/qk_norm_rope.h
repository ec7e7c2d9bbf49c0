#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

enum class Norm : int32_t { rms, layer, none };

// Heads of tokens, [B, L, H, E]; the numbers of a head lie one after another.
struct HeadsView {
  char* data;
  int64_t strides[3];  // bytes, of B, L and H

  char* head(int64_t b, int64_t l, int64_t h) const {
    return data + b * strides[0] + l * strides[1] + h * strides[2];
  }
};

// T is double for float64, else float.
struct QkNormRopeArgs {
  HeadsView x, out;
  HeadsView grad;  // of what x becomes, if `out` is to be the gradient of x
  Dtype dtype;     // of these
  int64_t batch, length, heads, num_dims;
  bool past_cache;  // out is too large to be found there

  Norm norm;
  bool across_heads;
  double eps;
  const void *weight, *bias;  // T [E] or [H E], or null

  const void *cos, *sin;  // T [..., L, table_width], or null
  int64_t rotary_dim, table_width, table_stride;  // numbers, from one of the batch to the next
  bool half;

  char *grad_weight, *grad_bias;  // [E] or [H E], or null
  Dtype weight_dtype, bias_dtype;  // of these

  int64_t rows_width() const { return across_heads ? heads * num_dims : num_dims; }
};

}  // namespace mmfast
