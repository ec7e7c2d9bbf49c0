// The kernels of one instruction set, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "cpu/code_statistics.h"
#include "cpu/nearest_code.h"

namespace mmfast {

struct Kernels {
  const char* isa;
  // Each returns false when memory ran out.
  bool (*nearest_code)(const NearestCodeArgs&, const Parallel&);
  bool (*code_statistics)(const CodeStatisticsArgs&, const Parallel&);
  int64_t (*dot_products)(int64_t rounds, bool bfloat16);
  int64_t (*matrix_products)(int64_t rounds);
};

// Filled in by the files in cpu/isa/, each compiled with its own flags.
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, avx512vnni_kernels,
    amx_kernels;

// What the processor has, lowered by the environment variable MMFAST_ISA, read at first use.
const Kernels& kernels();
std::vector<std::string> supported_isas();

}  // namespace mmfast
