// What the code_statistics kernel of every instruction set is given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

// Vectors and the codes they belong to.
struct Segments {
  Rows x;               // (N, D)
  const char* indices;  // (N,), int64 if index_bytes is 8, else int32
  int64_t index_stride;  // bytes
  int index_bytes;
  const char* weights;  // (N,) or null
  int64_t weight_stride;  // bytes
  Dtype weight_dtype;
  int64_t num_codes;    // K
};

struct CodeStatisticsArgs : Segments {
  void* counts;  // (K,), float64 if wide, else float32
  void* sums;    // (K, D)
  bool wide;
};

}  // namespace mmfast
