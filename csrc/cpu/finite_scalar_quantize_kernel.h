// Sixteen neighbouring numbers at a time, whatever the rows' width: what differs between dimensions
// is laid out in tables of the period with which dimensions meet lanes. A number is compared with
// its dimension's thresholds, which gives its level and its value without any tanh: with all of
// them, or, where tables of all kinds of dimensions fit registers, with those that halve the rest.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/finite_scalar_quantize.h"
#include "cpu/finite_scalar_quantize_tables.h"
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
  int32_t* basis = nullptr;
  RowSums indices_of;
#if defined(__AVX512F__)
  HalvingTables halving;
  int32_t* first_places = nullptr;  // [phases][16]
#endif
  std::atomic<bool> failed{false};

  explicit FiniteScalar(const FiniteScalarQuantizeArgs& a)
      : args(a), width(a.z.width), indices_of(width) {}
  FiniteScalar(const FiniteScalar&) = delete;
  ~FiniteScalar() {
    for (void* p : {(void*)thresholds, (void*)values, (void*)lowest, (void*)shifts, (void*)gains,
                    (void*)basis})
      std::free(p);
#if defined(__AVX512F__)
    std::free(first_places);
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

  bool prepare() {
    int64_t a = width, b = 16;
    while (b) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    phases = width / a;
    for (int64_t d = 0; d < width; ++d)
      if (args.levels[d].count - 1 > most) most = args.levels[d].count - 1;
    compares = most <= most_compared;
    const int64_t lanes16 = phases * 16, compared = compares ? lanes16 * most : 1;
    thresholds = allocate<T>(compared);
    values = allocate<T>(compared);
    lowest = allocate<T>(lanes16);
    shifts = allocate<T>(lanes16);
    gains = allocate<T>(lanes16);
    basis = allocate<int32_t>(lanes16);
    if (!thresholds || !values || !lowest || !shifts || !gains || !basis) return false;
    for (int64_t e = 0; e < lanes16; ++e) {
      const ScalarLevels& d = args.levels[e % width];
      lowest[e] = value(d, 0);
      shifts[e] = (T)d.shift;
      gains[e] = (T)d.gain;
      basis[e] = d.basis;
      for (int k = 0; k < most && compares; ++k) {
        const int64_t at = (e / 16 * most + k) * 16 + e % 16;
        const bool has = k + 1 < d.count;
        thresholds[at] = has ? not_below(d.thresholds[k]) : (T)__builtin_nan("");
        values[at] = has ? value(d, k + 1) : (T)0;
      }
    }
    return prepare_halving(lanes16);
  }

  bool prepare_halving([[maybe_unused]] int64_t lanes16) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      Scratch<int32_t> first(width);
      first_places = allocate<int32_t>(lanes16);
      if (!first.data || !first_places) return false;
      halving.prepare(
          args.levels, width, first.data,
          [](const ScalarLevels& d, int k) { return not_below(d.thresholds[k]); }, value);
      for (int64_t e = 0; e < lanes16 && halving.steps; ++e)
        first_places[e] = first.data[e % width];
    }
#endif
    return true;
  }

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

  // Of count numbers, values to out and each level's part of an index to terms; quantize is
  // called with sixteen of them, their phase, their place, and room for levels.
  template <class Quantize>
  void quantize_by(const Quantize quantize, const T* z, const T* noise, T* out, int32_t* terms,
                   int64_t count) const {
    using I32 = Sixteen<float>::I;
    const int32_t* const bases = basis;
    const int64_t period = phases;
    int64_t phase = 0;
    for (int64_t e = 0; e < count; e += 16) {
      I level;
      V v = quantize(load_some(z + e, count - e), phase, e, level);
      if (noise) v = clamp(v + load_some(noise + e, count - e));
      store_some(out + e, v, count - e);
      store(terms + e, __builtin_convertvector(level, I32) * load<I32>(bases + phase * 16));
      if (++phase == period) phase = 0;
    }
  }

  void quantize_block(const T* z, const T* noise, T* out, int32_t* terms, int64_t count) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) switch (halving.steps) {
        case 1: return quantize_by(Halving<1>(halving, first_places), z, noise, out, terms, count);
        case 2: return quantize_by(Halving<2>(halving, first_places), z, noise, out, terms, count);
        case 3: return quantize_by(Halving<3>(halving, first_places), z, noise, out, terms, count);
        case 4: return quantize_by(Halving<4>(halving, first_places), z, noise, out, terms, count);
        case 5: return quantize_by(Halving<5>(halving, first_places), z, noise, out, terms, count);
      }
#endif
    const auto comparing = [this](V v, int64_t phase, int64_t e, I& level)
                               __attribute__((always_inline)) {
      return quantize(v, phase, e, level);
    };
    quantize_by(comparing, z, noise, out, terms, count);
  }

  void forward(int64_t block) {
    const auto [begin, end] = block_of(block, args.z.count);
    const int64_t rows = end - begin, count = rows * width;
    const bool direct = size_of(args.z.dtype) == sizeof(T);
    Scratch<T> z_buffer(count), noise_buffer(args.noise.data ? count : 0),
        out_buffer(direct ? 0 : count);
    Scratch<int32_t> term_buffer(count + 16);
    int32_t* terms = term_buffer.data;
    if (!z_buffer.data || !noise_buffer.data || !out_buffer.data || !terms) {
      failed = true;
      return;
    }
    const T* z = read_rows(args.z, begin, rows, z_buffer.data);
    const T* noise =
        args.noise.data ? read_rows(args.noise, begin, rows, noise_buffer.data) : nullptr;
    char* target = args.quantized + begin * width * size_of(args.z.dtype);
    T* out = direct ? (T*)target : out_buffer.data;
    quantize_block(z, noise, out, terms, count);
    if (!direct) write_numbers(target, args.z.dtype, out, count);
    int32_t* indices = args.indices + begin;
    indices_of.sum(terms, rows, indices);
  }

  // Derivative of the quantised value by z.
  V slope(V z, int64_t phase) const {
    const V u = z + load<V>(shifts + phase * 16), gain = load<V>(gains + phase * 16);
    if (args.hard_clamp) {
      const V inside = u >= -1 ? (u <= 1 ? gain : V{}) : V{};
      return u != u ? u : inside;
    }
    constexpr T twice = -2.88539008177792681;  // -2 / log 2
    const V e = power_of_two(absolute(u) * twice), r = reciprocal(e + 1);
    return 4 * gain * e * (r * r);
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
    int64_t phase = 0;
    for (int64_t e = 0; e < count; e += 16) {
      const V x = load_some(z + e, count - e);
      V factor = slope(x, phase);
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
  if (!work.prepare()) return false;
  for_blocks(
      blocks_of(args.z.count), [&](int64_t block) { work.forward(block); }, parallel);
  return !work.failed;
}

template <class T>
static bool finite_scalar_backward(const FiniteScalarQuantizeBwdArgs& args,
                                   const Parallel& parallel) {
  FiniteScalar<T> work(args.forward);
  if (!work.prepare()) return false;
  for_blocks(
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
