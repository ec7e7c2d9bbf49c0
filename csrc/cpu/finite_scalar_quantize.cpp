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

// The Spec of this thread's last call, if it had the same arguments: inverse tangents take longer
// than a few rows.
const Spec& spec_of(const std::vector<int64_t>& counts, const std::string& variant,
                    bool hard_clamp) {
  struct Last {
    std::vector<int64_t> counts;
    std::string variant;
    bool hard_clamp;
    Spec spec;
  };
  thread_local std::optional<Last> last;
  if (!last || last->counts != counts || last->variant != variant ||
      last->hard_clamp != hard_clamp) {
    last.reset();  // its levels point into it
    last.emplace(counts, variant, hard_clamp, Spec(counts, variant, hard_clamp));
  }
  return last->spec;
}

// Interpolates at the zeros of a Chebyshev polynomial, by Newton's divided differences.
SlopeTable interpolated() {
  constexpr int points = SlopeTable::degree + 1;
  SlopeTable table;
  for (int segment = 0; segment < SlopeTable::segments; ++segment) {
    double x[points], divided[points], polynomial[points]{};
    for (int i = 0; i < points; ++i) {
      x[i] = std::cos(M_PI * (2 * i + 1) / (2 * points)) / 2;
      const double cosh = std::cosh((segment + x[i]) * SlopeTable::width);
      divided[i] = 1 / (cosh * cosh);
    }
    for (int order = 1; order < points; ++order)
      for (int i = points - 1; i >= order; --i)
        divided[i] = (divided[i] - divided[i - 1]) / (x[i] - x[i - order]);
    for (int i = points - 1; i >= 0; --i) {
      for (int j = points - 1; j > 0; --j) polynomial[j] = polynomial[j - 1] - x[i] * polynomial[j];
      polynomial[0] = divided[i] - x[i] * polynomial[0];
    }
    for (int j = 0; j < points; ++j) table.coefficients[j][segment] = (float)polynomial[j];
  }
  return table;
}

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
  const Spec& spec = spec_of(counts, variant, hard_clamp);
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
  const Spec& spec = spec_of(counts, variant, hard_clamp);
  Tensor result = new_output(z, sizes_of(z, z.dim()));
  static const SlopeTable slope = interpolated();
  FiniteScalarQuantizeBwdArgs args{arguments(z, spec, hard_clamp, noise), &slope,
                                   rows_of(grad, 0, 0), (char*)result.data_ptr()};
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
