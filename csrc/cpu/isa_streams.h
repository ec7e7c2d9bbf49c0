// Statistics, schedules and random numbers: AVX-512 alone serves them best.
// Included by each of cpu/isa/*_streams.cpp after it has named MMFAST_ISA.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/code_statistics_kernel.h"
#include "cpu/ema_update_kernel.h"
#include "cpu/finite_scalar_quantize_kernel.h"
#include "cpu/guidance_factors_kernel.h"
#include "cpu/lookup_free_quantize_kernel.h"
#include "cpu/pack_indices_kernel.h"
#include "cpu/randn_kernel.h"
#include "cpu/sample_code_kernel.h"
#include "cpu/sampler_step_kernel.h"
#include "cpu/soft_assignment_statistics_kernel.h"
#include "cpu/vector_quantize_bwd_kernel.h"

namespace mmfast {

template <>
void add_streams<isa::MMFAST_ISA>(Kernels& kernels) {
  kernels.code_statistics = &MMFAST_ISA::code_statistics;
  kernels.ema_update = &MMFAST_ISA::ema_update;
  kernels.finite_scalar_quantize = &MMFAST_ISA::finite_scalar_quantize;
  kernels.finite_scalar_quantize_bwd = &MMFAST_ISA::finite_scalar_quantize_bwd;
  kernels.guidance_factors = &MMFAST_ISA::guidance_factors;
  kernels.lookup_free_quantize = &MMFAST_ISA::lookup_free_quantize;
  kernels.lookup_free_quantize_bwd = &MMFAST_ISA::lookup_free_quantize_bwd;
  kernels.pack_indices = &MMFAST_ISA::pack_indices;
  kernels.randn = &MMFAST_ISA::randn;
  kernels.sample_code = &MMFAST_ISA::sample_code;
  kernels.sampler_step = &MMFAST_ISA::sampler_step;
  kernels.soft_assignment_statistics = &MMFAST_ISA::soft_assignment_statistics;
  kernels.soft_assignment_statistics_bwd = &MMFAST_ISA::soft_assignment_statistics_bwd;
  kernels.unpack_indices = &MMFAST_ISA::unpack_indices;
  kernels.vector_quantize_bwd = &MMFAST_ISA::vector_quantize_bwd;
}

}  // namespace mmfast
