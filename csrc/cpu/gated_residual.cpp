// A residual connection is gated_residual_modulate without the norm.
#include <tuple>

#include "cpu/isa.h"
#include "cpu/modulation_views.h"

namespace mmfast {
namespace {

Tensor gated_residual(const Tensor& x, const Tensor& gate, const Tensor& y,
                      const std::string& gate_activation) {
  Tensor residual = room_like(x);
  ModulationViews views;
  GatedResidualModulateArgs args{};
  const Optional gates = gate;
  args.shape = block_shape(x, "rms", gate_activation, {&gates});
  args.x = views.tokens(x);
  args.y = views.tokens(y);
  args.gate = views.modulation(gate);
  args.residual = views.tokens(residual);
  STD_TORCH_CHECK(kernels().gated_residual_modulate(args, parallel()),
                  "gated_residual: out of memory for ", x.size(2), " channels");
  return residual;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(const Tensor& grad, const Tensor& gate,
                                              const Tensor& y, const std::string& gate_activation,
                                              bool need_gate, bool need_y) {
  Tensor to_gate = gradient_like(grad, gate, need_gate);
  Tensor to_y = gradient_like(grad, y, need_y);
  ModulationViews views;
  GatedResidualModulateBwdArgs args{};
  const Optional gates = gate;
  args.shape = block_shape(grad, "rms", gate_activation, {&gates});
  args.grad_residual = views.tokens(grad);
  args.y = views.tokens(y);
  args.gate = views.modulation(gate);
  if (need_gate) args.to_gate = views.modulation(to_gate);
  if (need_y) args.to_y = views.tokens(to_y);
  STD_TORCH_CHECK(kernels().gated_residual_modulate_bwd(args, parallel()),
                  "gated_residual_bwd: out of memory for ", grad.size(0), " x ", grad.size(1),
                  " tokens of ", grad.size(2), " channels");
  return {to_gate, to_y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("gated_residual", MMFAST_BOX(&gated_residual));
  m.impl("gated_residual_bwd", MMFAST_BOX(&gated_residual_bwd));
}

}  // namespace mmfast
