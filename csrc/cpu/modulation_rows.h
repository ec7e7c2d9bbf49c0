// Rows of channels for the adaLN kernels, in vectors of float or double.
#pragma once
#include "cpu/gated_residual_modulate.h"
#include "cpu/numbers.h"
#include "cpu/past_cache.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

// Outputs larger than this have left the cache before anyone reads all of them: they go past it,
// and what lay there in memory is not read first.
constexpr int64_t stream_from = int64_t(16) << 20;

// Vectors of channels, the last of which may be a part of one.
template <class T>
struct Channels {
  using V = typename Native<T>::V;
  static constexpr int64_t width = native_width<T>;
  int64_t count;

  // Numbers in a buffer for one row: whole lines, so that no vector lies in two.
  int64_t room() const {
    constexpr int64_t line = 64 / (int64_t)sizeof(T);
    return (count + line - 1) / line * line;
  }

  // Calls work(c, n) for the n channels from c, n constant in the full vectors.
  template <class Work>
  __attribute__((always_inline)) void each(const Work& work) const {
    int64_t c = 0;
    for (; c + width <= count; c += width) work(c, width);
    const int64_t rest = count - c;
    if (rest >= width) __builtin_unreachable();  // GCC would warn of what came of it
    if (rest) work(c, rest);
  }

  // v, zero from its n-th number on.
  MMFAST_INLINE V first(V v, int64_t n) {
    if (n == width) return v;
    for (int64_t i = 0; i < width; ++i) v[i] = i < n ? v[i] : 0;
    return v;
  }

  MMFAST_INLINE V read(const char* row, Dtype dtype, int64_t c, int64_t n) {
    return read_first<V>(row + c * size_of(dtype), dtype, n);
  }

  MMFAST_INLINE void write(char* row, Dtype dtype, int64_t c, int64_t n, V v,
                           bool streams = false) {
    alignas(64) char rounded[width * sizeof(double)];
    write_numbers(rounded, dtype, v);
    put(row, dtype, c, n, rounded, streams);
  }

  // Asks for the line that channel c of a row begins, which comes soon. Into the second cache: the first
  // would wait for memory with too few lines at a time.
  MMFAST_INLINE void ask(const char* row, Dtype dtype, int64_t c) {
    const int64_t at = c * size_of(dtype);
    if (at % 64 == 0) __builtin_prefetch(row + at, 0, 2);
  }

  // Numbers that write_numbers has made.
  MMFAST_INLINE void put(char* row, Dtype dtype, int64_t c, int64_t n, const char* rounded,
                         bool streams) {
    char* at = row + c * size_of(dtype);
    const int64_t size = n * size_of(dtype);
    if (streams && size == (int64_t)sizeof(V))
      store_past_cache(at, load<V>(rounded));
    else
      std::memcpy(at, rounded, (size_t)size);
  }
};

// Whether rows are to go past the cache: each of them whole lines, which half precisions would
// write in parts.
template <class T>
static bool streams(const BlockShape& shape, int64_t outputs, const TokenView& like) {
  const int64_t row = shape.channels * size_of(shape.dtype);
  return outputs * shape.batch * shape.length * row >= stream_from && row % 64 == 0 &&
         (uintptr_t)like.data % 64 == 0 && size_of(shape.dtype) >= 4;
}

MMFAST_INLINE vf hyperbolic_tangent(vf x) {
  const vf size = x < 0.f ? -x : x, square = x * x;
  // Cephes' tanhf near zero, where the other form loses digits.
  vf p = fma(vf{} - 5.70498872745e-3f, square, vf{} + 2.06390887954e-2f);
  p = fma(p, square, vf{} - 5.37397155531e-2f);
  p = fma(p, square, vf{} + 1.33314422036e-1f);
  p = fma(p, square, vf{} - 3.33332819422e-1f);
  const vf near = fma(p * square, x, x);
  const vf far = 1.f - 2.f / (exponential(size + size) + 1.f);
  const vf result = size < 0.625f ? near : (x < 0.f ? -far : far);
  return x != x ? x : result;
}
MMFAST_INLINE vd hyperbolic_tangent(vd x) {
  for (int i = 0; i < native_width<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Of the hyperbolic tangent, without the difference 1 - tanh^2, in which digits cancel.
template <class V>
MMFAST_INLINE V tangent_slope(V x) {
  const V e = exponential(x < 0 ? x + x : -x - x), one_plus = e + 1;
  return 4 * e / (one_plus * one_plus);
}

// The modulation of one frame, ready for use: out = normed factor + level; act(gate).
template <class T>
struct FrameModulation {
  using C = Channels<T>;
  using V = typename C::V;
  T *gate, *factor, *level;

  static int64_t room(const C& channels) { return 3 * channels.room(); }
  FrameModulation(T* buffer, const C& channels)
      : gate(buffer), factor(gate + channels.room()), level(factor + channels.room()) {}

  // 1 + scale.
  MMFAST_INLINE V one_plus(const ModulationView& scale, int64_t b, int64_t frame, int64_t c,
                                  int64_t n) {
    V one = V{} + (T)1;
    if (scale.data) one += C::read(scale.at(b, frame), scale.dtype, c, n);
    return one;
  }

  MMFAST_INLINE V read_or(const ModulationView& view, T otherwise, int64_t b, int64_t frame,
                                 int64_t c, int64_t n) {
    return view.data ? C::read(view.at(b, frame), view.dtype, c, n) : V{} + otherwise;
  }

  MMFAST_INLINE V activated(const ModulationView& gate, bool tanh, int64_t b, int64_t frame,
                                   int64_t c, int64_t n) {
    const V v = read_or(gate, 1, b, frame, c, n);
    return tanh && gate.data ? hyperbolic_tangent(v) : v;
  }

  template <class Args>
  void make(const Args& args, const C& channels, int64_t b, int64_t frame, bool gates,
            bool norms) const {
    channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      if (gates)
        store(gate + c, activated(args.gate, args.shape.tanh, b, frame, c, n));
      if (!norms) return;
      const V one = one_plus(args.scale, b, frame, c, n);
      store(factor + c, one * read_or(args.weight, 1, b, frame, c, n));
      const V bias = read_or(args.bias, 0, b, frame, c, n);
      store(level + c, fma(bias, one, read_or(args.shift, 0, b, frame, c, n)));
    });
  }
};

}  // namespace mmfast::MMFAST_ISA
