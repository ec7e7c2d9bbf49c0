// What the gated_activation kernels of every instruction set are given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

enum class Activation : int32_t { gelu, gelu_tanh, silu };

struct GatedActivationArgs {
  Rows gate;  // (N, C), like the others; their numbers lie one after another in a row
  Rows value;  // no data where it is absent
  Rows grad;   // of the result; for the gradients only
  Activation activation;
  // The outputs, of the same dtype; without data where nothing asks for it.
  char *out, *grad_gate, *grad_value;
  int64_t out_stride;  // bytes between the rows of each
};

}  // namespace mmfast
