// Stages of nearest_code, and one pass over the residuals after each: the code's subtraction, the
// squares, the indices. The residuals live where the sums of the codes go at last. A pass moves
// 8 D bytes a row, a small part of the lookup's time, so that keeping the rows in cache through all
// stages, which would take the codebooks out of it, does not pay.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/nearest_code_kernel.h"
#include "cpu/residual_quantize.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct ResidualQuantize {
  static constexpr int64_t block_rows = 64;  // whose squares are added before any others
  const ResidualQuantizeArgs& args;
  const int64_t width, rows, blocks;
  T* const residual;            // [N][D]
  int64_t* nearest = nullptr;   // [N]
  T* distances = nullptr;       // [N]
  double* squares = nullptr;    // [blocks]
  int64_t* counts = nullptr;    // [K]
  int64_t stage = 0;
  std::atomic<bool> failed{false};

  explicit ResidualQuantize(const ResidualQuantizeArgs& a)
      : args(a),
        width(a.x.width),
        rows(a.x.count),
        blocks((a.x.count + block_rows - 1) / block_rows),
        residual((T*)a.quantized) {}
  ResidualQuantize(const ResidualQuantize&) = delete;
  ~ResidualQuantize() {
    std::free(nearest);
    std::free(distances);
    std::free(squares);
    std::free(counts);
  }

  bool run(const Parallel& parallel) {
    nearest = (int64_t*)std::malloc((size_t)(rows + 1) * sizeof(int64_t));
    distances = (T*)std::malloc((size_t)(rows + 1) * sizeof(T));
    squares = (double*)std::malloc((size_t)(blocks + 1) * sizeof(double));
    counts = (int64_t*)std::malloc((size_t)args.most_codes * sizeof(int64_t));
    if (!nearest || !distances || !squares || !counts) return false;
    for (; stage < args.stages; ++stage) {
      if (rows > 0) {
        const NearestCodeArgs lookup{stage ? residuals() : args.x, args.codes[stage], args.metric,
                                     nearest, distances, args.wide};
        if (!nearest_code(lookup, parallel)) return false;
        parallel.run(
            blocks,
            [](void* context, int64_t begin, int64_t end) {
              ((ResidualQuantize*)context)->pass(begin, end);
            },
            this);
        if (failed) return false;
      }
      finish();
    }
    return true;
  }

  Rows residuals() const {
    Rows r{};
    r.data = (const char*)residual;
    r.dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
    r.count = rows;
    r.width = width;
    r.step = sizeof(T);
    r.dims = 1;
    r.sizes[0] = rows;
    r.strides[0] = width * (int64_t)sizeof(T);
    return r;
  }

  bool inside(int64_t row) const { return !args.mask || args.mask[row]; }

  void pass(int64_t begin, int64_t end) {
    T* buffer = (T*)std::malloc(2 * (size_t)width * sizeof(T));
    if (!buffer) {
      failed = true;
      return;
    }
    for (int64_t b = begin; b < end; ++b) {
      double total = 0;
      for (int64_t i = b * block_rows; i < rows && i < (b + 1) * block_rows; ++i) {
        const T* from = residual + i * width;
        if (stage == 0) from = read_row<T>(args.x, i, buffer);
        const T* c = read_row<T>(args.codes[stage], nearest[i], buffer + width);
        const double square = subtract(from, c, residual + i * width);
        if (inside(i)) total += square;
        args.indices[i * args.stages + stage] = inside(i) ? nearest[i] : -1;
        if (stage == args.stages - 1) add_up(i, buffer);
      }
      squares[b] = total;
    }
    std::free(buffer);
  }

  // The residual that a stage leaves, and the sum of its squares.
  double subtract(const T* from, const T* c, T* out) const {
    using V = std::conditional_t<sizeof(T) == 8, d8, f8>;
    d8 total{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const V r = load<V>(from + d) - load<V>(c + d);
      store(out + d, r);
      const d8 w = wide(r);
      total += w * w;
    }
    double square = sum(total);
    for (; d < width; ++d) {
      const T r = from[d] - c[d];
      out[d] = r;
      square += (double)r * (double)r;
    }
    return square;
  }

  static d8 wide(f8 v) { return widen(v); }
  static d8 wide(d8 v) { return v; }

  // Puts the sum of a row's codes in the place of its residual.
  void add_up(int64_t row, T* buffer) const {
    T* out = residual + row * width;
    if (!inside(row)) {
      std::memcpy(out, read_row<T>(args.x, row, buffer), (size_t)width * sizeof(T));
      return;
    }
    for (int64_t q = 0; q < args.stages; ++q) {
      const T* c = read_row<T>(args.codes[q], args.indices[row * args.stages + q], buffer);
      if (q == 0)
        for (int64_t d = 0; d < width; ++d) out[d] = (T)0 + c[d];
      else
        for (int64_t d = 0; d < width; ++d) out[d] += c[d];
    }
  }

  // Loss and counts of the stage.
  void finish() {
    std::memset(counts, 0, (size_t)args.most_codes * sizeof(int64_t));
    int64_t number = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (!inside(i)) continue;
      ++counts[nearest[i]];
      ++number;
    }
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += squares[b];
    ((T*)args.losses)[stage] = number ? (T)(total / ((double)number * (double)width)) : 0;
    for (int64_t k = 0; k < args.most_codes; ++k)
      ((T*)args.counts)[stage * args.most_codes + k] = (T)counts[k];
  }
};

// The residuals are made again. Threads share out the columns, so that each code's gradient is
// added up in the order of the rows.
template <class T>
struct ResidualQuantizeBwd {
  static constexpr int64_t slice = 16;  // columns, a cache line of float32
  static constexpr int64_t least = 4;   // columns worth another look at the indices
  static constexpr int64_t ahead = 4;   // rows
  const ResidualQuantizeBwdArgs& args;
  const int64_t width;
  int64_t share = slice;     // columns taken together: fewer where threads would have none
  double factor = 0;  // of the mean of squares
  std::atomic<bool> failed{false};

  explicit ResidualQuantizeBwd(const ResidualQuantizeBwdArgs& a) : args(a), width(a.x.width) {}

  bool run(const Parallel& parallel) {
    int64_t number = 0;
    for (int64_t i = 0; i < args.x.count; ++i) number += args.indices[i * args.stages] >= 0;
    factor = 2 / ((double)(number ? number : 1) * (double)width);
    const int64_t even = (width + parallel.threads - 1) / parallel.threads;
    if (even < slice) share = even < least ? least : even;
    parallel.run(
        (width + share - 1) / share,
        [](void* context, int64_t begin, int64_t end) {
          ((ResidualQuantizeBwd*)context)->work(begin, end);
        },
        this);
    return !failed;
  }

  void work(int64_t begin, int64_t end) {
    const size_t size = (size_t)(args.codes.count * slice);
    double* totals = args.grad_codes ? (double*)std::aligned_alloc(64, size * sizeof(double)) : nullptr;
    if (args.grad_codes && !totals) {
      failed = true;
      return;
    }
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * share, left = width - first;
      if (totals) std::memset(totals, 0, size * sizeof(double));
      if (share == slice && left >= slice)
        columns_at<slice>(first, slice, totals);
      else
        columns_at<0>(first, left < share ? left : share, totals);
    }
    std::free(totals);
  }

  // Codes and their sums lie anywhere: ask for those of a later row while this one is added.
  void prefetch(const Rows& x, const Rows& codes, int64_t row, const double* totals) const {
    __builtin_prefetch(x.row(row));
    for (int64_t q = 0; q < args.stages; ++q) {
      const int64_t k = args.indices[row * args.stages + q];
      if (k < 0) return;
      __builtin_prefetch(codes.row(args.starts[q] + k));
      if (!totals) continue;
      const double* total = totals + (args.starts[q] + k) * slice;
      __builtin_prefetch(total);
      __builtin_prefetch(total + slice / 2);
    }
  }

  template <int64_t known>
  void columns_at(int64_t first, int64_t count, double* totals) const {
    if (known) count = known;
    const Rows x = args.x.columns(first, count), codes = args.codes.columns(first, count);
    Rows quantized{};
    if (args.quantized) quantized = args.quantized->columns(first, count);
    T row[slice], code[slice], grad[slice]{}, r[slice];
    double to_x[slice];
    for (int64_t i = 0; i < x.count; ++i) {
      const int64_t* index = args.indices + i * args.stages;
      if (i + ahead < x.count) prefetch(x, codes, i + ahead, totals);
      const bool inside = index[0] >= 0;
      const T* g = args.quantized ? read_row<T>(quantized, i, grad) : grad;
      const bool pass = args.straight_through || !inside;
      for (int64_t d = 0; d < count; ++d) to_x[d] = pass ? (double)g[d] : 0.0;
      const T* v = read_row<T>(x, i, row);
      for (int64_t d = 0; d < count; ++d) r[d] = v[d];
      for (int64_t q = 0; inside && q < args.stages; ++q) {
        const int64_t k = args.starts[q] + index[q];
        const T* c = read_row<T>(codes, k, code);
        for (int64_t d = 0; d < count; ++d) r[d] -= c[d];
        if (args.grad_x && args.commitment) {
          const double scale = args.commitment[q] * factor;
          for (int64_t d = 0; d < count; ++d) to_x[d] += scale * (double)r[d];
        }
        if (!totals) continue;
        double* total = totals + k * slice;
        if (args.codebook) {
          const double scale = args.codebook[q] * factor;
          for (int64_t d = 0; d < count; ++d) total[d] -= scale * (double)r[d];
        }
        if (!args.straight_through)
          for (int64_t d = 0; d < count; ++d) total[d] += (double)g[d];
      }
      if (args.grad_x) {
        T* out = (T*)args.grad_x + i * width + first;
        for (int64_t d = 0; d < count; ++d) out[d] = (T)to_x[d];
      }
    }
    for (int64_t k = 0; totals && k < codes.count; ++k) {
      T* out = (T*)args.grad_codes + k * width + first;
      for (int64_t d = 0; d < count; ++d) out[d] = (T)totals[k * slice + d];
    }
  }
};

static bool residual_quantize(const ResidualQuantizeArgs& args, const Parallel& parallel) {
  return args.wide ? ResidualQuantize<double>(args).run(parallel)
                   : ResidualQuantize<float>(args).run(parallel);
}

static bool residual_quantize_bwd(const ResidualQuantizeBwdArgs& args, const Parallel& parallel) {
  return args.wide ? ResidualQuantizeBwd<double>(args).run(parallel)
                   : ResidualQuantizeBwd<float>(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
