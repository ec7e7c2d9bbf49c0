#include "cpu/residual_quantize.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

// The codes of each stage, and where they start.
struct Stages {
  std::vector<Rows> codes;
  std::vector<int64_t> starts;
  int64_t most = 0;

  Stages(const Tensor& all, const std::vector<int64_t>& sizes, bool shared) {
    const Rows rows = rows_of(all, 0, 0);
    int64_t start = 0;
    for (const int64_t size : sizes) {
      codes.push_back(rows);
      codes.back().data = rows.row(start);
      codes.back().count = codes.back().sizes[0] = size;
      starts.push_back(start);
      most = size > most ? size : most;
      start += shared ? 0 : size;
    }
  }
};

ScalarType wide_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

// A tensor of the kernel's dtype for what goes out as `like`'s; `narrowed` makes it that.
Tensor of_kernel(const Tensor& like, bool wide, bool needed) {
  std::vector<int64_t> shape{0};
  if (needed) {
    shape.clear();
    for (int64_t d = 0; d < like.dim(); ++d) shape.push_back(like.size(d));
  }
  return new_output(like, shape, wide_type(wide));
}

Tensor narrowed(const Tensor& tensor, const Tensor& like) {
  return tensor.scalar_type() == like.scalar_type()
             ? tensor
             : torch::stable::to(tensor, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize(
    const Tensor& vectors, const Tensor& codes, std::vector<int64_t> sizes, bool shared,
    const std::string& metric, const std::string&, const std::optional<Tensor>& mask) {
  const Tensor x = for_rows(vectors);
  const bool wide = dtype_of(x) == Dtype::float64 || dtype_of(codes) == Dtype::float64;
  const int64_t stages = (int64_t)sizes.size();
  const Stages by_stage(codes, sizes, shared);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; ++d) shape.push_back(x.size(d));
  shape.push_back(stages);
  Tensor indices = new_output(x, shape, ScalarType::Long);
  Tensor quantized = of_kernel(x, wide, true);
  Tensor losses = new_output(x, {stages}, wide_type(wide));
  Tensor counts = new_output(x, {stages, by_stage.most}, wide_type(wide));
  std::optional<Tensor> whole_mask;
  if (mask) whole_mask = torch::stable::contiguous(*mask);
  ResidualQuantizeArgs args{};
  args.x = rows_of(x, 0, 0);
  args.codes = by_stage.codes.data();
  args.stages = stages;
  args.most_codes = by_stage.most;
  args.metric = metric_of(metric);
  args.mask = whole_mask ? (const bool*)whole_mask->data_ptr() : nullptr;
  args.indices = (int64_t*)indices.data_ptr();
  args.quantized = quantized.data_ptr();
  args.losses = losses.data_ptr();
  args.counts = counts.data_ptr();
  args.wide = wide;
  STD_TORCH_CHECK(by_stage.most < (int64_t(1) << 31),
                  "residual_quantize: at most 2^31 - 1 codes, got ", by_stage.most);
  STD_TORCH_CHECK(kernels().residual_quantize(args, parallel()),
                  "residual_quantize: out of memory for ", args.x.count, " vectors");
  return {narrowed(quantized, x), indices, losses, torch::stable::clone(losses), counts};
}

// Numbers of a tensor (Q,), however it lies.
std::vector<double> numbers(const std::optional<Tensor>& tensor) {
  std::vector<double> values;
  for (int64_t q = 0; tensor && q < tensor->size(0); ++q) {
    const int64_t at = q * tensor->stride(0);
    values.push_back(tensor->scalar_type() == ScalarType::Double
                         ? ((const double*)tensor->data_ptr())[at]
                         : (double)((const float*)tensor->data_ptr())[at]);
  }
  return values;
}

std::tuple<Tensor, Tensor> residual_quantize_bwd(
    const std::optional<Tensor>& quantized, const std::optional<Tensor>& commitment,
    const std::optional<Tensor>& codebook, const Tensor& vectors, const Tensor& codes,
    const Tensor& indices, std::vector<int64_t> sizes, bool shared, const std::string& gradient,
    bool need_x, bool need_codes) {
  const Tensor x = for_rows(vectors), index = torch::stable::contiguous(indices);
  const bool wide = dtype_of(x) == Dtype::float64 || dtype_of(codes) == Dtype::float64;
  const Stages by_stage(codes, sizes, shared);
  Tensor grad_x = of_kernel(x, wide, need_x), grad_codes = of_kernel(codes, wide, need_codes);
  const std::vector<double> of_commitment = numbers(commitment), of_codebook = numbers(codebook);
  std::optional<Tensor> passed;
  Rows passed_rows{};
  if (quantized) {
    passed = for_rows(*quantized);
    passed_rows = rows_of(*passed, 0, 0);
  }
  ResidualQuantizeBwdArgs args{};
  args.x = rows_of(x, 0, 0);
  args.codes = rows_of(codes, 0, 0);
  args.starts = by_stage.starts.data();
  args.stages = (int64_t)sizes.size();
  args.indices = (const int64_t*)index.data_ptr();
  args.quantized = quantized ? &passed_rows : nullptr;
  args.commitment = commitment ? of_commitment.data() : nullptr;
  args.codebook = codebook ? of_codebook.data() : nullptr;
  args.straight_through = gradient == "straight_through";
  args.grad_x = need_x ? grad_x.data_ptr() : nullptr;
  args.grad_codes = need_codes ? grad_codes.data_ptr() : nullptr;
  args.wide = wide;
  STD_TORCH_CHECK(kernels().residual_quantize_bwd(args, parallel()),
                  "residual_quantize_bwd: out of memory for ", args.codes.count, " codes");
  return {narrowed(grad_x, x), narrowed(grad_codes, codes)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("residual_quantize", MMFAST_BOX(&residual_quantize));
  m.impl("residual_quantize_bwd", MMFAST_BOX(&residual_quantize_bwd));
}

}  // namespace mmfast
