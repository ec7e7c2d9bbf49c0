// The prediction is what a sampler's step would make with the row's weights of the prediction.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cpu/isa.h"
#include "cpu/outputs.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// The quantile of |numbers|, which lose their order; NaN if one of them is.
template <class T>
double quantile(T* numbers, int64_t count, double ratio) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(numbers[i])) return std::numeric_limits<double>::quiet_NaN();
    numbers[i] = std::abs(numbers[i]);
  }
  const double rank = ratio * (double)(count - 1);
  const int64_t below = (int64_t)rank;
  std::nth_element(numbers, numbers + below, numbers + count);
  const double low = numbers[below], part = rank - (double)below;
  if (part == 0) return low;
  const double high = *std::min_element(numbers + below + 1, numbers + count);
  return high == low ? low : low + (high - low) * part;
}

Tensor dynamic_threshold(const Tensor& x, const Tensor& model_output,
                         const Optional& unconditional, double guidance_scale,
                         const Optional& guidance, const Tensor& table, const Tensor& step,
                         double ratio, double maximum) {
  const int64_t samples = x.size(0), elements = samples ? x.numel() / samples : 0;
  const bool wide = dtype_of(x) == Dtype::float64;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor prediction = new_output(x, sizes_of(x, x.dim()), dtype);
  Tensor result = new_output(x, {samples}, dtype);

  const Tensor rows = torch::stable::contiguous(table);
  const int64_t columns = rows.size(1), width = 13;
  std::vector<double> made((size_t)(samples * width));
  std::vector<int64_t> steps((size_t)samples);
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t s = ((const int64_t*)step.data_ptr())[step.dim() ? b * step.stride(0) : 0];
    STD_TORCH_CHECK(s >= 0 && s < rows.size(0), "step must be from 0 to ", rows.size(0) - 1,
                    " for a table of ", rows.size(0), " rows, got ", s);
    const double* c = (const double*)rows.data_ptr() + s * columns;
    STD_TORCH_CHECK(c[2] == 0, "row ", s, " of the table predicts with noise: no threshold for it");
    double* row = made.data() + b * width;
    row[3] = -std::numeric_limits<double>::infinity();
    row[4] = std::numeric_limits<double>::infinity();
    row[7] = c[7];
    row[9] = c[0];
    row[10] = c[1];
    steps[(size_t)b] = b;
  }
  SampleViews views;
  SamplerStepArgs args{};
  args.samples = samples;
  args.elements = elements;
  args.wide = wide;
  args.x = views.source(x);
  args.conditional = views.source(model_output);
  args.unconditional = views.source(unconditional);
  args.table = made.data();
  args.columns = width;
  args.steps = steps.data();
  args.step_stride = 1;
  double pair[2] = {guidance_scale, 1 - guidance_scale};
  args.guidance = pair;
  Optional factors;
  if (guidance) {
    factors = doubles_of(*guidance);
    args.guidance = (const double*)factors->data_ptr();
    args.guidance_stride = factors->size(0) > 1 ? 2 : 0;
  }
  args.out = SampleViews::view(prediction);
  if (elements) kernels().sampler_step(args, parallel());

  char *numbers = (char*)prediction.data_ptr(), *thresholds = (char*)result.data_ptr();
  torch::stable::parallel_for(0, samples, 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double q = elements == 0 ? 1
                       : wide ? quantile((double*)numbers + b * elements, elements, ratio)
                              : quantile((float*)numbers + b * elements, elements, ratio);
      const double t = q > maximum ? maximum : q < 1 ? std::min(1.0, maximum) : q;
      if (wide)
        ((double*)thresholds)[b] = t;
      else
        ((float*)thresholds)[b] = (float)t;
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("dynamic_threshold", MMFAST_BOX(&dynamic_threshold));
}

}  // namespace mmfast
