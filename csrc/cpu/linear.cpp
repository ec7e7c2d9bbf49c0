#include "cpu/linear_glue.h"

#include <tuple>

#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {

using torch::headeronly::ScalarType;

Dtype dtype_named(const std::string& name) {
  return (Dtype)choice("dtype", name, {"float32", "float16", "bfloat16", "float64"});
}

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return ScalarType::Float;
    case Dtype::float16: return ScalarType::Half;
    case Dtype::bfloat16: return ScalarType::BFloat16;
    case Dtype::float64: return ScalarType::Double;
  }
  return ScalarType::Float;
}

namespace {

// (..., C) as equally distant rows, whose numbers lie one after another; keeps what it copies.
struct Matrix {
  Tensor tensor;
  Rows rows;

  explicit Matrix(const Tensor& given) : tensor(for_rows(given)), rows(rows_of(tensor, 0, 0)) {
    if (rows.dims == 1 && (rows.width <= 1 || rows.step == size_of(rows.dtype))) return;
    tensor = torch::stable::contiguous(given);
    rows = rows_of(tensor, 0, 0);
    rows.strides[0] = rows.width * size_of(rows.dtype);  // also of no rows
    rows.dims = 1;
  }
};

void set_activation(LinearArgs& args, const std::string& activation) {
  const int32_t chosen = choice("activation", activation, {"none", "gelu", "gelu_tanh", "silu"});
  args.activated = chosen > 0;
  if (args.activated) args.activation = (Activation)(chosen - 1);
}

// Float64 is neither rounded nor made of less.
void check_width(const LinearArgs& args) {
  for (const Dtype dtype : {args.x.dtype, args.weight.dtype})
    STD_TORCH_CHECK((dtype == Dtype::float64) == (args.dtype == Dtype::float64),
                    "mmfast: linear takes float64 with float64 only");
}

// Where a gradient goes; nowhere without elements.
LinearOutput output(Tensor* tensor) {
  if (!tensor || !tensor->numel()) return {};
  return {(char*)tensor->data_ptr(), dtype_of(*tensor)};
}

void check(bool done) { STD_TORCH_CHECK(done, "mmfast: out of memory"); }

}  // namespace

void linear_to(Tensor& out, const Tensor& x, const Tensor& weight, const Optional& bias,
               const std::string& activation) {
  const Matrix given(x), weights(weight);
  LinearArgs args{};
  args.dtype = dtype_of(out);
  args.x = given.rows;
  args.weight = weights.rows;
  check_width(args);
  STD_TORCH_CHECK(out.numel() == args.x.count * weight.size(0),
                  "mmfast: a linear layer's result has a row for each of x, as wide as its weight");
  Optional dense;
  if (bias) {
    dense = torch::stable::contiguous(*bias);
    args.bias = (const char*)dense->data_ptr();
    args.bias_dtype = dtype_of(*dense);
  }
  set_activation(args, activation);
  args.out = output(&out);
  if (out.numel()) check(kernels().linear(args, parallel()));
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias,
              const std::string& activation, Dtype dtype) {
  auto sizes = sizes_of(x, x.dim());
  sizes.back() = weight.size(0);
  Tensor out = new_output(x, sizes, scalar_type(dtype));
  linear_to(out, x, weight, bias, activation);
  return out;
}

void linear_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                      const std::string& activation, const LinearGradients& to) {
  const Matrix gradient(grad), given(x), weights(weight);
  LinearArgs args{};
  args.dtype = gradient.rows.dtype;
  args.grad = gradient.rows;
  args.x = given.rows;
  args.weight = weights.rows;
  check_width(args);
  set_activation(args, activation);
  args.grad_x = output(to.x);
  args.grad_weight = output(to.weight);
  args.grad_bias = output(to.bias);
  if (args.grad_x.data || args.grad_weight.data || args.grad_bias.data)
    check(kernels().linear(args, parallel()));
}

namespace {

Tensor linear_op(const Tensor& x, const Tensor& weight, const Optional& bias,
                 const std::string& activation, const std::string& dtype) {
  return linear(x, weight, bias, activation, dtype_named(dtype));
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& grad, const Tensor& x,
                                              const Tensor& weight, const std::string& activation,
                                              bool want_x, bool want_weight, bool want_bias) {
  const auto like = [](const Tensor& tensor, bool wanted, int64_t dims) {
    return new_output(tensor, wanted ? sizes_of(tensor, dims) : std::vector<int64_t>{0});
  };
  Tensor grad_x = like(x, want_x, x.dim()), grad_weight = like(weight, want_weight, 2);
  Tensor grad_bias = like(weight, want_bias, 1);
  linear_gradients(grad, x, weight, activation, {&grad_x, &grad_weight, &grad_bias});
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("linear", MMFAST_BOX(&linear_op));
  m.impl("linear_bwd", MMFAST_BOX(&linear_bwd));
}

}  // namespace mmfast
