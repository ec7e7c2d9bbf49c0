// Attention of queries so few that vectors of them would be mostly empty. Lanes are elements of a
// head in scores and outputs, and keys in between; keys and values are read where they are.
#pragma once
#include "cpu/attention_limits.h"
#include "cpu/attention_softmax.h"

namespace mmfast::MMFAST_ISA {

template <class Kind>  // of one number in an element
struct FewQueries {
  using T = typename Kind::Number;
  using V = typename Kind::V;
  static constexpr int64_t per = sizeof(V) / sizeof(T), chunk = attention_block;  // keys
  static constexpr int64_t most = 6;  // queries; from eight on the other way is as fast
  static constexpr T infinity = __builtin_inf();

  const AttentionArgs& args;
  const Random& random;
  const T unit;  // of scores, that are multiplied by scale beforehand if `scales`
  const bool scales, drops;
  const int64_t batch, key_head, count;
  const QueryRow* rows;  // [count]
  // In memory of room() numbers:
  T* queries;   // [count][E], in vectors
  T* sums;      // [count][Ev], in vectors
  T largest[most];
  V totals[most];

  static int64_t in_vectors(int64_t width) { return (width + per - 1) / per * per; }
  static int64_t room(const AttentionArgs& args) {
    return most * (in_vectors(args.width) + in_vectors(args.value_width));
  }

  FewQueries(const AttentionArgs& a, const Random& r, T of_scores, bool multiplies, int64_t b,
             int64_t head, const QueryRow* of, int64_t n, T* memory)
      : args(a), random(r), unit(of_scores), scales(multiplies), drops(a.dropout > 0), batch(b),
        key_head(head), count(n), rows(of), queries(memory),
        sums(memory + n * in_vectors(a.width)) {}

  void run() {
    with_dtype<Kind>(args.dtype, [&]<Dtype D>() {
      start<D>();
      for (int s = 0; s < args.key_streams; ++s) {
        const int64_t keys = args.keys[s].sequences.length(batch);
        for (int64_t j = 0; j < keys; j += chunk)
          attend<D>(args.keys[s], j, keys - j < chunk ? keys - j : chunk);
      }
      finish();
    });
  }

  template <Dtype D>
  void start() {
    const V sign = V{} + (args.scale < 0 ? (T)-1 : (T)1);
    for (int64_t i = 0; i < count; ++i) {
      const QueryStream& stream = args.queries[rows[i].stream];
      const char* from = stream.query.at(batch, rows[i].head,
                                         stream.sequences.begin(batch) + rows[i].index);
      T* to = queries + i * in_vectors(args.width);
      for (int64_t e = 0; e < args.width; e += per)
        store(to + e, sign * read_first<V>(from + e * size_of(D), D, args.width - e));
      largest[i] = -infinity;
      totals[i] = V{};
    }
    std::memset(sums, 0, (size_t)(count * in_vectors(args.value_width)) * sizeof(T));
  }

  template <Dtype D>
  void attend(const KeyStream& stream, int64_t first, int64_t keys) {
    const int64_t begin = stream.sequences.begin(batch) + first;
    const bool bounded = args.causal != Causal::none || (args.mask.data && !args.mask.additive);
    const int64_t offset = args.causal == Causal::bottom_right
                               ? stream.sequences.length(batch) -
                                     args.queries[0].sequences.length(batch)
                               : 0;
    uint64_t attended[chunk], kept[chunk];
    if (bounded) attended_bits(args, batch, rows, count, first, keys, offset, attended);
    if (drops) kept_bits(args, random, batch, rows, count, first, keys, kept);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t bits = bounded ? attended[i] : low_bits(keys);
      if (!bits) continue;
      alignas(64) T p[chunk];
      score<D>(queries + i * in_vectors(args.width), stream.key, begin, keys, p);
      if (scales) scaled(i, first, keys, p);
      const T shrink = exponentials(i, bits, drops ? kept[i] : ~0ull, keys, p);
      add_values<D>(stream.value, begin, keys, p, shrink, sums + i * in_vectors(args.value_width));
    }
  }

  // Products of a query and keys; any numbers behind them.
  template <Dtype D>
  void score(const T* query, const HeadRows& key, int64_t begin, int64_t keys, T* out) const {
    const int64_t width = args.width, whole = width / per * per;
    for (int64_t j = 0; j < keys; j += per) {
      const char* at[per];
      for (int64_t r = 0; r < per; ++r)
        at[r] = key.at(batch, key_head, begin + (j + r < keys ? j + r : keys - 1));
      V v[per];
      // Row by row, as they lie in memory.
#pragma GCC unroll 16
      for (int64_t r = 0; r < per; ++r) {
        V sum{};
        for (int64_t e = 0; e < whole; e += per) {
          V k;
          read_numbers(at[r] + e * size_of(D), D, k);
          sum = fma(load<V>(query + e), k, sum);
        }
        if (whole < width)
          sum = fma(load<V>(query + whole),
                    read_first<V>(at[r] + whole * size_of(D), D, width % per), sum);
        v[r] = sum;
      }
      transpose(v);
      for (int64_t half = per / 2; half; half /= 2)
        for (int64_t r = 0; r < half; ++r) v[r] += v[r + half];
      store(out + j, v[0]);
    }
  }

  // Scores times the scale, plus the mask.
  void scaled(int64_t i, int64_t first, int64_t keys, T* p) const {
    const AttentionMask& mask = args.mask;
    const bool adds = mask.data && mask.additive;
    const T scale = (T)__builtin_fabs(args.scale);
    for (int64_t j = 0; j < keys; ++j)
      p[j] = p[j] * scale + (adds ? load_one<T>(mask.at(batch, rows[i].head, rows[i].index,
                                                        first + j), mask.dtype)
                                  : 0);
  }

  // From scores to exponentials; returns what sums so far are to be multiplied by.
  T exponentials(int64_t i, uint64_t bits, uint64_t kept, int64_t keys, T* p) {
    const V factor = V{} + (T)((double)unit * 1.4426950408889634), least = V{} - infinity;
    V vector = least;
    for (int64_t j = 0; j < keys; j += per) {
      const V score = where_bits(bits >> j, load<V>(p + j), least);
      vector = larger(score, vector);
      store(p + j, score);
    }
    T largest_now = largest[i];
    for (int64_t l = 0; l < per; ++l)
      largest_now = vector[l] > largest_now ? vector[l] : largest_now;
    const V base = V{} + (largest_now == -infinity ? 0 : largest_now);
    const V shrink = power_of_two((V{} + largest[i] - base) * factor);
    V total = totals[i] * shrink;
    for (int64_t j = 0; j < keys; j += per) {
      V e = power_of_two((load<V>(p + j) - base) * factor);
      total += e;
      store(p + j, where_bits(kept >> j, e, V{}));
    }
    largest[i] = largest_now;
    totals[i] = total;
    return shrink[0];
  }

  template <Dtype D>
  void add_values(const HeadRows& value, int64_t begin, int64_t keys, const T* p, T shrink,
                  T* to) const {
    const int64_t width = args.value_width;
    const char* from = value.at(batch, key_head, begin);
    const auto columns = [&]<int N, bool WHOLE>(int64_t d) __attribute__((always_inline)) {
      V v[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) v[n] = load<V>(to + d + n * per) * (V{} + shrink);
      const char* at = from + d * size_of(D);
      for (int64_t j = 0; j < keys; ++j, at += value.row) {
        const V by = every<V>(p[j]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          V x;
          const char* numbers = at + n * per * size_of(D);
          if constexpr (WHOLE)
            read_numbers(numbers, D, x);
          else
            x = read_first<V>(numbers, D, width % per);
          v[n] = fma(by, x, v[n]);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(to + d + n * per, v[n]);
    };
    int64_t d = 0;
    for (; d + 8 * per <= width; d += 8 * per) columns.template operator()<8, true>(d);
    if (d + 4 * per <= width) columns.template operator()<4, true>(d), d += 4 * per;
    if (d + 2 * per <= width) columns.template operator()<2, true>(d), d += 2 * per;
    if (d + per <= width) columns.template operator()<1, true>(d), d += per;
    if (d < width) columns.template operator()<1, false>(d);
  }

  void finish() const {
    const T kept = drops ? args.dropout < 1 ? (T)(1 / (1 - args.dropout)) : 0 : 1;
    for (int64_t i = 0; i < count; ++i) {
      T total = 0;
      for (int64_t l = 0; l < per; ++l) total += totals[i][l];
      const QueryStream& stream = args.queries[rows[i].stream];
      const int64_t row = stream.sequences.begin(batch) + rows[i].index;
      *(T*)stream.lse.at(batch, rows[i].head, row) =
          total == 0 ? -infinity : largest[i] * unit + natural_logarithm(V{} + total)[0];
      const V by = V{} + (total == 0 ? 0 : kept / total);
      char* out = stream.out.at(batch, rows[i].head, row);
      const T* from = sums + i * in_vectors(args.value_width);
      for (int64_t e = 0; e < args.value_width; e += per)
        write_first(out + e * size_of(args.dtype), args.dtype, load<V>(from + e) * by,
                    args.value_width - e);
    }
  }
};

}  // namespace mmfast::MMFAST_ISA
