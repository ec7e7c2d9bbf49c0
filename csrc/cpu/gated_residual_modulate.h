// What the kernels of the adaLN ops are given: a residual connection, a modulated norm, or both.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

// Activations (B, L, C), whose channels lie one after another.
struct TokenView {
  char* data;  // null where the tensor is absent
  int64_t batch_stride, token_stride;  // bytes

  char* at(int64_t b, int64_t token) const {
    return data + b * batch_stride + token * token_stride;
  }
};

// (B, F, C) likewise, or (C,) with strides of zero.
struct ModulationView {
  char* data;  // null where the tensor is absent
  Dtype dtype;
  int64_t batch_stride, frame_stride;  // bytes

  char* at(int64_t b, int64_t frame) const {
    return data + b * batch_stride + frame * frame_stride;
  }
};

struct BlockShape {
  int64_t batch, length, frames, channels;  // B, L, F, C
  Dtype dtype;   // of the residual
  Dtype branch;  // of y and the modulated: dtype, or a half precision beside float32
  bool rms, tanh;

  int64_t tokens_per_frame() const { return frames ? length / frames : 0; }
};

// Each part of the work is left out whose tensors are null: of y the branch, of modulated the norm.
struct GatedResidualModulateArgs {
  BlockShape shape;
  double eps;
  TokenView x, y;
  ModulationView gate, shift, scale, weight, bias;
  // Outputs. mean and rstd: [B, L], double if the residual is, else float.
  TokenView residual, modulated;
  char *mean, *rstd;
};

struct GatedResidualModulateBwdArgs {
  BlockShape shape;
  TokenView grad_residual, grad_modulated;
  TokenView residual, y;
  const char *mean, *rstd;
  ModulationView gate, shift, scale, weight, bias;
  // Outputs, contiguous; null where not needed.
  TokenView to_x, to_y;
  ModulationView to_gate, to_shift, to_scale, to_weight, to_bias;
};

}  // namespace mmfast
