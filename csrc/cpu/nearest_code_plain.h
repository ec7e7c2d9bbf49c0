// Few codes of few dimensions: float32 distances of one row per lane. The error of a sum of D
// float32 terms is known; a row whose two nearest codes it could exchange is scanned in float64.
#pragma once
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code_exact.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct Plain {
  static constexpr int together = 4;  // codes at a time, so that sums don't wait for themselves
  const NearestCodeArgs& args;
  const Exact<float>& exact;
  const int64_t width, count;  // D, K
  float* codes = nullptr;      // [K][D]; normalised for cosine
  double max_norm = 0;         // of them
  std::atomic<bool> failed{false};

  Plain(const NearestCodeArgs& a, const Exact<float>& e)
      : args(a), exact(e), width(a.x.width), count(a.codes.count) {}
  Plain(const Plain&) = delete;
  ~Plain() { std::free(codes); }

  // Whether this costs less than rounding the rows and sorting out candidates: cycles a row, as
  // measured on Zen 4.
  static bool pays(int64_t codes, int64_t width) {
    const double k = (double)codes, d = (double)width;
    return k * (0.1 * d + 0.4) + 1.5 * d + 40 < 280 + k * d / 32;
  }

  // Copies the codes; false if one is not finite, for which the float32 comparison has no rule.
  bool prepare() {
    bool finite = true;  // the comparisons fail for NaN
    for (int64_t k = 0; k < count; ++k) {
      float* out = codes + k * width;
      const float* c = read_row<float>(args.codes, k, out);
      const double norm = args.metric == Metric::cosine ? exact.norms[k] : 1;
      double square = 0;
      for (int64_t d = 0; d < width; ++d) {
        out[d] = norm > 0 ? (float)((double)c[d] / norm) : 0;
        square += (double)out[d] * out[d];
      }
      max_norm = square > max_norm ? square : max_norm;
      finite &= square < 1e300 && norm < 1e300;
    }
    max_norm = std::sqrt(max_norm);
    return finite;
  }

  bool allocate() {
    // Padded to whole groups of codes.
    codes = (float*)std::calloc((size_t)((count + together) * width), sizeof(float));
    return codes;
  }

  bool run(const Parallel& parallel) {
    const int64_t tiles = (args.x.count + lanes - 1) / lanes;
    const Body body = [](void* context, int64_t begin, int64_t end) {
      ((Plain*)context)->work(begin, end);
    };
    if (args.x.count * count * width < 1 << 17)
      work(0, tiles);
    else
      parallel.run(tiles, body, this);
    return !failed;
  }

  void work(int64_t begin, int64_t end) {
    float* x = (float*)std::malloc((size_t)(2 * lanes * width) * sizeof(float));
    if (!x) {
      failed = true;
      return;
    }
    float* rows = x + lanes * width;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * lanes;
      const int n = (int)(args.x.count - first < lanes ? args.x.count - first : lanes);
      const float* row[lanes];
      for (int r = 0; r < lanes; ++r) {
        row[r] = read_row<float>(args.x, first + (r < n ? r : 0), rows + r * width);
        for (int64_t d = 0; d < width; ++d) x[d * lanes + r] = row[r][d];
      }
      if (args.metric == Metric::euclidean)
        tile<true>(x, row, first, n);
      else
        tile<false>(x, row, first, n);
    }
    std::free(x);
  }

  // x: [D][lanes]
  template <bool euclidean>
  void tile(const float* x, const float* const* rows, int64_t first, int n) const {
    const vf highest = vf{} + std::numeric_limits<float>::infinity();
    vf best = highest, second = highest;
    vi index = vset(0);
    for (int64_t k = 0; k < count; k += together) {
      const float* c = codes + k * width;
      vf values[together]{};
      for (int64_t d = 0; d < width; ++d) {
        const vf a = load<vf>(x + d * lanes);
#pragma GCC unroll 4
        for (int j = 0; j < together; ++j) {
          const vf b = every<vf>(c[j * width + d]);
          values[j] = euclidean ? fma(a - b, a - b, values[j]) : fma(vf{} - a, b, values[j]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < together; ++j) {
        if (k + j >= count) break;
        // Written so that a NaN neither wins nor passes for a distance.
        const vf value = values[j];
        const auto nearer = value < best;
        const vf loser = nearer ? best : value;
        second = loser < second ? loser : second;
        best = nearer ? value : best;
        index = (vi)(nearer ? (decltype(nearer))vset((int32_t)(k + j)) : (decltype(nearer))index);
      }
    }
    alignas(64) float bests[lanes], seconds[lanes];
    alignas(64) int32_t indices[lanes];
    store(bests, best);
    store(seconds, second);
    vstore(indices, index);
    for (int r = 0; r < n; ++r) finish<euclidean>(first + r, rows[r], bests[r], seconds[r], indices[r]);
  }

  template <bool euclidean>
  void finish(int64_t row, const float* x, float best, float second, int32_t k) const {
    Nearest<float> nearest = exact.start(x);
    const double relative = (double)(width + 8) * 0x1p-23;
    // Underflow costs at most a few of the smallest numbers.
    const double error = relative * (euclidean ? (double)second : nearest.norm * max_norm) + 1e-36;
    const double gap = (double)second - (double)best;
    const bool sure = euclidean ? best >= 0 && best < 1e37f && gap > error
                                : std::fabs(best) < 1e37f && gap > 2 * error;
    float* buffer = (float*)__builtin_alloca((size_t)width * sizeof(float));
    if (count > 1 && !sure) {
      exact.scan(row, x, buffer);
      return;
    }
    exact.consider(nearest, k, buffer);
    exact.write(row, nearest);
  }
};

}  // namespace mmfast::MMFAST_ISA
