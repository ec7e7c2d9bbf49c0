// From torch's stable tensors to what attention kernels get.
#pragma once
#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/glue.h"
#include "cpu/outputs.h"

namespace mmfast {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Outputs. (B, H, L, width) in the order of query in memory: (B, L, H, E) stays that.
inline Tensor new_heads(const Tensor& query, int64_t width) {
  const int64_t batches = query.size(0), heads = query.size(1), rows = query.size(2);
  if (query.stride(1) >= query.stride(2))
    return new_output(query, {batches, heads, rows, width});
  return torch::stable::transpose(new_output(query, {batches, rows, heads, width}), 1, 2);
}

inline Tensor new_sums(const Tensor& query, std::initializer_list<int64_t> sizes) {
  const bool wide = dtype_of(query) == Dtype::float64;
  return new_output(query, sizes, wide ? ScalarType::Double : ScalarType::Float);
}

// Views of tensors, which are copied where numbers of a row do not lie together. The copies, and
// the lists of sequences, live as long as this.
class AttentionViews {
 public:
  // (B, H, L, E).
  HeadRows heads(const Tensor& given) {
    const Tensor tensor = dense(given);
    const int64_t size = size_of(dtype_of(tensor));
    return {(char*)tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size,
            tensor.stride(2) * size};
  }
  HeadRows heads(const Optional& given) { return given ? heads(*given) : HeadRows{}; }

  // (N, H, E), of which a batch has some rows.
  HeadRows tokens(const Tensor& given) {
    const Tensor tensor = dense(given);
    const int64_t size = size_of(dtype_of(tensor));
    return {(char*)tensor.data_ptr(), 0, tensor.stride(1) * size, tensor.stride(0) * size};
  }

  // (B, H, L), or (H, L) of tokens, contiguous.
  HeadRows sums(const Tensor& given) {
    const Tensor tensor = kept_.emplace_back(torch::stable::contiguous(given));
    const int64_t size = size_of(dtype_of(tensor)), last = tensor.dim() - 1;
    const int64_t row = size, head = tensor.size(last) * size;
    return {(char*)tensor.data_ptr(), last == 2 ? tensor.size(1) * head : 0, head, row};
  }

  // (B or 1, H or 1, L or 1, S or 1).
  AttentionMask mask(const Optional& given) {
    if (!given) return {};
    const bool additive = given->scalar_type() != ScalarType::Bool;
    const Dtype dtype = additive ? dtype_of(*given) : Dtype::float32;
    const int64_t size = additive ? size_of(dtype) : 1;
    const auto stride = [&](int64_t d) {
      return given->size(d) == 1 ? 0 : given->stride(d) * size;
    };
    return {(const char*)given->data_ptr(), additive, dtype, stride(0), stride(1), stride(2),
            stride(3)};
  }

  // rows of each batch, of which lengths (B,), if given, says how many there are.
  Sequences sequences(int64_t rows, const Optional& lengths) {
    if (!lengths) return {rows, nullptr, nullptr};
    std::vector<int64_t>& list = integers(*lengths);
    for (int64_t& length : list) length = std::clamp<int64_t>(length, 0, rows);
    return {rows, nullptr, list.data()};
  }

  // From where each batch begins in `tokens` rows, and the end of the last, (B + 1,). What is out
  // of order, out of range or beyond the longest is not there.
  Sequences sequences_from(const Tensor& bounds, int64_t tokens, int64_t longest) {
    std::vector<int64_t>& begins = integers(bounds);
    std::vector<int64_t>& lengths = lists_.emplace_back();
    for (int64_t& bound : begins) bound = std::clamp<int64_t>(bound, 0, tokens);
    for (size_t b = 0; b + 1 < begins.size(); ++b)
      lengths.push_back(std::clamp<int64_t>(begins[b + 1] - begins[b], 0, longest));
    return {0, begins.data(), lengths.data()};
  }

 private:
  // Memory of a copy, or of the tensor itself, that stays.
  Tensor dense(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
    return kept_.emplace_back(torch::stable::contiguous(tensor));
  }

  std::vector<int64_t>& integers(const Tensor& given) {
    const Tensor tensor = torch::stable::contiguous(given);
    std::vector<int64_t>& list = lists_.emplace_back((size_t)tensor.numel());
    for (size_t i = 0; i < list.size(); ++i)
      list[i] = tensor.scalar_type() == ScalarType::Int ? ((const int32_t*)tensor.data_ptr())[i]
                                                        : ((const int64_t*)tensor.data_ptr())[i];
    return list;
  }

  std::vector<Tensor> kept_;
  std::deque<std::vector<int64_t>> lists_;
};

// For query (B, H, L, E), or (N, H, E) of which the caller sets the batches; nothing else is set.
inline AttentionArgs attention_args(const Tensor& query, int64_t key_heads, int64_t value_width,
                                    double scale) {
  AttentionArgs args{};
  args.dtype = dtype_of(query);
  args.batches = query.size(0);
  args.heads = query.size(1);
  args.key_heads = key_heads;
  args.width = query.size(query.dim() - 1);
  args.value_width = value_width;
  args.scale = scale;
  return args;
}

inline void check_memory(bool made) {
  STD_TORCH_CHECK(made, "mmfast: attention ran out of memory for its workspace");
}

// Of a tensor (), or 0.
inline int64_t integer_of(const Optional& tensor) {
  return tensor ? *(const int64_t*)tensor->data_ptr() : 0;
}

}  // namespace mmfast
