#include "cpu/sampler_step.h"

#include <optional>

#include "cpu/isa.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;

// That the rows exist, and that what they ask for was given.
void check_rows(const SamplerStepArgs& args, int64_t rows, bool noise, bool variance) {
  const int64_t steps = args.step_stride ? args.samples : 1;
  const int width = 4 + args.slots;
  for (int64_t b = 0; b < steps; ++b) {
    const int64_t step = args.steps[b * args.step_stride];
    STD_TORCH_CHECK(step >= 0 && step < rows, "step must be from 0 to ", rows - 1,
                    " for a table of ", rows, " rows, got ", step);
    const double* c = args.table + step * args.columns;
    bool noisy = c[2] != 0;
    for (int i = 0; i <= args.slots; ++i) noisy = noisy || c[9 + i * width + 2] != 0;
    STD_TORCH_CHECK(!noisy || noise, "row ", step,
                    " of the table takes noise: give noise or seed");
    STD_TORCH_CHECK(!noisy || c[6] == 0 || variance, "row ", step,
                    " of the table scales its noise by the model's variance: give variance");
  }
}

void sampler_step(const Tensor& x, const Tensor& model_output, const Optional& unconditional,
                  double guidance_scale, const Optional& guidance, const Tensor& table,
                  const Tensor& step, const Optional& noise, const Optional& seed,
                  const Optional& variance, const Optional& threshold, const Tensor& out,
                  const Optional& history, const Optional& denoised,
                  const Optional& model_input) {
  SampleViews views;
  SamplerStepArgs args{};
  args.samples = x.size(0);
  args.wide = dtype_of(x) == Dtype::float64;
  args.x = views.source(x);
  args.conditional = views.source(model_output);
  args.unconditional = views.source(unconditional);
  args.noise = views.source(noise);
  args.variance = views.source(variance);

  const Tensor rows = dense(table);
  args.table = (const double*)rows.data_ptr();
  args.columns = rows.size(1);
  args.steps = (const int64_t*)step.data_ptr();
  args.step_stride = step.dim() ? step.stride(0) : 0;
  double pair[2] = {guidance_scale, 1 - guidance_scale};
  args.guidance = pair;
  Optional factors, thresholds, seeds;
  if (guidance) {
    factors = doubles_of(*guidance);
    args.guidance = (const double*)factors->data_ptr();
    args.guidance_stride = factors->size(0) > 1 ? 2 : 0;
  }
  if (threshold) {
    thresholds = doubles_of(*threshold);
    args.threshold = (const double*)thresholds->data_ptr();
  }
  if (seed && !noise) {
    seeds = dense(*seed);
    args.seeds = (const int64_t*)seeds->data_ptr();
    args.seed_stride = seeds->dim();
  }

  args.out = views.target(out);
  args.denoised = views.target(denoised);
  args.model_input = views.target(model_input);
  args.copies = model_input && args.samples ? model_input->size(0) / args.samples : 0;
  if (history) {
    const Tensor kept = views.writable(*history, 2);
    args.slots = (int)kept.size(0);
    for (int s = 0; s < args.slots; ++s) {
      args.history[s] = SampleViews::view(kept, 2);
      args.history[s].data += s * kept.stride(0) * size_of(args.history[s].dtype);
    }
  }
  check_rows(args, rows.size(0), noise || seed, variance.has_value());
  args.elements = args.samples ? x.numel() / args.samples : 0;
  if (args.elements == 0) return;
  kernels().sampler_step(args, parallel());
  views.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("sampler_step", MMFAST_BOX(&sampler_step)); }

}  // namespace mmfast
