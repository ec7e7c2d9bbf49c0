#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_attention(
    const Tensor& q_image, const Tensor& k_image, const Tensor& v_image, const Tensor& q_text,
    const Tensor& k_text, const Tensor& v_text, const Optional& text_lengths, double scale) {
  const int64_t width = v_image.size(3);
  AttentionViews views;
  AttentionArgs args = attention_args(q_image, k_image.size(1), width, scale);
  args.query_streams = args.key_streams = 2;
  Tensor outs[2], sums[2];
  const Tensor* streams[2][3] = {{&q_image, &k_image, &v_image}, {&q_text, &k_text, &v_text}};
  for (int s = 0; s < 2; ++s) {
    const auto& [query, key, value] = streams[s];
    outs[s] = new_heads(*query, width);
    sums[s] = new_sums(*query, {query->size(0), query->size(1), query->size(2)});
    const Sequences sequences =
        views.sequences(query->size(2), s ? text_lengths : Optional());
    args.queries[s].sequences = args.keys[s].sequences = sequences;
    args.queries[s].query = views.heads(*query);
    args.queries[s].out = views.heads(outs[s]);
    args.queries[s].lse = views.sums(sums[s]);
    args.keys[s].key = views.heads(*key);
    args.keys[s].value = views.heads(*value);
  }
  check_memory(kernels().attention_forward(args, parallel()));
  return {outs[0], outs[1], sums[0], sums[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("joint_attention", MMFAST_BOX(&joint_attention));
}

}  // namespace mmfast
