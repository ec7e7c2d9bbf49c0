// What the randn kernel of every instruction set is given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct RandnArgs {
  const int64_t *seeds, *offsets;    // of sample b at [b * step]
  int64_t seed_step, offset_step;    // 0 where all samples share one
  int64_t samples, count;            // elements of each
  Dtype dtype;
  char* out;  // (samples, count)
};

}  // namespace mmfast
