#include "cpu/lookup_free_quantize.h"

#include <optional>
#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(*tensor);
}

LookupFreeQuantizeArgs arguments(const Tensor& z, int64_t codebooks, double scale, bool spherical,
                                 double inv_temperature, int64_t group,
                                 const std::optional<Tensor>& mask) {
  LookupFreeQuantizeArgs args{};
  args.z = rows_of(z, 0, 0);
  args.codebooks = codebooks;
  args.scale = scale;
  args.spherical = spherical;
  args.inv_temperature = inv_temperature;
  args.group = group;
  if (mask) args.mask = (const bool*)mask->data_ptr();
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lookup_free_quantize(
    const Tensor& given, int64_t codebooks, double scale, bool spherical, double inv_temperature,
    int64_t group, const std::optional<Tensor>& given_mask) {
  const Tensor z = for_rows(given);
  const std::optional<Tensor> mask = dense(given_mask);
  LookupFreeQuantizeArgs args =
      arguments(z, codebooks, scale, spherical, inv_temperature, group, mask);
  const ScalarType dtype =
      args.z.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor quantized = new_output(z, sizes_of(z, z.dim()));
  std::vector<int64_t> sizes = sizes_of(z, z.dim() - 1);
  sizes.push_back(codebooks);
  Tensor indices = new_output(z, sizes, ScalarType::Long);
  Tensor commitment = new_output(z, {}, dtype);
  Tensor entropy = new_output(z, {}, dtype);
  const int64_t groups = group ? args.z.width / codebooks / group : 0;
  Tensor means = new_output(z, {codebooks, groups, (int64_t)1 << group}, dtype);
  args.quantized = (char*)quantized.data_ptr();
  args.indices = (int64_t*)indices.data_ptr();
  args.commitment = commitment.data_ptr();
  args.entropy = entropy.data_ptr();
  args.means = means.data_ptr();
  STD_TORCH_CHECK(kernels().lookup_free_quantize(args, parallel()),
                  "lookup_free_quantize: out of memory for groups of ", group, " bits");
  return {quantized, indices, commitment, entropy, means};
}

double number(const std::optional<Tensor>& tensor) {
  if (!tensor) return 0;
  return dtype_of(*tensor) == Dtype::float64 ? *(const double*)tensor->data_ptr()
                                             : *(const float*)tensor->data_ptr();
}

Tensor lookup_free_quantize_bwd(const std::optional<Tensor>& given_quantized,
                                const std::optional<Tensor>& commitment,
                                const std::optional<Tensor>& entropy,
                                const std::optional<Tensor>& given_means, const Tensor& given,
                                int64_t codebooks, double scale, bool spherical,
                                double inv_temperature, int64_t group,
                                const std::optional<Tensor>& given_mask) {
  const Tensor z = for_rows(given);
  const std::optional<Tensor> mask = dense(given_mask), means = dense(given_means);
  std::optional<Tensor> quantized;
  if (given_quantized) quantized = for_rows(*given_quantized);
  Tensor result = new_output(z, sizes_of(z, z.dim()));
  LookupFreeQuantizeBwdArgs args{};
  args.forward = arguments(z, codebooks, scale, spherical, inv_temperature, group, mask);
  if (quantized) args.quantized = rows_of(*quantized, 0, 0);
  args.commitment = number(commitment);
  args.entropy = number(entropy);
  if (means && group) args.means = means->data_ptr();
  args.result = (char*)result.data_ptr();
  STD_TORCH_CHECK(kernels().lookup_free_quantize_bwd(args, parallel()),
                  "lookup_free_quantize_bwd: out of memory for groups of ", group, " bits");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("lookup_free_quantize", MMFAST_BOX(&lookup_free_quantize));
  m.impl("lookup_free_quantize_bwd", MMFAST_BOX(&lookup_free_quantize_bwd));
}

}  // namespace mmfast
