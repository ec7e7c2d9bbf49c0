// Sixteen neighbouring numbers at a time, whatever the rows' width: what differs between dimensions
// is laid out in tables of the period with which dimensions meet lanes. A number is compared with
// its dimension's thresholds, which gives its level and its value without any tanh: with all of
// them, or, where tables of all kinds of dimensions fit registers, with those that halve the rest.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/blocks_past_cache.h"
#include "cpu/fetch_ahead.h"
#include "cpu/finite_scalar_quantize.h"
#include "cpu/finite_scalar_quantize_slopes.h"
#include "cpu/finite_scalar_quantize_tables.h"
#include "cpu/past_cache.h"
#include "cpu/row_blocks.h"
#include "cpu/sixteen.h"

namespace mmfast::MMFAST_ISA {

// Where z reaches the threshold t, the level is one more and its value w.
template <class V, class I>
MMFAST_INLINE void reach(V z, V t, V w, V& value, I& level) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {  // GCC 12 makes vectors of its masks
    const __mmask16 reached = _mm512_cmp_ps_mask((__m512)z, (__m512)t, _CMP_GE_OQ);
    level = (I)_mm512_mask_add_epi32((__m512i)level, reached, (__m512i)level, _mm512_set1_epi32(1));
    value = (V)_mm512_mask_mov_ps((__m512)value, reached, (__m512)w);
    return;
  }
#endif
  const I reached = z >= t;
  level -= reached;
  value = reached ? w : value;
}

template <class T>
struct FiniteScalar {
  using V = typename Sixteen<T>::V;
  using I = typename Sixteen<T>::I;
  static constexpr int most_compared = 32;  // thresholds; more are searched

  const FiniteScalarQuantizeArgs& args;
  const int64_t width;
  int64_t phases = 0;  // vectors after which dimensions meet the same lanes again
  int most = 0;        // thresholds of a dimension
  bool compares = false;
  // [phases][most][16] thresholds and the values of the levels that begin there; NaN where a
  // dimension has fewer.
  T *thresholds = nullptr, *values = nullptr;
  // [phases][16]
  T *lowest = nullptr, *shifts = nullptr, *gains = nullptr;
#if defined(__AVX512F__)
  HalvingTables halving;
  // [phases][16], and no data without halving
  int32_t* first_places = nullptr;
  float* middles = nullptr;
  const RowIndices* indices_of = nullptr;
  alignas(RowIndices) char room[sizeof(RowIndices)];
#endif
  std::atomic<bool> failed{false};

  explicit FiniteScalar(const FiniteScalarQuantizeArgs& a) : args(a), width(a.z.width) {
    int64_t common = 16;
    while (width % common) common /= 2;
    phases = width / common;
    for (int64_t d = 0; d < width; ++d)
      if (args.levels[d].count - 1 > most) most = args.levels[d].count - 1;
    compares = most <= most_compared;
  }
  FiniteScalar(const FiniteScalar&) = delete;
  ~FiniteScalar() {
    for (void* p :
         {(void*)thresholds, (void*)values, (void*)lowest, (void*)shifts, (void*)gains})
      std::free(p);
#if defined(__AVX512F__)
    std::free(first_places);
    std::free(middles);
#endif
  }

  // The least T that is not below t: what reaches it reaches t.
  static T not_below(double t) {
    const T rounded = (T)t;
    if ((double)rounded >= t) return rounded;
    return sizeof(T) == 4 ? (T)__builtin_nextafterf((float)rounded, __builtin_inff())
                          : (T)__builtin_nextafter((double)rounded, __builtin_inf());
  }

  static T value(const ScalarLevels& d, int64_t level) {
    return (T)(2 * level - d.width) / (T)d.width;
  }

  bool prepare_levels() {
#if defined(__AVX512F__)
    bool halves = false;
    if (!prepare_indices(halves)) return false;
    if (halves) return true;
#endif
    return prepare_comparing();
  }

  bool prepare_comparing() {
    const int64_t lanes16 = phases * 16, compared = compares ? lanes16 * most : 1;
    thresholds = allocate<T>(compared);
    values = allocate<T>(compared);
    lowest = allocate<T>(lanes16);
    if (!thresholds || !values || !lowest) return false;
    for (int64_t e = 0; e < lanes16; ++e) {
      const ScalarLevels& d = args.levels[e % width];
      lowest[e] = value(d, 0);
      for (int k = 0; k < most && compares; ++k) {
        const int64_t at = (e / 16 * most + k) * 16 + e % 16;
        const bool has = k + 1 < d.count;
        thresholds[at] = has ? not_below(d.thresholds[k]) : (T)__builtin_nan("");
        values[at] = has ? value(d, k + 1) : (T)0;
      }
    }
    return true;
  }

  bool prepare_slopes() {
    const int64_t lanes16 = phases * 16;
    shifts = allocate<T>(lanes16);
    gains = allocate<T>(lanes16);
    if (!shifts || !gains) return false;
    for (int64_t e = 0; e < lanes16; ++e) {
      shifts[e] = (T)args.levels[e % width].shift;
      gains[e] = (T)args.levels[e % width].gain;
    }
    return true;
  }

#if defined(__AVX512F__)
  bool prepare_indices(bool& halves) {
    if (width > RowIndices::most_width || most > INT16_MAX - 1) return true;
    int32_t firsts[RowIndices::most_width]{};
    if constexpr (sizeof(T) == 4) {
      halving.prepare(
          args.levels, width, firsts,
          [](const ScalarLevels& d, int k) { return not_below(d.thresholds[k]); }, value);
      halves = halving.steps;
    }
    if (halves) {
      first_places = allocate<int32_t>(phases * 16);
      middles = allocate<float>(phases * 16);
      if (!first_places || !middles) return false;
      for (int64_t e = 0; e < phases * 16; ++e) {
        first_places[e] = firsts[e % width];
        middles[e] = halving.thresholds[halving.steps - 1][firsts[e % width]];
      }
    } else {
      for (int32_t& first : firsts) first = 0;  // levels are their own places
    }
    indices_of = new (room) RowIndices(args.levels, width, firsts);
    return true;
  }
#endif

  // Values and levels of sixteen numbers, which are at that place of a block.
  __attribute__((always_inline)) V quantize(V z, int64_t phase, int64_t at, I& level) const {
    V v = load<V>(lowest + phase * 16);
    I count{};
    if (compares) {
      const T* t = thresholds + phase * most * 16;
      const T* w = values + phase * most * 16;
      for (const T* end = t + most * 16; t < end; t += 16, w += 16)
        reach(z, load<V>(t), load<V>(w), v, count);
    } else {
      for (int i = 0; i < 16; ++i) {
        const ScalarLevels& d = args.levels[(at + i) % width];
        int64_t low = 0, high = d.count - 1;  // thresholds below low are reached
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if ((double)z[i] >= d.thresholds[middle])
            low = middle + 1;
          else
            high = middle;
        }
        count[i] = low;
        v[i] = value(d, low);
      }
    }
    level = count;
    return z != z ? z : v;
  }

  static V clamp(V v) {
    const V above = v > 1 ? V{} + 1 : v;
    return above < -1 ? V{} - 1 : above;
  }

#if defined(__AVX512F__)
  template <bool PAST_CACHE, class Quantize>
  __attribute__((always_inline)) __m512i sixteen_rows(const Quantize& quantize, const T* z,
                                                      const T* noise, T* out) const {
    __m512i words[RowIndices::most_words];
    words[1] = _mm512_setzero_si512();
    const int64_t vectors = width;
    int64_t phase = 0;
    const auto places = [&](int64_t vector) __attribute__((always_inline)) {
      const int64_t e = 16 * vector;
      I level;
      fetch_ahead(z + e);
      if (!PAST_CACHE) fetch_ahead(out + e);
      V v = quantize(load<V>(z + e), phase, e, level);
      if (noise) v = clamp(v + load<V>(noise + e));
      put<PAST_CACHE>(out + e, v);
      phase = phase + 1 == phases ? 0 : phase + 1;
      return (__m512i)__builtin_convertvector(level, Sixteen<float>::I);
    };
    int64_t vector = 0;
    for (; vector + 2 <= vectors; vector += 2) {
      const __m512i low = places(vector);
      words[vector / 2] = _mm512_packs_epi32(low, places(vector + 1));
    }
    if (vector < vectors)
      words[vector / 2] = _mm512_packs_epi32(places(vector), _mm512_setzero_si512());
    return indices_of->of(words);
  }

  template <class Quantize>
  void quantize_rows(const Quantize& quantize, const T* z, const T* noise, T* out,
                     int32_t* indices, int64_t rows) const {
    const int64_t whole = rows / 16 * 16, rest = (rows - whole) * width, step = 16 * width;
    const auto each = [&](const auto& sixteen) __attribute__((always_inline)) {
      for (int64_t row = 0; row < whole; row += 16, z += step, out += step)
        _mm512_storeu_si512(indices + row, sixteen(row * width));
    };
    if (noise)
      each([&](int64_t e) __attribute__((always_inline)) {
        return sixteen_rows<false>(quantize, z, noise + e, out);
      });
    else if (past_cache(out))
      each([&](int64_t) __attribute__((always_inline)) {
        return sixteen_rows<true>(quantize, z, nullptr, out);
      });
    else
      each([&](int64_t) __attribute__((always_inline)) {
        return sixteen_rows<false>(quantize, z, nullptr, out);
      });
    if (!rest) return;
    constexpr int64_t most_numbers = 16 * RowIndices::most_width;
    T last[most_numbers]{}, last_noise[most_numbers]{}, last_out[most_numbers];
    std::memcpy(last, z, (size_t)rest * sizeof(T));
    if (noise) std::memcpy(last_noise, noise + whole * width, (size_t)rest * sizeof(T));
    _mm512_mask_storeu_epi32(
        indices + whole, (__mmask16)((1 << (rows - whole)) - 1),
        sixteen_rows<false>(quantize, last, noise ? last_noise : nullptr, last_out));
    std::memcpy(out, last_out, (size_t)rest * sizeof(T));
  }

  template <int REGISTERS>
  void quantize_by_halving(const T* z, const T* noise, T* out, int32_t* indices,
                           int64_t rows) const {
    const auto by = [&](const auto& quantize) {
      quantize_rows(quantize, z, noise, out, indices, rows);
    };
    if constexpr (sizeof(T) == 4) switch (halving.steps) {
        case 1: return by(Halving<1, REGISTERS>(halving, first_places, middles));
        case 2: return by(Halving<2, REGISTERS>(halving, first_places, middles));
        case 3: return by(Halving<3, REGISTERS>(halving, first_places, middles));
        case 4: return by(Halving<4, REGISTERS>(halving, first_places, middles));
        case 5: return by(Halving<5, REGISTERS>(halving, first_places, middles));
      }
  }
#endif

  // Whether what is written there goes past the cache, which cannot hold all of it.
  bool past_cache(const T* out) const {
    return args.z.count * width * (int64_t)sizeof(T) >= past_cache_from &&
           size_of(args.z.dtype) == sizeof(T) && (uintptr_t)out % sizeof(V) == 0;
  }

  template <bool PAST_CACHE>
  MMFAST_INLINE void put(T* out, V v) {
    if constexpr (PAST_CACHE)
      store_past_cache(out, v);
    else
      store(out, v);
  }

  void quantize_block(const T* z, const T* noise, T* out, int32_t* indices, int64_t rows) {
#if defined(__AVX512F__)
    if (first_places)
      return halving.used > 16 ? quantize_by_halving<2>(z, noise, out, indices, rows)
                               : quantize_by_halving<1>(z, noise, out, indices, rows);
    const auto comparing = [this](V v, int64_t phase, int64_t e, I& level)
                               __attribute__((always_inline)) {
      return quantize(v, phase, e, level);
    };
    if (indices_of) return quantize_rows(comparing, z, noise, out, indices, rows);
#endif
    const int64_t count = rows * width;
    Scratch<int32_t> levels(count + 16);
    if (!levels.data) {
      failed = true;
      return;
    }
    int64_t phase = 0;
    for (int64_t e = 0; e < count; e += 16) {
      I level;
      V v = quantize(load_some(z + e, count - e), phase, e, level);
      if (noise) v = clamp(v + load_some(noise + e, count - e));
      store_some(out + e, v, count - e);
      store(levels.data + e, __builtin_convertvector(level, Sixteen<float>::I));
      if (++phase == phases) phase = 0;
    }
    for (int64_t row = 0; row < rows; ++row) {
      int32_t index = 0;
      for (int64_t d = 0; d < width; ++d)
        index += levels.data[row * width + d] * args.levels[d].basis;
      indices[row] = index;
    }
  }

  void forward(int64_t block) {
    const auto [begin, end] = block_of(block, args.z.count);
    const int64_t rows = end - begin, count = rows * width;
    const bool direct = size_of(args.z.dtype) == sizeof(T);
    Scratch<T> z_buffer(count), noise_buffer(args.noise.data ? count : 0),
        out_buffer(direct ? 0 : count);
    if (!z_buffer.data || !noise_buffer.data || !out_buffer.data) {
      failed = true;
      return;
    }
    const T* z = read_rows(args.z, begin, rows, z_buffer.data);
    const T* noise =
        args.noise.data ? read_rows(args.noise, begin, rows, noise_buffer.data) : nullptr;
    char* target = args.quantized + begin * width * size_of(args.z.dtype);
    T* out = direct ? (T*)target : out_buffer.data;
    quantize_block(z, noise, out, args.indices + begin, rows);
    if (!direct) write_numbers(target, args.z.dtype, out, count);
  }

  // Derivative of the quantised value by z.
  V slope(const Slopes<T>& slopes, V z, int64_t phase) const {
    const V u = z + load<V>(shifts + phase * 16), gain = load<V>(gains + phase * 16);
    if (args.hard_clamp) {
      const V inside = u >= -1 ? (u <= 1 ? gain : V{}) : V{};
      return u != u ? u : inside;
    }
    return gain * slopes(u);
  }

  // Gradients of as many numbers as it returns; phase becomes that of those behind them.
  template <bool PAST_CACHE>
  int64_t gradients_together(const Slopes<T>& slopes, const T* z, const T* grad, T* out,
                             int64_t count, int64_t& phase) const {
    constexpr int64_t step = 128;
    int64_t e = 0;
    if constexpr (Slopes<T>::has_near)
      for (; e + step <= count; e += step) {
        const int64_t first = phase;
        V farthest{};
        for (int64_t i = e; i < e + step; i += 16) {
          fetch_ahead(z + i);
          fetch_ahead(grad + i);
          if (!PAST_CACHE) fetch_ahead(out + i);
          const V u = load<V>(z + i) + load<V>(shifts + phase * 16);
          const V slope = load<V>(gains + phase * 16) * slopes.near(u, farthest);
          put<PAST_CACHE>(out + i, load<V>(grad + i) * slope);
          phase = phase + 1 == phases ? 0 : phase + 1;
        }
        if (!slopes.beyond(farthest)) continue;
        phase = first;
        for (int64_t i = e; i < e + step; i += 16) {
          put<PAST_CACHE>(out + i, load<V>(grad + i) * slope(slopes, load<V>(z + i), phase));
          phase = phase + 1 == phases ? 0 : phase + 1;
        }
      }
    return e;
  }

  void backward(int64_t block, const FiniteScalarQuantizeBwdArgs& bwd) {
    const auto [begin, end] = block_of(block, args.z.count);
    const int64_t rows = end - begin, count = rows * width;
    const bool direct = size_of(args.z.dtype) == sizeof(T);
    Scratch<T> z_buffer(count), grad_buffer(count), noise_buffer(args.noise.data ? count : 0),
        out_buffer(direct ? 0 : count);
    if (!z_buffer.data || !grad_buffer.data || !noise_buffer.data || !out_buffer.data) {
      failed = true;
      return;
    }
    const T* z = read_rows(args.z, begin, rows, z_buffer.data);
    const T* grad = read_rows(bwd.grad, begin, rows, grad_buffer.data);
    const T* noise =
        args.noise.data ? read_rows(args.noise, begin, rows, noise_buffer.data) : nullptr;
    char* target = bwd.result + begin * width * size_of(args.z.dtype);
    T* out = direct ? (T*)target : out_buffer.data;
    const Slopes<T> slopes(*bwd.slope);
    int64_t e = 0, phase = 0;
    if (!noise && !args.hard_clamp)
      e = past_cache(out) ? gradients_together<true>(slopes, z, grad, out, count, phase)
                          : gradients_together<false>(slopes, z, grad, out, count, phase);
    for (; e < count; e += 16) {
      const V x = load_some(z + e, count - e);
      V factor = slope(slopes, x, phase);
      if (noise) {
        I level;
        const V v = quantize(x, phase, e, level) + load_some(noise + e, count - e);
        factor = v >= -1 ? (v <= 1 ? factor : V{}) : V{};
        factor = x != x ? x : factor;
      }
      store_some(out + e, load_some(grad + e, count - e) * factor, count - e);
      if (++phase == phases) phase = 0;
    }
    if (!direct) write_numbers(target, args.z.dtype, out, count);
  }
};

template <class T>
static bool finite_scalar_forward(const FiniteScalarQuantizeArgs& args, const Parallel& parallel) {
  FiniteScalar<T> work(args);
  if (!work.prepare_levels()) return false;
  for_blocks_past_cache(
      blocks_of(args.z.count), [&](int64_t block) { work.forward(block); }, parallel);
  return !work.failed;
}

template <class T>
static bool finite_scalar_backward(const FiniteScalarQuantizeBwdArgs& args,
                                   const Parallel& parallel) {
  FiniteScalar<T> work(args.forward);
  if (!work.prepare_slopes()) return false;
  if (args.forward.noise.data && !work.prepare_comparing()) return false;
  for_blocks_past_cache(
      blocks_of(args.forward.z.count), [&](int64_t block) { work.backward(block, args); },
      parallel);
  return !work.failed;
}

static bool finite_scalar_quantize(const FiniteScalarQuantizeArgs& args,
                                   const Parallel& parallel) {
  return args.z.dtype == Dtype::float64 ? finite_scalar_forward<double>(args, parallel)
                                        : finite_scalar_forward<float>(args, parallel);
}

static bool finite_scalar_quantize_bwd(const FiniteScalarQuantizeBwdArgs& args,
                                       const Parallel& parallel) {
  return args.forward.z.dtype == Dtype::float64 ? finite_scalar_backward<double>(args, parallel)
                                                : finite_scalar_backward<float>(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
