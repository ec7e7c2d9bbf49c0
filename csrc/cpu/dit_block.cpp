// A block of DiT in one call: the kernels of its parts, one after another. What an op of its own costs
// outside of its kernel, eight times a block and again for gradients, is paid once.
#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"
#include "cpu/linear_glue.h"
#include "cpu/modulation_views.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

// Parts of the modulation, in their order.
enum Part { shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, parts };

void check_memory_of_norm(bool made) {
  STD_TORCH_CHECK(made, "mmfast: dit_block ran out of memory for its norms");
}

Tensor empty_like_of(const Tensor& x, const std::vector<int64_t>& sizes, Dtype dtype) {
  return new_output(x, sizes, scalar_type(dtype));
}

// [B, L, width] beside x.
Tensor new_rows(const Tensor& x, int64_t width, Dtype dtype) {
  return empty_like_of(x, {x.size(0), x.size(1), width}, dtype);
}

// Without elements.
Tensor nothing(const Tensor& x) { return new_output(x, {0}); }

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

// Rows [B, L] of temporary results in one piece of memory: many tensors would each find another
// place in the heap, whose pages stay. What is no longer needed is written over.
class Workspace {
 public:
  // Two parts, for rows as wide as the widest of each.
  Workspace(const Tensor& x, Dtype dtype, std::initializer_list<int64_t> firsts,
            std::initializer_list<int64_t> seconds)
      : batch_(x.size(0)),
        length_(x.size(1)),
        split_(std::max(firsts)),
        all_(empty_like_of(x, {batch_ * length_ * (split_ + std::max(seconds))}, dtype)) {}

  Tensor first(int64_t width) const { return part(0, width); }
  Tensor second(int64_t width) const { return part(batch_ * length_ * split_, width); }

 private:
  Tensor part(int64_t from, int64_t width) const {
    Tensor all = all_;
    return torch::stable::view(torch::stable::narrow(all, 0, from, batch_ * length_ * width),
                               {batch_, length_, width});
  }

  const int64_t batch_, length_, split_;
  Tensor all_;
};

// The norm of residual, modulated; its statistics.
void write_normed(Tensor& modulated, const Tensor& residual, const Modulation& modulation,
                  Part shifts, Part scales, double eps, Tensor& mean, Tensor& rstd) {
  ModulationViews views;
  GatedResidualModulateArgs args{};
  args.shape = shape_of(residual, modulation, dtype_of(modulated));
  args.eps = eps;
  args.x = views.tokens(residual);
  args.shift = modulation[shifts];
  args.scale = modulation[scales];
  args.modulated = views.tokens(modulated);
  args.mean = (char*)mean.data_ptr();
  args.rstd = (char*)rstd.data_ptr();
  check_memory_of_norm(kernels().gated_residual_modulate(args, parallel()));
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
  const int64_t channels = x.size(2), width = proj_weight.size(1), fed_width = fc1_weight.size(0);
  // Without gradients, all but the result are in the workspace.
  const Workspace room(x, branch, {channels, keep ? 0 : width},
                       {keep ? 0 : std::max({3 * width, channels, fed_width})});

  Tensor mean = statistics_like(x, true), rstd = statistics_like(x, true);
  Tensor modulated = room.first(channels);
  write_normed(modulated, x, made, shift, scale, eps, mean, rstd);
  Tensor qkv = keep ? new_rows(x, 3 * width, branch) : room.second(3 * width);
  linear_to(qkv, modulated, qkv_weight, qkv_bias, "none");
  Tensor attended = keep ? new_rows(x, width, branch) : room.first(width);
  Tensor lse = new_sums(qkv, {x.size(0), heads, x.size(1)});
  check_memory(kernels().attention_forward(attention_of(qkv, attended, lse, heads, factor),
                                           parallel()));
  Tensor y = keep ? new_rows(x, channels, branch) : room.second(channels);
  linear_to(y, attended, proj_weight, proj_bias, "none");

  Tensor residual = room_like(x), mlp_mean = statistics_like(x, true);
  Tensor mlp_rstd = statistics_like(x, true);
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
  Tensor hidden = keep ? new_rows(x, fed_width, branch) : room.second(fed_width);
  linear_to(hidden, modulated, fc1_weight, fc1_bias, "none");
  if (!keep) activate(hidden, activation);
  Tensor fed = keep ? new_rows(x, channels, branch) : room.first(channels);
  linear_to(fed, hidden, fc2_weight, fc2_bias, keep ? activation : "none");

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
  if (!keep)
    for (Tensor* tensor : {&mean, &rstd, &qkv, &attended, &lse, &y, &residual, &mlp_mean,
                           &mlp_rstd, &hidden, &fed})
      *tensor = nothing(x);
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
                     ? new_output(like, sizes_of(like, of_bias ? 1 : like.dim()))
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

  const int64_t channels = x.size(2), width = attended.size(2), fed_width = hidden.size(2);
  const Workspace room(x, branch, {channels, width}, {qkv.size(2), channels, fed_width});

  // Of a linear layer: gradients of its weight and bias, and if asked for that of its input.
  const auto layer = [&](const Tensor& passed, const Tensor& input, const Tensor& weight,
                         const std::string& active, Input of_weight, Tensor* to_input) {
    linear_gradients(passed, input, weight, active,
                     {to_input, &to[of_weight], &to[of_weight + 1]});
  };
  // Of one behind a norm, whose output is made again where a weight's gradient needs its numbers:
  // the input's gradient takes that one's place.
  const auto normed_layer = [&](const Tensor& passed, const Tensor& from, Part shifts, Part scales,
                                double its_eps, const Tensor& weight, Input of_weight,
                                bool further) {
    Tensor input = room.first(channels);
    if (wants(of_weight)) {
      Tensor means = statistics_like(from, true), rstds = statistics_like(from, true);
      write_normed(input, from, made, shifts, scales, its_eps, means, rstds);
    }
    layer(passed, input, weight, "none", of_weight, nullptr);
    if (further) linear_gradients(passed, input, weight, "none", {&input, nullptr, nullptr});
    return input;
  };
  // Of a norm, modulated, and of the sum before it.
  const auto norm = [&](ModulationViews& views, const Tensor& to_sum, const Tensor& to_modulated,
                        const Tensor& sum, const Tensor& its_mean, const Tensor& its_rstd,
                        Part shifts, Part scales) {
    GatedResidualModulateBwdArgs args{};
    args.shape = shape_of(x, made, branch);
    args.grad_residual = views.tokens(to_sum);
    args.grad_modulated = views.tokens(to_modulated);
    args.residual = views.tokens(sum);
    args.mean = (const char*)its_mean.data_ptr();
    args.rstd = (const char*)its_rstd.data_ptr();
    args.shift = made[shifts];
    args.scale = made[scales];
    args.to_shift = to_part(shifts);
    args.to_scale = to_part(scales);
    return args;
  };

  Tensor to_fed = room.first(channels);
  if (at_fed) {
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
  Tensor to_hidden = room.second(fed_width), to_modulated = to_fed;
  if (at_fed)
    layer(to_fed, hidden, fc2_weight, activation, of_fc2, at_hidden ? &to_hidden : nullptr);
  if (at_hidden)
    to_modulated = normed_layer(to_hidden, residual, mlp_shift, mlp_scale, mlp_eps, fc1_weight,
                                of_fc1, at_y);

  Tensor to_residual = nothing(x), to_y = room.second(channels);
  if (at_y) {
    // Where the gradient of x is written later, number after number.
    to_residual = wants(of_x) ? to[of_x] : room_like(x);
    ModulationViews views;
    GatedResidualModulateBwdArgs args =
        norm(views, grad, to_modulated, residual, mlp_mean, mlp_rstd, mlp_shift, mlp_scale);
    args.y = views.tokens(y);
    args.gate = made[gate];
    args.to_gate = to_part(gate);
    args.to_x = views.tokens(to_residual);
    args.to_y = views.tokens(to_y);
    check_memory_of_norm(kernels().gated_residual_modulate_bwd(args, parallel()));
  }
  Tensor to_attended = room.first(width);
  if (at_y)
    layer(to_y, attended, proj_weight, "none", of_proj, at_qkv ? &to_attended : nullptr);
  if (at_qkv) {
    Tensor to_qkv = room.second(qkv.size(2));
    AttentionArgs args = attention_of(qkv, attended, lse, heads, factor);
    const PackedHeads packed(to_qkv, heads);
    args.queries[0].grad_out = heads_of(to_attended, heads);
    args.queries[0].grad_query = packed.query;
    args.keys[0].grad_key = packed.key;
    args.keys[0].grad_value = packed.value;
    check_memory(kernels().attention_backward(args, parallel()));
    to_modulated = normed_layer(to_qkv, x, shift, scale, eps, qkv_weight, of_qkv, at_norm);
  }
  if (at_norm) {
    ModulationViews views;
    GatedResidualModulateBwdArgs args =
        norm(views, to_residual, to_modulated, x, mean, rstd, shift, scale);
    if (wants(of_x)) args.to_x = views.tokens(to[of_x]);
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
