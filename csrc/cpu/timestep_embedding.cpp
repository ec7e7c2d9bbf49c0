#include "cpu/timestep_embedding.h"

#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/outputs.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

Tensor timestep_embedding(const Tensor& timesteps, int64_t dim, double max_period,
                          bool flip_sin_to_cos, double downscale_freq_shift, double scale,
                          torch::headeronly::ScalarType dtype) {
  const int64_t batch = timesteps.size(0), half = dim / 2;
  Tensor out = new_output(timesteps, {batch, dim}, dtype);
  const Tensor times = doubles_of(timesteps);
  const double step = -std::log(max_period) / ((double)half - downscale_freq_shift);
  std::vector<double> frequencies((size_t)half);
  for (int64_t i = 0; i < half; ++i)
    frequencies[(size_t)i] = scale * std::exp((double)i * step);
  TimestepEmbeddingArgs args{};
  args.timesteps = (const double*)times.data_ptr();
  args.frequencies = frequencies.data();
  args.out = (char*)out.data_ptr();
  args.dtype = dtype_of(out);
  args.batch = batch;
  args.dim = dim;
  args.cos_first = flip_sin_to_cos;
  kernels().timestep_embedding(args, parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("timestep_embedding", MMFAST_BOX(&timestep_embedding));
}

}  // namespace mmfast
