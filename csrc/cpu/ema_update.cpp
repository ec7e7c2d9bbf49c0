#include "cpu/ema_update.h"

#include "cpu/isa.h"
#include "cpu/sample_views.h"

namespace mmfast {
namespace {

void ema_update(const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum,
                const Tensor& counts, const Tensor& sums, double decay, double eps,
                bool normalize) {
  const bool heads = codebook.dim() == 3;
  const int64_t last = codebook.dim() - 1;
  SampleViews views;
  EmaUpdateArgs args{};
  args.codes = codebook.size(last - 1);
  args.width = codebook.size(last);
  args.decay = decay;
  args.eps = eps;
  args.normalize = normalize;
  const Tensor codes = views.writable(codebook, last), sum = views.writable(embed_sum, last),
               size = views.writable(cluster_size, last - 1),
               new_sum = views.readable(sums, last), count = views.readable(counts, last - 1);
  const auto rows_of_head = [&](const Tensor& tensor, int64_t h) {
    SampleView view = SampleViews::view(tensor, tensor.dim() - 1);
    if (heads) view.data += h * tensor.stride(0) * size_of(view.dtype);
    return view;
  };
  const auto numbers_of_head = [&](const Tensor& tensor, int64_t h) {
    SampleView view{(char*)tensor.data_ptr(), dtype_of(tensor), 0};
    if (heads) view.data += h * tensor.stride(0) * size_of(view.dtype);
    return view;
  };
  for (int64_t h = 0; h < (heads ? codebook.size(0) : 1); ++h) {
    args.codebook = rows_of_head(codes, h);
    args.embed_sum = rows_of_head(sum, h);
    args.sums = rows_of_head(new_sum, h);
    args.cluster_size = numbers_of_head(size, h);
    args.counts = numbers_of_head(count, h);
    STD_TORCH_CHECK(kernels().ema_update(args, parallel()), "ema_update: out of memory for ",
                    args.codes, " codes of dimension ", args.width);
  }
  views.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("ema_update", MMFAST_BOX(&ema_update)); }

}  // namespace mmfast
