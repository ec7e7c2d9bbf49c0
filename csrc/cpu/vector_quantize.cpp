#include "cpu/vector_quantize.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize(
    const Tensor& vectors, const Tensor& codebook, const std::string& metric, const std::string&,
    const std::optional<Tensor>& mask) {
  const Tensor x = for_rows(vectors);
  const int64_t heads = codebook.dim() == 3, num_heads = heads ? x.size(0) : 1;
  const bool wide = dtype_of(x) == Dtype::float64 || dtype_of(codebook) == Dtype::float64;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor quantized = new_output(x, sizes_of(x, x.dim()));
  Tensor indices = new_output(x, sizes_of(x, x.dim() - 1), ScalarType::Long);
  Tensor commitment = new_output(x, sizes_of(codebook, heads), dtype);
  Tensor codebook_loss = new_output(x, sizes_of(codebook, heads), dtype);
  Tensor counts = new_output(x, sizes_of(codebook, heads + 1), dtype);
  std::optional<Tensor> inside;
  if (mask) inside = torch::stable::contiguous(*mask);
  const int64_t bytes = wide ? 8 : 4;
  for (int64_t h = 0; h < num_heads; ++h) {
    VectorQuantizeArgs args{};
    args.x = rows_of(x, heads, h);
    args.codes = rows_of(codebook, heads, h);
    args.metric = metric_of(metric);
    if (inside) args.mask = (const bool*)inside->data_ptr() + h * args.x.count;
    args.quantized =
        (char*)quantized.data_ptr() + h * args.x.count * args.x.width * size_of(args.x.dtype);
    args.indices = (int64_t*)indices.data_ptr() + h * args.x.count;
    args.commitment = (char*)commitment.data_ptr() + h * bytes;
    args.codebook_loss = (char*)codebook_loss.data_ptr() + h * bytes;
    args.counts = (char*)counts.data_ptr() + h * args.codes.count * bytes;
    args.wide = wide;
    STD_TORCH_CHECK(args.codes.count < (int64_t(1) << 31),
                    "vector_quantize: at most 2^31 - 1 codes, got ", args.codes.count);
    STD_TORCH_CHECK(kernels().vector_quantize(args, parallel()),
                    "vector_quantize: out of memory for ", args.x.count, " vectors and ",
                    args.codes.count, " codes of dimension ", args.x.width);
  }
  return {quantized, indices, commitment, codebook_loss, counts};
}

// The number of head h in a tensor of one number, or of one for each head.
Number number_of(const std::optional<Tensor>& tensor, int64_t h) {
  if (!tensor) return {};
  const Dtype dtype = dtype_of(*tensor);
  const int64_t offset = tensor->dim() ? h * tensor->stride(0) * size_of(dtype) : 0;
  return {(const char*)tensor->data_ptr() + offset, dtype};
}

std::tuple<Tensor, Tensor> vector_quantize_bwd(
    const std::optional<Tensor>& quantized_gradient, const std::optional<Tensor>& commitment,
    const std::optional<Tensor>& codebook_loss, const Tensor& vectors, const Tensor& codebook,
    const Tensor& codes, const Tensor& counts, const std::string& gradient, bool need_x,
    bool need_codebook) {
  const Tensor x = for_rows(vectors), indices = torch::stable::contiguous(codes);
  std::optional<Tensor> quantized;
  if (quantized_gradient) quantized = for_rows(*quantized_gradient);
  const int64_t heads = codebook.dim() == 3, num_heads = heads ? x.size(0) : 1;
  const std::vector<int64_t> none{0};
  Tensor x_gradient = new_output(x, need_x ? sizes_of(x, x.dim()) : none);
  Tensor codebook_gradient = new_output(
      codebook, need_codebook ? sizes_of(codebook, codebook.dim()) : none);
  for (int64_t h = 0; h < num_heads; ++h) {
    VectorQuantizeBwdArgs args{};
    if (quantized) args.quantized = rows_of(*quantized, heads, h);
    args.commitment = number_of(commitment, h);
    args.codebook_loss = number_of(codebook_loss, h);
    args.x = rows_of(x, heads, h);
    args.codes = rows_of(codebook, heads, h);
    args.indices = (const int64_t*)indices.data_ptr() + h * args.x.count;
    args.counts = rows_of(counts, heads, h);
    args.gradient =
        (Gradient)choice("gradient", gradient, {"straight_through", "rotation", "none"});
    if (need_x)
      args.x_gradient =
          (char*)x_gradient.data_ptr() + h * args.x.count * args.x.width * size_of(args.x.dtype);
    if (need_codebook)
      args.codebook_gradient = (char*)codebook_gradient.data_ptr() +
                               h * args.codes.count * args.codes.width * size_of(args.codes.dtype);
    STD_TORCH_CHECK(args.x.count < (int64_t(1) << 31),
                    "vector_quantize_bwd: at most 2^31 - 1 vectors per head, got ", args.x.count);
    STD_TORCH_CHECK(kernels().vector_quantize_bwd(args, parallel()),
                    "vector_quantize_bwd: out of memory for ", args.codes.count,
                    " codes of dimension ", args.codes.width);
  }
  return {x_gradient, codebook_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("vector_quantize", MMFAST_BOX(&vector_quantize));
  m.impl("vector_quantize_bwd", MMFAST_BOX(&vector_quantize_bwd));
}

}  // namespace mmfast
