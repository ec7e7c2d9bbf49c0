#include "cpu/gated_activation.h"

#include <optional>
#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;

// A tensor whose rows the kernel can take.
Tensor with_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return torch::stable::contiguous(tensor);
  return for_rows(tensor);
}

struct Inputs {
  Tensor x;
  Optional value;
  int64_t first = 0;  // column of the gate in x
  bool packed;

  Inputs(const Tensor& given, const Optional& given_value, const std::string& layout)
      : x(with_rows(given)), packed(layout != "gate") {
    if (given_value) value = with_rows(*given_value);
    if (choice("layout", layout, {"gate", "gate_value", "value_gate"}) == 2) first = channels();
  }

  int64_t channels() const { return x.size(x.dim() - 1) / (packed ? 2 : 1); }
  int64_t value_first() const { return channels() - first; }

  GatedActivationArgs args(const std::string& activation) const {
    GatedActivationArgs args{};
    const Rows rows = rows_of(x, 0, 0);
    args.gate = packed ? rows.columns(first, channels()) : rows;
    if (packed) args.value = rows.columns(value_first(), channels());
    if (value) args.value = rows_of(*value, 0, 0);
    args.activation = (Activation)choice("activation", activation, {"gelu", "gelu_tanh", "silu"});
    args.out_stride = channels() * size_of(rows.dtype);
    return args;
  }
};

Tensor gated_activation(const Tensor& x, const Optional& value, const std::string& activation,
                        const std::string& layout) {
  const Inputs inputs(x, value, layout);
  GatedActivationArgs args = inputs.args(activation);
  auto sizes = sizes_of(x, x.dim());
  sizes.back() = inputs.channels();
  Tensor out = new_output(x, sizes);
  args.out = (char*)out.data_ptr();
  kernels().gated_activation(args, parallel());
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(const Tensor& given_grad, const Tensor& x,
                                                const Optional& value,
                                                const std::string& activation,
                                                const std::string& layout, bool want_x,
                                                bool want_value) {
  const Inputs inputs(x, value, layout);
  const Tensor grad = with_rows(given_grad);
  GatedActivationArgs args = inputs.args(activation);
  args.grad = rows_of(grad, 0, 0);
  const auto like = [&](bool wanted) {
    return new_output(x, wanted ? sizes_of(x, x.dim()) : std::vector<int64_t>{0});
  };
  Tensor grad_x = like(want_x), grad_value = like(want_value);
  if (want_x) args.grad_gate = (char*)grad_x.data_ptr();
  if (want_value) args.grad_value = (char*)grad_value.data_ptr();
  if (inputs.packed && want_x) {
    const int64_t size = size_of(args.gate.dtype);
    args.grad_value = args.grad_gate + inputs.value_first() * size;
    args.grad_gate += inputs.first * size;
    args.out_stride *= 2;
  }
  kernels().gated_activation(args, parallel());
  return {grad_x, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("gated_activation", MMFAST_BOX(&gated_activation));
  m.impl("gated_activation_bwd", MMFAST_BOX(&gated_activation_bwd));
}

}  // namespace mmfast
