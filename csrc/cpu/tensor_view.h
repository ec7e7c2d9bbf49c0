// Plain views of tensors for the kernels, which know nothing of torch.
#pragma once
#include <cstdint>

namespace mmfast {

enum class Dtype : int32_t { float32, float16, bfloat16, float64 };

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// N rows of D numbers. The rows' leading dimensions keep their own strides, so that a permuted
// image needs no copy.
struct Rows {
  static constexpr int max_dims = 8;
  const char* data;
  Dtype dtype;
  int64_t count;      // N, the product of sizes
  int64_t width;      // D
  int64_t step;       // bytes between neighbours in a row
  int dims;           // leading dimensions, outermost first
  int64_t sizes[max_dims];
  int64_t strides[max_dims];  // bytes

  const char* row(int64_t i) const {
    if (dims == 1) return data + i * strides[0];
    const char* at = data;
    for (int d = dims - 1; d >= 0; --d) {
      at += (i % sizes[d]) * strides[d];
      i /= sizes[d];
    }
    return at;
  }

  // Columns [first, first + count) of all rows.
  Rows columns(int64_t first, int64_t count) const {
    Rows part = *this;
    part.data += first * step;
    part.width = count;
    return part;
  }
};

// Runs body(context, begin, end) over [0, count), on as many threads as torch allows.
using Body = void (*)(void* context, int64_t begin, int64_t end);
struct Parallel {
  int threads;
  void (*run)(int64_t count, Body body, void* context);
};

}  // namespace mmfast
