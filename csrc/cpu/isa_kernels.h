// Included by each file in cpu/isa/ after it has named MMFAST_ISA: all kernels, compiled for it.
#pragma once
#include "cpu/isa.h"
// After isa.h and the standard headers: nothing in these may instantiate library templates, whose
// code the linker would share with processors that lack these instructions.
#include "cpu/code_statistics_kernel.h"
#include "cpu/nearest_code_kernel.h"
#include "cpu/peak.h"

#define MMFAST_STRING_(name) #name
#define MMFAST_STRING(name) MMFAST_STRING_(name)
#define MMFAST_JOIN_(a, b) a##b
#define MMFAST_JOIN(a, b) MMFAST_JOIN_(a, b)

namespace mmfast {
extern const Kernels MMFAST_JOIN(MMFAST_ISA, _kernels){
    MMFAST_STRING(MMFAST_ISA), &MMFAST_ISA::nearest_code, &MMFAST_ISA::code_statistics,
    &MMFAST_ISA::dot_products, &MMFAST_ISA::matrix_products};
}
