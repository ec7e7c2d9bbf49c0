// The gradients of a block of queries and a block of keys of one head, all operands packed. With
// P = exp(scores - lse) and D = P (dO V^T - delta), delta the rows' sums of dO out:
//
//   dV^T += dO^T P,   dK^T += Q^T D,   dQ += D K
//
// Numbers along the head size are broadcast and keys fill the vectors, so that a head size costs
// what it has; only dQ has vectors along the head size.
#pragma once
#include "cpu/attention_limits.h"
#include "cpu/attention_softmax.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t key_block = attention_block;
constexpr int64_t most_queries = 128;  // of a block

#if defined(__AVX512BF16__)
// Elements of two neighbouring vectors of a row.
MMFAST_INLINE vi pair_lanes(vf first, vf second) {
  return (vi)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif

template <class Kind>
struct BackwardTile {
  using T = typename Kind::Number;
  using Element = typename Kind::Element;
  using V = typename Kind::V;
  static constexpr int64_t w = native_width<T>, numbers = Kind::numbers;
  // P and D of a block of queries and the scores of score_rows fit the first-level cache.
  static constexpr int64_t query_block = numbers == 2 ? most_queries : 96;
  static constexpr int64_t score_rows = numbers == 2 ? 24 : query_block;

  int64_t width, value_width;  // E, Ev
  int64_t padded_width;        // E in whole vectors
  T scale;

  // The queries.
  int64_t rows;
  const Element *query, *grad_out;                // [rows][E], [rows][Ev]: along the head size
  const Element *query_across, *grad_out_across;  // [rows][E], [rows][Ev]: elements across rows
  const T *lse, *delta;                           // [rows]
  const uint64_t* attended;                       // [rows]: bits of the keys that take part
  T* grad_query;                                  // [rows][padded_width]

  // The keys.
  int64_t keys;
  const Element *key, *value;  // [E][key_block], [Ev][key_block]: along the head size
  const Element* key_across;   // [key_block][padded_width]: elements across keys
  T *grad_key, *grad_value;    // [E][key_block], [Ev][key_block]

  // What only some calls have.
  const T* bias;  // [rows][bias_step], added to scores; or null
  int64_t bias_step;
  const uint64_t* kept;  // [rows]: bits of the keys that dropout leaves; or null
  T kept_factor;
  T* grad_scores;  // [rows][key_block]: D, where wanted; or null

  // Room for one block. Where an element is a number, p is scores and both d are products.
  T *scores, *products;    // [score_rows][key_block]
  Element *p, *d;          // [query_block][key_block]: elements across rows
  Element* d_along;        // [query_block][key_block]: elements along keys

  static int64_t vectors(int64_t n) { return (n + w - 1) / w; }

  // False if no key takes part.
  bool run() const {
    uint64_t any = 0, every = ~0ull;
    for (int64_t i = 0; i < rows; ++i) {
      any |= attended[i];
      every &= attended[i];
    }
    if (!any) return false;
    const bool limited = every != ~0ull, special = bias || kept || grad_scores;
    const int64_t columns = vectors(keys);
    for (int64_t i = 0; i < rows; i += score_rows) {
      const int64_t n = rows - i < score_rows ? rows - i : score_rows;
      products_of<Kind>({query + i * elements_of<Kind>(width), elements_of<Kind>(width), 1}, n,
                        {key, key_block}, columns, elements_of<Kind>(width), scores, key_block,
                        false);
      products_of<Kind>(
          {grad_out + i * elements_of<Kind>(value_width), elements_of<Kind>(value_width), 1}, n,
          {value, key_block}, columns, elements_of<Kind>(value_width), products, key_block, false);
      if (special)
        score_gradients<true, true>(i, n);
      else if (limited)
        score_gradients<true, false>(i, n);
      else
        score_gradients<false, false>(i, n);
    }
    const int64_t depth = elements_of<Kind>(rows);
    products_of<Kind>({grad_out_across, 1, value_width}, value_width, {p, key_block}, columns,
                      depth, grad_value, key_block, true);
    products_of<Kind>({query_across, 1, width}, width, {d, key_block}, columns, depth, grad_key,
                      key_block, true);
    products_of<Kind>({d_along, key_block / numbers, 1}, rows, {key_across, padded_width},
                      padded_width / w, elements_of<Kind>(keys), grad_query, padded_width, true);
    return true;
  }

  template <class K>
  static __attribute__((noinline)) void products_of(Broadcasts<K> a, int64_t m, Panel<K> b,
                                                    int64_t n, int64_t depth, T* out, int64_t step,
                                                    bool accumulate) {
    if (accumulate)
      mmfast::MMFAST_ISA::products<K>(a, m, b, n, depth, FromMemory<T>{out, step},
                                      ToMemory<T>{out, step});
    else
      mmfast::MMFAST_ISA::products<K>(a, m, b, n, depth, FromZero{}, ToMemory<T>{out, step});
  }

  struct Row {
    T lse, delta;
    uint64_t attended, kept;
    const T* bias;
    T* grad_scores;
  };

  template <bool special>
  Row row(int64_t i) const {
    Row row{lse[i], delta[i], attended[i], 0, nullptr, nullptr};
    if constexpr (special) {
      if (bias) row.bias = bias + i * bias_step;
      if (kept) row.kept = kept[i];
      if (grad_scores) row.grad_scores = grad_scores + i * key_block;
    }
    return row;
  }

  struct Pair {
    V p, d;
  };

  template <bool limited, bool special>
  inline __attribute__((always_inline)) Pair gradient(const Row& row, const T* score,
                                                      const T* product, int64_t column) const {
    constexpr T log2e = (T)1.4426950408889634;
    V below = load<V>(score + column), grad = load<V>(product + column);  // below the logarithm
    if (special && row.bias)
      below = row.lse - fma(below, V{} + scale, load<V>(row.bias + column));
    else
      below = fma(below, V{} - scale, V{} + row.lse);
    // Not above 1, whatever the logarithm of large scores was rounded to.
    const V p = power_of_two(larger(V{}, below) * -log2e);
    V left = p;
    if (special && kept) {
      left = where_bits(row.kept >> column, p * kept_factor, V{});
      grad = where_bits(row.kept >> column, grad * kept_factor, V{});
    }
    V d = p * (grad - row.delta);
    if constexpr (limited) {
      left = where_bits(row.attended >> column, left, V{});
      d = where_bits(row.attended >> column, d, V{});
    }
    if (special && row.grad_scores) store(row.grad_scores + column, d);
    return {left, d};
  }

  // P and D of rows [first, first + count) from their scores and dO V^T.
  template <bool limited, bool special>
  void score_gradients(int64_t first, int64_t count) const {
    const int64_t columns = vectors(keys) * w;
    if constexpr (numbers == 1) {
      for (int64_t i = 0; i < count; ++i) {
        const Row row = this->row<special>(first + i);
        T *score = scores + i * key_block, *product = products + i * key_block;
        for (int64_t j = 0; j < columns; j += w) {
          const Pair pair = gradient<limited, special>(row, score, product, j);
          store(score + j, pair.p);
          store(product + j, pair.d);
        }
      }
    } else {
#if defined(__AVX512BF16__)
      for (int64_t i = 0; i < count; i += 2) {
        const T *score = scores + i * key_block, *product = products + i * key_block;
        const bool both = i + 1 < count;
        const Row low = row<special>(first + i), high = row<special>(first + i + both);
        Element* to_p = p + (first + i) / 2 * key_block;
        Element* to_d = d + (first + i) / 2 * key_block;
        Element* along = d_along + (first + i) * (key_block / 2);
        for (int64_t j = 0; j < columns; j += 2 * w) {
          V d_low[2], d_high[2];
          for (int64_t v = 0; v < 2; ++v) {
            const int64_t column = j + v * w;
            const Pair a = gradient<limited, special>(low, score, product, column);
            Pair b{};
            if (both)
              b = gradient<limited, special>(high, score + key_block, product + key_block, column);
            d_low[v] = a.d;
            d_high[v] = b.d;
            store(to_p + column, pairs_of(a.p, b.p));
            store(to_d + column, pairs_of(a.d, b.d));
          }
          store(along + j / 2, pair_lanes(d_low[0], d_low[1]));
          if (both) store(along + (key_block + j) / 2, pair_lanes(d_high[0], d_high[1]));
        }
      }
#endif
    }
  }
};

}  // namespace mmfast::MMFAST_ISA
