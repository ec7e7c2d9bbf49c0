// The adaLN ops backwards. A row's gradients are made as it comes from memory, and its terms of
// the sums over tokens added to sums of a part: `part_tokens` tokens of one frame, or as many
// frames as have so many. Parts depend on nothing but L and F, and their sums are added in order.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/modulation_rows.h"

namespace mmfast::MMFAST_ISA {

template <class T, Dtype DTYPE, Dtype BRANCH = DTYPE>
struct GatedResidualModulateBwd {
  using C = Channels<T>;
  using V = typename C::V;
  static constexpr int64_t part_tokens = 32;
  static constexpr int64_t slice = 64;  // channels whose sums a thread adds

  // What is summed over tokens: the gradient of the modulated, its product with the norm, and that
  // of the residual's gradient with y.
  enum Sum { of_grad, of_normed, of_gated, sums };

  const GatedResidualModulateBwdArgs& args;
  const C channels;
  const int64_t each;  // tokens of a frame
  // A frame in several parts, whose sums are kept, or several frames in a part, of which only the
  // terms of weight and bias are.
  const bool splits;
  const int64_t parts;  // of a sample
  const bool norms, affine, sums_norm, sums_gate, past_the_cache;
  T* kept = nullptr;  // [B][parts][sums][room]
  std::atomic<bool> failed{false};

  explicit GatedResidualModulateBwd(const GatedResidualModulateBwdArgs& a)
      : args(a),
        channels{a.shape.channels},
        each(a.shape.tokens_per_frame()),
        splits(each > part_tokens),
        parts(splits ? a.shape.frames * parts_of_frame()
                     : (a.shape.frames + frames_of_part() - 1) / frames_of_part()),
        norms(a.grad_modulated.data),
        affine(a.to_weight.data || a.to_bias.data),
        sums_norm(affine || a.to_shift.data || a.to_scale.data),
        sums_gate(a.to_gate.data),
        past_the_cache(streams<T>(a.shape, (a.to_x.data != nullptr) + (a.to_y.data != nullptr),
                                  a.to_x.data ? a.to_x : a.to_y)) {}
  GatedResidualModulateBwd(const GatedResidualModulateBwd&) = delete;
  ~GatedResidualModulateBwd() { std::free(kept); }

  int64_t parts_of_frame() const { return (each + part_tokens - 1) / part_tokens; }
  int64_t frames_of_part() const { return each ? part_tokens / each : 1; }
  T* sums_of(int64_t b, int64_t part) const {
    return kept + (b * parts + part) * sums * channels.room();
  }

  bool run(const Parallel& parallel) {
    const bool keeps = splits ? sums_norm || sums_gate : affine;
    if (keeps) {
      kept = allocate<T>(args.shape.batch * parts * sums * channels.room());
      if (!kept) return false;
    }
    for_blocks(
        args.shape.batch * parts,
        [&](int64_t i) {
          past_the_cache ? part<true>(i / parts, i % parts) : part<false>(i / parts, i % parts);
        },
        parallel);
    if (failed) return false;
    if (!keeps) return true;
    for_blocks(
        (channels.count + slice - 1) / slice, [&](int64_t i) { add_slice(i * slice); }, parallel);
    return true;
  }

  template <bool STREAMS>
  void part(int64_t b, int64_t part) {
    const int64_t room = channels.room(), own = FrameModulation<T>::room(channels);
    T* buffer = allocate<T>(own + sums * room);
    if (!buffer) {
      failed = true;
      return;
    }
    const FrameModulation<T> modulation(buffer, channels);
    T* total = splits && kept ? sums_of(b, part) : buffer + own;
    if (splits) {
      const int64_t frame = part / parts_of_frame(), last = (frame + 1) * each;
      const int64_t first = frame * each + part % parts_of_frame() * part_tokens;
      modulation.make(args, channels, b, frame, args.to_y.data, norms);
      tokens<STREAMS>(b, first, first + part_tokens < last ? first + part_tokens : last,
                      modulation, total);
    } else {
      T* affine_sums = affine ? sums_of(b, part) : nullptr;
      if (affine) std::memset(affine_sums, 0, (size_t)(sums * room) * sizeof(T));
      const int64_t first = part * frames_of_part(), past = first + frames_of_part();
      for (int64_t f = first; f < past && f < args.shape.frames; ++f) {
        modulation.make(args, channels, b, f, args.to_y.data, norms);
        tokens<STREAMS>(b, f * each, (f + 1) * each, modulation, total);
        channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
          V found[sums];
          for (int s = 0; s < sums; ++s) found[s] = load<V>(total + s * room + c);
          finish(b, f, c, n, found);
          if (!affine) return;
          const V one = modulation.one_plus(args.scale, b, f, c, n);
          for (const Sum s : {of_grad, of_normed}) {
            T* at = affine_sums + s * room + c;
            store(at, fma(one, found[s], load<V>(at)));
          }
        });
      }
    }
    if (STREAMS) _mm_sfence();
    std::free(buffer);
  }

  // Rows [first, last) of one frame, two at a time; sums [sums][room] are made anew.
  template <bool STREAMS>
  __attribute__((always_inline)) void tokens(int64_t b, int64_t first, int64_t last,
                            const FrameModulation<T>& modulation, T* total) {
    if (sums_norm || sums_gate)
      std::memset(total, 0, (size_t)(sums * channels.room()) * sizeof(T));
    for (; first + 2 <= last; first += 2) rows<2, STREAMS>(b, first, modulation, total);
    if (first < last) rows<1, STREAMS>(b, first, modulation, total);
  }

  template <int ROWS, bool STREAMS>
  void rows(int64_t b, int64_t first, const FrameModulation<T>& modulation, T* total) {
    const C channels = this->channels;
    const T *factor = modulation.factor, *gate = modulation.gate;
    const bool norms = this->norms, sums_norm = this->sums_norm, sums_gate = this->sums_gate;
    const char *passed[ROWS], *residual[ROWS], *own[ROWS], *y[ROWS];
    char *to_x[ROWS], *to_y[ROWS];
    T mean[ROWS]{}, rstd[ROWS]{}, level[ROWS]{}, along[ROWS]{};
    for (int r = 0; r < ROWS; ++r) {
      const int64_t token = first + r, at = b * args.shape.length + token;
      passed[r] = args.grad_modulated.at(b, token);
      residual[r] = args.residual.at(b, token);
      own[r] = args.grad_residual.at(b, token);
      y[r] = args.y.at(b, token);
      to_x[r] = args.to_x.at(b, token);
      to_y[r] = args.to_y.at(b, token);
      if (!norms) continue;
      mean[r] = args.shape.rms ? 0 : ((const T*)args.mean)[at];
      rstd[r] = ((const T*)args.rstd)[at];
      V levels{}, alongs{};
      const char* next = args.residual.at(b, token + ROWS);
      channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
        if constexpr (STREAMS) C::ask(next, DTYPE, c);
        const V normed = (C::read(residual[r], DTYPE, c, n) - mean[r]) * rstd[r];
        const V grad = C::read(passed[r], BRANCH, c, n) * load<V>(factor + c);
        levels += C::first(grad, n);
        alongs = fma(C::first(grad, n), normed, alongs);
      });
      level[r] = args.shape.rms ? 0 : sum_lanes(levels) / (T)channels.count;
      along[r] = sum_lanes(alongs) / (T)channels.count;
    }
    const int64_t room = channels.room();
    const bool adds = args.grad_residual.data, wants_x = args.to_x.data, wants_y = args.to_y.data;
    channels.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      V found[sums];
      if (sums_norm)
        for (const Sum s : {of_grad, of_normed}) found[s] = load<V>(total + s * room + c);
      if (sums_gate) found[of_gated] = load<V>(total + of_gated * room + c);
      for (int r = 0; r < ROWS; ++r) {
        if constexpr (STREAMS) {
          C::ask(passed[r] + ROWS * args.grad_modulated.token_stride, BRANCH, c);
          C::ask(own[r] + ROWS * args.grad_residual.token_stride, DTYPE, c);
          C::ask(y[r] + ROWS * args.y.token_stride, BRANCH, c);
        }
        V grad{};
        if (norms) {
          const V normed = (C::read(residual[r], DTYPE, c, n) - mean[r]) * rstd[r];
          const V above = C::read(passed[r], BRANCH, c, n);
          if (sums_norm) {
            found[of_grad] += above;
            found[of_normed] = fma(above, normed, found[of_normed]);
          }
          grad = fma(above, load<V>(factor + c), V{} - level[r]);
          grad = fma(V{} - along[r], normed, grad) * rstd[r];
        }
        if (adds) grad += C::read(own[r], DTYPE, c, n);
        if (wants_x) C::write(to_x[r], DTYPE, c, n, grad, STREAMS);
        if (wants_y)
          C::write(to_y[r], BRANCH, c, n, grad * load<V>(gate + c), STREAMS);
        if (sums_gate)
          found[of_gated] = fma(grad, C::read(y[r], BRANCH, c, n), found[of_gated]);
      }
      if (sums_norm)
        for (const Sum s : {of_grad, of_normed}) store(total + s * room + c, found[s]);
      if (sums_gate) store(total + of_gated * room + c, found[of_gated]);
    });
  }

  // Gradients of the modulation of a frame from its sums.
  __attribute__((always_inline)) void finish(int64_t b, int64_t frame, int64_t c, int64_t n, const V* found) {
    using F = FrameModulation<T>;
    const auto put = [&](const ModulationView& to, V v) __attribute__((always_inline)) {
      if (to.data) C::write(to.at(b, frame), to.dtype, c, n, v);
    };
    put(args.to_shift, found[of_grad]);
    if (args.to_scale.data) {
      const V weighted = found[of_normed] * F::read_or(args.weight, 1, b, frame, c, n);
      put(args.to_scale, fma(found[of_grad], F::read_or(args.bias, 0, b, frame, c, n), weighted));
    }
    if (!args.to_gate.data) return;
    V slope = V{} + (T)1;
    if (args.shape.tanh) slope = tangent_slope(F::read_or(args.gate, 0, b, frame, c, n));
    put(args.to_gate, found[of_gated] * slope);
  }

  // Adds what the parts kept, of channels [from, from + slice), each sum in double.
  void add_slice(int64_t from) {
    const int64_t room = channels.room(), left = channels.count - from;
    const C some{left < slice ? left : slice};
    double affine_sums[2][slice + C::width]{};
    for (int64_t b = 0; b < args.shape.batch; ++b)
      for (int64_t p = 0; p < parts;) {
        double found[sums][slice + C::width]{};
        const int64_t frame = splits ? p / parts_of_frame() : 0;
        const int64_t past = splits ? (frame + 1) * parts_of_frame() : parts;
        for (; p < past; ++p) {
          const T* at = sums_of(b, p) + from;
          for (int s = 0; s < sums; ++s)
            for (int64_t c = 0; c < some.count; ++c) found[s][c] += at[s * room + c];
        }
        if (splits)
          some.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
            V narrowed[sums];
            for (int s = 0; s < sums; ++s)
              read_numbers((const char*)(found[s] + c), Dtype::float64, narrowed[s]);
            finish(b, frame, from + c, n, narrowed);
          });
        for (int64_t c = 0; c < some.count && affine; ++c) {
          double one = 1;
          if (splits && args.scale.data)
            one += load_one<double>(
                args.scale.at(b, frame) + (from + c) * size_of(args.scale.dtype), args.scale.dtype);
          affine_sums[0][c] += one * found[of_grad][c];
          affine_sums[1][c] += one * found[of_normed][c];
        }
      }
    if (!affine) return;
    some.each([&](int64_t c, int64_t n) __attribute__((always_inline)) {
      for (const Sum s : {of_grad, of_normed}) {
        const ModulationView& to = s == of_grad ? args.to_bias : args.to_weight;
        V v;
        read_numbers((const char*)(affine_sums[s] + c), Dtype::float64, v);
        if (to.data) C::write(to.data, to.dtype, from + c, n, v);
      }
    });
  }
};

static bool gated_residual_modulate_bwd(const GatedResidualModulateBwdArgs& args,
                                        const Parallel& parallel) {
  switch (args.shape.dtype) {
    case Dtype::float32:
      switch (args.shape.branch) {
        case Dtype::bfloat16:
          return GatedResidualModulateBwd<float, Dtype::float32, Dtype::bfloat16>(args).run(parallel);
        case Dtype::float16:
          return GatedResidualModulateBwd<float, Dtype::float32, Dtype::float16>(args).run(parallel);
        default:
          return GatedResidualModulateBwd<float, Dtype::float32, Dtype::float32>(args).run(parallel);
      }
    case Dtype::float16:
      return GatedResidualModulateBwd<float, Dtype::float16>(args).run(parallel);
    case Dtype::bfloat16:
      return GatedResidualModulateBwd<float, Dtype::bfloat16>(args).run(parallel);
    case Dtype::float64:
      return GatedResidualModulateBwd<double, Dtype::float64>(args).run(parallel);
  }
  return true;
}

}  // namespace mmfast::MMFAST_ISA
