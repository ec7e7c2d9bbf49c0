#include "cpu/guidance_factors.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/isa.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

using Optional = std::optional<Tensor>;

// Standard deviations' quotient, conditional by guided; blocks are merged as Chan et al. do (1979).
double deviation_ratio(const GuidanceFactorsArgs& args, int64_t b) {
  double count = 0, mean[2] = {0, 0}, squares[2] = {0, 0};
  for (int64_t i = 0; i < args.blocks(); ++i) {
    const double* part = args.parts + (b * args.blocks() + i) * 4;
    const double more = (double)std::min(args.block, args.elements - i * args.block);
    for (int v = 0; v < 2; ++v) {
      const double off = part[v] - mean[v];
      squares[v] += part[2 + v] + off * off * count * more / (count + more);
      mean[v] += off * more / (count + more);
    }
    count += more;
  }
  const double freedom = count - 1;
  return std::sqrt(squares[0] / freedom) / std::sqrt(squares[1] / freedom);
}

void guidance_factors(const Tensor& conditional, const Tensor& unconditional,
                      double guidance_scale, double rescale, double eta, double norm_threshold,
                      double momentum, bool project, const Optional& average,
                      const Tensor& factors) {
  SampleViews views;
  GuidanceFactorsArgs args{};
  args.samples = conditional.size(0);
  args.elements = args.samples ? conditional.numel() / args.samples : 0;
  args.conditional = views.source(conditional);
  args.unconditional = views.source(unconditional);
  args.project = project;
  args.scale = guidance_scale;
  args.average = views.target(average);
  args.momentum = momentum;
  std::vector<double> parts((size_t)(args.samples * args.blocks() * 4));
  args.parts = parts.data();
  if (args.elements) kernels().guidance_factors(args, parallel());

  Tensor made = views.writable(factors, 0);
  double* pair = (double*)made.data_ptr();
  for (int64_t b = 0; b < args.samples; ++b, pair += 2) {
    if (!project) {
      const double f = rescale == 0 ? 1 : rescale * deviation_ratio(args, b) + 1 - rescale;
      pair[0] = f * guidance_scale;
      pair[1] = f * (1 - guidance_scale);
      continue;
    }
    double aa = 0, ab = 0, bb = 0;
    for (int64_t i = 0; i < args.blocks(); ++i) {
      const double* part = args.parts + (b * args.blocks() + i) * 4;
      aa += part[0];
      ab += part[1];
      bb += part[2];
    }
    const double norm = std::sqrt(bb);
    const double k = (guidance_scale - 1) * (norm > norm_threshold ? norm_threshold / norm : 1);
    const double parallel_part = aa > 0 ? ab / aa : aa;  // NaN stays
    pair[0] = 1 - k * (1 - eta) * parallel_part + (average ? 0 : k);
    pair[1] = average ? k : -k;
  }
  views.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("guidance_factors", MMFAST_BOX(&guidance_factors));
}

}  // namespace mmfast
