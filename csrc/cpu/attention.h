// What the attention kernels of all three ops get, forward and backward:
// softmax(scale Q K^T + mask) V.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

// A tensor as [batch][head][row] of numbers that lie one after another. Strides are in bytes.
struct HeadRows {
  char* data;
  int64_t batch, head, row;

  char* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};

// Rows of batch b are [begin(b), begin(b) + length(b)) of the tensors.
struct Sequences {
  int64_t rows;            // of every batch, if begins is null: those from its length on attend to
                           // nothing and are not attended to; outputs for them are zeros
  const int64_t* begins;   // [batches], or null: 0
  const int64_t* lengths;  // [batches], or null: rows

  int64_t begin(int64_t b) const { return begins ? begins[b] : 0; }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : rows; }
};

// Rows that attend. Attention is to the keys of all streams together.
struct QueryStream {
  Sequences sequences;
  HeadRows query, out;  // [E], [Ev]
  HeadRows lse;         // one float32, or float64 where the dtype is, for each row
  HeadRows grad_out, grad_query;  // of the backward; grad_out without data is zero
};

struct KeyStream {
  Sequences sequences;
  HeadRows key, value;  // [E], [Ev]
  HeadRows grad_key, grad_value;
};

enum class Causal : int32_t {
  none,
  top_left,      // row i of a batch attends to its keys j <= i
  bottom_right,  // j <= i + its keys - its rows
};

struct AttentionMask {
  const char* data;  // null: none
  bool additive;     // else of bytes, those that are not 0 take part
  Dtype dtype;       // of an additive one
  int64_t batch, head, row, column;  // strides in bytes, 0 where broadcast

  const char* at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return data + b * batch + h * head + i * row + j * column;
  }
};

// Causality, masks and dropout are for one stream of each kind.
struct AttentionArgs {
  static constexpr int most_streams = 2;
  Dtype dtype;
  int64_t batches, heads, key_heads;  // head h attends to key head h / (heads / key_heads)
  int64_t width, value_width;         // E, Ev
  double scale;
  int query_streams, key_streams;
  QueryStream queries[most_streams];
  KeyStream keys[most_streams];
  Causal causal;
  AttentionMask mask;
  // Probability (b, h, i, j) is dropped where the uniform number of element
  // ((b heads + h) rows + i) keys + j is below this in float32, rows and keys those of the streams.
  double dropout;
  int64_t seed, offset;
  // [batch][head][row][column] of double, 1 where mask broadcasts; null: not wanted.
  char* grad_mask;
  // Batches may be without rows or keys; E or Ev may be 0.
};

}  // namespace mmfast
