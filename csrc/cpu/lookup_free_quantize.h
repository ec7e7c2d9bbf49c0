// What the lookup_free_quantize kernels of every instruction set are given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct LookupFreeQuantizeArgs {
  Rows z;  // (N, C B)
  int64_t codebooks;  // C
  double scale;
  bool spherical;
  double inv_temperature;
  int64_t group;     // g, bits whose joint distribution is averaged; 0: no losses
  const bool* mask;  // (N,) or null
  char* quantized;   // (N, C B), of z's dtype
  int64_t* indices;  // (N, C)
  // One number each, and (C B / g, 2^g): float64 if z is, else float32.
  void *commitment, *entropy, *means;
};

struct LookupFreeQuantizeBwdArgs {
  LookupFreeQuantizeArgs forward;  // without its outputs
  Rows quantized;                  // (N, C B), its gradient; no data where it is absent
  // Gradients of one number each, 0 where absent, and of (C B / g, 2^g), dense, or null; the latter
  // float64 if z is, else float32.
  double commitment, entropy;
  const void* means;
  char* result;  // (N, C B), of z's dtype
};

}  // namespace mmfast
