#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_dot_product_attention_bwd(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Optional& mask, double dropout, bool causal,
    double scale, const Optional& seed, const Optional& offset, bool want_mask_grad) {
  Tensor grad_query = new_heads(query, query.size(3)), grad_key = new_heads(key, key.size(3));
  Tensor grad_value = new_heads(value, value.size(3));
  AttentionViews views;
  AttentionArgs args = attention_args(query, key.size(1), value.size(3), scale);
  args.query_streams = args.key_streams = 1;
  args.queries[0] = {views.sequences(query.size(2), {}), views.heads(query), views.heads(out),
                     views.sums(lse), views.heads(grad_out), views.heads(grad_query)};
  args.keys[0] = {views.sequences(key.size(2), {}), views.heads(key), views.heads(value),
                  views.heads(grad_key), views.heads(grad_value)};
  args.causal = causal ? Causal::top_left : Causal::none;
  args.dropout = dropout;
  args.seed = integer_of(seed);
  args.offset = integer_of(offset);
  // A mask that was expanded has a gradient for every number of its shape.
  Optional given = mask;
  if (want_mask_grad) given = torch::stable::contiguous(*mask);
  args.mask = views.mask(given);
  Tensor sums = torch::stable::new_zeros(
      query, want_mask_grad ? sizes_of(*mask, 4) : std::vector<int64_t>{0}, ScalarType::Double);
  if (want_mask_grad) args.grad_mask = (char*)sums.data_ptr();
  check_memory(kernels().attention_backward(args, parallel()));
  if (!want_mask_grad)
    return {grad_query, grad_key, grad_value, new_output(query, {0})};
  Tensor grad_mask = new_output(*mask, sizes_of(*mask, 4));
  torch::stable::copy_(grad_mask, sums);
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("scaled_dot_product_attention_bwd", MMFAST_BOX(&scaled_dot_product_attention_bwd));
}

}  // namespace mmfast
