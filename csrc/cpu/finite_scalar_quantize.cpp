#include "cpu/finite_scalar_quantize.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

// How the dimensions are quantised; `dimension` in mmfast/ops/finite_scalar_quantize.py says why.
struct Spec {
  std::vector<double> thresholds;
  std::vector<ScalarLevels> levels;

  Spec(const std::vector<int64_t>& counts, const std::string& variant, bool hard_clamp) {
    const bool symmetric = choice("variant", variant, {"bound", "symmetric"});
    const auto inverse = [&](double v) { return hard_clamp ? v : std::atanh(v); };
    int64_t basis = 1, total = 0;
    for (const int64_t count : counts) {
      ScalarLevels d{nullptr, (int32_t)count, 0, (int32_t)basis, 0, 1};
      basis *= count;
      total += count - 1;
      if (symmetric) {
        d.width = (int32_t)count - 1;
        for (int64_t i = 0; i + 1 < count; ++i)
          thresholds.push_back(inverse((double)(2 * i + 1) / d.width - 1));
      } else {
        const double half = (double)(count - 1) * (1 + 1e-3) / 2, offset = count % 2 ? 0 : 0.5;
        const int64_t middle = count / 2;
        d.shift = inverse(offset / half);
        d.gain = half / (double)middle;
        d.width = (int32_t)(2 * middle);
        for (int64_t i = 0; i + 1 < count; ++i)
          thresholds.push_back(inverse(((double)i + 0.5 - (double)middle + offset) / half) -
                               d.shift);
      }
      levels.push_back(d);
    }
    total = 0;
    for (ScalarLevels& d : levels) {
      d.thresholds = thresholds.data() + total;
      total += d.count - 1;
    }
  }
};

FiniteScalarQuantizeArgs arguments(const Tensor& z, const Spec& spec, bool hard_clamp,
                                   const std::optional<Tensor>& noise) {
  FiniteScalarQuantizeArgs args{};
  args.z = rows_of(z, 0, 0);
  if (noise) args.noise = rows_of(*noise, 0, 0);
  args.levels = spec.levels.data();
  args.hard_clamp = hard_clamp;
  return args;
}

std::optional<Tensor> for_rows(const std::optional<Tensor>& tensor) {
  if (!tensor) return tensor;
  return mmfast::for_rows(*tensor);
}

std::tuple<Tensor, Tensor> finite_scalar_quantize(const Tensor& given,
                                                  std::vector<int64_t> counts,
                                                  const std::string& variant, bool hard_clamp,
                                                  const std::optional<Tensor>& given_noise) {
  const Tensor z = mmfast::for_rows(given);
  const std::optional<Tensor> noise = for_rows(given_noise);
  const Spec spec(counts, variant, hard_clamp);
  FiniteScalarQuantizeArgs args = arguments(z, spec, hard_clamp, noise);
  Tensor quantized = new_output(z, sizes_of(z, z.dim()));
  Tensor indices = new_output(z, sizes_of(z, z.dim() - 1), ScalarType::Int);
  args.quantized = (char*)quantized.data_ptr();
  args.indices = (int32_t*)indices.data_ptr();
  STD_TORCH_CHECK(kernels().finite_scalar_quantize(args, parallel()),
                  "finite_scalar_quantize: out of memory for ", counts.size(), " dimensions");
  return {quantized, indices};
}

Tensor finite_scalar_quantize_bwd(const Tensor& given_grad, const Tensor& given,
                                  std::vector<int64_t> counts, const std::string& variant,
                                  bool hard_clamp, const std::optional<Tensor>& given_noise) {
  const Tensor z = mmfast::for_rows(given), grad = mmfast::for_rows(given_grad);
  const std::optional<Tensor> noise = for_rows(given_noise);
  const Spec spec(counts, variant, hard_clamp);
  Tensor result = new_output(z, sizes_of(z, z.dim()));
  FiniteScalarQuantizeBwdArgs args{arguments(z, spec, hard_clamp, noise), rows_of(grad, 0, 0),
                                   (char*)result.data_ptr()};
  STD_TORCH_CHECK(kernels().finite_scalar_quantize_bwd(args, parallel()),
                  "finite_scalar_quantize_bwd: out of memory for ", counts.size(), " dimensions");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("finite_scalar_quantize", MMFAST_BOX(&finite_scalar_quantize));
  m.impl("finite_scalar_quantize_bwd", MMFAST_BOX(&finite_scalar_quantize_bwd));
}

}  // namespace mmfast
