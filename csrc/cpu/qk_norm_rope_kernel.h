// Heads are normalised and rotated in the first cache: numbers are read once, and written once.
//
// The last vector of a head overlaps the one before it where E is no multiple of the vectors'
// width. A head that is narrower than a vector is padded with zeros.
#pragma once
#include <atomic>

#include "cpu/numbers.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

template <class T, Dtype DTYPE>
struct QkNormRope {
  using V = typename Native<T>::V;
  static constexpr int64_t W = native_width<T>;
  static constexpr int64_t size = DTYPE == Dtype::float64 ? 8 : DTYPE == Dtype::float32 ? 4 : 2;
  static constexpr int64_t block = 16;  // tokens whose tables are made at once
  static constexpr int64_t most_parts = 64, least_part = 64;  // of a sum over tokens, and tokens

  const QkNormRopeArgs& args;
  const int64_t E, R, stride;  // stride: numbers from one head to the next in our memory
  const int64_t vectors, tail;  // of a head; lanes of the last one that the others have not
  const int64_t blocks_per_sample, blocks;
  const bool backward;
  int64_t part_blocks = 1, parts = 0;
  double* sums = nullptr;  // [parts][2][rows_width]
  std::atomic<bool> failed{false};

  QkNormRope(const QkNormRopeArgs& a, bool is_backward)
      : args(a),
        E(a.num_dims),
        R(a.cos ? a.rotary_dim : 0),
        stride((a.num_dims + 15) / 16 * 16),
        vectors((a.num_dims + W - 1) / W),
        tail(a.num_dims - (vectors - 1) * W),
        blocks_per_sample((a.length + block - 1) / block),
        blocks(a.batch * blocks_per_sample),
        backward(is_backward) {}
  QkNormRope(const QkNormRope&) = delete;
  ~QkNormRope() { std::free(sums); }

  // A thread's memory.
  struct Work {
    T* memory;
    T* tables;            // [block][2][stride]
    T *x, *grad;          // [H or 1][stride]
    T* pairs;             // [2 stride]: a head and its beginning once more
    T *to_weight, *to_bias;  // [H or 1][stride], of a block
    double* sums;         // of a part
  };

  bool sums_rows() const { return args.grad_weight || args.grad_bias; }
  int64_t group() const { return args.across_heads ? args.heads : 1; }  // heads of a norm

  bool prepare(Work& work) const {
    const int64_t heads = group() * stride, tables = block * 2 * stride;
    work.memory = allocate<T>(tables + 4 * heads + 2 * stride);
    if (!work.memory) return false;
    T* at = work.memory;
    const auto take = [&](int64_t count) {
      T* taken = at;
      at += count;
      return taken;
    };
    work.tables = take(tables);
    work.x = take(heads);
    work.grad = take(heads);
    work.to_weight = take(heads);
    work.to_bias = take(heads);
    work.pairs = take(2 * stride);
    // Padding is read, though nothing follows from it.
    std::memset(work.memory, 0, (size_t)(at - work.memory) * sizeof(T));
    return true;
  }

  // Where vector v of a head begins.
  MMFAST_INLINE int64_t place(int64_t v, int64_t width) {
    const int64_t last = width - W;
    return v * W < last || last < 0 ? v * W : last;
  }

  MMFAST_INLINE V take(const char* at, int64_t e, int64_t width) {
    V v;
    if (width >= W) {
      read_numbers(at + e * size, DTYPE, v);
      return v;
    }
    char padded[W * sizeof(double)]{};
    std::memcpy(padded, at, (size_t)(width * size));
    read_numbers(padded, DTYPE, v);
    return v;
  }

  MMFAST_INLINE void put(char* at, int64_t e, int64_t width, V v) {
    if (width >= W) {
      write_numbers(at + e * size, DTYPE, v);
      return;
    }
    char padded[W * sizeof(double)];
    write_numbers(padded, DTYPE, v);
    std::memcpy(at, padded, (size_t)(width * size));
  }

  // Vector v without the lanes that belong to the one before it.
  __attribute__((always_inline)) V own(V value, int64_t v) const {
    if (v + 1 < vectors || tail == W || E < W) return value;
    V lane;
    for (int i = 0; i < W; ++i) lane[i] = (T)i;
    return lane >= V{} + (T)(W - tail) ? value : V{};
  }

  // cos and sin of a token as factors of a number and of its partner, for each number of a head.
  void expand(T* to, int64_t b, int64_t l) const {
    const int64_t row = b * args.table_stride + l * args.table_width, h = R / 2;
    const T *cos = (const T*)args.cos + row, *sin = (const T*)args.sin + row;
    T *c = to, *s = to + stride;
    const bool pairs = args.table_width != R;
    // Gradients take the partner's sine.
    if (args.half) {
      const int64_t second = pairs ? 0 : h;
      const T *first_sin = backward ? sin + second : sin, *second_sin = backward ? sin : sin + second;
      const T sign = backward ? 1 : -1;
      for (int64_t i = 0; i < h; ++i) {
        c[i] = cos[i];
        c[i + h] = cos[i + second];
        s[i] = sign * first_sin[i];
        s[i + h] = -sign * second_sin[i];
      }
      return;
    }
    for (int64_t i = 0; i < h; ++i) {
      const int64_t a = pairs ? i : 2 * i, z = pairs ? i : 2 * i + 1;
      c[2 * i] = cos[a];
      c[2 * i + 1] = cos[z];
      s[2 * i] = backward ? sin[z] : -sin[a];
      s[2 * i + 1] = backward ? -sin[a] : sin[z];
    }
  }

  // Calls give(v, e, rotated) for the vectors of a head, whose numbers are at(v, e).
  template <class At, class Give>
  __attribute__((always_inline)) void rotate(const T* table, T* pairs, const At& at,
                                             const Give& give) const {
    const int64_t h = R / 2;
    const T *c = table, *s = table + stride;
    if (R == 0) {
      for (int64_t v = 0; v < vectors; ++v) give(v, place(v, E), at(v, place(v, E)));
      return;
    }
    const auto turned = [&](int64_t e, V n, V partner) __attribute__((always_inline)) {
      V r = fma(n, load<V>(c + e), partner * load<V>(s + e));
      if (e + W > R)
        for (int64_t i = R > e ? R - e : 0; i < W; ++i) r[i] = n[i];
      return r;
    };
    if (!args.half) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t e = place(v, E);
        const V n = at(v, e);
        give(v, e, turned(e, n, swap_pairs(n)));
      }
      return;
    }
    if (R == E && h % W == 0) {
      for (int64_t v = 0, u = vectors / 2; u < vectors; ++v, ++u) {
        const V a = at(v, v * W), b = at(u, u * W);
        give(v, v * W, fma(a, load<V>(c + v * W), b * load<V>(s + v * W)));
        give(u, u * W, fma(b, load<V>(c + u * W), a * load<V>(s + u * W)));
      }
      return;
    }
    for (int64_t v = 0; v < vectors; ++v) store(pairs + place(v, E), at(v, place(v, E)));
    // What follows the rotated numbers makes room for their beginning: it is not needed.
    T beginning[W];
    for (int64_t i = 0; i < h; i += W) {
      std::memcpy(beginning, pairs + i, sizeof beginning);
      std::memcpy(pairs + R + i, beginning, sizeof beginning);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t e = place(v, E);
      give(v, e, turned(e, at(v, e), load<V>(pairs + e + h)));
    }
  }

  // Of the heads [h, h + group) of a token, which stay in work.x; for a layer's norm less their
  // mean.
  __attribute__((always_inline)) T read_normed(const Work& work, int64_t b, int64_t l,
                                               int64_t h) const {
    const bool layer = args.norm == Norm::layer;
    V squares[2]{}, total{};
    for (int64_t i = 0; i < group(); ++i) {
      const char* from = args.x.head(b, l, h + i);
      T* x = work.x + i * stride;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t e = place(v, E);
        const V value = take(from, e, E), mine = own(value, v);
        store(x + e, value);
        if (layer)
          total += mine;
        else
          squares[v & 1] = fma(mine, mine, squares[v & 1]);
      }
    }
    const T count = (T)(E * group());
    if (layer) {
      const T mean = sum_lanes(total) / count;
      for (int64_t i = 0; i < group(); ++i) {
        T* x = work.x + i * stride;
        // The last vector, which overlaps, must not be centred twice.
        const V last = load<V>(x + place(vectors - 1, E)) - mean;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t e = place(v, E);
          V value = v + 1 < vectors ? load<V>(x + e) - mean : last;
          if (E < W)
            for (int64_t k = E; k < W; ++k) value[k] = 0;
          const V mine = own(value, v);
          store(x + e, value);
          squares[v & 1] = fma(mine, mine, squares[v & 1]);
        }
      }
    }
    if (args.norm == Norm::none) return 1;
    const T mean = sum_lanes(squares[0] + squares[1]) / count + (T)args.eps;
    return 1 / (sizeof(T) == 4 ? (T)__builtin_sqrtf((float)mean) : (T)__builtin_sqrt((double)mean));
  }

  MMFAST_INLINE V row_at(const T* row, int64_t e, int64_t width) {
    if (width >= W) return load<V>(row + e);
    V v{};
    std::memcpy(&v, row, (size_t)width * sizeof(T));
    return v;
  }

  void forward_group(const Work& work, const T* table, int64_t b, int64_t l, int64_t h) const {
    const V inverse = V{} + read_normed(work, b, l, h);
    for (int64_t i = 0; i < group(); ++i) {
      const T* x = work.x + i * stride;
      const T* weight = args.weight ? (const T*)args.weight + i * E : nullptr;
      const T* bias = args.bias ? (const T*)args.bias + i * E : nullptr;
      char* to = args.out.head(b, l, h + i);
      const auto normed = [&](int64_t, int64_t e) __attribute__((always_inline)) {
        V n = load<V>(x + e) * inverse;
        if (weight) n *= row_at(weight, e, E);
        if (bias) n += row_at(bias, e, E);
        return n;
      };
      const auto write = [&](int64_t, int64_t e, V v) __attribute__((always_inline)) {
        put(to, e, E, v);
      };
      rotate(table, work.pairs, normed, write);
    }
  }

  void backward_group(const Work& work, const T* table, int64_t b, int64_t l, int64_t h) const {
    const bool plain = args.norm == Norm::none, layer = args.norm == Norm::layer;
    const T inverse = plain ? 1 : read_normed(work, b, l, h);
    V products{}, total{};
    for (int64_t i = 0; i < group(); ++i) {
      const T* x = work.x + i * stride;
      T *grad = work.grad + i * stride, *to_weight = work.to_weight + i * stride;
      T* to_bias = work.to_bias + i * stride;
      const T* weight = args.weight ? (const T*)args.weight + i * E : nullptr;
      const char* from = args.grad.head(b, l, h + i);
      char* to = args.out.head(b, l, h + i);
      const auto read = [&](int64_t, int64_t e) __attribute__((always_inline)) {
        return take(from, e, E);
      };
      const auto use = [&](int64_t v, int64_t e, V g) __attribute__((always_inline)) {
        if (plain) {
          put(to, e, E, g);
          return;
        }
        const V xhat = load<V>(x + e) * inverse, mine = own(g, v);
        if (args.grad_weight) store(to_weight + e, fma(mine, xhat, load<V>(to_weight + e)));
        if (args.grad_bias) store(to_bias + e, load<V>(to_bias + e) + mine);
        const V w = weight ? row_at(weight, e, E) : V{} + (T)1;
        store(grad + e, g * w);
        products = fma(mine * w, xhat, products);
        if (layer) total = fma(mine, w, total);
      };
      rotate(table, work.pairs, read, use);
    }
    if (plain) return;
    const T count = (T)(E * group());
    const V along = V{} + sum_lanes(products) / count * inverse;
    const V mean = V{} + (layer ? sum_lanes(total) / count : 0);
    for (int64_t i = 0; i < group(); ++i) {
      const T *x = work.x + i * stride, *grad = work.grad + i * stride;
      char* to = args.out.head(b, l, h + i);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t e = place(v, E);
        put(to, e, E, inverse * (load<V>(grad + e) - mean - load<V>(x + e) * along));
      }
    }
  }

  void run_block(const Work& work, int64_t index) const {
    const int64_t b = index / blocks_per_sample, first = index % blocks_per_sample * block;
    const int64_t last = first + block < args.length ? first + block : args.length;
    if (R)
      for (int64_t l = first; l < last; ++l) expand(work.tables + (l - first) * 2 * stride, b, l);
    const auto one = [&](int64_t l, int64_t h) {
      const T* table = work.tables + (l - first) * 2 * stride;
      backward ? backward_group(work, table, b, l, h) : forward_group(work, table, b, l, h);
    };
    if (args.across_heads) {
      for (int64_t l = first; l < last; ++l) one(l, 0);
    } else if (args.x.strides[1] < args.x.strides[2]) {
      for (int64_t h = 0; h < args.heads; ++h)
        for (int64_t l = first; l < last; ++l) one(l, h);
    } else {
      for (int64_t l = first; l < last; ++l)
        for (int64_t h = 0; h < args.heads; ++h) one(l, h);
    }
    if (!work.sums) return;
    const int64_t width = args.rows_width();
    for (int64_t i = 0; i < group(); ++i)
      for (int64_t e = 0; e < E; ++e) {
        work.sums[i * E + e] += work.to_weight[i * stride + e];
        work.sums[width + i * E + e] += work.to_bias[i * stride + e];
      }
    const size_t bytes = (size_t)(group() * stride) * sizeof(T);
    std::memset(work.to_weight, 0, bytes);
    std::memset(work.to_bias, 0, bytes);
  }

  void run(int64_t begin, int64_t end) {
    Work work{};
    if (!prepare(work)) {
      failed = true;
      return;
    }
    for (int64_t part = begin; part < end; ++part) {
      if (sums) work.sums = sums + part * 2 * args.rows_width();
      const int64_t last = (part + 1) * part_blocks;
      for (int64_t i = part * part_blocks; i < last && i < blocks; ++i) run_block(work, i);
    }
    std::free(work.memory);
  }

  static void write_sum(char* to, Dtype dtype, const double* sums, int64_t parts, int64_t width) {
    if (!to) return;
    for (int64_t e = 0; e < width; e += 8) {
      const int64_t count = width - e < 8 ? width - e : 8;
      double total[8]{};
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < count; ++i) total[i] += sums[part * 2 * width + e + i];
      write_row(to + e * size_of(dtype), dtype, total, count);
    }
  }

  bool run(const Parallel& parallel) {
    const int64_t width = args.rows_width();
    if (sums_rows()) {
      part_blocks = (blocks + most_parts - 1) / most_parts;
      if (part_blocks < least_part / block) part_blocks = least_part / block;
      parts = (blocks + part_blocks - 1) / part_blocks;
      sums = allocate<double>(parts * 2 * width);
      if (!sums) return false;
      std::memset(sums, 0, (size_t)(parts * 2 * width) * sizeof(double));
    } else {
      parts = blocks;
    }
    if (parts == 1)
      run(0, 1);
    else if (parts)
      parallel.run(
          parts,
          [](void* context, int64_t begin, int64_t end) {
            ((QkNormRope*)context)->run(begin, end);
          },
          this);
    if (failed) return false;
    if (!sums_rows()) return true;
    write_sum(args.grad_weight, args.weight_dtype, sums, parts, width);
    write_sum(args.grad_bias, args.bias_dtype, sums + width, parts, width);
    return true;
  }
};

static bool run_qk_norm_rope(const QkNormRopeArgs& args, const Parallel& parallel, bool backward) {
  switch (args.dtype) {
    case Dtype::float32: return QkNormRope<float, Dtype::float32>(args, backward).run(parallel);
    case Dtype::float16: return QkNormRope<float, Dtype::float16>(args, backward).run(parallel);
    case Dtype::bfloat16: return QkNormRope<float, Dtype::bfloat16>(args, backward).run(parallel);
    case Dtype::float64: return QkNormRope<double, Dtype::float64>(args, backward).run(parallel);
  }
  return false;
}

static bool qk_norm_rope(const QkNormRopeArgs& args, const Parallel& parallel) {
  return run_qk_norm_rope(args, parallel, false);
}

static bool qk_norm_rope_bwd(const QkNormRopeArgs& args, const Parallel& parallel) {
  return run_qk_norm_rope(args, parallel, true);
}

}  // namespace mmfast::MMFAST_ISA
