// What the pack_indices kernels of every instruction set are given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct PackIndicesArgs {
  const char* indices;  // (N, L), int64 or int32, dense
  int index_bytes;
  uint8_t* packed;  // (N, ceil(L * bits / 8)), dense
  int64_t rows;     // N
  int64_t count;    // L
  int bits;
};

}  // namespace mmfast
