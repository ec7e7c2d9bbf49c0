#include "cpu/outputs.h"

#include <vector>

namespace mmfast {
namespace {

// 0 for dtypes that no kernel writes.
int64_t bytes_of_number(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool: return 1;
    default: return 0;
  }
}

}  // namespace

Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  std::optional<torch::headeronly::ScalarType> given) {
  const auto dtype = given.value_or(like.scalar_type());
  int64_t bytes = bytes_of_number(dtype);
  for (const int64_t size : sizes) bytes *= size;
  void* memory = bytes < least_kept ? nullptr : take_memory(bytes);
  if (!memory) return torch::stable::new_empty(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size());
  for (int64_t d = (int64_t)sizes.size() - 1, stride = 1; d >= 0; stride *= sizes[d--])
    strides[d] = stride;
  return torch::stable::from_blob(memory, sizes, strides, like.device(), dtype, &give_memory);
}

namespace {

Tensor new_output_op(const Tensor& like, std::vector<int64_t> sizes,
                     torch::headeronly::ScalarType dtype) {
  return new_output(like, sizes, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("new_output", TORCH_BOX(&new_output_op)); }

}  // namespace mmfast
