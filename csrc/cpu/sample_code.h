// What the sample_code kernel of every instruction set is given.
#pragma once
#include "cpu/nearest_code.h"
#include "cpu/tensor_view.h"

namespace mmfast {

struct SampleCodeArgs {
  Rows x;      // (N, D) of one head
  Rows codes;  // (K, D)
  Metric metric;
  double temperature;
  const int64_t *seeds, *offsets;    // of sample b at [b * step]
  int64_t seed_step, offset_step;    // 0 where all samples share one
  int64_t rows;                      // of a sample and head
  int64_t head, heads;
  int64_t* indices;  // (N,)
};

}  // namespace mmfast
