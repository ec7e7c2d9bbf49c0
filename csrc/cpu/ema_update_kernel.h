// Moving averages: one pass over the sizes, in double, whose sum smooths them, then one over the
// sums and codes, in float where these are.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/ema_update.h"
#include "cpu/numbers.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

struct EmaUpdate {
  const EmaUpdateArgs& args;
  const int64_t blocks;
  double* sizes = nullptr;   // [K] new cluster sizes
  double* totals = nullptr;  // [blocks] of them
  double total = 0;
  std::atomic<bool> failed{false};

  explicit EmaUpdate(const EmaUpdateArgs& a) : args(a), blocks(blocks_of(a.codes)) {}
  EmaUpdate(const EmaUpdate&) = delete;
  ~EmaUpdate() {
    std::free(sizes);
    std::free(totals);
  }

  bool run(const Parallel& parallel) {
    sizes = allocate<double>(args.codes);
    totals = allocate<double>(blocks);
    if (!sizes || !totals) return false;
    for_blocks(blocks, [this](int64_t block) { average_sizes(block); }, parallel);
    for (int64_t b = 0; b < blocks; ++b) total += totals[b];
    for_blocks(blocks, [this](int64_t block) { update(block); }, parallel);
    return !failed;
  }

  // decay of the old numbers, the rest of the new ones. Exact at both ends, as torch.lerp is: from
  // the nearer one a part of the way to the other.
  template <class V>
  struct Average {
    using T = std::remove_reference_t<decltype(V{}[0])>;
    const bool from_new;
    const V part;
    explicit Average(double decay)
        : from_new(decay < 0.5), part(V{} + (T)(decay < 0.5 ? decay : 1 - decay)) {}
    V operator()(V start, V end) const { return fma(end - start, part, start); }
  };

  struct Numbers {
    char* data;
    Dtype dtype;
    int64_t size;
    char* at(int64_t d) const { return data + d * size; }
  };

  static Numbers numbers(const SampleView& view, int64_t first) {
    const int64_t size = size_of(view.dtype);
    return {view.data + first * size, view.dtype, size};
  }

  // NATIVE: they are of type T, which is known when this is compiled.
  template <class T, bool NATIVE>
  MMFAST_INLINE Numbers row(const SampleView& view, int64_t k) {
    return {view.data + k * view.stride, NATIVE ? Native<T>::dtype : view.dtype,
            NATIVE ? (int64_t)sizeof(T) : size_of(view.dtype)};
  }

  void average_sizes(int64_t block) const {
    const auto [begin, end] = block_of(block, args.codes);
    const Average<vd> average(args.decay);
    const Numbers size = numbers(args.cluster_size, begin), count = numbers(args.counts, begin),
                  start = average.from_new ? count : size, other = average.from_new ? size : count;
    double* to = sizes + begin;
    vd sum{};
    const auto some = [&](int64_t k, auto read, auto write) __attribute__((always_inline)) {
      const vd now = average(read(start, k), read(other, k));
      write({(char*)to, Dtype::float64, sizeof(double)}, k, now);
      write(size, k, now);
      sum += now;
    };
    for_vectors<vd>(some, end - begin);
    totals[block] = sum_lanes(sum);
  }

  bool has(Dtype dtype, bool all) const {
    const int number = (args.codebook.dtype == dtype) + (args.embed_sum.dtype == dtype) +
                       (args.sums.dtype == dtype);
    return number == 3 || (number && !all);
  }

  void update(int64_t block) {
    double* unit = args.normalize ? allocate<double>(padded(args.width) + 8) : nullptr;
    if (args.normalize && !unit) {
      failed = true;
      return;
    }
    const auto [begin, end] = block_of(block, args.codes);
    double factors[block_rows];  // of the sums, for the codes
    for (int64_t k = begin; k < end; ++k)
      factors[k - begin] =
          (total + (double)args.codes * args.eps) / ((sizes[k] + args.eps) * total);
    bool wide = has(Dtype::float64, false);
    for (int64_t k = begin; k < end; ++k) {
      const double size = std::abs(factors[k - begin]);
      wide = wide || !(size > 1e-36 && size < 1e36);
    }
    if (wide)
      update_codes<double, false>(begin, end, factors, unit);
    else if (has(Dtype::float32, true))
      update_codes<float, true>(begin, end, factors, (float*)unit);
    else
      update_codes<float, false>(begin, end, factors, (float*)unit);
    std::free(unit);
  }

  template <class T, bool NATIVE>
  void update_codes(int64_t begin, int64_t end, const double* factors, T* unit) const {
    unit ? update_codes<T, NATIVE, true>(begin, end, factors, unit)
         : update_codes<T, NATIVE, false>(begin, end, factors, unit);
  }

  template <class T, bool NATIVE, bool UNIT>
  void update_codes(int64_t begin, int64_t end, const double* factors, T* unit) const {
    const EmaUpdateArgs own = args;  // which no store can change
    const Average<typename Native<T>::V> average(args.decay);
    const bool moves = total > 0;  // else nothing was ever counted: the codes stay
    for (int64_t k = begin; k < end; ++k)
      update_code<T, NATIVE, UNIT>(own, k, average, moves, (T)factors[k - begin], unit);
  }

  // UNIT: the code's norm is to be one; unit [D, padded] is room for it.
  template <class T, bool NATIVE, bool UNIT, class V = typename Native<T>::V>
  MMFAST_INLINE void update_code(const EmaUpdateArgs& args, int64_t k, const Average<V>& average,
                                 bool moves, T factor, T* unit) {
    const Numbers code = row<T, NATIVE>(args.codebook, k), sum = row<T, NATIVE>(args.embed_sum, k),
                  latest = row<T, NATIVE>(args.sums, k),
                  start = average.from_new ? latest : sum, other = average.from_new ? sum : latest;
    V squares{};
    const auto some = [&](int64_t d, auto read, auto write) __attribute__((always_inline)) {
      V now = average(read(start, d), read(other, d));
      write(sum, d, now);
      now *= factor;
      if (UNIT) {
        if (!moves) now = read(code, d);
        store(unit + d, now);
        squares = fma(now, now, squares);
      } else if (moves) {
        write(code, d, now);
      }
    };
    for_vectors<V>(some, args.width);
    if (!UNIT) return;
    const V divisor = V{} + (T)divisor_of(unit, args.width, (double)sum_lanes(squares));
    for (int64_t d = 0; d < args.width; d += native_width<T>)
      write_first(code.at(d), code.dtype, load<V>(unit + d) / divisor, args.width - d);
  }

  // some(d, read, write) for every vector of a row; the last one has zeros behind the row.
  template <class V, class Some>
  MMFAST_INLINE void for_vectors(const Some& some, int64_t count) {
    constexpr int64_t width = sizeof(V) / sizeof(V{}[0]);
    int64_t d = 0;
    for (; d + width <= count; d += width)
      some(
          d,
          [](const Numbers& row, int64_t at) __attribute__((always_inline)) {
            V v;
            read_numbers(row.at(at), row.dtype, v);
            return v;
          },
          [](const Numbers& row, int64_t at, V v) __attribute__((always_inline)) {
            write_numbers(row.at(at), row.dtype, v);
          });
    if (const int64_t n = count - d; n > 0)
      some(
          d,
          [n](const Numbers& row, int64_t at) {
            return read_first<V>(row.at(at), row.dtype, n);
          },
          [n](const Numbers& row, int64_t at, V v) { write_first(row.at(at), row.dtype, v, n); });
  }

  // The norm of what has such a sum of squares, which may have been too large or small for a T.
  template <class T>
  static double divisor_of(const T* unit, int64_t width, double squares) {
    constexpr double least = 1e-6;
    if (!(squares > 1e-24 && squares < 1e36)) {
      squares = 0;
      for (int64_t d = 0; d < width; ++d) squares += (double)unit[d] * (double)unit[d];
    }
    const double norm = std::sqrt(squares);
    return norm < least ? least : norm;
  }
};

static bool ema_update(const EmaUpdateArgs& args, const Parallel& parallel) {
  return EmaUpdate(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
