#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct TimestepEmbeddingArgs {
  const double* timesteps;    // [B]
  const double* frequencies;  // [dim / 2], scaled
  char* out;                  // [B, dim]
  Dtype dtype;                // of it
  int64_t batch, dim;
  bool cos_first;
};

}  // namespace mmfast
