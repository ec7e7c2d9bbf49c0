// Comparison of codes in float64: the definition, and a vectorised evaluation that decides all but
// the closest calls.
#pragma once
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr double unit_roundoff = 0x1p-53;

// The sums of two.
MMFAST_INLINE void vsums(vf a, vf b, float* sums) {
#if defined(__AVX512F__)
  const auto half = [](vf v) __attribute__((always_inline)) {
    const __m512 w = (__m512)v;
    return _mm256_add_ps(_mm512_castps512_ps256(w), _mm512_extractf32x8_ps(w, 1));
  };
  const __m256 p = half(a), q = half(b);
  const __m256 pairs = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storel_pi((__m64*)sums, _mm_add_ps(four, _mm_movehl_ps(four, four)));
#else
  sums[0] = vsum(a);
  sums[1] = vsum(b);
#endif
}

// A row under comparison, and the nearest code so far. `value` is the metric, smaller is nearer.
template <class T>
struct Nearest {
  const T* x = nullptr;
  double norm = 0;  // of x, for cosine and dot
  int64_t index = -1;
  double value = std::numeric_limits<double>::infinity();
  double defined = 0;  // the definition's value of `index`, once needed
  bool have_defined = false;
};

template <class T>
struct Exact {
  const NearestCodeArgs& args;
  int64_t width;
  double* norms = nullptr;  // [K] of the codes, for cosine and dot
  double max_norm = 0;      // the largest finite one

  explicit Exact(const NearestCodeArgs& a) : args(a), width(a.x.width) {}
  Exact(const Exact&) = delete;
  ~Exact() { std::free(norms); }

  bool prepare(const Parallel&) {
    if (args.metric == Metric::euclidean) return true;
    norms = (double*)std::malloc((size_t)args.codes.count * sizeof(double));
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    const bool ok = norms && buffer;
    for (int64_t k = 0; ok && k < args.codes.count; ++k) {
      norms[k] = defined_norm(read_row<T>(args.codes, k, buffer));
      if (norms[k] > max_norm && norms[k] < std::numeric_limits<double>::infinity())
        max_norm = norms[k];
    }
    std::free(buffer);
    return ok;
  }

  // The norm as the reference sums it.
  double defined_norm(const T* x) const {
    double total = 0;
    for (int64_t d = 0; d < width; ++d) total += (double)x[d] * (double)x[d];
    return std::sqrt(total);
  }

  // The metric as the reference sums it: in order, each operation rounded.
  double defined(const T* x, double norm, const T* c, int64_t k) const {
    double total = 0;
    if (args.metric == Metric::euclidean) {
      for (int64_t d = 0; d < width; ++d) {
        const double t = (double)x[d] - (double)c[d];
        total += t * t;
      }
      return total;
    }
    for (int64_t d = 0; d < width; ++d) total -= (double)x[d] * (double)c[d];
    return finish(total, norm, k);
  }

  double finish(double total, double norm, int64_t k) const {
    if (args.metric == Metric::dot) return total;
    const double product = norm * norms[k];
    return product == 0 ? std::fabs(total) * 0 : total / product;
  }

  // The same to within tolerance(), several dimensions at a time.
  double quick(const T* x, double norm, const T* c, int64_t k) const {
    d8 total0{}, total1{};
    int64_t d = 0;
    if (args.metric == Metric::euclidean) {
      for (; d + 16 <= width; d += 16) {
        const d8 a = wide8(x + d) - wide8(c + d), b = wide8(x + d + 8) - wide8(c + d + 8);
        total0 += a * a;
        total1 += b * b;
      }
      for (; d + 8 <= width; d += 8) {
        const d8 a = wide8(x + d) - wide8(c + d);
        total0 += a * a;
      }
      double total = sum(total0 + total1);
      for (; d < width; ++d) {
        const double t = (double)x[d] - (double)c[d];
        total += t * t;
      }
      return total;
    }
    for (; d + 8 <= width; d += 8) total0 -= wide8(x + d) * wide8(c + d);
    double total = sum(total0);
    for (; d < width; ++d) total -= (double)x[d] * (double)c[d];
    return finish(total, norm, k);
  }

  // The squared distance to within a share rough_error() of it: a float32 sum. Negative if it
  // could have overflowed, or vanished.
  float rough(const float* x, const float* c) const {
    vf total0{}, total1{};
    int64_t d = 0;
    for (; d + 2 * lanes <= width; d += 2 * lanes) {
      const vf a = load<vf>(x + d) - load<vf>(c + d);
      const vf b = load<vf>(x + d + lanes) - load<vf>(c + d + lanes);
      total0 = fma(a, a, total0);
      total1 = fma(b, b, total1);
    }
    if (d + lanes <= width) {
      const vf a = load<vf>(x + d) - load<vf>(c + d);
      total0 = fma(a, a, total0);
      d += lanes;
    }
    float total = vsum(total0 + total1);
    for (; d < width; ++d) total += (x[d] - c[d]) * (x[d] - c[d]);
    return total > 1e-30f && total < 1e37f ? total : -1;
  }

  // The same of two codes, which share what is read of x, and without the check.
  void rough(const float* x, const float* c0, const float* c1, float* distances) const {
    vf total[2][2]{};
    int64_t d = 0;
    const auto take = [&](int i) __attribute__((always_inline)) {
      const vf v = load<vf>(x + d);
      const vf a = v - load<vf>(c0 + d), b = v - load<vf>(c1 + d);
      total[0][i] = fma(a, a, total[0][i]);
      total[1][i] = fma(b, b, total[1][i]);
      d += lanes;
    };
    while (d + 2 * lanes <= width) {
      take(0);
      take(1);
    }
    if (d + lanes <= width) take(0);
    vsums(total[0][0] + total[0][1], total[1][0] + total[1][1], distances);
    for (; d < width; ++d) {
      distances[0] += (x[d] - c0[d]) * (x[d] - c0[d]);
      distances[1] += (x[d] - c1[d]) * (x[d] - c1[d]);
    }
  }

  double rough_error() const { return (double)(width + 16) * 0x1p-23; }

  static d8 wide8(const float* p) { return widen(load<f8>(p)); }
  static d8 wide8(const double* p) { return load<d8>(p); }

  // How far two evaluations of one value near `value` can lie apart.
  double tolerance(double value, double norm) const {
    const double scale = args.metric == Metric::euclidean ? std::fabs(value)
                         : args.metric == Metric::dot     ? norm * max_norm
                                                          : 1.0;
    return 8 * (double)(width + 16) * unit_roundoff * scale + std::numeric_limits<double>::min();
  }

  Nearest<T> start(const T* x) const {
    return {x, args.metric == Metric::euclidean ? 0.0 : defined_norm(x)};
  }

  // Takes code k, if it is nearer by the definition, or as near and of lower index. NaN is nearest.
  void consider(Nearest<T>& best, int64_t k, T* buffer) const {
    const T* c = read_row<T>(args.codes, k, buffer);
    const double value = quick(best.x, best.norm, c, k);
    if (best.index < 0) {
      best.index = k;
      best.value = value;
      return;
    }
    if (k == best.index) return;
    const double margin = tolerance(value, best.norm) + tolerance(best.value, best.norm);
    if (value > best.value + margin) return;
    if (!(value < best.value - margin)) {
      if (!best.have_defined) {
        // Reading a stored code overwrites the buffer that may hold c.
        best.defined = defined(best.x, best.norm, read_row<T>(args.codes, best.index, buffer),
                               best.index);
        best.have_defined = true;
        c = read_row<T>(args.codes, k, buffer);
      }
      const double mine = defined(best.x, best.norm, c, k);
      const bool nan = std::isnan(mine), best_nan = std::isnan(best.defined);
      const bool nearer = nan != best_nan ? nan : !nan && mine != best.defined
                                                      ? mine < best.defined
                                                      : k < best.index;
      if (!nearer) return;
      best.defined = mine;
    } else {
      best.have_defined = false;
    }
    best.index = k;
    best.value = value;
  }

  void write(int64_t row, const Nearest<T>& best) const {
    args.indices[row] = best.index;
    const double value = args.metric == Metric::euclidean ? best.value : 0.0 - best.value;
    if (args.wide)
      ((double*)args.distances)[row] = value;
    else
      ((float*)args.distances)[row] = (float)value;
  }

  // All codes, one after the other.
  void scan(int64_t row) const {
    T* buffer = (T*)std::malloc(2 * (size_t)width * sizeof(T));
    scan(row, read_row<T>(args.x, row, buffer), buffer + width);
    std::free(buffer);
  }

  void scan(int64_t row, const T* x, T* buffer) const {
    Nearest<T> best = start(x);
    const bool nan = has_nan(x);
    for (int64_t k = 0; k < (nan ? 1 : args.codes.count); ++k) {
      if constexpr (sizeof(T) == 4)
        if (k > 0 && args.metric == Metric::euclidean &&
            rough(x, read_row<T>(args.codes, k, buffer)) * (1 - rough_error()) > best.value)
          continue;
      consider(best, k, buffer);
    }
    write(row, best);
  }

  bool has_nan(const T* x) const {
    bool nan = false;
    for (int64_t d = 0; d < width; ++d) nan |= x[d] != x[d];
    return nan;
  }
};

}  // namespace mmfast::MMFAST_ISA
