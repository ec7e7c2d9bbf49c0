// act(gate) value, and its gradients, which recompute the activation from the gate.
#pragma once
#include "cpu/gated_activation.h"
#include "cpu/numbers.h"
#include "cpu/row_blocks.h"

namespace mmfast::MMFAST_ISA {

// The normal distribution's Phi(x), and exp(-x^2 / 2), which is sqrt(2 pi) its density.
MMFAST_INLINE void normal_distribution(vf x, vf& phi, vf& bell) {
  // Phi(-a) = bell Q(a) with Q(a) = erfcx(a / sqrt(2)) / 2, a polynomial of t = 1 / (1 + 0.35 a)
  // within 3.2e-8 of itself. One less it is for positive x; nothing cancels for negative ones.
  using bits = uint32_t __attribute__((vector_size(4 * lanes)));
  const vf a = (vf)((bits)x & 0x7FFFFFFFu);
  const vf t = 1.f / fma(a, vf{} + 0.35f, vf{} + 1.f);
  vf q = fma(vf{} - 0.0291578849f, t, vf{} + 0.144030921f);
  q = fma(q, t, vf{} - 0.255839022f);
  q = fma(q, t, vf{} + 0.159319727f);
  q = fma(q, t, vf{} - 0.0232123684f);
  q = fma(q, t, vf{} + 0.105552508f);
  q = fma(q, t, vf{} + 0.119821285f);
  q = fma(q, t, vf{} + 0.139863513f);
  q = fma(q, t, vf{} + 0.139621304f);
  bell = exponential(x * x * -0.5f);
  const vf tail = bell * (q * t);
  phi = x > 0.f ? 1.f - tail : tail;
}
MMFAST_INLINE void normal_distribution(vd x, vd& phi, vd& bell) {
  for (int i = 0; i < native_width<double>; ++i) {
    phi[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
    bell[i] = __builtin_exp(x[i] * x[i] * -0.5);
  }
}

// An activation x s(x), and its derivative.
template <Activation A, class V>
struct Activated {
  V s, derivative;

  template <bool DERIVATIVE>
  MMFAST_INLINE Activated at(V x) {
    Activated r;
    if constexpr (A == Activation::gelu) {
      V bell;
      normal_distribution(x, r.s, bell);
      // An infinite x has no bell.
      if constexpr (DERIVATIVE) r.derivative = bell == 0 ? r.s : fma(x * bell, V{} + root, r.s);
      return r;
    }
    // s = 1 / (1 + e^-y), with y = x, or twice the argument of the tanh.
    const V square = x * x;
    const V y = A == Activation::silu ? x : x * fma(square, V{} + cubic, V{} + linear);
    const V e = exponential(-y);
    r.s = 1 / (1 + e);
    if constexpr (DERIVATIVE) {
      const V slope = A == Activation::silu ? V{} + 1 : fma(square, V{} + 3 * cubic, V{} + linear);
      const V other = e * r.s;  // 1 - s, without what cancels there
      // Where s is 0 or 1, slope and e may be infinite.
      const V bend = r.s * (r.s == 0 ? V{} : other);
      r.derivative = bend == 0 ? r.s : fma(x * bend, slope, r.s);
    }
    return r;
  }

 private:
  using T = std::remove_reference_t<decltype(V{}[0])>;
  static constexpr T root = (T)0.39894228040143267794;         // 1 / sqrt(2 pi)
  static constexpr T linear = (T)1.59576912160573071176;       // 2 sqrt(2 / pi)
  static constexpr T cubic = (T)(1.59576912160573071176 * 0.044715);
};

template <class T, Dtype D, Activation A, bool GATED, bool BACKWARD>
struct GatedActivation {
  using V = typename Native<T>::V;
  static constexpr int64_t width = native_width<T>, block = 8192;

  const GatedActivationArgs& args;
  int64_t blocks() const { return (args.gate.width + block - 1) / block; }

  MMFAST_INLINE V read(const char* at) {
    V v;
    read_numbers(at, D, v);
    return v;
  }

  struct Row {
    const char *gate, *value, *grad;
    char *out, *grad_gate, *grad_value;
  };

  MMFAST_INLINE void vector(const Row& row, int64_t at) {
    const V x = read(row.gate + at);
    const auto act = Activated<A, V>::template at<BACKWARD>(x);
    if constexpr (!BACKWARD) {
      V result = x * act.s;
      if constexpr (GATED) result = result * read(row.value + at);
      write_numbers(row.out + at, D, result);
    } else {
      const V grad = read(row.grad + at);
      if (GATED && row.grad_value) write_numbers(row.grad_value + at, D, grad * (x * act.s));
      if (!row.grad_gate) return;
      V passed = grad;
      if constexpr (GATED) passed = grad * read(row.value + at);
      write_numbers(row.grad_gate + at, D, passed * act.derivative);
    }
  }

  // The last numbers of a row, in buffers that are long enough.
  static void rest(const Row& row, int64_t at, int64_t bytes) {
    char buffers[6][sizeof(V)]{};
    const auto in = [&](int i, const char* from) -> const char* {
      if (from) std::memcpy(buffers[i], from + at, (size_t)bytes);
      return buffers[i];
    };
    Row padded{in(0, row.gate), in(1, row.value), in(2, row.grad), buffers[3],
               row.grad_gate ? buffers[4] : nullptr, row.grad_value ? buffers[5] : nullptr};
    vector(padded, 0);
    const auto out = [&](int i, char* to) {
      if (to) std::memcpy(to + at, buffers[i], (size_t)bytes);
    };
    out(3, row.out);
    out(4, row.grad_gate);
    out(5, row.grad_value);
  }

  void part(int64_t index) const {
    const int64_t size = size_of(D);
    const int64_t i = index / blocks(), first = index % blocks() * block;
    const int64_t last = first + block < args.gate.width ? first + block : args.gate.width;
    const auto to = [&](char* out) { return out ? out + i * args.out_stride : nullptr; };
    const Row row{args.gate.row(i),
                  GATED ? args.value.row(i) : nullptr,
                  BACKWARD ? args.grad.row(i) : nullptr,
                  to(args.out),
                  to(args.grad_gate),
                  to(args.grad_value)};
    int64_t d = first;
    for (; d + width <= last; d += width) vector(row, d * size);
    if (d < last) rest(row, d * size, (last - d) * size);
  }

  static void run(const GatedActivationArgs& args, const Parallel& parallel) {
    const GatedActivation activation{args};
    const auto body = [](void* context, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ((const GatedActivation*)context)->part(i);
    };
    const int64_t parts = args.gate.count * activation.blocks();
    if (args.gate.count * args.gate.width <= block)
      body((void*)&activation, 0, parts);
    else
      parallel.run(parts, body, (void*)&activation);
  }
};

template <Activation A, bool GATED, bool BACKWARD>
static void gated_activation_of(const GatedActivationArgs& args, const Parallel& parallel) {
  switch (args.gate.dtype) {
    case Dtype::float32:
      GatedActivation<float, Dtype::float32, A, GATED, BACKWARD>::run(args, parallel);
      return;
    case Dtype::float16:
      GatedActivation<float, Dtype::float16, A, GATED, BACKWARD>::run(args, parallel);
      return;
    case Dtype::bfloat16:
      GatedActivation<float, Dtype::bfloat16, A, GATED, BACKWARD>::run(args, parallel);
      return;
    case Dtype::float64:
      GatedActivation<double, Dtype::float64, A, GATED, BACKWARD>::run(args, parallel);
  }
}

template <Activation A>
static void gated_activation_by(const GatedActivationArgs& args, const Parallel& parallel) {
  if (args.grad.data)
    args.value.data ? gated_activation_of<A, true, true>(args, parallel)
                    : gated_activation_of<A, false, true>(args, parallel);
  else
    args.value.data ? gated_activation_of<A, true, false>(args, parallel)
                    : gated_activation_of<A, false, false>(args, parallel);
}

// The result or, where args.grad has data, the gradients.
static void gated_activation(const GatedActivationArgs& given, const Parallel& parallel) {
  GatedActivationArgs args = given;
  if (args.gate.count == 0 || args.gate.width == 0) return;
  const auto dense = [](const Rows& rows) { return !rows.data || is_dense(rows); };
  if (dense(args.gate) && dense(args.value) && dense(args.grad) &&
      args.out_stride == args.gate.width * size_of(args.gate.dtype)) {
    Rows* const all[] = {&args.gate, &args.value, &args.grad};
    for (Rows* rows : all) {
      rows->width *= rows->count;
      rows->count = 1;
    }
  }
  switch (args.activation) {
    case Activation::gelu: return gated_activation_by<Activation::gelu>(args, parallel);
    case Activation::gelu_tanh: return gated_activation_by<Activation::gelu_tanh>(args, parallel);
    case Activation::silu: return gated_activation_by<Activation::silu>(args, parallel);
  }
}

}  // namespace mmfast::MMFAST_ISA
