#include "cpu/nearest_code.h"

#include <string>
#include <tuple>
#include <vector>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> nearest_code(const Tensor& vectors, const Tensor& codebook,
                                        const std::string& metric) {
  const Tensor x = for_rows(vectors);
  const bool heads = codebook.dim() == 3;
  const int64_t num_heads = heads ? x.size(0) : 1;
  const bool wide = dtype_of(x) == Dtype::float64 || dtype_of(codebook) == Dtype::float64;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; ++d) shape.push_back(x.size(d));
  Tensor indices = new_output(x, shape, ScalarType::Long);
  Tensor distances = new_output(x, shape, wide ? ScalarType::Double : ScalarType::Float);
  for (int64_t h = 0; h < num_heads; ++h) {
    NearestCodeArgs args{};
    args.x = rows_of(x, heads, h);
    args.codes = rows_of(codebook, heads, h);
    args.metric = metric_of(metric);
    args.wide = wide;
    args.indices = (int64_t*)indices.data_ptr() + h * args.x.count;
    args.distances = (char*)distances.data_ptr() + h * args.x.count * (wide ? 8 : 4);
    STD_TORCH_CHECK(args.codes.count < (int64_t(1) << 31),
                    "nearest_code: at most 2^31 - 1 codes, got ", args.codes.count);
    if (args.x.count == 0) continue;
    STD_TORCH_CHECK(kernels().nearest_code(args, parallel()), "nearest_code: out of memory for ",
                    args.codes.count, " codes of dimension ", args.codes.width);
  }
  return {indices, distances};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("nearest_code", MMFAST_BOX(&nearest_code)); }

}  // namespace mmfast
