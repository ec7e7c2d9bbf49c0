#include "cpu/randn.h"

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

Tensor randn(const Tensor& seed, const Tensor& offset, std::vector<int64_t> shape,
             ScalarType dtype) {
  Tensor result = new_output(seed, shape, dtype);
  const int64_t total = result.numel();
  if (total == 0) return result;
  const bool each = seed.dim() || offset.dim();
  RandnArgs args{};
  args.seeds = (const int64_t*)seed.data_ptr();
  args.offsets = (const int64_t*)offset.data_ptr();
  args.seed_step = seed.dim() ? seed.stride(0) : 0;
  args.offset_step = offset.dim() ? offset.stride(0) : 0;
  args.samples = each ? shape[0] : 1;
  args.count = total / args.samples;
  args.dtype = dtype_of(result);
  args.out = (char*)result.data_ptr();
  kernels().randn(args, parallel());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("randn", MMFAST_BOX(&randn)); }

}  // namespace mmfast
