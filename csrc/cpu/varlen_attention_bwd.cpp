#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

// Zeros where some tokens are of no sequence.
Tensor new_gradient(const Tensor& tensor, const Sequences& sequences, int64_t batches) {
  Tensor made = new_output(tensor, sizes_of(tensor, 3));
  int64_t next = 0;
  for (int64_t b = 0; b < batches && sequences.begins[b] == next; ++b) next += sequences.lengths[b];
  if (next != tensor.size(0)) torch::stable::fill_(made, 0);
  return made;
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale) {
  AttentionViews views;
  AttentionArgs args = attention_args(query, key.size(1), value.size(2), scale);
  args.batches = cu_seqlens_q.size(0) - 1;
  args.query_streams = args.key_streams = 1;
  const Sequences queries = views.sequences_from(cu_seqlens_q, query.size(0), max_seqlen_q);
  const Sequences keys = views.sequences_from(cu_seqlens_k, key.size(0), max_seqlen_k);
  Tensor grad_query = new_gradient(query, queries, args.batches);
  Tensor grad_key = new_gradient(key, keys, args.batches);
  Tensor grad_value = new_gradient(value, keys, args.batches);
  args.queries[0] = {queries,         views.tokens(query),    views.tokens(out),
                     views.sums(lse), views.tokens(grad_out), views.tokens(grad_query)};
  args.keys[0] = {keys, views.tokens(key), views.tokens(value), views.tokens(grad_key),
                  views.tokens(grad_value)};
  args.causal = causal ? Causal::bottom_right : Causal::none;
  check_memory(kernels().attention_backward(args, parallel()));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("varlen_attention_bwd", MMFAST_BOX(&varlen_attention_bwd));
}

}  // namespace mmfast
