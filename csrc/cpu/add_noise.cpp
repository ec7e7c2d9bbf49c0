// Noising is a sampler's step with a row of its own for each sample: the noisy sample is its
// result, the target what it calls denoised.
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/outputs.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

enum Column { alpha, sigma, target_x0, target_noise, weight, columns };

// The rows of a table that samples name.
class NoisingRows {
 public:
  NoisingRows(const Tensor& table, const Tensor& timesteps)
      : table_(dense(table)), timesteps_(timesteps) {}

  // What sample b has in a column.
  double at(int64_t b, Column column) const {
    const int64_t stride = timesteps_.dim() ? timesteps_.stride(0) : 0;
    const int64_t t = ((const int64_t*)timesteps_.data_ptr())[b * stride];
    const int64_t length = table_.size(0);
    STD_TORCH_CHECK(t >= 0 && t < length, "timesteps must be from 0 to ", length - 1,
                    " for a table of ", length, " rows, got ", t);
    return ((const double*)table_.data_ptr())[t * columns + column];
  }

 private:
  Tensor table_, timesteps_;
};

// Rows for sampler_step: next = next_x x + next_m m + next_n n, denoised likewise.
class Steps {
 public:
  explicit Steps(int64_t samples) : table_((size_t)(samples * width)), steps_((size_t)samples) {
    for (int64_t b = 0; b < samples; ++b) {
      steps_[(size_t)b] = b;
      table_[(size_t)(b * width + 3)] = -std::numeric_limits<double>::infinity();
      table_[(size_t)(b * width + 4)] = std::numeric_limits<double>::infinity();
    }
  }
  enum Place { denoised_x = 0, denoised_n = 2, next_x = 9, next_m = 10, next_n = 11 };
  double& at(int64_t b, Place place) { return table_[(size_t)(b * width + place)]; }

  void run(SamplerStepArgs& args, const Tensor& like) {
    args.samples = like.size(0);
    args.elements = args.samples ? like.numel() / args.samples : 0;
    args.wide = dtype_of(like) == Dtype::float64;
    args.table = table_.data();
    args.columns = width;
    args.steps = steps_.data();
    args.step_stride = 1;
    if (args.elements) kernels().sampler_step(args, parallel());
  }

 private:
  static constexpr int64_t width = 13;
  std::vector<double> table_;
  std::vector<int64_t> steps_;
};

Tensor like(const Tensor& tensor) {
  return new_output(tensor, sizes_of(tensor, tensor.dim()));
}

std::tuple<Tensor, Tensor, Tensor> add_noise(const Tensor& x0, const Tensor& timesteps,
                                             const Tensor& table, const Optional& noise,
                                             const Optional& seed, const Optional& offset,
                                             bool want_target) {
  const int64_t samples = x0.size(0);
  const ScalarType wide =
      dtype_of(x0) == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor noisy = like(x0);
  Tensor target = want_target ? like(x0) : new_output(x0, {0});
  Tensor weights = new_output(x0, {samples}, wide);

  const NoisingRows rows(table, timesteps);
  Steps steps(samples);
  for (int64_t b = 0; b < samples; ++b) {
    steps.at(b, Steps::next_x) = rows.at(b, alpha);
    steps.at(b, Steps::next_n) = rows.at(b, sigma);
    if (want_target) {
      steps.at(b, Steps::denoised_x) = rows.at(b, target_x0);
      steps.at(b, Steps::denoised_n) = rows.at(b, target_noise);
    }
    const double w = rows.at(b, weight);
    if (wide == ScalarType::Double)
      ((double*)weights.data_ptr())[b] = w;
    else
      ((float*)weights.data_ptr())[b] = (float)w;
  }
  SampleViews views;
  SamplerStepArgs args{};
  args.x = args.conditional = views.source(x0);
  args.noise = views.source(noise);
  Optional seeds, offsets;
  if (seed) {
    seeds = dense(*seed);
    offsets = dense(*offset);
    args.seeds = (const int64_t*)seeds->data_ptr();
    args.seed_stride = seeds->dim();
    args.offsets = (const int64_t*)offsets->data_ptr();
    args.offset_stride = offsets->dim();
  }
  args.out = SampleViews::view(noisy);
  if (want_target) args.denoised = SampleViews::view(target);
  steps.run(args, x0);
  return {noisy, target, weights};
}

Tensor add_noise_bwd(const Optional& grad_noisy, const Optional& grad_target,
                     const Tensor& timesteps, const Tensor& table) {
  const Tensor& any = grad_noisy ? *grad_noisy : *grad_target;
  Tensor grad = like(any);
  const NoisingRows rows(table, timesteps);
  Steps steps(any.size(0));
  for (int64_t b = 0; b < any.size(0); ++b) {
    steps.at(b, Steps::next_x) = grad_noisy ? rows.at(b, alpha) : 0;
    steps.at(b, Steps::next_m) = grad_target ? rows.at(b, target_x0) : 0;
  }
  SampleViews views;
  SamplerStepArgs args{};
  args.x = views.source(grad_noisy ? *grad_noisy : *grad_target);
  args.conditional = views.source(grad_target ? *grad_target : *grad_noisy);
  args.out = SampleViews::view(grad);
  steps.run(args, any);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("add_noise", MMFAST_BOX(&add_noise));
  m.impl("add_noise_bwd", MMFAST_BOX(&add_noise_bwd));
}

}  // namespace mmfast
