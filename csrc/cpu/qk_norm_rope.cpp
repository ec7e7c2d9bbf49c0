#include "cpu/outputs.h"
#include "cpu/qk_norm_rope.h"

#include <optional>
#include <string>
#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Memory for what is made of x: dense [B, L, H, E], or [B, H, L, E] where heads are further apart.
Tensor new_like(const Tensor& x) {
  if (x.stride(1) >= x.stride(2))
    return new_output(x, sizes_of(x, 4));
  Tensor made = new_output(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  return torch::stable::transpose(made, 1, 2);
}

Tensor nothing(const Tensor& x) { return new_output(x, {0}); }

// x, or a copy of it where the numbers of a head are scattered.
Tensor with_heads(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

HeadsView view(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  return {(char*)x.data_ptr(), {x.stride(0) * size, x.stride(1) * size, x.stride(2) * size}};
}

Optional dense(const Optional& tensor, ScalarType dtype) {
  if (!tensor) return {};
  return torch::stable::contiguous(torch::stable::to(*tensor, dtype));
}

// What q and k share.
class Call {
 public:
  Call(const Tensor& q, const Optional& cos, const Optional& sin, const std::string& norm,
       bool across_heads, const std::string& rotation, int64_t rotary_dim, double eps)
      : wide_(dtype_of(q) == Dtype::float64 ? ScalarType::Double : ScalarType::Float),
        cos_(dense(cos, wide_)),
        sin_(dense(sin, wide_)) {
    args_.dtype = dtype_of(q);
    args_.norm = (Norm)choice("norm", norm, {"rms", "layer", "none"});
    args_.across_heads = across_heads;
    args_.eps = eps;
    args_.half = choice("rotation", rotation, {"interleaved", "half"}) == 1;
    if (!cos) return;
    args_.cos = cos_->data_ptr();
    args_.sin = sin_->data_ptr();
    args_.rotary_dim = rotary_dim;
    args_.table_width = cos_->size(cos_->dim() - 1);
    args_.table_stride = cos_->dim() == 3 ? cos_->stride(0) : 0;
  }

  // Queries or keys, or their gradients. Gradients of rows are asked for by tensors that are not empty.
  void add(const Tensor& given, const Tensor& out, const Optional& weight, const Optional& bias,
           const Optional& grad = {}, const Optional& grad_weight = {},
           const Optional& grad_bias = {}) {
    Part& part = parts_[count_++];
    QkNormRopeArgs& args = part.args = args_;
    part.x = with_heads(given);
    part.weight = dense(weight, wide_);
    part.bias = dense(bias, wide_);
    args.x = view(*part.x);
    args.out = view(out);
    args.batch = given.size(0);
    args.length = given.size(1);
    args.heads = given.size(2);
    args.num_dims = given.size(3);
    args.weight = part.weight ? part.weight->data_ptr() : nullptr;
    args.bias = part.bias ? part.bias->data_ptr() : nullptr;
    if (grad) args.grad = view(*(part.grad = with_heads(*grad)));
    const auto row = [](const Optional& of, char*& at, Dtype& dtype) {
      if (!of || !of->numel()) return;
      at = (char*)of->data_ptr();
      dtype = dtype_of(*of);
    };
    row(grad_weight, args.grad_weight, args.weight_dtype);
    row(grad_bias, args.grad_bias, args.bias_dtype);
    bytes_ += (grad ? 3 : 2) * given.numel() * size_of(args.dtype);
  }

  void run() {
    if (!count_) return;
    for (Part& part : parts_) part.args.past_cache = bytes_ >= past_cache_from;
    const QkNormRopeArgs& args = parts_[0].args;
    STD_TORCH_CHECK(
        kernels().qk_norm_rope(args, count_ > 1 ? &parts_[1].args : nullptr, parallel()),
        "qk_norm_rope: out of memory for ", args.heads, " heads of dimension ", args.num_dims);
  }

 private:
  // Where more than this is read and written, little of it is found in the cache again.
  static constexpr int64_t past_cache_from = int64_t(16) << 20;

  struct Part {
    QkNormRopeArgs args;
    Optional x, weight, bias, grad;
  };

  ScalarType wide_;
  Optional cos_, sin_;
  QkNormRopeArgs args_{};
  Part parts_[2]{};
  int count_ = 0;
  int64_t bytes_ = 0;
};

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Optional& k,
                                        const Optional& weight_q, const Optional& bias_q,
                                        const Optional& weight_k, const Optional& bias_k,
                                        const Optional& cos, const Optional& sin,
                                        const std::string& norm, bool across_heads,
                                        const std::string& rotation, int64_t rotary_dim,
                                        double eps) {
  Call call(q, cos, sin, norm, across_heads, rotation, rotary_dim, eps);
  Tensor out_q = new_like(q), out_k = k ? new_like(*k) : nothing(q);
  call.add(q, out_q, weight_q, bias_q);
  if (k) call.add(*k, out_k, weight_k, bias_k);
  call.run();
  return {out_q, out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(
    const Optional& grad_q, const Optional& grad_k, const Tensor& q, const Optional& k,
    const Optional& weight_q, const Optional& bias_q, const Optional& weight_k,
    const Optional& bias_k, const Optional& cos, const Optional& sin, const std::string& norm,
    bool across_heads, const std::string& rotation, int64_t rotary_dim, double eps,
    bool want_rows) {
  Call call(q, cos, sin, norm, across_heads, rotation, rotary_dim, eps);
  const auto row = [&](const Optional& grad, const Optional& of) {
    return grad && of && want_rows ? new_output(*of, sizes_of(*of, 1)) : nothing(q);
  };
  Tensor to_q = grad_q ? new_like(q) : nothing(q);
  Tensor to_k = grad_k && k ? new_like(*k) : nothing(q);
  Tensor to_weight_q = row(grad_q, weight_q), to_bias_q = row(grad_q, bias_q);
  Tensor to_weight_k = row(grad_k, weight_k), to_bias_k = row(grad_k, bias_k);
  if (grad_q) call.add(q, to_q, weight_q, {}, grad_q, to_weight_q, to_bias_q);
  if (grad_k && k) call.add(*k, to_k, weight_k, {}, grad_k, to_weight_k, to_bias_k);
  call.run();
  return {to_q, to_k, to_weight_q, to_bias_q, to_weight_k, to_bias_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("qk_norm_rope", MMFAST_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_bwd", MMFAST_BOX(&qk_norm_rope_bwd));
}

}  // namespace mmfast
