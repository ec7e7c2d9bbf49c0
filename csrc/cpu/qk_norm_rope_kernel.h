// Heads are normalised and rotated some at a time, so that their sums, roots and divisions overlap:
// numbers come from memory once, and from the first cache again.
//
// The last vector of a head overlaps the one before it where E is no multiple of the vectors'
// width. A head that is narrower than a vector is padded with zeros.
#pragma once
#include <atomic>
#include <utility>

#include "cpu/numbers.h"
#include "cpu/past_cache.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/qk_norm_rope_paired.h"
#include "cpu/qk_norm_rope_rows.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

// COUNT: vectors of a head, 0 if the compiler is not to know.
template <class T, Dtype DTYPE, int COUNT>
struct QkNormRope {
  using V = typename Native<T>::V;
  static constexpr int64_t W = native_width<T>;
  static constexpr int64_t size = DTYPE == Dtype::float64 ? 8 : DTYPE == Dtype::float32 ? 4 : 2;
  static constexpr int64_t block = 16;  // tokens whose tables are made at once
  static constexpr int64_t together = 16;  // heads, unless a norm is of more
  static constexpr int at_once = W * sizeof(T) == 64 ? 4 : 2;  // of these, if they are of one token
  static constexpr int64_t most_parts = 64, least_part = 64;  // of a sum over tokens, and tokens

  const QkNormRopeArgs& args;
  const int64_t E, R, stride;  // stride: numbers from one head to the next in our memory
  const int64_t tail;          // lanes of the last vector that the others have not
  const int64_t blocks_per_sample, blocks, group;  // group: heads of a norm
  const bool layer;
  const bool folded;  // weights are in the tables
  const bool streams;  // what is written goes past the cache
  const bool whole;    // tokens are taken as rows
  int64_t part_blocks = 1, parts = 0;
  double* sums = nullptr;  // [parts][2][rows_width]
  std::atomic<bool> failed{false};
  QkNormRope* other = nullptr;  // keys beside these queries

  explicit QkNormRope(const QkNormRopeArgs& a)
      : args(a),
        E(a.num_dims),
        R(a.cos ? a.rotary_dim : 0),
        stride((a.num_dims + 31) / 32 * 32),
        tail(a.num_dims - (a.num_dims - 1) / W * W),
        blocks_per_sample((a.length + block - 1) / block),
        blocks(a.batch * blocks_per_sample),
        group(a.across_heads ? a.heads : 1),
        layer(a.norm == Norm::layer),
        folded(R == E && a.weight && !a.bias && !a.across_heads && !a.grad.data),
        streams(a.past_cache && whole_lines(a)),
        whole(has_whole_rows(a)) {}
  QkNormRope(const QkNormRope&) = delete;
  ~QkNormRope() { std::free(sums); }

#if defined(__AVX512BF16__)
  static constexpr bool pairs_in_rows = DTYPE == Dtype::bfloat16;
#else
  static constexpr bool pairs_in_rows = false;
#endif
  using Rows = WholeRows<QkNormRope, T, DTYPE, pairs_in_rows>;

  static bool has_whole_rows(const QkNormRopeArgs& a) {
    if constexpr (COUNT == 0) return Rows::possible(a);
    return false;
  }

  __attribute__((always_inline)) int64_t vectors() const {
    return COUNT ? COUNT : (E + W - 1) / W;
  }

  // A head of a token. next: of one that comes soon.
  struct Row {
    const char *x, *grad, *next, *next_grad;
    char* out;
    const T *table, *weight, *bias;
    T *to_weight, *to_bias, *to_xhat;
    T mean, inverse;
    T average, along;  // of the gradient, and of its products with xhat
  };

  // A thread's memory.
  struct Work {
    void* memory;
    Row* rows;
    T* tables;               // [block][2][stride]
    T *weight, *bias;        // [group][stride]
    T* swapped;              // [stride]: the weight of each number's partner
    T *to_weight, *to_bias;  // [group][stride], of a block
    T* to_xhat;              // [rows][stride]
    T* pairs;                // [2 stride]: a head and its beginning once more
    T* copies;               // [3][group E]: of rows whose heads lie apart
    double* sums;            // of a part
  };

  bool sums_rows() const { return args.grad_weight || args.grad_bias; }

  bool prepare(Work& work) const {
    if constexpr (COUNT == 0)
      if (whole) return Rows(*this).prepare(work);
    const int64_t most = group > together ? group : together;
    const int64_t rows = (most * (int64_t)sizeof(Row) + 63) / 64 * 64 / (int64_t)sizeof(T);
    const int64_t numbers = rows + (2 * block + 4 * group + most + 3) * stride;
    T* at = allocate<T>(numbers);
    if (!at) return false;
    // Padding is read, though nothing follows from it.
    std::memset(at, 0, (size_t)numbers * sizeof(T));
    work.memory = at;
    work.rows = (Row*)at;
    at += rows;
    const auto take = [&](int64_t count) {
      T* taken = at;
      at += count * stride;
      return taken;
    };
    work.tables = take(2 * block);
    work.weight = take(group);
    work.bias = take(group);
    work.swapped = take(1);
    work.to_weight = take(group);
    work.to_bias = take(group);
    work.to_xhat = take(most);
    work.pairs = take(2);
    for (int64_t i = 0; i < group; ++i)
      for (int64_t e = 0; e < E; ++e) {
        work.weight[i * stride + e] = args.weight ? ((const T*)args.weight)[i * E + e] : 1;
        if (args.bias) work.bias[i * stride + e] = ((const T*)args.bias)[i * E + e];
      }
    for (int64_t e = 0; e < R; ++e)
      work.swapped[e] = work.weight[args.half ? (e + R / 2) % R : e ^ 1];
    if constexpr (can_pair)
      if (paired())
        for (int64_t i = 0; i <= group; ++i) {
          T* row = i < group ? work.weight + i * stride : work.swapped;
          std::memcpy(work.pairs, row, (size_t)E * sizeof(T));
          this->pair_blocks().arrange(row, work.pairs);
        }
    return true;
  }

  enum class Way { none, neighbours, halves, memory };  // in which partners are found

  Way way() const {
    if (R == 0) return Way::none;
    if (!args.half) return E % 2 == 0 || E < W ? Way::neighbours : Way::memory;
    return R == E && E % (2 * W) == 0 ? Way::halves : Way::memory;
  }

#if defined(__AVX512BF16__)
  static constexpr bool can_pair = DTYPE == Dtype::bfloat16 && COUNT;

  __attribute__((always_inline)) PairBlocks pair_blocks() const {
    return {E, COUNT ? (COUNT + 1) / 2 : 0};
  }
#else
  static constexpr bool can_pair = false;
#endif

  // Whether heads are taken as pairs of vectors. Their squares lose what is far below eps.
  bool paired() const {
    if (!can_pair || layer || args.bias || args.grad_bias || E % 2) return false;
    if (args.norm == Norm::rms && !(args.eps >= 1e-30)) return false;
    const Way found = way();
    return found == Way::none || (R == E && (found == Way::neighbours || E % 64 == 0));
  }

  static bool whole_lines(const QkNormRopeArgs& a) {
    if (!COUNT || a.num_dims * size % 64) return false;
    for (const int64_t stride : a.out.strides)
      if (stride % 64) return false;
    return (uintptr_t)a.out.data % 64 == 0;
  }

  // Calls use(v) for the vectors of a head, or for the first half of them. Written out if USUAL: what
  // is added up stays in registers then.
  template <bool USUAL, int UP_TO = COUNT, class Use>
  __attribute__((always_inline)) void for_vectors(const Use& use) const {
    if constexpr (USUAL)
      [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (use((int64_t)I), ...);
      }(std::make_integer_sequence<int, UP_TO>{});
    else
      for (int64_t v = 0, end = UP_TO == COUNT ? vectors() : UP_TO; v < end; ++v) use(v);
  }

  // Where vector v of a head begins.
  __attribute__((always_inline)) int64_t place(int64_t v) const {
    return v + 1 < vectors() || (!COUNT && E < W) ? v * W : E - W;
  }

  __attribute__((always_inline)) V take(const char* at, int64_t e) const {
    V v;
    if (COUNT || E >= W) {
      read_numbers(at + e * size, DTYPE, v);
      return v;
    }
    char padded[W * sizeof(double)]{};
    std::memcpy(padded, at, (size_t)(E * size));
    read_numbers(padded, DTYPE, v);
    return v;
  }

  __attribute__((always_inline)) void put(char* at, int64_t e, V v, bool past_cache) const {
    if constexpr (DTYPE == Dtype::float32 && COUNT)
      if (past_cache) {
        store_past_cache(at + e * size, v);
        return;
      }
#if defined(__AVX512BF16__)
    // One instruction for ten; it takes denormals for zeros.
    if constexpr (DTYPE == Dtype::bfloat16 && COUNT) {
      store(at + e * size, _mm512_cvtneps_pbh((__m512)v));
      return;
    }
#endif
    if (COUNT || E >= W) {
      write_numbers(at + e * size, DTYPE, v);
      return;
    }
    char padded[W * sizeof(double)];
    write_numbers(padded, DTYPE, v);
    std::memcpy(at, padded, (size_t)(E * size));
  }

  // Vector v with zeros for what is no number of the head, or belongs to the vector before it.
  __attribute__((always_inline)) V own(V value, int64_t v) const {
    if (v + 1 < vectors() || tail == W) return value;
    if (!COUNT && E < W) return first(tail, value, V{});
    return first(W - tail, V{}, value);
  }

  // The first count lanes of a, the others of b.
  MMFAST_INLINE V first(int64_t count, V a, V b) {
    V lane;
    for (int i = 0; i < W; ++i) lane[i] = (T)i;
    return lane < V{} + (T)count ? a : b;
  }

  // cos and sin of a token as factors of a number and of its partner, for each number of a head.
  void expand(T* to, const T* weight, const T* swapped, int64_t b, int64_t l) const {
    const int64_t row = b * args.table_stride + l * args.table_width, h = R / 2;
    const T *cos = (const T*)args.cos + row, *sin = (const T*)args.sin + row;
    T *__restrict c = to, *__restrict s = to + stride;
    const bool pairs = args.table_width != R;
    // Gradients take the partner's sine.
    const bool backward = args.grad.data != nullptr;
    const T sign = backward ? 1 : -1;
    if (args.half) {
      const int64_t second = pairs ? 0 : h;
      const T *first_sin = backward ? sin + second : sin, *second_sin = backward ? sin : sin + second;
      for (int64_t i = 0; i < h; ++i) {
        c[i] = cos[i];
        c[i + h] = cos[i + second];
        s[i] = sign * first_sin[i];
        s[i + h] = -sign * second_sin[i];
      }
    } else if (pairs) {
      for (int64_t i = 0; i < h; ++i) {
        c[2 * i] = cos[i];
        c[2 * i + 1] = cos[i];
        s[2 * i] = sign * sin[i];
        s[2 * i + 1] = -sign * sin[i];
      }
    } else {
      const int64_t other = backward ? 1 : 0;  // whose sine a number's partner has
      for (int64_t i = 0; i < h; ++i) {
        c[2 * i] = cos[2 * i];
        c[2 * i + 1] = cos[2 * i + 1];
        s[2 * i] = sign * sin[2 * i + other];
        s[2 * i + 1] = -sign * sin[2 * i + 1 - other];
      }
    }
    if (!folded) return;
    for (int64_t e = 0; e < R; ++e) {
      c[e] *= weight[e];
      s[e] *= swapped[e];
    }
  }

  // A root mean square of a head, no bias, and all numbers are rotated or none: nothing is left to ask
  // for each vector.
  bool usual() const {
    return COUNT && args.norm == Norm::rms && !args.across_heads && !args.bias && !args.grad_bias &&
           (R == 0 || R == E);
  }

  // Calls give(v, e, rotated) for the vectors of MANY heads with one table, whose numbers are
  // at(i, e); rotated[i] is head i's vector v.
  template <Way WAY, bool USUAL, int MANY, class At, class Give>
  __attribute__((always_inline)) void rotate(const T* table, T* pairs, const At& at,
                                             const Give& give) const {
    const int64_t R = this->R, h = R / 2;
    const bool partly = !USUAL && R < E;
    const T *c = table, *s = table + stride;
    V made[MANY];
    if constexpr (WAY == Way::none) {
      for_vectors<USUAL>([&](int64_t v) __attribute__((always_inline)) {
        for (int i = 0; i < MANY; ++i) made[i] = at(i, place(v));
        give(v, place(v), made);
      });
    } else if constexpr (WAY == Way::neighbours) {
      for_vectors<USUAL>([&](int64_t v) __attribute__((always_inline)) {
        const int64_t e = place(v);
        const V to_self = load<V>(c + e), to_partner = load<V>(s + e);
        for (int i = 0; i < MANY; ++i) {
          const V n = at(i, e), r = fma(n, to_self, swap_pairs(n) * to_partner);
          made[i] = partly ? first(R - e, r, n) : r;
        }
        give(v, e, made);
      });
    } else if constexpr (WAY == Way::halves) {
      const auto both = [&](int64_t v, int64_t u) __attribute__((always_inline)) {
        const V c1 = load<V>(c + v * W), s1 = load<V>(s + v * W);
        const V c2 = load<V>(c + u * W), s2 = load<V>(s + u * W);
        V second[MANY];
        for (int i = 0; i < MANY; ++i) {
          const V a = at(i, v * W), b = at(i, u * W);
          made[i] = fma(a, c1, b * s1);
          second[i] = fma(b, c2, a * s2);
        }
        give(v, v * W, made);
        give(u, u * W, second);
      };
      if constexpr (COUNT != 0)
        for_vectors<USUAL, COUNT / 2>([&](int64_t v) __attribute__((always_inline)) {
          both(v, v + COUNT / 2);
        });
      else
        for (int64_t v = 0, u = vectors() / 2; u < vectors(); ++v, ++u) both(v, u);
    } else {
      static_assert(MANY == 1);
      for (int64_t v = 0; v < vectors(); ++v) store(pairs + place(v), at(0, place(v)));
      int64_t offset = 0;  // from a number to its partner
      if (args.half) {
        // What follows the rotated numbers makes room for their beginning: it is not needed.
        T beginning[W];
        for (int64_t i = 0; i < h; i += W) {
          std::memcpy(beginning, pairs + i, sizeof beginning);
          std::memcpy(pairs + R + i, beginning, sizeof beginning);
        }
        offset = h;
      } else {
        for (int64_t i = 0; i < R; i += 2) {
          const T a = pairs[i];
          pairs[i] = pairs[i + 1];
          pairs[i + 1] = a;
        }
      }
      for (int64_t v = 0; v < vectors(); ++v) {
        const int64_t e = place(v);
        const V n = at(0, e), partner = load<V>(pairs + e + offset);
        const V r = fma(n, load<V>(c + e), partner * load<V>(s + e));
        made[0] = partly ? first(R - e, r, n) : r;
        give(v, e, made);
      }
    }
  }

  // of[i]: what the numbers of a head's vector add up to, or those of all heads of a norm. Calls
  // partial(i, found), which makes the vectors of as many heads from i on as it returns.
  template <class Partial>
  __attribute__((always_inline)) void add_up(Row* rows, int64_t count, T Row::*of,
                                             const Partial& partial) const {
    V found[together];
    if (args.across_heads) {
      V total{};
      for (int64_t i = 0; i < count;) {
        const int64_t many = partial(i, found);
        for (int64_t j = 0; j < many; ++j) total += found[j];
        i += many;
      }
      const T sum = sum_lanes(total);
      for (int64_t i = 0; i < count; ++i) rows[i].*of = sum;
      return;
    }
    T sums[together];
    for (int64_t i = 0; i < count;) i += partial(i, found + i);
    for (int64_t i = count; i < together; ++i) found[i] = V{};
    if constexpr (sizeof(T) == 4)
      sum_lanes_of(found, sums);
    else
      for (int64_t i = 0; i < count; ++i) sums[i] = sum_lanes(found[i]);
    for (int64_t i = 0; i < count; ++i) rows[i].*of = sums[i];
  }

  // Means and inverses of the rows.
  template <bool PAIRED = false, bool USUAL = false>
  void measure(Row* rows, int64_t count) const {
    if (!USUAL && args.norm == Norm::none) return;
    const T numbers = (T)(E * group);
    const bool layer = !USUAL && this->layer;
    if (layer) {
      add_up(rows, count, &Row::mean, [&](int64_t i, V* found) __attribute__((always_inline)) {
        V total{};
        for (int64_t v = 0; v < vectors(); ++v) total += own(take(rows[i].x, place(v)), v);
        found[0] = total;
        return 1;
      });
      for (int64_t i = 0; i < count; ++i) rows[i].mean /= numbers;
    }
    add_up(rows, count, &Row::inverse, [&](int64_t i, V* found) __attribute__((always_inline)) {
      V squares[2]{};
      if constexpr (PAIRED) {
        const auto blocks = this->pair_blocks();
#pragma GCC unroll 4
        for (int64_t j = 0; j < blocks.count; ++j)
          squares[j & 1] =
              add_squares(squares[j & 1], rows[i].x + blocks.place(j) * size, blocks.own(j));
      } else {
        const V mean = V{} + rows[i].mean;
        for_vectors<USUAL>([&](int64_t v) __attribute__((always_inline)) {
          const V x = take(rows[i].x, place(v)), mine = own(layer ? x - mean : x, v);
          squares[v & 1] = fma(mine, mine, squares[v & 1]);
        });
      }
      found[0] = squares[0] + squares[1];
      return 1;
    });
    const int64_t different = args.across_heads ? 1 : count;
    T inverses[together];
    for (int64_t i = 0; i < different; ++i) inverses[i] = rows[i].inverse;
    for (int64_t i = different; i < together; ++i) inverses[i] = 1;
    for (int64_t i = 0; i < together; ++i) {
      const T mean = inverses[i] / numbers + (T)args.eps;
      inverses[i] =
          1 / (sizeof(T) == 4 ? (T)__builtin_sqrtf((float)mean) : (T)__builtin_sqrt((double)mean));
    }
    for (int64_t i = 0; i < count; ++i) rows[i].inverse = inverses[args.across_heads ? 0 : i];
  }

  // How many heads ahead their numbers are asked for: not a page, or near to one, for loads wait for
  // stores to the same place of another page.
  int64_t rows_ahead() const {
    int64_t rows = together;
    while (rows < 2 * together && (uint64_t)(rows * E * size % 4096 - 1024) > 2048) ++rows;
    return rows;
  }

  // Asks for a part of the row that comes soon, where vector v of this one is. Into the second cache:
  // the first would wait for memory with too few lines at a time.
  __attribute__((always_inline)) void ask(const char* next, int64_t v) const {
    if (COUNT && v * W * size % 64 == 0) __builtin_prefetch(next + v * W * size, 0, 2);
  }

  // Whether heads from i on, as many as are taken at once, have one table.
  static bool as_one(const Row* rows, int64_t i, int64_t count) {
    if (i + at_once > count) return false;
    for (int j = 1; j < at_once; ++j)
      if (rows[i + j].table != rows[i].table) return false;
    return true;
  }

  // What is the same for all rows; copies stay in registers, members would be read again after every
  // store.
  template <bool USUAL>
  struct Flags {
    const bool plain, layer, biased, folded, streams, of_weight, of_bias;

    explicit Flags(const QkNormRope& op)
        : plain(!USUAL && op.args.norm == Norm::none),
          layer(!USUAL && op.layer),
          biased(!USUAL && op.args.bias),
          folded(op.folded),
          streams(op.streams),
          of_weight(op.args.grad_weight),
          of_bias(!USUAL && op.args.grad_bias) {}
  };

  template <Way WAY, bool USUAL, int MANY>
  __attribute__((always_inline)) void write_heads(const Row* rows, T* pairs,
                                                  const Flags<USUAL>& is) const {
    V mean[MANY], inverse[MANY];
    for (int i = 0; i < MANY; ++i) {
      mean[i] = V{} + rows[i].mean;
      inverse[i] = V{} + rows[i].inverse;
    }
    const T *weight = rows[0].weight, *bias = rows[0].bias;
    const auto normed = [&](int i, int64_t e) __attribute__((always_inline)) {
      const V x = is.layer ? take(rows[i].x, e) - mean[i] : take(rows[i].x, e);
      if (is.folded) return x;
      const V n = x * inverse[i] * load<V>(weight + e);
      return is.biased ? n + load<V>(bias + e) : n;
    };
    const auto write = [&](int64_t v, int64_t e, const V* made) __attribute__((always_inline)) {
      for (int i = 0; i < MANY; ++i) {
        put(rows[i].out, e, is.folded ? made[i] * inverse[i] : made[i], is.streams);
        ask(rows[i].next, v);
      }
    };
    rotate<WAY, USUAL, MANY>(rows[0].table, pairs, normed, write);
  }

  template <Way WAY, bool USUAL>
  void forward(Row* rows, int64_t count, T* pairs) const {
    measure<false, USUAL>(rows, count);
    const Flags<USUAL> is(*this);
    for (int64_t i = 0; i < count;) {
      if constexpr (USUAL)
        if (as_one(rows, i, count)) {
          write_heads<WAY, USUAL, at_once>(rows + i, pairs, is);
          i += at_once;
          continue;
        }
      write_heads<WAY, USUAL, 1>(rows + i, pairs, is);
      ++i;
    }
  }

  // Gradients of what the norm makes, in to_xhat, and found: their products with it.
  template <Way WAY, bool USUAL, int MANY>
  __attribute__((always_inline)) void gradients_of_norm(Row* rows, T* pairs, V* found,
                                                        const Flags<USUAL>& is) const {
    V mean[MANY], inverse[MANY], total[MANY]{}, products[MANY][2]{};
    for (int i = 0; i < MANY; ++i) {
      mean[i] = V{} + rows[i].mean;
      inverse[i] = V{} + rows[i].inverse;
    }
    const Row& one = rows[0];
    const auto read = [&](int i, int64_t e) __attribute__((always_inline)) {
      return take(rows[i].grad, e);
    };
    const auto use = [&](int64_t v, int64_t e, const V* made) __attribute__((always_inline)) {
      if (is.plain) {
        for (int i = 0; i < MANY; ++i) put(rows[i].out, e, made[i], is.streams);
        return;
      }
      const V w = load<V>(one.weight + e);
      V to_weight{}, to_bias{};
      if (is.of_weight) to_weight = load<V>(one.to_weight + e);
      if (is.of_bias) to_bias = load<V>(one.to_bias + e);
      for (int i = 0; i < MANY; ++i) {
        const V x = take(rows[i].x, e), g = made[i], mine = own(g, v), mine_w = mine * w;
        const V xhat = (is.layer ? x - mean[i] : x) * inverse[i];
        to_weight = fma(mine, xhat, to_weight);
        if (is.of_bias) to_bias += mine;
        store(rows[i].to_xhat + e, g * w);
        ask(rows[i].next, v);
        products[i][v & 1] = fma(mine_w, xhat, products[i][v & 1]);
        if (is.layer) total[i] += mine_w;
      }
      if (is.of_weight) store(one.to_weight + e, to_weight);
      if (is.of_bias) store(one.to_bias + e, to_bias);
    };
    rotate<WAY, USUAL, MANY>(one.table, pairs, read, use);
    for (int i = 0; i < MANY; ++i) {
      rows[i].average = is.layer ? sum_lanes(total[i]) : 0;
      found[i] = products[i][0] + products[i][1];
    }
  }

  template <Way WAY, bool USUAL>
  void backward(Row* rows, int64_t count, T* pairs) const {
    measure<false, USUAL>(rows, count);
    const Flags<USUAL> is(*this);
    add_up(rows, count, &Row::along, [&](int64_t i, V* found) __attribute__((always_inline)) {
      if constexpr (USUAL)
        if (as_one(rows, i, count)) {
          gradients_of_norm<WAY, USUAL, at_once>(rows + i, pairs, found, is);
          return at_once;
        }
      gradients_of_norm<WAY, USUAL, 1>(rows + i, pairs, found, is);
      return 1;
    });
    if (is.plain) return;
    if (args.across_heads) {
      T total = 0;
      for (int64_t i = 0; i < count; ++i) total += rows[i].average;
      for (int64_t i = 0; i < count; ++i) rows[i].average = total;
    }
    const T per_number = 1 / (T)(E * group);
    for (int64_t i = 0; i < count; ++i) {
      const Row row = rows[i];
      const V mean = V{} + row.mean, inverse = V{} + row.inverse;
      const V average = V{} + row.average * per_number;
      const V along = V{} + row.along * per_number * row.inverse;
      for_vectors<USUAL>([&](int64_t v) __attribute__((always_inline)) {
        const int64_t e = place(v);
        const V x = take(row.x, e);
        V to_x = fma(is.layer ? x - mean : x, -along, load<V>(row.to_xhat + e));
        if (is.layer) to_x -= average;
        put(row.out, e, to_x * inverse, is.streams);
        ask(row.next_grad, v);
      });
    }
  }

  template <Way WAY, bool USUAL>
  void run_rows(const Work& work, int64_t count) const {
    args.grad.data ? backward<WAY, USUAL>(work.rows, count, work.pairs)
                   : forward<WAY, USUAL>(work.rows, count, work.pairs);
  }

  template <Way WAY>
  void run_block(const Work& work, int64_t index) const {
    const int64_t b = index / blocks_per_sample, first = index % blocks_per_sample * block;
    const int64_t last = first + block < args.length ? first + block : args.length;
    const bool in_pairs = paired(), is_usual = usual();
    // Sums have one order, whatever the strides.
    const bool by_head = args.x.strides[1] < args.x.strides[2] && !args.across_heads && !work.sums;
    // Tables of as many tokens as heads at once can be of.
    const int64_t spanned = args.across_heads ? 1 : together / args.heads + 2;
    const int64_t slots = by_head || spanned > block ? block : spanned;
    const auto make_table = [&](int64_t l) {
      T* table = work.tables + l % slots * 2 * stride;
      if constexpr (can_pair) {
        if (in_pairs) {
          PairedHeads<QkNormRope>{*this}.expand(table, work, b, l);
          return;
        }
      }
      expand(table, work.weight, work.swapped, b, l);
    };
    int64_t count = 0;
    const auto finish = [&] {
      if (in_pairs) {
        if constexpr (can_pair)
          args.grad.data ? PairedHeads<QkNormRope>{*this}.template backward<WAY>(work.rows, count)
                         : PairedHeads<QkNormRope>{*this}.template forward<WAY>(work.rows, count);
      } else {
        constexpr bool can_be =
            COUNT && DTYPE == Dtype::float32 && WAY != Way::memory && sizeof(V) >= 32;
        if (can_be && is_usual)
          run_rows<WAY, can_be>(work, count);
        else
          run_rows<WAY, false>(work, count);
      }
      count = 0;
    };
    const int64_t inner = by_head ? last - first : args.heads;
    const int64_t ahead = args.across_heads ? args.heads : rows_ahead();
    const int64_t outer_step = ahead / inner, inner_step = ahead % inner;
    const HeadsView x = args.x, grad = args.grad, out = args.out;
    const int64_t heads = args.heads, length = args.length;
    const auto add = [&](int64_t l, int64_t h) __attribute__((always_inline)) {
      const int64_t offset = args.across_heads ? h * stride : 0;
      Row& row = work.rows[count];
      int64_t next_l = l + (by_head ? inner_step : outer_step);
      int64_t next_h = h + (by_head ? outer_step : inner_step);
      if (by_head && next_l >= last) {
        next_l -= inner;
        ++next_h;
      } else if (!by_head && next_h >= heads) {
        next_h -= heads;
        ++next_l;
      }
      const bool there = next_l < length && next_h < heads;
      row.x = x.head(b, l, h);
      row.grad = grad.data ? grad.head(b, l, h) : nullptr;
      row.next = there ? x.head(b, next_l, next_h) : row.x;
      row.next_grad = there && grad.data ? grad.head(b, next_l, next_h) : row.x;
      row.out = out.head(b, l, h);
      row.table = work.tables + l % slots * 2 * stride;
      row.weight = work.weight + offset;
      row.bias = work.bias + offset;
      row.to_weight = work.to_weight + offset;
      row.to_bias = work.to_bias + offset;
      row.to_xhat = work.to_xhat + count * stride;
      row.mean = 0;
      row.inverse = 1;
      ++count;
      if (args.across_heads ? h + 1 == args.heads : count == together) finish();
    };
    if (by_head) {
      if (R)
        for (int64_t l = first; l < last; ++l) make_table(l);
      for (int64_t h = 0; h < args.heads; ++h)
        for (int64_t l = first; l < last; ++l) add(l, h);
    } else {
      for (int64_t l = first; l < last; ++l) {
        if (R) make_table(l);
        for (int64_t h = 0; h < args.heads; ++h) add(l, h);
      }
    }
    if (count) finish();
    if (!work.sums) return;
    const int64_t width = args.rows_width();
    if constexpr (can_pair)
      if (in_pairs)
        for (int64_t i = 0; i < group; ++i) {
          std::memset(work.pairs, 0, (size_t)E * sizeof(T));
          this->pair_blocks().add_back(work.pairs, work.to_weight + i * stride);
          std::memcpy(work.to_weight + i * stride, work.pairs, (size_t)E * sizeof(T));
        }
    for (int64_t i = 0; i < group; ++i)
      for (int64_t e = 0; e < E; ++e) {
        work.sums[i * E + e] += work.to_weight[i * stride + e];
        work.sums[width + i * E + e] += work.to_bias[i * stride + e];
      }
    const size_t bytes = (size_t)(group * stride) * sizeof(T);
    std::memset(work.to_weight, 0, bytes);
    std::memset(work.to_bias, 0, bytes);
  }

  void run_any(const Work& work, int64_t index) const {
    if constexpr (COUNT == 0)
      if (whole) return Rows(*this).run_block(work, index);
    switch (way()) {
      case Way::none: run_block<Way::none>(work, index); return;
      case Way::neighbours: run_block<Way::neighbours>(work, index); return;
      case Way::halves: run_block<Way::halves>(work, index); return;
      case Way::memory: run_block<Way::memory>(work, index); return;
    }
  }

  void run(int64_t begin, int64_t end) {
    QkNormRope* const both[] = {this, other};
    Work works[2]{};
    const int count = other ? 2 : 1;
    for (int i = 0; i < count; ++i)
      if (!both[i]->prepare(works[i])) failed = true;
    for (int64_t part = begin; part < end && !failed; ++part) {
      for (int i = 0; i < count; ++i)
        if (sums) works[i].sums = both[i]->sums + part * 2 * both[i]->args.rows_width();
      const int64_t last = (part + 1) * part_blocks;
      for (int64_t index = part * part_blocks; index < last && index < blocks; ++index)
        for (int i = 0; i < count; ++i) both[i]->run_any(works[i], index);
    }
    if (streams || (other && other->streams)) _mm_sfence();
    for (Work& work : works) std::free(work.memory);
  }

  static void write_sum(char* to, Dtype dtype, const double* sums, int64_t parts, int64_t width) {
    if (!to) return;
    for (int64_t e = 0; e < width; e += 8) {
      const int64_t count = width - e < 8 ? width - e : 8;
      double total[8]{};
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < count; ++i) total[i] += sums[part * 2 * width + e + i];
      write_row(to + e * size_of(dtype), dtype, total, count);
    }
  }

  // Memory for the sums over tokens; false when there is none.
  bool plan() {
    if (!sums_rows()) {
      parts = blocks;
      return true;
    }
    const int64_t width = args.rows_width();
    part_blocks = (blocks + most_parts - 1) / most_parts;
    if (part_blocks < least_part / block) part_blocks = least_part / block;
    parts = (blocks + part_blocks - 1) / part_blocks;
    sums = allocate<double>(parts * 2 * width);
    if (!sums) return false;
    std::memset(sums, 0, (size_t)(parts * 2 * width) * sizeof(double));
    return true;
  }

  void write_sums() const {
    if (!sums_rows()) return;
    const int64_t width = args.rows_width();
    write_sum(args.grad_weight, args.weight_dtype, sums, parts, width);
    write_sum(args.grad_bias, args.bias_dtype, sums + width, parts, width);
  }

  // with: has as many tokens and parts, and is computed in turns.
  bool run(const Parallel& parallel, QkNormRope* with = nullptr) {
    other = with;
    if (parts == 1)
      run(0, 1);
    else if (parts)
      parallel.run(
          parts,
          [](void* context, int64_t begin, int64_t end) {
            ((QkNormRope*)context)->run(begin, end);
          },
          this);
    if (failed) return false;
    write_sums();
    if (with) with->write_sums();
    return true;
  }

  // Queries, and keys if there are any: they may lie beside each other in memory.
  static bool run(const QkNormRopeArgs& q, const QkNormRopeArgs* k, const Parallel& parallel) {
    QkNormRope first(q);
    if (!first.plan()) return false;
    if (!k) return first.run(parallel);
    QkNormRope second(*k);
    if (!second.plan()) return false;
    if (first.sums_rows() == second.sums_rows() && first.blocks == second.blocks)
      return first.run(parallel, &second);
    return first.run(parallel) && second.run(parallel);
  }
};

template <class T, Dtype DTYPE>
static bool run_qk_norm_rope(const QkNormRopeArgs& q, const QkNormRopeArgs* k,
                             const Parallel& parallel) {
  if (QkNormRope<T, DTYPE, 0>::has_whole_rows(q)) return QkNormRope<T, DTYPE, 0>::run(q, k, parallel);
  // E = 64, 65 to 80, 96 and 128 with the widest vectors.
  switch ((q.num_dims + native_width<T> - 1) / native_width<T>) {
    case 4: return QkNormRope<T, DTYPE, 4>::run(q, k, parallel);
    case 5: return QkNormRope<T, DTYPE, 5>::run(q, k, parallel);
    case 6: return QkNormRope<T, DTYPE, 6>::run(q, k, parallel);
    case 8: return QkNormRope<T, DTYPE, 8>::run(q, k, parallel);
    default: return QkNormRope<T, DTYPE, 0>::run(q, k, parallel);
  }
}

// The gradients, if args have any; else the op. k, of as many tokens and dimensions, may be null.
static bool qk_norm_rope(const QkNormRopeArgs& q, const QkNormRopeArgs* k,
                         const Parallel& parallel) {
  switch (q.dtype) {
    case Dtype::float32: return run_qk_norm_rope<float, Dtype::float32>(q, k, parallel);
    case Dtype::float16: return run_qk_norm_rope<float, Dtype::float16>(q, k, parallel);
    case Dtype::bfloat16: return run_qk_norm_rope<float, Dtype::bfloat16>(q, k, parallel);
    case Dtype::float64: return QkNormRope<double, Dtype::float64, 0>::run(q, k, parallel);
  }
  return false;
}

}  // namespace mmfast::MMFAST_ISA
