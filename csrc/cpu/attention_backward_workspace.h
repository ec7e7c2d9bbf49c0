// What the gradients of attention work on: the rows of a batch, parts of keys, memory of a thread.
#pragma once
#include <cstdlib>

#include "cpu/attention.h"
#include "cpu/attention_backward_tile.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t smallest_part = 256, most_parts = 16;

static int64_t part_keys(int64_t keys) {
  const int64_t share = (keys + most_parts * key_block - 1) / (most_parts * key_block) * key_block;
  return share > smallest_part ? share : smallest_part;
}

// n numbers, in whole vectors.
template <class T>
static int64_t in_vectors(int64_t n) {
  return (n + native_width<T> - 1) / native_width<T> * native_width<T>;
}

// The rows of a batch: those of the first stream, then those of the second.
template <class Stream>
struct JoinedRows {
  const Stream* streams;
  int64_t batch, first, count;  // rows of the first stream, and of both

  JoinedRows(const Stream* s, int number, int64_t b)
      : streams(s), batch(b), first(s[0].sequences.length(b)), count(first) {
    if (number > 1) count += s[1].sequences.length(b);
  }
  char* at(HeadRows Stream::*rows, int64_t head, int64_t i) const {
    const Stream& stream = streams[i >= first];
    const HeadRows& all = stream.*rows;
    if (!all.data) return nullptr;
    return all.at(batch, head, stream.sequences.begin(batch) + i - (i >= first ? first : 0));
  }
};

// What one thread needs: a head's queries and output gradients, packed, and their gradients (twice
// for a group of heads where there are parts), and one part's keys.
template <class Kind>
struct BackwardWorkspace {
  using T = typename Kind::Number;
  using Element = typename Kind::Element;
  using Tile = BackwardTile<Kind>;

  // Whose room there is.
  struct Sizes {
    const AttentionArgs& args;
    int64_t group, rows, keys;  // heads of a key head; of a batch, at most
    bool with_totals;
  };

  char* memory = nullptr;
  Element *query, *grad_out, *query_across, *grad_out_across;
  T *lse, *delta, *grad_query, *totals;
  int64_t* empty;  // whether a row attends to nothing
  Element *key, *value, *key_across;
  T *grad_key, *grad_value;
  T *scores, *products, *bias, *grad_scores, *rows;
  Element *p, *d, *d_along;
  char* zeros;

  ~BackwardWorkspace() { std::free(memory); }

  // Called twice: without memory it counts bytes.
  int64_t place(const Sizes& sizes) {
    int64_t used = 0;
    const auto take = [&]<class N>(N*& at, int64_t count) {
      at = (N*)(memory + used);
      used += (count * (int64_t)sizeof(N) + 63) / 64 * 64;
    };
    const AttentionArgs& args = sizes.args;
    const int64_t rows = sizes.rows, part = part_keys(sizes.keys);
    const int64_t most = part < sizes.keys ? part : sizes.keys;
    const int64_t padded_width = in_vectors<T>(args.width);
    const int64_t part_blocks = (most + key_block - 1) / key_block;
    take(query, rows * elements_of<Kind>(args.width));
    take(grad_out, rows * elements_of<Kind>(args.value_width));
    if (Kind::numbers == 1) {
      query_across = query;
      grad_out_across = grad_out;
    } else {
      take(query_across, elements_of<Kind>(rows) * args.width);
      take(grad_out_across, elements_of<Kind>(rows) * args.value_width);
    }
    take(lse, rows);
    take(delta, rows);
    take(empty, rows);
    take(grad_query, rows * padded_width);
    if (sizes.with_totals && part < sizes.keys)
      take(totals, sizes.group * rows * padded_width);
    else
      totals = nullptr;
    take(key, part_blocks * elements_of<Kind>(args.width) * key_block);
    take(value, part_blocks * elements_of<Kind>(args.value_width) * key_block);
    take(key_across, part_blocks * elements_of<Kind>(key_block) * padded_width);
    take(grad_key, part_blocks * args.width * key_block);
    take(grad_value, part_blocks * args.value_width * key_block);
    take(scores, Tile::score_rows * key_block);
    take(products, Tile::score_rows * key_block);
    if (Kind::numbers == 1) {
      p = (Element*)scores;
      d = d_along = (Element*)products;
    } else {
      take(p, elements_of<Kind>(Tile::query_block) * key_block);
      take(d, elements_of<Kind>(Tile::query_block) * key_block);
      take(d_along, Tile::query_block * elements_of<Kind>(key_block));
    }
    take(bias, args.mask.data && args.mask.additive ? Tile::query_block * key_block : 0);
    take(grad_scores, args.grad_mask ? Tile::query_block * key_block : 0);
    const int64_t widest = args.width > args.value_width ? args.width : args.value_width;
    take(this->rows, key_block * in_vectors<T>(widest));
    take(zeros, args.value_width * size_of(args.dtype));
    return used;
  }
  bool allocate(const Sizes& sizes) {
    const int64_t bytes = place(sizes);
    memory = mmfast::MMFAST_ISA::allocate<char>(bytes);
    if (!memory) return false;
    place(sizes);
    std::memset(zeros, 0, (size_t)(sizes.args.value_width * size_of(sizes.args.dtype)));
    return true;
  }
};

}  // namespace mmfast::MMFAST_ISA
