// Linear layers: products of bfloat16, where a processor has them.
// Included by each of cpu/isa/*_linear.cpp after it has named MMFAST_ISA.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/linear_kernel.h"

namespace mmfast {

template <>
void add_linear<isa::MMFAST_ISA>(Kernels& kernels) {
  kernels.linear = &MMFAST_ISA::linear;
}

}  // namespace mmfast
