// Diffusion transformers: products of bfloat16, where a processor has them.
// Included by each of cpu/isa/*_transformers.cpp after it has named MMFAST_ISA.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/attention_backward_kernel.h"
#include "cpu/attention_forward_kernel.h"
#include "cpu/gated_activation_kernel.h"
#include "cpu/gated_residual_modulate_bwd_kernel.h"
#include "cpu/gated_residual_modulate_kernel.h"
#include "cpu/peak.h"
#include "cpu/qk_norm_rope_kernel.h"
#include "cpu/timestep_embedding_kernel.h"

namespace mmfast {

template <>
void add_transformers<isa::MMFAST_ISA>(Kernels& kernels) {
  kernels.attention_backward = &MMFAST_ISA::attention_backward;
  kernels.attention_forward = &MMFAST_ISA::attention_forward;
  kernels.bfloat16_products = &MMFAST_ISA::bfloat16_products;
  kernels.gated_activation = &MMFAST_ISA::gated_activation;
  kernels.gated_residual_modulate = &MMFAST_ISA::gated_residual_modulate;
  kernels.gated_residual_modulate_bwd = &MMFAST_ISA::gated_residual_modulate_bwd;
  kernels.qk_norm_rope = &MMFAST_ISA::qk_norm_rope;
  kernels.timestep_embedding = &MMFAST_ISA::timestep_embedding;
}

}  // namespace mmfast
