// The gradients of a block of queries and a block of keys of one head, all operands packed. With
// P = exp(scores - lse) and D = P (dO V^T - delta), delta the rows' sums of dO out:
//
//   dV^T += dO^T P,   dK^T += Q^T D,   dQ += D K
//
// Numbers along the head size are broadcast and keys fill the vectors, so that a head size costs what
// it has; only dQ has vectors along the head size.
#pragma once
#include "cpu/attention_products.h"
#include "cpu/philox.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t key_block = 64;
constexpr int64_t most_queries = 128;  // of a block

// e^x, x a score minus its row's logarithm of the sum: not above 0 but for rounding.
MMFAST_INLINE vf probability(vf x) {
#if defined(__AVX512F__)
  // 2^n 2^r, r from -1/2 to 1/2. The bound keeps -inf from becoming NaN, and NaN as it is.
  const vf bounded = (vf)_mm512_max_ps(_mm512_set1_ps(-128.f), (__m512)x);
  const vf per_power = vf{} + 1.44269504f;
  const vf n = (vf)_mm512_roundscale_ps((__m512)(bounded * per_power), _MM_FROUND_TO_NEAREST_INT);
  const vf r = fma(bounded, per_power, -n);
  vf p = fma(vf{} + 1.53789195e-4f, r, vf{} + 1.34050171e-3f);
  p = fma(p, r, vf{} + 9.61837452e-3f);
  p = fma(p, r, vf{} + 5.55031411e-2f);
  p = fma(p, r, vf{} + 2.40226477e-1f);
  p = fma(p, r, vf{} + 6.93147242e-1f);
  p = fma(p, r, vf{} + 1.f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exponential(x);
#endif
}
MMFAST_INLINE vd probability(vd x) { return exponential(x); }

#if defined(__AVX512BF16__)
// Elements of the lanes of two rows, and of two neighbouring vectors of one row.
MMFAST_INLINE vi pair_rows(vf low, vf high) {
  const vi order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                    7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (vi)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
MMFAST_INLINE vi pair_lanes(vf first, vf second) {
  return (vi)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif

template <class Kind>
struct BackwardTile {
  using T = typename Kind::Number;
  using Element = typename Kind::Element;
  using V = typename Kind::V;
  using Mask = decltype(V{} < V{});  // of lanes, integers
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
  const int64_t* limits;                          // [rows]: how many of the keys take part
  T* grad_query;                                  // [rows][padded_width]

  // The keys.
  int64_t keys;
  const Element *key, *value;  // [E][key_block], [Ev][key_block]: along the head size
  const Element* key_across;   // [key_block][padded_width]: elements across keys
  T *grad_key, *grad_value;    // [E][key_block], [Ev][key_block]

  // What only some calls have.
  const T* bias;  // [rows][bias_step], added to scores, -inf where a key takes no part; or null
  int64_t bias_step;
  const Random* random;                 // or null
  int64_t random_element, random_step;  // of the first row's first key; between rows
  float dropout;
  T* grad_scores;  // [rows][key_block]: D, where wanted; or null

  // Room for one block. Where an element is a number, p is scores and both d are products.
  T *scores, *products;    // [score_rows][key_block]
  Element *p, *d;          // [query_block][key_block]: elements across rows
  Element* d_along;        // [query_block][key_block]: elements along keys

  static int64_t vectors(int64_t n) { return (n + w - 1) / w; }

  // False if no key takes part.
  bool run() const {
    int64_t least = keys, most = 0;
    for (int64_t i = 0; i < rows; ++i) {
      least = limits[i] < least ? limits[i] : least;
      most = limits[i] > most ? limits[i] : most;
    }
    if (most == 0) return false;
    const bool limited = least < key_block, special = bias || random || grad_scores;
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
    products_of<Kind>({grad_out_across, 1, value_width}, value_width, {p, key_block}, columns, depth,
                      grad_value, key_block, true);
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
    int64_t limit;
    const T* bias;
    T* grad_scores;
    bool kept;  // whether `factors` are
    alignas(64) float factors[key_block];  // of dropout
  };

  template <bool special>
  void start(Row& row, int64_t i) const {
    row.lse = lse[i];
    row.delta = delta[i];
    row.limit = limits[i];
    if constexpr (special) {
      row.bias = bias ? bias + i * bias_step : nullptr;
      row.grad_scores = grad_scores ? grad_scores + i * key_block : nullptr;
      if (random) {
        fill_uniforms(*random, random_element + i * random_step, row.factors, keys);
        const float factor = 1.f / (1.f - dropout);
        for (int64_t j = 0; j < key_block; ++j) row.factors[j] = row.factors[j] < dropout ? 0 : factor;
      }
    }
  }

  struct Pair {
    V p, d;
  };

  template <bool limited, bool special>
  inline __attribute__((always_inline)) Pair gradient(const Row& row, const T* score,
                                                      const T* product, int64_t column) const {
    V x = load<V>(score + column);
    V grad = load<V>(product + column);
    if constexpr (special)
      if (row.bias) {
        const V b = load<V>(row.bias + column), least = V{} - (T)__builtin_inf();
        x = fma(x, V{} + scale, b);
        x = b == least ? least : x;
        x = probability(x - row.lse);
      } else {
        x = probability(fma(x, V{} + scale, V{} - row.lse));
      }
    else
      x = probability(fma(x, V{} + scale, V{} - row.lse));
    V kept = x;
    if constexpr (special)
      if (random) {
        V factor;
        read_numbers((const char*)(row.factors + column), Dtype::float32, factor);
        kept = x * factor;
        grad = grad * factor;
      }
    V d = x * (grad - row.delta);
    if constexpr (limited) {
      Mask index;
      for (int l = 0; l < w; ++l) index[l] = l;
      const Mask inside = index < (decltype(index[0] + 0))(row.limit - column);
      kept = inside ? kept : V{};
      d = inside ? d : V{};
      if constexpr (special) d = x == 0 ? V{} : d;  // whatever the rest is
    }
    if constexpr (special)
      if (row.grad_scores) store(row.grad_scores + column, d);
    return {kept, d};
  }

  // P and D of rows [first, first + count) from their scores and dO V^T.
  template <bool limited, bool special>
  void score_gradients(int64_t first, int64_t count) const {
    const int64_t columns = vectors(keys) * w;
    if constexpr (numbers == 1) {
      Row row;
      for (int64_t i = 0; i < count; ++i) {
        start<special>(row, first + i);
        T *score = scores + i * key_block, *product = products + i * key_block;
        for (int64_t j = 0; j < columns; j += w) {
          const Pair pair = gradient<limited, special>(row, score, product, j);
          store(score + j, pair.p);
          store(product + j, pair.d);
        }
      }
    } else {
#if defined(__AVX512BF16__)
      Row low, high;
      for (int64_t i = 0; i < count; i += 2) {
        const T *score = scores + i * key_block, *product = products + i * key_block;
        const bool both = i + 1 < count;
        start<special>(low, first + i);
        start<special>(high, first + i + both);
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
            store(to_p + column, pair_rows(a.p, b.p));
            store(to_d + column, pair_rows(a.d, b.d));
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
