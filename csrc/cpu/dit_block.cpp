// A block of DiT in one call: the kernels of its parts, one after another. What an op of its own costs
// outside of its kernel, eight times a block and again for gradients, is paid once.
#include <array>
#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"
#include "cpu/linear_glue.h"
#include "cpu/modulation_views.h"

namespace mmfast {
namespace {

// Parts of the modulation, in their order.
enum Part { shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, parts };

void check_memory_of_norm(bool made) {
  STD_TORCH_CHECK(made, "mmfast: dit_block ran out of memory for its norms");
}

Tensor empty_like_of(const Tensor& x, const std::vector<int64_t>& sizes, Dtype dtype) {
  return on_huge_pages(torch::stable::new_empty(x, sizes, scalar_type(dtype)));
}

// Without elements.
Tensor nothing(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

// modulation [B, F, 6 C], or its gradient, taken apart.
class Modulation {
 public:
  explicit Modulation(const Tensor& given)
      : tensor_(given.stride(2) == 1 || given.size(2) == 1 ? given
                                                           : torch::stable::contiguous(given)) {}

  ModulationView operator[](Part part) const {
    const Dtype dtype = dtype_of(tensor_);
    const int64_t size = size_of(dtype), channels = tensor_.size(2) / parts;
    return {(char*)tensor_.data_ptr() + part * channels * size, dtype, tensor_.stride(0) * size,
            tensor_.stride(1) * size};
  }
  int64_t frames() const { return tensor_.size(1); }

 private:
  const Tensor tensor_;
};

BlockShape shape_of(const Tensor& x, const Modulation& modulation, Dtype branch) {
  const Dtype dtype = dtype_of(x);
  return {x.size(0), x.size(1), modulation.frames(), x.size(2), dtype, branch, false, false};
}

// The norm of residual, modulated, in the branch's dtype; its statistics if there is room for them.
Tensor normed(const Tensor& residual, const Modulation& modulation, Part shifts, Part scales,
              double eps, Dtype branch, Tensor& mean, Tensor& rstd) {
  Tensor modulated = empty_like_of(residual, sizes_of(residual, 3), branch);
  ModulationViews views;
  GatedResidualModulateArgs args{};
  args.shape = shape_of(residual, modulation, branch);
  args.eps = eps;
  args.x = views.tokens(residual);
  args.shift = modulation[shifts];
  args.scale = modulation[scales];
  args.modulated = views.tokens(modulated);
  args.mean = (char*)mean.data_ptr();
  args.rstd = (char*)rstd.data_ptr();
  check_memory_of_norm(kernels().gated_residual_modulate(args, parallel()));
  return modulated;
}

// Queries, keys and values of tokens [B, L, 3 A], or gradients of them.
struct PackedHeads {
  HeadRows query, key, value;

  PackedHeads(const Tensor& packed, int64_t heads) {
    const int64_t size = size_of(dtype_of(packed)), rows = packed.size(1), width = packed.size(2);
    const HeadRows first{(char*)packed.data_ptr(), rows * width * size, width / 3 / heads * size,
                         width * size};
    query = key = value = first;
    key.data += width / 3 * size;
    value.data += 2 * (width / 3) * size;
  }
};

HeadRows heads_of(const Tensor& tokens, int64_t heads) {
  const int64_t size = size_of(dtype_of(tokens)), rows = tokens.size(1), width = tokens.size(2);
  return {(char*)tokens.data_ptr(), rows * width * size, width / heads * size, width * size};
}

AttentionArgs attention_of(const Tensor& qkv, const Tensor& attended, const Tensor& lse,
                           int64_t heads, double factor) {
  AttentionArgs args{};
  args.dtype = dtype_of(qkv);
  args.batches = qkv.size(0);
  args.heads = args.key_heads = heads;
  args.width = args.value_width = qkv.size(2) / 3 / heads;
  args.scale = factor;
  args.query_streams = args.key_streams = 1;
  const int64_t rows = qkv.size(1), size = (int64_t)(args.dtype == Dtype::float64 ? 8 : 4);
  const PackedHeads packed(qkv, heads);
  QueryStream& queries = args.queries[0];
  queries.sequences = {rows, nullptr, nullptr};
  queries.query = packed.query;
  queries.out = heads_of(attended, heads);
  queries.lse = {(char*)lse.data_ptr(), heads * rows * size, rows * size, size};
  KeyStream& keys = args.keys[0];
  keys.sequences = queries.sequences;
  keys.key = packed.key;
  keys.value = packed.value;
  args.causal = Causal::none;
  return args;
}

void check_sizes(const Tensor& x, const Tensor& modulation) {
  STD_TORCH_CHECK(x.dim() == 3 && modulation.dim() == 3 && x.numel() > 0 &&
                      modulation.size(0) == x.size(0) && modulation.size(1) > 0 &&
                      x.size(1) % modulation.size(1) == 0 &&
                      modulation.size(2) == parts * x.size(2),
                  "mmfast: dit_block takes tokens [B, L, C] and modulation [B, F, 6 C]");
}

// In place: no room for activated rows is needed where nobody wants the others again.
void activate(const Tensor& hidden, const std::string& activation) {
  if (activation == "none") return;
  GatedActivationArgs args{};
  args.gate = rows_of(hidden, 0, 0);
  args.activation = (Activation)choice("activation", activation, {"gelu", "gelu_tanh", "silu"});
  args.out = (char*)hidden.data_ptr();
  args.out_stride = hidden.size(2) * size_of(args.gate.dtype);
  kernels().gated_activation(args, parallel());
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor, Tensor>;

Outputs dit_block(const Tensor& x, const Tensor& modulation, const Tensor& qkv_weight,
                  const Optional& qkv_bias, const Tensor& proj_weight, const Optional& proj_bias,
                  const Tensor& fc1_weight, const Optional& fc1_bias, const Tensor& fc2_weight,
                  const Optional& fc2_bias, int64_t heads, double factor, double eps,
                  double mlp_eps, const std::string& activation, const std::string& dtype,
                  bool keep) {
  check_sizes(x, modulation);
  const Dtype branch = dtype_named(dtype), wide = dtype_of(x);
  STD_TORCH_CHECK(branch == wide || (wide == Dtype::float32 && size_of(branch) == 2),
                  "mmfast: dit_block multiplies in x's dtype, or in half precision beside float32");
  const Modulation made(modulation);
  const auto kept = [&](Tensor& tensor) {
    if (!keep) tensor = nothing(x);
  };

  Tensor mean = statistics_like(x, true), rstd = statistics_like(x, true);
  Tensor qkv = linear(normed(x, made, shift, scale, eps, branch, mean, rstd), qkv_weight,
                      qkv_bias, "none", branch);
  Tensor attended = empty_like_of(qkv, {x.size(0), x.size(1), qkv.size(2) / 3}, branch);
  Tensor lse = new_sums(qkv, {x.size(0), heads, x.size(1)});
  check_memory(kernels().attention_forward(attention_of(qkv, attended, lse, heads, factor),
                                           parallel()));
  kept(qkv);
  kept(lse);
  Tensor y = linear(attended, proj_weight, proj_bias, "none", branch);
  kept(attended);

  Tensor residual = room_like(x), mlp_mean = statistics_like(x, true);
  Tensor mlp_rstd = statistics_like(x, true);
  Tensor modulated = empty_like_of(x, sizes_of(x, 3), branch);
  {
    ModulationViews views;
    GatedResidualModulateArgs args{};
    args.shape = shape_of(x, made, branch);
    args.eps = mlp_eps;
    args.x = views.tokens(x);
    args.y = views.tokens(y);
    args.gate = made[gate];
    args.shift = made[mlp_shift];
    args.scale = made[mlp_scale];
    args.residual = views.tokens(residual);
    args.modulated = views.tokens(modulated);
    args.mean = (char*)mlp_mean.data_ptr();
    args.rstd = (char*)mlp_rstd.data_ptr();
    check_memory_of_norm(kernels().gated_residual_modulate(args, parallel()));
  }
  kept(y);
  Tensor hidden = linear(modulated, fc1_weight, fc1_bias, "none", branch);
  modulated = nothing(x);
  if (!keep) activate(hidden, activation);
  Tensor fed = linear(hidden, fc2_weight, fc2_bias, keep ? activation : "none", branch);
  kept(hidden);

  // In the place of the residual where nobody needs it.
  Tensor out = keep ? room_like(x) : residual;
  {
    ModulationViews views;
    GatedResidualModulateArgs args{};
    args.shape = shape_of(x, made, branch);
    args.x = views.tokens(residual);
    args.y = views.tokens(fed);
    args.gate = made[mlp_gate];
    args.residual = views.tokens(out);
    check_memory_of_norm(kernels().gated_residual_modulate(args, parallel()));
  }
  for (Tensor* tensor : {&mean, &rstd, &residual, &mlp_mean, &mlp_rstd, &fed}) kept(*tensor);
  return {out, mean, rstd, qkv, attended, lse, y, residual, mlp_mean, mlp_rstd, hidden, fed};
}

// The gradients in the order of the inputs.
enum Input { of_x, of_modulation, of_qkv, of_qkv_bias, of_proj, of_proj_bias, of_fc1, of_fc1_bias,
             of_fc2, of_fc2_bias, inputs };

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dit_block_bwd(const Tensor& grad, const Tensor& x, const Tensor& modulation,
                        const Tensor& qkv_weight, const Tensor& proj_weight,
                        const Tensor& fc1_weight, const Tensor& fc2_weight, const Tensor& means,
                        const Tensor& rstds, const Tensor& packed_heads, const Tensor& heads_out,
                        const Tensor& logarithms, const Tensor& y, const Tensor& residual,
                        const Tensor& mlp_means, const Tensor& mlp_rstds, const Tensor& hidden,
                        const Tensor& fed, int64_t heads, double factor, double eps,
                        double mlp_eps, const std::string& activation, int64_t wanted) {
  // As the forward made them, unless somebody has moved them.
  const Tensor mean = torch::stable::contiguous(means), rstd = torch::stable::contiguous(rstds);
  const Tensor mlp_mean = torch::stable::contiguous(mlp_means);
  const Tensor mlp_rstd = torch::stable::contiguous(mlp_rstds);
  const Tensor qkv = torch::stable::contiguous(packed_heads);
  const Tensor attended = torch::stable::contiguous(heads_out);
  const Tensor lse = torch::stable::contiguous(logarithms);
  check_sizes(x, modulation);
  const Dtype branch = dtype_of(qkv);
  const Modulation made(modulation);
  const auto wants = [&](Input input) { return (wanted >> input & 1) != 0; };
  std::vector<Tensor> to;
  const std::array<const Tensor*, inputs> likes{&x,          &modulation,  &qkv_weight, &qkv_weight,
                                                &proj_weight, &proj_weight, &fc1_weight, &fc1_weight,
                                                &fc2_weight, &fc2_weight};
  for (int i = 0; i < inputs; ++i) {
    const bool of_bias = i >= of_qkv && (i - of_qkv) % 2 == 1;
    const Tensor& like = *likes[(size_t)i];
    to.push_back(wants((Input)i)
                     ? on_huge_pages(torch::stable::new_empty(
                           like, sizes_of(like, of_bias ? 1 : like.dim())))
                     : nothing(x));
  }
  const Modulation to_modulation(wants(of_modulation) ? to[of_modulation] : modulation);
  const auto to_part = [&](Part part) {
    return wants(of_modulation) ? to_modulation[part] : ModulationView{};
  };
  // How far back gradients have to go.
  const bool at_norm = wants(of_x) || wants(of_modulation);
  const bool at_qkv = at_norm || wants(of_qkv) || wants(of_qkv_bias);
  const bool at_y = at_qkv || wants(of_proj) || wants(of_proj_bias);
  const bool at_hidden = at_y || wants(of_fc1) || wants(of_fc1_bias);
  const bool at_fed = at_hidden || wants(of_fc2) || wants(of_fc2_bias);

  // Of a linear layer: its weight's and bias' gradients, and if asked for that of its input.
  const auto layer = [&](const Tensor& passed, const Tensor& input, const Tensor& weight,
                         const std::string& active, Input of_weight, bool further) {
    Tensor to_input = further ? empty_like_of(input, sizes_of(input, 3), branch) : nothing(x);
    linear_gradients(passed, input, weight, active,
                     {&to_input, &to[of_weight], &to[of_weight + 1]});
    return to_input;
  };
  // Of one whose input was made again: its gradient takes that one's place.
  const auto layer_in_place = [&](const Tensor& passed, Tensor input, const Tensor& weight,
                                  Input of_weight, bool further) {
    linear_gradients(passed, input, weight, "none",
                     {nullptr, &to[of_weight], &to[of_weight + 1]});
    if (further) linear_gradients(passed, input, weight, "none", {&input, nullptr, nullptr});
    return input;
  };
  // A norm's output, made again where a weight's gradient needs its numbers.
  const auto again = [&](const Tensor& from, Part shifts, Part scales, double its_eps,
                         Input of_weight) {
    if (!wants(of_weight)) return empty_like_of(from, sizes_of(from, 3), branch);
    Tensor means = statistics_like(from, true), rstds = statistics_like(from, true);
    return normed(from, made, shifts, scales, its_eps, branch, means, rstds);
  };

  Tensor to_fed = nothing(x);
  if (at_fed) {
    to_fed = room_like(fed);
    ModulationViews views;
    GatedResidualModulateBwdArgs args{};
    args.shape = shape_of(x, made, branch);
    args.grad_residual = views.tokens(grad);
    args.y = views.tokens(fed);
    args.gate = made[mlp_gate];
    args.to_gate = to_part(mlp_gate);
    args.to_y = views.tokens(to_fed);
    check_memory_of_norm(kernels().gated_residual_modulate_bwd(args, parallel()));
  }
  Tensor to_hidden = nothing(x);
  if (at_fed) to_hidden = layer(to_fed, hidden, fc2_weight, activation, of_fc2, at_hidden);
  to_fed = nothing(x);
  Tensor to_modulated = nothing(x);
  if (at_hidden)
    to_modulated = layer_in_place(to_hidden,
                                  again(residual, mlp_shift, mlp_scale, mlp_eps, of_fc1),
                                  fc1_weight, of_fc1, at_y);
  to_hidden = nothing(x);

  Tensor to_residual = nothing(x), to_y = nothing(x);
  if (at_y) {
    to_residual = room_like(x);
    to_y = room_like(y);
    ModulationViews views;
    GatedResidualModulateBwdArgs args{};
    args.shape = shape_of(x, made, branch);
    args.grad_residual = views.tokens(grad);
    args.grad_modulated = views.tokens(to_modulated);
    args.residual = views.tokens(residual);
    args.y = views.tokens(y);
    args.mean = (const char*)mlp_mean.data_ptr();
    args.rstd = (const char*)mlp_rstd.data_ptr();
    args.gate = made[gate];
    args.shift = made[mlp_shift];
    args.scale = made[mlp_scale];
    args.to_x = views.tokens(to_residual);
    args.to_y = views.tokens(to_y);
    args.to_gate = to_part(gate);
    args.to_shift = to_part(mlp_shift);
    args.to_scale = to_part(mlp_scale);
    check_memory_of_norm(kernels().gated_residual_modulate_bwd(args, parallel()));
  }
  to_modulated = nothing(x);
  Tensor to_attended = nothing(x);
  if (at_y) to_attended = layer(to_y, attended, proj_weight, "none", of_proj, at_qkv);
  to_y = nothing(x);
  if (at_qkv) {
    Tensor to_qkv = room_like(qkv);
    AttentionArgs args = attention_of(qkv, attended, lse, heads, factor);
    const PackedHeads packed(to_qkv, heads);
    args.queries[0].grad_out = heads_of(to_attended, heads);
    args.queries[0].grad_query = packed.query;
    args.keys[0].grad_key = packed.key;
    args.keys[0].grad_value = packed.value;
    check_memory(kernels().attention_backward(args, parallel()));
    to_attended = nothing(x);
    to_modulated =
        layer_in_place(to_qkv, again(x, shift, scale, eps, of_qkv), qkv_weight, of_qkv, at_norm);
  }
  if (at_norm) {
    ModulationViews views;
    GatedResidualModulateBwdArgs args{};
    args.shape = shape_of(x, made, branch);
    args.grad_residual = views.tokens(to_residual);
    args.grad_modulated = views.tokens(to_modulated);
    args.residual = views.tokens(x);
    args.mean = (const char*)mean.data_ptr();
    args.rstd = (const char*)rstd.data_ptr();
    args.shift = made[shift];
    args.scale = made[scale];
    if (wants(of_x)) args.to_x = views.tokens(to[of_x]);
    args.to_shift = to_part(shift);
    args.to_scale = to_part(scale);
    check_memory_of_norm(kernels().gated_residual_modulate_bwd(args, parallel()));
  }
  return {to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8], to[9]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("dit_block", MMFAST_BOX(&dit_block));
  m.impl("dit_block_bwd", MMFAST_BOX(&dit_block_bwd));
}

}  // namespace mmfast
