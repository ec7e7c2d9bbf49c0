// Nearest codes: products of integers, bytes and tiles, where a processor has them.
// Included by each of cpu/isa/*_lookups.cpp after it has named MMFAST_ISA.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/nearest_code_kernel.h"
#include "cpu/peak.h"
#include "cpu/residual_quantize_kernel.h"
#include "cpu/vector_quantize_kernel.h"

namespace mmfast {

template <>
void add_lookups<isa::MMFAST_ISA>(Kernels& kernels) {
  kernels.integer_products = &MMFAST_ISA::integer_products;
  kernels.matrix_products = &MMFAST_ISA::matrix_products;
  kernels.nearest_code = &MMFAST_ISA::nearest_code;
  kernels.residual_quantize = &MMFAST_ISA::residual_quantize;
  kernels.residual_quantize_bwd = &MMFAST_ISA::residual_quantize_bwd;
  kernels.vector_quantize = &MMFAST_ISA::vector_quantize;
}

}  // namespace mmfast
