// Included by each file in cpu/isa/ after it has named MMFAST_ISA: all kernels, compiled for it.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/attention_backward_kernel.h"
#include "cpu/attention_forward_kernel.h"
#include "cpu/code_statistics_kernel.h"
#include "cpu/ema_update_kernel.h"
#include "cpu/finite_scalar_quantize_kernel.h"
#include "cpu/gated_activation_kernel.h"
#include "cpu/gated_residual_modulate_bwd_kernel.h"
#include "cpu/gated_residual_modulate_kernel.h"
#include "cpu/guidance_factors_kernel.h"
#include "cpu/lookup_free_quantize_kernel.h"
#include "cpu/nearest_code_kernel.h"
#include "cpu/pack_indices_kernel.h"
#include "cpu/peak.h"
#include "cpu/qk_norm_rope_kernel.h"
#include "cpu/randn_kernel.h"
#include "cpu/residual_quantize_kernel.h"
#include "cpu/sample_code_kernel.h"
#include "cpu/soft_assignment_statistics_kernel.h"
#include "cpu/sampler_step_kernel.h"
#include "cpu/timestep_embedding_kernel.h"
#include "cpu/vector_quantize_bwd_kernel.h"
#include "cpu/vector_quantize_kernel.h"

#define MMFAST_STRING_(name) #name
#define MMFAST_STRING(name) MMFAST_STRING_(name)
#define MMFAST_JOIN_(a, b) a##b
#define MMFAST_JOIN(a, b) MMFAST_JOIN_(a, b)

namespace mmfast {
extern const Kernels MMFAST_JOIN(MMFAST_ISA, _kernels){
    MMFAST_STRING(MMFAST_ISA),
    &MMFAST_ISA::nearest_code,
    &MMFAST_ISA::code_statistics,
    &MMFAST_ISA::vector_quantize,
    &MMFAST_ISA::vector_quantize_bwd,
    &MMFAST_ISA::ema_update,
    &MMFAST_ISA::residual_quantize,
    &MMFAST_ISA::residual_quantize_bwd,
    &MMFAST_ISA::finite_scalar_quantize,
    &MMFAST_ISA::finite_scalar_quantize_bwd,
    &MMFAST_ISA::lookup_free_quantize,
    &MMFAST_ISA::lookup_free_quantize_bwd,
    &MMFAST_ISA::pack_indices,
    &MMFAST_ISA::unpack_indices,
    &MMFAST_ISA::dot_products,
    &MMFAST_ISA::matrix_products,
    &MMFAST_ISA::randn,
    &MMFAST_ISA::sample_code,
    &MMFAST_ISA::soft_assignment_statistics,
    &MMFAST_ISA::soft_assignment_statistics_bwd,
    &MMFAST_ISA::sampler_step,
    &MMFAST_ISA::guidance_factors,
    &MMFAST_ISA::qk_norm_rope,
    &MMFAST_ISA::timestep_embedding,
    &MMFAST_ISA::gated_activation,
    &MMFAST_ISA::attention_backward,
    &MMFAST_ISA::attention_forward,
    &MMFAST_ISA::gated_residual_modulate,
    &MMFAST_ISA::gated_residual_modulate_bwd,
};
}
