#include "cpu/code_statistics.h"

#include <optional>
#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> code_statistics(const Tensor& x, const Tensor& indices,
                                           int64_t num_codes,
                                           const std::optional<Tensor>& weights) {
  const bool heads = x.dim() == 3;
  const int64_t num_heads = heads ? x.size(0) : 1, width = x.size(x.dim() - 1);
  const bool wide = dtype_of(x) == Dtype::float64 ||
                    (weights && dtype_of(*weights) == Dtype::float64);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const auto sizes = [&](bool with_width) {
    std::vector<int64_t> shape;
    if (heads) shape.push_back(num_heads);
    shape.push_back(num_codes);
    if (with_width) shape.push_back(width);
    return shape;
  };
  Tensor counts = new_output(x, sizes(false), dtype);
  Tensor sums = new_output(x, sizes(true), dtype);
  const int64_t bytes = wide ? 8 : 4;
  STD_TORCH_CHECK(x.size(heads) < (int64_t(1) << 31),
                  "code_statistics: at most 2^31 - 1 vectors per head, got ", x.size(heads));
  for (int64_t h = 0; h < num_heads; ++h) {
    CodeStatisticsArgs args{};
    args.x = rows_of(x, heads, h);
    args.index_bytes = indices.scalar_type() == ScalarType::Long ? 8 : 4;
    args.index_stride = indices.stride(heads) * args.index_bytes;
    args.indices = (const char*)indices.data_ptr() +
                   (heads ? h * indices.stride(0) * args.index_bytes : 0);
    if (weights) {
      args.weight_dtype = dtype_of(*weights);
      const int64_t size = size_of(args.weight_dtype);
      args.weight_stride = weights->stride(heads) * size;
      args.weights = (const char*)weights->data_ptr() + (heads ? h * weights->stride(0) * size : 0);
    }
    args.num_codes = num_codes;
    args.counts = (char*)counts.data_ptr() + h * num_codes * bytes;
    args.sums = (char*)sums.data_ptr() + h * num_codes * width * bytes;
    args.wide = wide;
    STD_TORCH_CHECK(kernels().code_statistics(args, parallel()),
                    "code_statistics: out of memory for ", num_codes, " codes");
  }
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("code_statistics", MMFAST_BOX(&code_statistics));
}

}  // namespace mmfast
