// Tensors as samples, for kernels that take the numbers of a sample as they come.
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "cpu/glue.h"
#include "cpu/sampler_step.h"

namespace mmfast {

// Whether the numbers of a sample, dimensions [first, dim), lie one after another.
inline bool lies_together(const Tensor& tensor, int64_t first) {
  if (tensor.is_contiguous()) return true;  // one question, not two for each dimension
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    const int64_t size = tensor.size(d);
    if (size != 1 && tensor.stride(d) != expected) return false;
    expected *= size;
  }
  return true;
}

// The tensors' samples in place, or in copies where they are scattered; these must outlive the
// views, and are written back by finish().
class SampleViews {
 public:
  SampleView source(const Tensor& tensor) {
    return view(readable(tensor, 1));
  }
  SampleView source(const std::optional<Tensor>& tensor) {
    return tensor ? source(*tensor) : SampleView{};
  }

  // Of something that is written.
  SampleView target(const Tensor& tensor) { return view(writable(tensor, 1)); }
  SampleView target(const std::optional<Tensor>& tensor) {
    return tensor ? target(*tensor) : SampleView{};
  }

  // tensor, or a copy whose dimensions [first, dim) lie together.
  Tensor readable(const Tensor& tensor, int64_t first) {
    return lies_together(tensor, first) ? tensor : kept(torch::stable::contiguous(tensor));
  }

  // As readable(), of something that is written; finish() writes the copy back.
  Tensor writable(const Tensor& tensor, int64_t first) {
    if (lies_together(tensor, first)) return tensor;
    Tensor copy = kept(torch::stable::contiguous(tensor));
    written_.emplace_back(tensor, copy);
    return copy;
  }

  void finish() {
    for (auto& [tensor, copy] : written_) torch::stable::copy_(tensor, copy);
  }

  static SampleView view(const Tensor& tensor, int64_t first = 1) {
    const Dtype dtype = dtype_of(tensor);
    return {(char*)tensor.data_ptr(), dtype, tensor.stride(first - 1) * size_of(dtype)};
  }

 private:
  const Tensor& kept(Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }

  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

// tensor in double, dense.
inline Tensor doubles_of(const Tensor& tensor) {
  return torch::stable::contiguous(
      torch::stable::to(tensor, torch::headeronly::ScalarType::Double));
}

}  // namespace mmfast
