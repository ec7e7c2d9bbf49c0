#include <tuple>

#include "cpu/attention_glue.h"
#include "cpu/isa.h"

namespace mmfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_attention_bwd(
    const Optional& grad_image, const Optional& grad_text, const Tensor& q_image,
    const Tensor& k_image, const Tensor& v_image, const Tensor& q_text, const Tensor& k_text,
    const Tensor& v_text, const Tensor& out_image, const Tensor& out_text, const Tensor& lse_image,
    const Tensor& lse_text, const Optional& text_lengths, double scale) {
  AttentionViews views;
  AttentionArgs args = attention_args(q_image, k_image.size(1), v_image.size(3), scale);
  args.query_streams = args.key_streams = 2;
  Tensor grads[2][3];
  const Tensor* inputs[2][3] = {{&q_image, &k_image, &v_image}, {&q_text, &k_text, &v_text}};
  const Tensor *outs[2] = {&out_image, &out_text}, *sums[2] = {&lse_image, &lse_text};
  const Optional* grad_outs[2] = {&grad_image, &grad_text};
  for (int s = 0; s < 2; ++s) {
    for (int i = 0; i < 3; ++i) grads[s][i] = new_heads(*inputs[s][i], inputs[s][i]->size(3));
    const auto& [query, key, value] = inputs[s];
    const Sequences sequences = views.sequences(query->size(2), s ? text_lengths : Optional());
    args.queries[s] = {sequences,           views.heads(*query),         views.heads(*outs[s]),
                       views.sums(*sums[s]), views.heads(*grad_outs[s]), views.heads(grads[s][0])};
    args.keys[s] = {sequences, views.heads(*key), views.heads(*value), views.heads(grads[s][1]),
                    views.heads(grads[s][2])};
  }
  check_memory(kernels().attention_backward(args, parallel()));
  return {grads[0][0], grads[0][1], grads[0][2], grads[1][0], grads[1][1], grads[1][2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("joint_attention_bwd", MMFAST_BOX(&joint_attention_bwd));
}

}  // namespace mmfast
