// Linear layers of torch's stable tensors.
#pragma once
#include <optional>
#include <string>

#include "cpu/glue.h"
#include "cpu/linear.h"

namespace mmfast {

using Optional = std::optional<Tensor>;

// The dtype of a name.
Dtype dtype_named(const std::string& name);
torch::headeronly::ScalarType scalar_type(Dtype dtype);

// act(x) weight^T + bias, written to out, a dense tensor of the products' dtype.
void linear_to(Tensor& out, const Tensor& x, const Tensor& weight, const Optional& bias,
               const std::string& activation);
// The same in a new tensor.
Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias,
              const std::string& activation, Dtype dtype);

// Room for gradients; null where they are not wanted.
struct LinearGradients {
  Tensor *x, *weight, *bias;
};

// Writes gradients from that of the result, whose dtype is the products'.
void linear_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                      const std::string& activation, const LinearGradients& to);

}  // namespace mmfast
