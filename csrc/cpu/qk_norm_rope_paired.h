// What qk_norm_rope_kernel.h does to heads, for those of bfloat16 as pairs of vectors.
#pragma once
#include "cpu/qk_norm_rope_pairs.h"

namespace mmfast::MMFAST_ISA {

// Op: a QkNormRope, of which this is a part.
template <class Op>
struct PairedHeads;

#if defined(__AVX512BF16__)

template <class Op>
struct PairedHeads {
  using T = float;
  using V = typename Op::V;
  using Row = typename Op::Row;
  using Way = typename Op::Way;

  const Op& op;

  // Of expand, in the order of blocks.
  void expand(T* to, const typename Op::Work& work, int64_t b, int64_t l) const {
    const int64_t row = b * op.args.table_stride + l * op.args.table_width;
    const T *cos = (const T*)op.args.cos + row, *sin = (const T*)op.args.sin + row;
    const PairBlocks blocks = op.pair_blocks();
    const bool one_each = op.args.table_width == op.R, backward = op.args.grad.data != nullptr;
    const V sign = V{} + (T)(backward ? 1 : -1);
    for (int64_t j = 0; j < blocks.count; ++j) {
      const int64_t e = blocks.place(j);
      Pair c, s, other;  // other: the sine of a number's partner
      if (op.args.half) {
        const int64_t h = op.R / 2, from = one_each || e < h ? e : e - h;
        c = split_pair(cos + from);
        s = split_pair(sin + from);
        other = one_each ? split_pair(sin + (e < h ? e + h : e - h)) : s;
      } else if (one_each) {
        c = split_pair(cos + e);
        s = split_pair(sin + e);
        other = {s.odd, s.even};
      } else {
        c.even = c.odd = load<V>(cos + e / 2);
        s.even = s.odd = load<V>(sin + e / 2);
        other = s;
      }
      if (backward) s = other;
      // The first of two partners takes the sine with the sign.
      const V at_even = op.args.half && e >= op.R / 2 ? -sign : sign;
      const V at_odd = op.args.half ? at_even : -sign;
      s = {s.even * at_even, s.odd * at_odd};
      if (op.folded) {
        const Pair w = load_pair(work.weight + 32 * j), w2 = load_pair(work.swapped + 32 * j);
        c = {c.even * w.even, c.odd * w.odd};
        s = {s.even * w2.even, s.odd * w2.odd};
      }
      store_pair(to + 32 * j, c);
      store_pair(to + op.stride + 32 * j, s);
    }
  }

  // Calls give(j, rotated) for the blocks of a head, whose numbers are at(j).
  template <Way WAY, class At, class Give>
  __attribute__((always_inline)) void rotate(const T* table, const At& at,
                                                   const Give& give) const {
    const int64_t count = op.pair_blocks().count;
    const auto turned = [&](int64_t j, Pair n, Pair even_odd) __attribute__((always_inline)) {
      const Pair c = load_pair(table + 32 * j), s = load_pair(table + op.stride + 32 * j);
      give(j, Pair{fma(n.even, c.even, even_odd.even * s.even),
                   fma(n.odd, c.odd, even_odd.odd * s.odd)});
    };
    if constexpr (WAY == Way::halves) {
#pragma GCC unroll 4
      for (int64_t j = 0, k = count / 2; k < count; ++j, ++k) {
        const Pair a = at(j), b = at(k);
        turned(j, a, b);
        turned(k, b, a);
      }
    } else {
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) {
        const Pair n = at(j);
        if constexpr (WAY == Way::none)
          give(j, n);
        else
          turned(j, n, Pair{n.odd, n.even});
      }
    }
  }

  template <Way WAY>
  void forward(Row* rows, int64_t count) const {
    op.template measure<true>(rows, count);
    const PairBlocks blocks = op.pair_blocks();
    const bool folded = op.folded, streams = op.streams;
    for (int64_t i = 0; i < count; ++i) {
      const Row row = rows[i];
      const V inverse = V{} + row.inverse;
      const auto normed = [=](int64_t j) __attribute__((always_inline)) {
        const Pair x = read_pair(row.x + blocks.place(j) * Op::size);
        if (folded) return x;
        const Pair w = load_pair(row.weight + 32 * j);
        return Pair{x.even * inverse * w.even, x.odd * inverse * w.odd};
      };
      const auto write = [=](int64_t j, Pair v) __attribute__((always_inline)) {
        if (folded) v = {v.even * inverse, v.odd * inverse};
        write_pair(row.out + blocks.place(j) * Op::size, v, streams);
        __builtin_prefetch(row.next + j * 64, 0, 2);
      };
      rotate<WAY>(row.table, normed, write);
    }
  }

  template <Way WAY>
  void backward(Row* rows, int64_t count) const {
    op.template measure<true>(rows, count);
    const PairBlocks blocks = op.pair_blocks();
    const bool plain = op.args.norm == Norm::none, of_weight = op.args.grad_weight;
    const bool streams = op.streams;
    op.add_up(rows, count, &Row::along, [&](int64_t i, V* found) __attribute__((always_inline)) {
      const Row row = rows[i];
      const V inverse = V{} + row.inverse;
      V products[2]{};
      const auto read = [&](int64_t j) __attribute__((always_inline)) {
        return read_pair(row.grad + blocks.place(j) * Op::size);
      };
      const auto use = [&](int64_t j, Pair g) __attribute__((always_inline)) {
        const int64_t at = blocks.place(j) * Op::size;
        if (plain) {
          write_pair(row.out + at, g, streams);
          return;
        }
        const Pair x = read_pair(row.x + at), w = load_pair(row.weight + 32 * j);
        const Pair xhat{x.even * inverse, x.odd * inverse};
        const Pair mine = last(blocks.own(j), g), to{g.even * w.even, g.odd * w.odd};
        if (of_weight) {
          T* sums = row.to_weight + 32 * j;
          const Pair before = load_pair(sums);
          store(sums, fma(mine.even, xhat.even, before.even));
          store(sums + 16, fma(mine.odd, xhat.odd, before.odd));
        }
        store(row.to_xhat + 32 * j, to.even);
        store(row.to_xhat + 32 * j + 16, to.odd);
        const Pair own = last(blocks.own(j), to);
        products[0] = fma(own.even, xhat.even, products[0]);
        products[1] = fma(own.odd, xhat.odd, products[1]);
      };
      rotate<WAY>(row.table, read, use);
      found[0] = products[0] + products[1];
      return 1;
    });
    if (plain) return;
    const T per_number = 1 / (T)(op.E * op.group);
    for (int64_t i = 0; i < count; ++i) {
      const Row row = rows[i];
      const V inverse = V{} + row.inverse;
      const V along = V{} - row.along * per_number * row.inverse;
#pragma GCC unroll 4
      for (int64_t j = 0; j < blocks.count; ++j) {
        const int64_t at = blocks.place(j) * Op::size;
        const Pair x = read_pair(row.x + at), to = load_pair(row.to_xhat + 32 * j);
        const Pair to_x{fma(x.even, along, to.even) * inverse, fma(x.odd, along, to.odd) * inverse};
        write_pair(row.out + at, to_x, streams);
        __builtin_prefetch(row.next + j * 64, 0, 2);
        __builtin_prefetch(row.next_grad + j * 64, 0, 2);
      }
    }
  }
};

#endif

}  // namespace mmfast::MMFAST_ISA
