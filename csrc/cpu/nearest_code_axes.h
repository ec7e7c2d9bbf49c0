// The few directions in which the codes of a codebook spread most.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct Axes {
  static constexpr int count = 8;
  int64_t width = 0;
  double norm = 0;              // a vector's projection is at most this much longer than itself
  double* exact = nullptr;      // [D][count], each number a float32
  float* directions = nullptr;  // the same

  Axes() = default;
  Axes(const Axes&) = delete;
  ~Axes() {
    std::free(exact);
    std::free(directions);
  }

  // Orthogonal iteration on a sample of n vectors: read(i) is one, [D] doubles, until the next.
  // What has not converged only serves less well.
  template <class Read>
  bool find(int64_t d, int64_t n, const Read& read) {
    constexpr int64_t most = 512;
    const int64_t samples = n < most ? n : most;
    width = d;
    const size_t numbers = (size_t)(width * count);
    exact = (double*)std::malloc(numbers * sizeof(double));
    directions = (float*)std::malloc(numbers * sizeof(float));
    double* next = (double*)std::malloc(numbers * sizeof(double));
    const bool ok = exact && directions && next;
    for (int a = 0; ok && a < count; ++a) {
      const double* v = read(n / count * a);
      for (int64_t i = 0; i < width; ++i) exact[i * count + a] = v[i];
    }
    if (ok) orthonormalise(exact);
    for (int round = 0; ok && round < 4; ++round) {
      std::memset(next, 0, numbers * sizeof(double));
      for (int64_t s = 0; s < samples; ++s) {
        const double* v = read(n / samples * s);
        const d8 along = project(v);
        for (int64_t i = 0; i < width; ++i)
          store(next + i * count, load<d8>(next + i * count) + v[i] * along);
      }
      orthonormalise(next);
      std::memcpy(exact, next, numbers * sizeof(double));
    }
    std::free(next);
    if (!ok) return false;
    for (size_t i = 0; i < numbers; ++i) exact[i] = directions[i] = (float)exact[i];
    bound_norm();
    return true;
  }

  // Gram-Schmidt, twice. What depends on the directions before becomes zero.
  void orthonormalise(double* all) const {
    for (int a = 0; a < count; ++a) {
      const double before = product(all, a, a);
      for (int twice = 0; twice < 2; ++twice)
        for (int b = 0; b < a; ++b) {
          const double along = product(all, a, b);
          for (int64_t i = 0; i < width; ++i) all[i * count + a] -= along * all[i * count + b];
        }
      const double square = product(all, a, a);
      const double factor = square > before * 1e-12 ? 1 / std::sqrt(square) : 0;
      for (int64_t i = 0; i < width; ++i) all[i * count + a] *= factor;
    }
  }

  double product(const double* all, int a, int b) const {
    double total = 0;
    for (int64_t i = 0; i < width; ++i) total += all[i * count + a] * all[i * count + b];
    return total;
  }

  // The square of a matrix's norm is at most the largest row sum of its Gram matrix.
  void bound_norm() {
    double most = 0;
    for (int a = 0; a < count; ++a) {
      double row = 0;
      for (int b = 0; b < count; ++b) row += std::fabs(product(exact, a, b));
      most = row > most ? row : most;
    }
    norm = std::sqrt(most) * (1 + 1e-9);
  }

  d8 project(const double* v) const {
    d8 total[2]{};
    int64_t i = 0;
    for (; i + 2 <= width; i += 2) {
      total[0] += v[i] * load<d8>(exact + i * count);
      total[1] += v[i + 1] * load<d8>(exact + (i + 1) * count);
    }
    if (i < width) total[0] += v[i] * load<d8>(exact + i * count);
    return total[0] + total[1];
  }

  // In float32: four sums of D / 4 terms.
  f8 project(const float* v) const {
    f8 total[4]{};
    int64_t i = 0;
    for (; i + 4 <= width; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total[j] += v[i + j] * load<f8>(directions + (i + j) * count);
    for (; i < width; ++i) total[0] += v[i] * load<f8>(directions + i * count);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
};

}  // namespace mmfast::MMFAST_ISA
