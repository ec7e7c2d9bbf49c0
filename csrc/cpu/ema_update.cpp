#include "cpu/ema_update.h"

#include <tuple>

#include "cpu/glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

Tensor like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, sizes_of(tensor, tensor.dim()));
}

std::tuple<Tensor, Tensor, Tensor> ema_update(const Tensor& codebook, const Tensor& cluster_size,
                                              const Tensor& embed_sum, const Tensor& counts,
                                              const Tensor& sums, double decay, double eps,
                                              bool normalize) {
  const bool heads = codebook.dim() == 3;
  Tensor new_codebook = like(codebook), new_size = like(cluster_size), new_sum = like(embed_sum);
  const auto head = [](const Tensor& tensor, int64_t h, int64_t numbers) {
    return (char*)tensor.data_ptr() + h * numbers * size_of(dtype_of(tensor));
  };
  for (int64_t h = 0; h < (heads ? codebook.size(0) : 1); ++h) {
    EmaUpdateArgs args{};
    args.codebook = rows_of(codebook, heads, h);
    args.cluster_size = rows_of(cluster_size, heads, h);
    args.embed_sum = rows_of(embed_sum, heads, h);
    args.counts = rows_of(counts, heads, h);
    args.sums = rows_of(sums, heads, h);
    args.decay = decay;
    args.eps = eps;
    args.normalize = normalize;
    const int64_t codes = args.codebook.count, width = args.codebook.width;
    args.new_codebook = head(new_codebook, h, codes * width);
    args.new_cluster_size = head(new_size, h, codes);
    args.new_embed_sum = head(new_sum, h, codes * width);
    STD_TORCH_CHECK(kernels().ema_update(args, parallel()), "ema_update: out of memory for ",
                    codes, " codes of dimension ", width);
  }
  return {new_codebook, new_size, new_sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("ema_update", TORCH_BOX(&ema_update)); }

}  // namespace mmfast
