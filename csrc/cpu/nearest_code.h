// What the nearest_code kernel of every instruction set is given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

enum class Metric : int32_t { euclidean, cosine, dot };

struct NearestCodeArgs {
  Rows x;         // (N, D)
  Rows codes;     // (K, D)
  Metric metric;
  int64_t* indices;  // (N,)
  void* distances;   // (N,), float64 if wide, else float32
  bool wide;
};

}  // namespace mmfast
