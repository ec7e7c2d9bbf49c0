// The kernels of one instruction set, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/code_statistics.h"
#include "cpu/ema_update.h"
#include "cpu/finite_scalar_quantize.h"
#include "cpu/gated_activation.h"
#include "cpu/gated_residual_modulate.h"
#include "cpu/guidance_factors.h"
#include "cpu/linear.h"
#include "cpu/lookup_free_quantize.h"
#include "cpu/nearest_code.h"
#include "cpu/pack_indices.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/randn.h"
#include "cpu/residual_quantize.h"
#include "cpu/sample_code.h"
#include "cpu/soft_assignment_statistics.h"
#include "cpu/sampler_step.h"
#include "cpu/timestep_embedding.h"
#include "cpu/vector_quantize.h"

namespace mmfast {

struct Kernels {
  const char* isa;
  // Each returns false when memory ran out.
  bool (*nearest_code)(const NearestCodeArgs&, const Parallel&);
  bool (*code_statistics)(const CodeStatisticsArgs&, const Parallel&);
  bool (*vector_quantize)(const VectorQuantizeArgs&, const Parallel&);
  bool (*vector_quantize_bwd)(const VectorQuantizeBwdArgs&, const Parallel&);
  bool (*ema_update)(const EmaUpdateArgs&, const Parallel&);
  bool (*residual_quantize)(const ResidualQuantizeArgs&, const Parallel&);
  bool (*residual_quantize_bwd)(const ResidualQuantizeBwdArgs&, const Parallel&);
  bool (*finite_scalar_quantize)(const FiniteScalarQuantizeArgs&, const Parallel&);
  bool (*finite_scalar_quantize_bwd)(const FiniteScalarQuantizeBwdArgs&, const Parallel&);
  bool (*lookup_free_quantize)(const LookupFreeQuantizeArgs&, const Parallel&);
  bool (*lookup_free_quantize_bwd)(const LookupFreeQuantizeBwdArgs&, const Parallel&);
  void (*pack_indices)(const PackIndicesArgs&, const Parallel&);
  void (*unpack_indices)(const PackIndicesArgs&, const Parallel&);
  int64_t (*integer_products)(int64_t rounds);
  int64_t (*bfloat16_products)(int64_t rounds);
  int64_t (*matrix_products)(int64_t rounds);
  void (*randn)(const RandnArgs&, const Parallel&);
  bool (*sample_code)(const SampleCodeArgs&, const Parallel&);
  bool (*soft_assignment_statistics)(const SoftAssignmentArgs&, const Parallel&);
  bool (*soft_assignment_statistics_bwd)(const SoftAssignmentBwdArgs&, const Parallel&);
  void (*sampler_step)(const SamplerStepArgs&, const Parallel&);
  void (*guidance_factors)(const GuidanceFactorsArgs&, const Parallel&);
  bool (*qk_norm_rope)(const QkNormRopeArgs&, const QkNormRopeArgs*, const Parallel&);
  void (*timestep_embedding)(const TimestepEmbeddingArgs&, const Parallel&);
  void (*gated_activation)(const GatedActivationArgs&, const Parallel&);
  bool (*attention_backward)(const AttentionArgs&, const Parallel&);
  bool (*attention_forward)(const AttentionArgs&, const Parallel&);
  bool (*gated_residual_modulate)(const GatedResidualModulateArgs&, const Parallel&);
  bool (*gated_residual_modulate_bwd)(const GatedResidualModulateBwdArgs&, const Parallel&);
  bool (*linear)(const LinearArgs&, const Parallel&);
};

namespace isa {
struct baseline {};
struct avx2 {};
struct avx512 {};
struct avx512vnni {};
struct avx512bf16 {};
struct amx {};
}  // namespace isa

// The kernels of one group, compiled for an instruction set: each specialisation has its file in
// cpu/isa/, which gets that set's flags. A group has files for the sets that make a difference to it.
template <class Isa>
void add_lookups(Kernels& kernels);
template <class Isa>
void add_transformers(Kernels& kernels);
template <class Isa>
void add_streams(Kernels& kernels);
template <class Isa>
void add_linear(Kernels& kernels);

// What the processor has, lowered by the environment variable MMFAST_ISA, read at first use.
const Kernels& kernels();
std::vector<std::string> supported_isas();

}  // namespace mmfast
