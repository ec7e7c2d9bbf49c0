#include <limits>
#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& cu_seqlens_q,
                                            const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                            int64_t max_seqlen_k, bool causal, double scale) {
  const int64_t tokens = query.size(0), heads = query.size(1), width = value.size(2);
  Tensor out = new_output(query, {tokens, heads, width});
  Tensor lse = new_sums(query, {heads, tokens});
  AttentionViews views;
  AttentionArgs args = attention_args(query, key.size(1), width, scale);
  args.batches = cu_seqlens_q.size(0) - 1;
  args.query_streams = args.key_streams = 1;
  const Sequences queries = views.sequences_from(cu_seqlens_q, tokens, max_seqlen_q);
  int64_t next = 0;
  for (int64_t b = 0; b < args.batches && queries.begins[b] == next; ++b)
    next += queries.lengths[b];
  if (next != tokens) {  // some are of no sequence
    torch::stable::fill_(out, 0);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  args.queries[0].sequences = queries;
  args.queries[0].query = views.tokens(query);
  args.queries[0].out = views.tokens(out);
  args.queries[0].lse = views.sums(lse);
  args.keys[0].sequences = views.sequences_from(cu_seqlens_k, key.size(0), max_seqlen_k);
  args.keys[0].key = views.tokens(key);
  args.keys[0].value = views.tokens(value);
  args.causal = causal ? Causal::bottom_right : Causal::none;
  check_memory(kernels().attention_forward(args, parallel()));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("varlen_attention", MMFAST_BOX(&varlen_attention));
}

}  // namespace mmfast
