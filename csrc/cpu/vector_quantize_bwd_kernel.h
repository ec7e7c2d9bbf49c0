// The gradients of vector_quantize in double: one pass over the rows for that of x, and segment
// sums for that of the codebook.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/code_statistics_segments.h"
#include "cpu/rotation.h"
#include "cpu/simd.h"
#include "cpu/vector_quantize.h"
#include "cpu/workspace.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

struct VectorQuantizeBwd {
  const VectorQuantizeBwdArgs& args;
  const int64_t width, codes;
  double factor = 0;         // of a difference x - c, in the gradient of a mean of squares
  double to_x = 0;           // the same, times the gradient of the commitment
  double* counts = nullptr;  // [K]
  double* sums = nullptr;   // [K][D] of the gradients of each code's vectors, where needed
  std::atomic<bool> failed{false};

  explicit VectorQuantizeBwd(const VectorQuantizeBwdArgs& a)
      : args(a), width(a.x.width), codes(a.codes.count) {}
  VectorQuantizeBwd(const VectorQuantizeBwd&) = delete;
  ~VectorQuantizeBwd() {
    std::free(counts);
    std::free(sums);
  }

  static double value(const Number& number) { return load_one<double>(number.data, number.dtype); }

  bool run(const Parallel& parallel) {
    counts = allocate<double>(codes);
    if (!counts) return false;
    double inside = 0;
    for (int64_t k = 0; k < codes; ++k) {
      counts[k] = load_one<double>(args.counts.data + k * args.counts.step, args.counts.dtype);
      inside += counts[k];
    }
    factor = 2 / (inside * (double)width > 1 ? inside * (double)width : 1);
    if (args.commitment.data) to_x = factor * value(args.commitment);
    if (args.x_gradient)
      for_blocks(
          blocks_of(args.x.count), [this](int64_t block) { x_gradients(block); }, parallel);
    return !failed && (!args.codebook_gradient || codebook_gradient(parallel));
  }

  void x_gradients(int64_t block) {
    double* buffers = allocate<double>(4 * padded(width));
    if (!buffers)
      failed = true;
    else
      std::memset(buffers + 3 * padded(width), 0, (size_t)width * sizeof(double));
    const auto [begin, end] = block_of(block, args.x.count);
    if (together())
      rotate_rows(begin, end, buffers);
    else
      for (int64_t i = begin; i < end && !failed; ++i) x_gradient(i, buffers);
    std::free(buffers);
  }

  // Whether rows are rotated eight at a time: those that float32 holds.
  bool together() const {
    const auto narrow = [](const Rows& rows) { return rows.dtype != Dtype::float64; };
    return args.gradient == Gradient::rotation && args.quantized.data && narrow(args.x) &&
           narrow(args.codes) && narrow(args.quantized);
  }

  void rotate_rows(int64_t begin, int64_t end, double* buffers) {
    constexpr int most = RotatedRows::most;
    float* copies = failed ? nullptr : allocate<float>(4 * most * padded(width));
    if (!copies) {
      failed = true;
      return;
    }
    const Dtype dtype = args.x.dtype;
    const bool in_place = dtype == Dtype::float32;
    RotatedRows rows;
    int64_t row[most];
    int n = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = args.indices[i];
      if (k < 0 || k >= codes) {
        x_gradient(i, buffers);
      } else {
        float* copy = copies + 4 * n * padded(width);
        rows.g[n] = read_row<float>(args.quantized, i, copy);
        rows.x[n] = read_row<float>(args.x, i, copy + padded(width));
        rows.c[n] = read_row<float>(args.codes, k, copy + 2 * padded(width));
        rows.out[n] = in_place ? (float*)(args.x_gradient + i * width * size_of(dtype))
                               : copy + 3 * padded(width);
        row[n++] = i;
      }
      if (n < most && (i + 1 < end || n == 0)) continue;
      const uint32_t left = rows.write(n, width, to_x);
      for (int r = 0; r < n; ++r)
        if (left >> r & 1)
          x_gradient(row[r], buffers);
        else if (!in_place)
          write_row(args.x_gradient + row[r] * width * size_of(dtype), dtype, rows.out[r], width);
      n = 0;
    }
    std::free(copies);
  }

  // buffers: [4][padded(D)], the last of them zeros.
  void x_gradient(int64_t i, double* buffers) const {
    const Dtype dtype = args.x.dtype;
    char* out = args.x_gradient + i * width * size_of(dtype);
    const int64_t k = args.indices[i];
    const bool chosen = k >= 0 && k < codes;
    const double* zeros = buffers + 3 * padded(width);
    if (!chosen || (args.gradient == Gradient::straight_through && !args.commitment.data)) {
      if (args.quantized.data)
        convert_row(out, dtype, args.quantized, i, buffers);
      else
        write_row(out, dtype, zeros, width);
      return;
    }
    const double* g = zeros;
    if (args.gradient != Gradient::none && args.quantized.data)
      g = read_row<double>(args.quantized, i, buffers);
    if (args.gradient == Gradient::rotation || args.commitment.data) {
      const double* x = read_row<double>(args.x, i, buffers + padded(width));
      const double* c = read_row<double>(args.codes, k, buffers + 2 * padded(width));
      if (args.gradient == Gradient::rotation) {
        rotate(buffers, g, x, c);
        g = buffers;
      }
      if (args.commitment.data) {
        add_difference(buffers, g, to_x, x, c);
        g = buffers;
      }
    }
    write_row(out, dtype, g, width);
  }

  // out = g + scale (x - c)
  void add_difference(double* out, const double* g, double scale, const double* x,
                      const double* c) const {
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
      store(out + d, load<d8>(g + d) + scale * (load<d8>(x + d) - load<d8>(c + d)));
    for (; d < width; ++d) out[d] = g[d] + scale * (x[d] - c[d]);
  }

  // out = |c| / |x| (g - 2 (w g) w + 2 (q g) e): e and q the directions of x and c, w of e + q.
  void rotate(double* out, const double* g, const double* x, const double* c) const {
    d8 all_xx{}, all_cc{}, all_cg{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const d8 a = load<d8>(x + d), b = load<d8>(c + d);
      all_xx += a * a;
      all_cc += b * b;
      all_cg += b * load<d8>(g + d);
    }
    double xx = sum(all_xx), cc = sum(all_cc), cg = sum(all_cg);
    for (; d < width; ++d) {
      xx += x[d] * x[d];
      cc += c[d] * c[d];
      cg += c[d] * g[d];
    }
    const double norm_c = std::sqrt(cc);
    const double per_x = 1 / divisor(std::sqrt(xx)), per_c = 1 / divisor(norm_c);
    d8 squares{}, products{};
    double square = 0, product = 0;
    for (d = 0; d + 8 <= width; d += 8) {
      const d8 s = load<d8>(x + d) * per_x + load<d8>(c + d) * per_c;
      squares += s * s;
      products += s * load<d8>(g + d);
    }
    for (; d < width; ++d) {
      const double s = x[d] * per_x + c[d] * per_c;
      square += s * s;
      product += s * g[d];
    }
    const double length = divisor(std::sqrt(sum(squares) + square));
    const double along_w = 2 * ((sum(products) + product) / length / length);
    const double along_q = 2 * (cg * per_c), scale = norm_c * per_x;
    for (d = 0; d + 8 <= width; d += 8) {
      const d8 e = load<d8>(x + d) * per_x, s = e + load<d8>(c + d) * per_c;
      store(out + d, scale * (load<d8>(g + d) - along_w * s + along_q * e));
    }
    for (; d < width; ++d) {
      const double e = x[d] * per_x, s = e + c[d] * per_c;
      out[d] = scale * (g[d] - along_w * s + along_q * e);
    }
  }

  Segments segments(const Rows& rows) const {
    Segments all{};
    all.x = rows;
    all.indices = (const char*)args.indices;
    all.index_bytes = all.index_stride = sizeof(int64_t);
    all.num_codes = codes;
    return all;
  }

  bool codebook_gradient(const Parallel& parallel) {
    const bool passed = args.gradient == Gradient::none && args.quantized.data;
    if (!passed && !args.codebook_loss.data) {
      std::memset(args.codebook_gradient, 0,
                  (size_t)(codes * width * size_of(args.codes.dtype)));
      return true;
    }
    if (passed && args.codebook_loss.data) {
      sums = allocate<double>(codes * width);
      if (!sums) return false;
    }
    const auto take_passed = [this](int64_t k, int64_t column, const double* total, int64_t columns,
                                    double) {
      if (sums)
        std::memcpy(sums + k * width + column, total, (size_t)columns * sizeof(double));
      else
        write_row(place(k, column), args.codes.dtype, total, columns);
    };
    if (passed && !segment_sums(segments(args.quantized), take_passed, parallel)) return false;
    if (!args.codebook_loss.data) return true;
    const double scale = factor * value(args.codebook_loss);
    const auto take_loss = [this, scale](int64_t k, int64_t column, const double* total,
                                         int64_t columns, double) {
      constexpr int64_t together = 64;
      alignas(64) double result[together], buffer[together];
      for (int64_t first = 0; first < columns; first += together) {
        const int64_t n = columns - first < together ? columns - first : together;
        const double* c = read_row<double>(args.codes.columns(column + first, n), k, buffer);
        for (int64_t d = 0; d < n; ++d) result[d] = scale * (counts[k] * c[d] - total[first + d]);
        if (sums)
          for (int64_t d = 0; d < n; ++d) result[d] += sums[k * width + column + first + d];
        write_row(place(k, column + first), args.codes.dtype, result, n);
      }
    };
    return segment_sums(segments(args.x), take_loss, parallel);
  }

  char* place(int64_t k, int64_t column) const {
    return args.codebook_gradient + (k * width + column) * size_of(args.codes.dtype);
  }
};

static bool vector_quantize_bwd(const VectorQuantizeBwdArgs& args, const Parallel& parallel) {
  return VectorQuantizeBwd(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
