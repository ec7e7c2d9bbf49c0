// The adaLN ops forwards. A row at a time: the sum is made from x and y as they come from memory
// and stays in the first-level cache for its statistics and its norm.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/modulation_rows.h"

namespace mmfast::MMFAST_ISA {

template <class T, Dtype DTYPE, Dtype BRANCH = DTYPE>
struct GatedResidualModulate {
  using C = Channels<T>;
  using V = typename C::V;
  static constexpr int64_t block_tokens = 32;

  const GatedResidualModulateArgs& args;
  const C channels;
  const bool past_the_cache;
  std::atomic<bool> failed{false};

  explicit GatedResidualModulate(const GatedResidualModulateArgs& a)
      : args(a),
        channels{a.shape.channels},
        past_the_cache(
            streams<T>(a.shape, (a.residual.data != nullptr) + (a.modulated.data != nullptr),
                       a.residual.data ? a.residual : a.modulated)) {}

  bool run(const Parallel& parallel) {
    const int64_t blocks = (args.shape.length + block_tokens - 1) / block_tokens;
    for_blocks(
        blocks * args.shape.batch,
        [&](int64_t i) {
          const int64_t first = i % blocks * block_tokens, last = first + block_tokens;
          past_the_cache ? tokens<true>(i / blocks, first, last)
                         : tokens<false>(i / blocks, first, last);
        },
        parallel);
    return !failed;
  }

  template <bool STREAMS>
  void tokens(int64_t b, int64_t first, int64_t last) {
    const BlockShape& shape = args.shape;
    if (last > shape.length) last = shape.length;
    T* buffer = allocate<T>(FrameModulation<T>::room(channels) + channels.room());
    if (!buffer) {
      failed = true;
      return;
    }
    const FrameModulation<T> modulation(buffer, channels);
    T* row = buffer + FrameModulation<T>::room(channels);
    const bool adds = args.y.data, norms = args.modulated.data;
    const int64_t each = shape.tokens_per_frame();
    for (int64_t token = first, made = -1; token < last; ++token) {
      const int64_t frame = token / each;
      if (frame != made) modulation.make(args, channels, b, made = frame, adds, norms);
      if (!norms)
        sum<true, false, STREAMS>(b, token, modulation, row);
      else if (adds)
        norm<STREAMS>(b, token, modulation, sum<true, true, STREAMS>(b, token, modulation, row));
      else
        norm<STREAMS>(b, token, modulation, sum<false, true, STREAMS>(b, token, modulation, row));
    }
    if (STREAMS) _mm_sfence();
    std::free(buffer);
  }

  // A row as it was rounded, and the sum of its numbers.
  struct Summed {
    const T* row;
    T total;
  };

  // The residual of x and y if it ADDS. Only what NORMS needs its numbers.
  template <bool ADDS, bool NORMS, bool STREAMS>
  __attribute__((always_inline)) Summed sum(int64_t b, int64_t token,
                                            const FrameModulation<T>& modulation, T* buffer) {
    const C channels = this->channels;
    const char *x = args.x.at(b, token), *y = args.y.at(b, token);
    char* out = args.residual.at(b, token);
    const T* gate = modulation.gate;
    // Numbers that are of type T lie in the first-level cache already.
    constexpr bool copies = NORMS && (DTYPE != Native<T>::dtype || (ADDS && STREAMS));
    V total{};
    channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      V v = C::read(x, DTYPE, c, n);
      if constexpr (ADDS) {
        v = fma(load<V>(gate + c), C::read(y, BRANCH, c, n), v);
        alignas(64) char rounded[sizeof(V)];
        write_numbers(rounded, DTYPE, v);
        C::put(out, DTYPE, c, n, rounded, STREAMS);
        read_numbers(rounded, DTYPE, v);
      }
      if constexpr (copies) store(buffer + c, v);
      if constexpr (NORMS) total += C::first(v, n);
    });
    return {copies ? buffer : (const T*)(ADDS ? out : x), NORMS ? sum_lanes(total) : 0};
  }

  template <bool STREAMS>
  __attribute__((always_inline)) void norm(int64_t b, int64_t token,
                                           const FrameModulation<T>& modulation,
                                           const Summed& summed) {
    const C channels = this->channels;
    const char* row = (const char*)summed.row;
    const T count = (T)channels.count;
    const T near = args.shape.rms ? 0 : summed.total / count;
    const char *next_x = args.x.at(b, token + 1), *next_y = args.y.at(b, token + 1);
    V sums{}, squares{};
    channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      if constexpr (STREAMS) C::ask(next_x, DTYPE, c);
      const V difference = C::first(C::read(row, Native<T>::dtype, c, n) - near, n);
      sums += difference;
      squares = fma(difference, difference, squares);
    });
    // What the rounding of the first sum left.
    const T rest = args.shape.rms ? 0 : sum_lanes(sums) / count;
    const T mean = near + rest;
    T variance = sum_lanes(squares) / count - rest * rest;
    variance = variance < 0 ? 0 : variance;
    const T rstd = (T)1 / (T)__builtin_sqrt((double)(variance + (T)args.eps));
    char* out = args.modulated.at(b, token);
    const T *factor = modulation.factor, *level = modulation.level;
    channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      if constexpr (STREAMS) C::ask(next_y, BRANCH, c);
      const V normed = (C::read(row, Native<T>::dtype, c, n) - mean) * rstd;
      C::write(out, BRANCH, c, n, fma(normed, load<V>(factor + c), load<V>(level + c)), STREAMS);
    });
    const int64_t at = b * args.shape.length + token;
    if (!args.shape.rms) ((T*)args.mean)[at] = mean;
    ((T*)args.rstd)[at] = rstd;
  }
};

static bool gated_residual_modulate(const GatedResidualModulateArgs& args,
                                    const Parallel& parallel) {
  switch (args.shape.dtype) {
    case Dtype::float32:
      switch (args.shape.branch) {
        case Dtype::bfloat16:
          return GatedResidualModulate<float, Dtype::float32, Dtype::bfloat16>(args).run(parallel);
        case Dtype::float16:
          return GatedResidualModulate<float, Dtype::float32, Dtype::float16>(args).run(parallel);
        default:
          return GatedResidualModulate<float, Dtype::float32, Dtype::float32>(args).run(parallel);
      }
    case Dtype::float16:
      return GatedResidualModulate<float, Dtype::float16>(args).run(parallel);
    case Dtype::bfloat16:
      return GatedResidualModulate<float, Dtype::bfloat16>(args).run(parallel);
    case Dtype::float64:
      return GatedResidualModulate<double, Dtype::float64>(args).run(parallel);
  }
  return true;
}

}  // namespace mmfast::MMFAST_ISA
