// A modulated norm is gated_residual_modulate without the residual connection.
#include <tuple>

#include "cpu/isa.h"
#include "cpu/modulation_views.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(const Tensor& x, const Optional& shift,
                                                       const Optional& scale,
                                                       const Optional& weight,
                                                       const Optional& bias, double eps,
                                                       const std::string& norm) {
  GatedResidualModulateArgs args{};
  args.shape = block_shape(x, norm, "linear", {&shift, &scale});
  Tensor modulated = room_like(x);
  Tensor mean = statistics_like(x, !args.shape.rms), rstd = statistics_like(x, true);
  ModulationViews views;
  args.eps = eps;
  args.x = views.tokens(x);
  args.shift = views.modulation(shift);
  args.scale = views.modulation(scale);
  args.weight = views.modulation(weight);
  args.bias = views.modulation(bias);
  args.modulated = views.tokens(modulated);
  args.mean = (char*)mean.data_ptr();
  args.rstd = (char*)rstd.data_ptr();
  STD_TORCH_CHECK(kernels().gated_residual_modulate(args, parallel()),
                  "layer_norm_modulate: out of memory for ", x.size(2), " channels");
  return {modulated, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_bwd(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const Optional& shift, const Optional& scale, const Optional& weight, const Optional& bias,
    const std::string& norm, bool need_x, bool need_shift, bool need_scale, bool need_weight,
    bool need_bias) {
  Tensor to_x = gradient_like(x, x, need_x), to_shift = gradient_like(x, shift, need_shift),
         to_scale = gradient_like(x, scale, need_scale),
         to_weight = gradient_like(x, weight, need_weight),
         to_bias = gradient_like(x, bias, need_bias);
  ModulationViews views;
  GatedResidualModulateBwdArgs args{};
  args.shape = block_shape(x, norm, "linear", {&shift, &scale});
  args.grad_modulated = views.tokens(grad);
  args.residual = views.tokens(x);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  args.mean = (const char*)means.data_ptr();
  args.rstd = (const char*)rstds.data_ptr();
  args.shift = views.modulation(shift);
  args.scale = views.modulation(scale);
  args.weight = views.modulation(weight);
  args.bias = views.modulation(bias);
  if (need_x) args.to_x = views.tokens(to_x);
  if (need_shift) args.to_shift = views.modulation(to_shift);
  if (need_scale) args.to_scale = views.modulation(to_scale);
  if (need_weight) args.to_weight = views.modulation(to_weight);
  if (need_bias) args.to_bias = views.modulation(to_bias);
  STD_TORCH_CHECK(kernels().gated_residual_modulate_bwd(args, parallel()),
                  "layer_norm_modulate_bwd: out of memory for ", x.size(0), " x ", x.size(1),
                  " tokens of ", x.size(2), " channels");
  return {to_x, to_shift, to_scale, to_weight, to_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("layer_norm_modulate", MMFAST_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_bwd", MMFAST_BOX(&layer_norm_modulate_bwd));
}

}  // namespace mmfast
