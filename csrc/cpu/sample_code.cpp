#include "cpu/sample_code.h"

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

Tensor sample_code(const Tensor& given, const Tensor& codebook, double temperature,
                   const std::string& metric, const Tensor& seed, const Tensor& offset) {
  const Tensor x = for_rows(given);
  const bool heads = codebook.dim() == 3;
  const bool each = seed.dim() || offset.dim();
  Tensor indices = new_output(x, sizes_of(x, x.dim() - 1), ScalarType::Long);
  for (int64_t h = 0; h < (heads ? x.size(0) : 1); ++h) {
    SampleCodeArgs args{};
    args.x = rows_of(x, heads, h);
    args.codes = rows_of(codebook, heads, h);
    args.metric = metric_of(metric);
    args.temperature = temperature;
    args.seeds = (const int64_t*)seed.data_ptr();
    args.offsets = (const int64_t*)offset.data_ptr();
    args.seed_step = seed.dim() ? seed.stride(0) : 0;
    args.offset_step = offset.dim() ? offset.stride(0) : 0;
    args.head = h;
    args.heads = heads ? x.size(0) : 1;
    args.indices = (int64_t*)indices.data_ptr() + h * args.x.count;
    if (args.x.count == 0) continue;
    args.rows = each ? args.x.count / x.size(heads) : args.x.count;
    STD_TORCH_CHECK(kernels().sample_code(args, parallel()), "sample_code: out of memory for ",
                    args.codes.count, " codes of dimension ", args.codes.width);
  }
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("sample_code", MMFAST_BOX(&sample_code)); }

}  // namespace mmfast
