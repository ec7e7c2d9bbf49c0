// The kernels of one instruction set, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "cpu/code_statistics.h"
#include "cpu/ema_update.h"
#include "cpu/nearest_code.h"
#include "cpu/vector_quantize.h"
#include "cpu/residual_quantize.h"

namespace mmfast {

struct Kernels {
  const char* isa;
  // Each returns false when memory ran out.
  bool (*nearest_code)(const NearestCodeArgs&, const Parallel&);
  bool (*code_statistics)(const CodeStatisticsArgs&, const Parallel&);
  bool (*residual_quantize)(const ResidualQuantizeArgs&, const Parallel&);
  bool (*residual_quantize_bwd)(const ResidualQuantizeBwdArgs&, const Parallel&);
  int64_t (*dot_products)(int64_t rounds, bool bfloat16);
  bool (*vector_quantize)(const VectorQuantizeArgs&, const Parallel&);
  bool (*vector_quantize_bwd)(const VectorQuantizeBwdArgs&, const Parallel&);
  bool (*ema_update)(const EmaUpdateArgs&, const Parallel&);
};

// Filled in by the files in cpu/isa/, each compiled with its own flags.
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, avx512vnni_kernels;

// What the processor has, lowered by the environment variable MMFAST_ISA, read at first use.
const Kernels& kernels();
std::vector<std::string> supported_isas();

}  // namespace mmfast
