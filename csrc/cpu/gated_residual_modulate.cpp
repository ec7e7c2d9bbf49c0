#include "cpu/gated_residual_modulate.h"

#include <tuple>

#include "cpu/isa.h"
#include "cpu/modulation_views.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_modulate(
    const Tensor& x, const Optional& gate, const Tensor& y, const Optional& shift,
    const Optional& scale, const Optional& weight, const Optional& bias, double eps,
    const std::string& norm, const std::string& gate_activation) {
  GatedResidualModulateArgs args{};
  args.shape = block_shape(x, norm, gate_activation, {&gate, &shift, &scale});
  Tensor residual = room_like(x), modulated = room_like(x);
  Tensor mean = statistics_like(x, !args.shape.rms), rstd = statistics_like(x, true);
  ModulationViews views;
  args.eps = eps;
  args.x = views.tokens(x);
  args.y = views.tokens(y);
  args.gate = views.modulation(gate);
  args.shift = views.modulation(shift);
  args.scale = views.modulation(scale);
  args.weight = views.modulation(weight);
  args.bias = views.modulation(bias);
  args.residual = views.tokens(residual);
  args.modulated = views.tokens(modulated);
  args.mean = (char*)mean.data_ptr();
  args.rstd = (char*)rstd.data_ptr();
  STD_TORCH_CHECK(kernels().gated_residual_modulate(args, parallel()),
                  "gated_residual_modulate: out of memory for ", x.size(2), " channels");
  return {residual, modulated, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulate_bwd(
    const Optional& grad_residual, const Optional& grad_modulated, const Tensor& residual,
    const Tensor& mean, const Tensor& rstd, const Optional& gate, const Optional& y,
    const Optional& shift, const Optional& scale, const Optional& weight, const Optional& bias,
    const std::string& norm, const std::string& gate_activation, bool need_x, bool need_gate,
    bool need_y, bool need_shift, bool need_scale, bool need_weight, bool need_bias) {
  Tensor to_x = gradient_like(residual, residual, need_x),
         to_gate = gradient_like(residual, gate, need_gate),
         to_y = gradient_like(residual, y, need_y),
         to_shift = gradient_like(residual, shift, need_shift),
         to_scale = gradient_like(residual, scale, need_scale),
         to_weight = gradient_like(residual, weight, need_weight),
         to_bias = gradient_like(residual, bias, need_bias);
  ModulationViews views;
  GatedResidualModulateBwdArgs args{};
  args.shape = block_shape(residual, norm, gate_activation, {&gate, &shift, &scale});
  args.grad_residual = views.tokens(grad_residual);
  args.grad_modulated = views.tokens(grad_modulated);
  args.residual = views.tokens(residual);
  args.y = views.tokens(y);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  args.mean = (const char*)means.data_ptr();
  args.rstd = (const char*)rstds.data_ptr();
  args.gate = views.modulation(gate);
  args.shift = views.modulation(shift);
  args.scale = views.modulation(scale);
  args.weight = views.modulation(weight);
  args.bias = views.modulation(bias);
  if (need_x) args.to_x = views.tokens(to_x);
  if (need_gate) args.to_gate = views.modulation(to_gate);
  if (need_y) args.to_y = views.tokens(to_y);
  if (need_shift) args.to_shift = views.modulation(to_shift);
  if (need_scale) args.to_scale = views.modulation(to_scale);
  if (need_weight) args.to_weight = views.modulation(to_weight);
  if (need_bias) args.to_bias = views.modulation(to_bias);
  STD_TORCH_CHECK(kernels().gated_residual_modulate_bwd(args, parallel()),
                  "gated_residual_modulate_bwd: out of memory for ", residual.size(0), " x ",
                  residual.size(1), " tokens of ", residual.size(2), " channels");
  return {to_x, to_gate, to_y, to_shift, to_scale, to_weight, to_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("gated_residual_modulate", MMFAST_BOX(&gated_residual_modulate));
  m.impl("gated_residual_modulate_bwd", MMFAST_BOX(&gated_residual_modulate_bwd));
}

}  // namespace mmfast
