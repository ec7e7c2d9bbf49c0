#include "cpu/pack_indices.h"

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

// The first sizes of tensor, and a last one.
Tensor with_last(const Tensor& tensor, int64_t last, ScalarType dtype) {
  std::vector<int64_t> sizes = sizes_of(tensor, tensor.dim() - 1);
  sizes.push_back(last);
  return new_output(tensor, sizes, dtype);
}

int64_t rows_in(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

Tensor pack_indices(const Tensor& given, int64_t bits) {
  const Tensor indices = torch::stable::contiguous(given);
  const int64_t count = indices.size(indices.dim() - 1);
  Tensor packed = with_last(indices, (count * bits + 7) / 8, ScalarType::Byte);
  kernels().pack_indices({(const char*)indices.data_ptr(),
                          indices.scalar_type() == ScalarType::Long ? 8 : 4,
                          (uint8_t*)packed.data_ptr(), rows_in(indices), count, (int)bits},
                         parallel());
  return packed;
}

Tensor unpack_indices(const Tensor& given, int64_t bits, int64_t count) {
  const Tensor packed = torch::stable::contiguous(given);
  Tensor indices = with_last(packed, count, ScalarType::Long);
  kernels().unpack_indices({(const char*)indices.data_ptr(), 8, (uint8_t*)packed.data_ptr(),
                            rows_in(packed), count, (int)bits},
                           parallel());
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("pack_indices", MMFAST_BOX(&pack_indices));
  m.impl("unpack_indices", MMFAST_BOX(&unpack_indices));
}

}  // namespace mmfast
