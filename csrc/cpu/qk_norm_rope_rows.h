// What qk_norm_rope_kernel.h does to heads, where a root mean square is of all heads of a token: their
// numbers follow each other, and a token is one row. Factors of its rotation repeat after as many
// numbers as whole heads and whole blocks have.
#pragma once
#include "cpu/past_cache.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/qk_norm_rope_pairs.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

// Op: a QkNormRope, of which this is a part. PAIRED: bfloat16 as pairs of vectors.
template <class Op, class T, Dtype DTYPE, bool PAIRED>
struct WholeRows {
  using V = typename Op::V;
  using Work = typename Op::Work;
  static constexpr int vectors = PAIRED ? 2 : 1;
  static constexpr int64_t W = Op::W, width = vectors * W, size = Op::size;
  static constexpr int64_t most_repeated = 1024;  // numbers of a table
  static constexpr int64_t ahead = 2;             // tokens, of what is asked for

  const Op& op;
  const int64_t numbers, blocks, repeated;  // repeated: blocks until the table begins again
  const bool rotates;

  explicit WholeRows(const Op& op)
      : op(op),
        numbers(op.E * op.args.heads),
        blocks(numbers / width),
        repeated(repeats(op.args) / width),
        rotates(op.R != 0) {}

  // Of a row that the table repeats in.
  static int64_t repeats(const QkNormRopeArgs& a) {
    int64_t numbers = a.num_dims;
    while (numbers % width) numbers += a.num_dims;
    return numbers;
  }

  static bool possible(const QkNormRopeArgs& a) {
    const bool turns = a.cos && a.rotary_dim;
    return a.across_heads && a.norm == Norm::rms && !a.bias && !a.grad_bias &&
           (!PAIRED || a.eps >= 1e-30) && a.num_dims * a.heads % width == 0 &&
           repeats(a) <= most_repeated &&
           (!turns || (!a.half && a.num_dims % 2 == 0 && a.rotary_dim == a.num_dims));
  }

  bool prepare(Work& work) const {
    const HeadsView& grad = op.args.grad;
    const bool copies = !together(op.args.x) || !together(op.args.out) ||
                        (grad.data && !together(grad));
    // Whole lines each.
    const int64_t row = (numbers + 15) / 16 * 16, table = 2 * (repeated * width + op.stride);
    T* at = allocate<T>(table + (3 + 3 * copies) * row);
    if (!at) return false;
    work.memory = work.tables = at;
    work.weight = at += table;
    work.to_weight = at += row;
    work.to_xhat = at += row;
    work.copies = at += row;
    const T* weight = (const T*)op.args.weight;
    for (int64_t e = 0; e < numbers; ++e) work.weight[e] = weight ? weight[e] : 1;
    arrange(work.weight, numbers);
    std::memset(work.to_weight, 0, (size_t)numbers * sizeof(T));
    return true;
  }

  // As many numbers as a block has.
  struct Block {
    V v[vectors];
  };

  MMFAST_INLINE Block read(const char* at) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRED) {
      const Pair pair = read_pair(at);
      return {{pair.even, pair.odd}};
    }
#endif
    Block block;
    read_numbers(at, DTYPE, block.v[0]);
    return block;
  }
  MMFAST_INLINE void write(char* at, const Block& block, bool past_cache) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRED) {
      write_pair(at, {block.v[0], block.v[1]}, past_cache);
      return;
    }
#endif
    if constexpr (DTYPE == Dtype::float32)
      if (past_cache) {
        store_past_cache(at, block.v[0]);
        return;
      }
    write_numbers(at, DTYPE, block.v[0]);
  }
  MMFAST_INLINE Block load_block(const T* at) {
    Block block;
    for (int i = 0; i < vectors; ++i) block.v[i] = load<V>(at + i * W);
    return block;
  }
  MMFAST_INLINE void store_block(T* at, const Block& block) {
    for (int i = 0; i < vectors; ++i) store(at + i * W, block.v[i]);
  }

  // numbers [count] in the order of blocks.
  static void arrange(T* at, int64_t count) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRED)
      for (int64_t e = 0; e < count; e += width) store_pair(at + e, split_pair(at + e));
#endif
  }

  // b, whose partners take the factors s, and themselves c.
  MMFAST_INLINE Block turned(const Block& b, const T* c, const T* s) {
    const Block to_self = load_block(c), to_partner = load_block(s);
    Block result;
    if constexpr (PAIRED) {
      for (int i = 0; i < 2; ++i)
        result.v[i] = fma(b.v[i], to_self.v[i], b.v[1 - i] * to_partner.v[i]);
    } else {
      result.v[0] = fma(b.v[0], to_self.v[0], swap_pairs(b.v[0]) * to_partner.v[0]);
    }
    return result;
  }

  // The row of a token: in place, or copied there from heads that lie apart.
  const char* row(const HeadsView& view, int64_t b, int64_t l, T* copy) const {
    if (together(view)) return view.head(b, l, 0);
    for (int64_t h = 0; h < op.args.heads; ++h)
      std::memcpy((char*)copy + h * op.E * size, view.head(b, l, h), (size_t)(op.E * size));
    return (const char*)copy;
  }
  bool together(const HeadsView& view) const {
    return op.args.heads == 1 || view.strides[2] == op.E * size;
  }
  bool streams() const {
    const HeadsView& out = op.args.out;
    return op.args.past_cache && (DTYPE == Dtype::float32 || PAIRED) && together(out) &&
           width * size == 64 && (uintptr_t)out.data % 64 == 0 && out.strides[0] % 64 == 0 &&
           out.strides[1] % 64 == 0;
  }

  // 1 over the root of the mean square.
  T inverse_of(const char* x) const {
    V squares[4]{};
    for (int64_t j = 0; j < blocks; ++j) {
#if defined(__AVX512BF16__)
      if constexpr (PAIRED) {
        squares[j & 3] = add_squares(squares[j & 3], x + j * width * size, width);
        continue;
      }
#endif
      const V v = read(x + j * width * size).v[0];
      squares[j & 3] = fma(v, v, squares[j & 3]);
    }
    const T sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const T mean = sum / (T)numbers + (T)op.args.eps;
    return 1 / (sizeof(T) == 4 ? (T)__builtin_sqrtf((float)mean) : (T)__builtin_sqrt((double)mean));
  }

  // Factors of the rotation times factor, [2][repeated].
  void make_table(const Work& work, int64_t b, int64_t l, T factor) const {
    const int64_t count = repeated * width;
    T *c = work.tables, *s = c + count, *plain = s + count;
    op.expand(plain, nullptr, nullptr, b, l);
    for (int64_t first = 0; first < count; first += op.E)
      for (int64_t e = 0; e < op.E; ++e) {
        c[first + e] = plain[e] * factor;
        s[first + e] = plain[op.stride + e] * factor;
      }
    arrange(c, 2 * count);
  }

  // Calls use(j, at), at: where in the table, for all blocks.
  template <class Use>
  __attribute__((always_inline)) void for_blocks(const Use& use) const {
    for (int64_t first = 0; first < blocks; first += repeated) {
      const int64_t count = blocks - first < repeated ? blocks - first : repeated;
      for (int64_t i = 0; i < count; ++i) use(first + i, i * width);
    }
  }

  template <bool ROTATES>
  void forward(const Work& work, const char* x, char* out, const char* next, T inverse,
               bool past_cache) const {
    const T *weight = work.weight, *c = work.tables, *s = c + repeated * width;
    for_blocks([=](int64_t j, int64_t at) __attribute__((always_inline)) {
      const Block given = read(x + j * width * size), w = load_block(weight + j * width);
      Block n;
      for (int i = 0; i < vectors; ++i) n.v[i] = given.v[i] * w.v[i];
      if constexpr (ROTATES)
        n = turned(n, c + at, s + at);
      else
        for (int i = 0; i < vectors; ++i) n.v[i] = n.v[i] * inverse;
      write(out + j * width * size, n, past_cache);
      __builtin_prefetch(next + j * width * size, 0, 2);
    });
  }

  template <bool ROTATES, bool OF_WEIGHT>
  void backward(const Work& work, const char* x, const char* grad, char* out, const char* next,
                const char* next_grad, T inverse, bool past_cache) const {
    const T *weight = work.weight, *c = work.tables, *s = c + repeated * width;
    T *to_weight = work.to_weight, *to_xhat = work.to_xhat;
    Block products{};
    for_blocks([&](int64_t j, int64_t at) __attribute__((always_inline)) {
      Block g = read(grad + j * width * size);
      if constexpr (ROTATES) g = turned(g, c + at, s + at);
      const Block given = read(x + j * width * size), w = load_block(weight + j * width);
      Block to, sum;
      if constexpr (OF_WEIGHT) sum = load_block(to_weight + j * width);
      for (int i = 0; i < vectors; ++i) {
        to.v[i] = g.v[i] * w.v[i];
        products.v[i] = fma(to.v[i], given.v[i], products.v[i]);
        if constexpr (OF_WEIGHT) sum.v[i] = fma(g.v[i], given.v[i] * inverse, sum.v[i]);
      }
      store_block(to_xhat + j * width, to);
      __builtin_prefetch(next + j * width * size, 0, 2);
      if constexpr (OF_WEIGHT) store_block(to_weight + j * width, sum);
    });
    V total = products.v[0];
    if constexpr (PAIRED) total += products.v[1];
    // Of the products with xhat the mean, times xhat's factor.
    const T along = sum_lanes(total) * inverse / (T)numbers * inverse;
    for (int64_t j = 0; j < blocks; ++j) {
      const Block given = read(x + j * width * size), to = load_block(to_xhat + j * width);
      Block made;
      for (int i = 0; i < vectors; ++i)
        made.v[i] = fma(given.v[i], V{} - along, to.v[i]) * inverse;
      write(out + j * width * size, made, past_cache);
      __builtin_prefetch(next_grad + j * width * size, 0, 2);
    }
  }

  void run_block(const Work& work, int64_t index) const {
    const QkNormRopeArgs& args = op.args;
    const int64_t b = index / op.blocks_per_sample, first = index % op.blocks_per_sample * op.block;
    const int64_t last = first + op.block < args.length ? first + op.block : args.length;
    const bool past_cache = streams(), backwards = args.grad.data;
    for (int64_t l = first; l < last; ++l) {
      const int64_t following = l + ahead < args.length ? l + ahead : l;
      const char* x = row(args.x, b, l, work.copies);
      const char* next = args.x.head(b, following, 0);
      const T inverse = inverse_of(x);
      if (rotates) make_table(work, b, l, backwards ? 1 : inverse);
      char* out = together(args.out) ? args.out.head(b, l, 0) : (char*)(work.copies + 2 * numbers);
      if (backwards) {
        const char* grad = row(args.grad, b, l, work.copies + numbers);
        const char* next_grad = args.grad.head(b, following, 0);
        const auto go = [&]<bool ROTATES, bool OF_WEIGHT>() {
          backward<ROTATES, OF_WEIGHT>(work, x, grad, out, next, next_grad, inverse, past_cache);
        };
        if (args.grad_weight)
          rotates ? go.template operator()<true, true>() : go.template operator()<false, true>();
        else
          rotates ? go.template operator()<true, false>() : go.template operator()<false, false>();
      } else if (rotates) {
        forward<true>(work, x, out, next, inverse, past_cache);
      } else {
        forward<false>(work, x, out, next, inverse, past_cache);
      }
      if (together(args.out)) continue;
      for (int64_t h = 0; h < args.heads; ++h)
        std::memcpy(args.out.head(b, l, h), out + h * op.E * size, (size_t)(op.E * size));
    }
    if (!work.sums) return;
    T* sums = work.to_weight;
    for (int64_t e = 0; e < numbers; ++e) {
      const int64_t within = e % width, from = e - within;
      // Of a pair the even numbers come first.
      work.sums[e] += sums[PAIRED ? from + within / 2 + within % 2 * W : e];
    }
    std::memset(sums, 0, (size_t)numbers * sizeof(T));
  }
};

}  // namespace mmfast::MMFAST_ISA
