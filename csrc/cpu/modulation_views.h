// Tensors of the adaLN ops as their kernels' views.
#pragma once
#include <deque>
#include <optional>
#include <string>

#include "cpu/gated_residual_modulate.h"
#include "cpu/outputs.h"

namespace mmfast {

using Optional = std::optional<Tensor>;

// The tensors in place, or copies where channels do not lie one after another; these must outlive
// the views.
class ModulationViews {
 public:
  // (B, L, C).
  TokenView tokens(const Optional& tensor) {
    if (!tensor) return {};
    const Tensor& t = dense(*tensor);
    const int64_t size = size_of(dtype_of(t));
    return {(char*)t.data_ptr(), t.stride(0) * size, t.stride(1) * size};
  }

  // (B, F, C), or (C,).
  ModulationView modulation(const Optional& tensor) {
    if (!tensor) return {};
    const Tensor& t = dense(*tensor);
    const Dtype dtype = dtype_of(t);
    const bool framed = t.dim() == 3;
    const int64_t size = size_of(dtype);
    return {(char*)t.data_ptr(), dtype, framed ? t.stride(0) * size : 0,
            framed ? t.stride(1) * size : 0};
  }

 private:
  const Tensor& dense(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    const bool is_dense = tensor.stride(last) == 1 || tensor.size(last) == 1;
    return kept_.emplace_back(is_dense ? tensor : torch::stable::contiguous(tensor));
  }

  std::deque<Tensor> kept_;
};

// For activations like x and the first of the modulations that is there.
inline BlockShape block_shape(const Tensor& x, const std::string& norm,
                              const std::string& gate_activation,
                              std::initializer_list<const Optional*> modulations) {
  const Dtype dtype = dtype_of(x);
  BlockShape shape{x.size(0), x.size(1), 1, x.size(2), dtype, dtype, false, false};
  shape.rms = choice("norm", norm, {"layer", "rms"}) == 1;
  shape.tanh = choice("gate_activation", gate_activation, {"linear", "tanh"}) == 1;
  for (const Optional* modulation : modulations)
    if (*modulation) {
      shape.frames = (*modulation)->size(1);
      break;
    }
  return shape;
}

inline Tensor room_like(const Tensor& tensor) {
  return new_output(tensor, sizes_of(tensor, tensor.dim()));
}

// Room for the gradient of tensor; without elements, and so without data, where it is not needed.
inline Tensor gradient_like(const Tensor& like, const Optional& tensor, bool needed) {
  return needed && tensor ? room_like(*tensor) : new_output(like, {0});
}

// Statistics of the rows of x, [B, L], or without elements.
inline Tensor statistics_like(const Tensor& x, bool wanted) {
  using torch::headeronly::ScalarType;
  const bool wide = dtype_of(x) == Dtype::float64;
  return new_output(x, wanted ? sizes_of(x, 2) : std::vector<int64_t>{0},
                                  wide ? ScalarType::Double : ScalarType::Float);
}

}  // namespace mmfast
