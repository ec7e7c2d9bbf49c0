#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor> scaled_dot_product_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
    double dropout, bool causal, double scale, const Optional& seed, const Optional& offset) {
  Tensor out = new_heads(query, value.size(3));
  Tensor lse = new_sums(query, {query.size(0), query.size(1), query.size(2)});
  AttentionViews views;
  AttentionArgs args = attention_args(query, key.size(1), value.size(3), scale);
  args.query_streams = args.key_streams = 1;
  args.queries[0].sequences = views.sequences(query.size(2), {});
  args.queries[0].query = views.heads(query);
  args.queries[0].out = views.heads(out);
  args.queries[0].lse = views.sums(lse);
  args.keys[0].sequences = views.sequences(key.size(2), {});
  args.keys[0].key = views.heads(key);
  args.keys[0].value = views.heads(value);
  args.causal = causal ? Causal::top_left : Causal::none;
  args.mask = views.mask(mask);
  args.dropout = dropout;
  args.seed = integer_of(seed);
  args.offset = integer_of(offset);
  check_memory(kernels().attention_forward(args, parallel()));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("scaled_dot_product_attention", MMFAST_BOX(&scaled_dot_product_attention));
}

}  // namespace mmfast
