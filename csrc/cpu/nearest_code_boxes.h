// Boxes around the groups of a codebook, along its axes: a code is at least as far from a row as
// its group's box. Groups are long and thin, so that a ball around one would reach over many others.
#pragma once
#include <limits>

#include "cpu/nearest_code_codebook.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Boxes {
  static constexpr int axes = Axes::count;
  const Codebook<T>& codebook;
  const int64_t groups, stride;
  float* means = nullptr;    // [axes][stride] of the groups' codes
  float* middles = nullptr;  // [axes][stride]
  float* halves = nullptr;   // [axes][stride] half the lengths of the sides, rounded up

  explicit Boxes(const Codebook<T>& c)
      : codebook(c), groups(c.num_chunks), stride((groups + 15) / 16 * 16) {}
  Boxes(const Boxes&) = delete;
  ~Boxes() { std::free(means); }

  bool prepare() {
    const int64_t numbers = axes * stride;
    means = (float*)std::malloc((size_t)(3 * numbers) * sizeof(float));
    if (!means) return false;
    middles = means + numbers;
    halves = middles + numbers;
    // No row is near what fills up the last vector.
    for (int64_t i = 0; i < 2 * numbers; ++i) means[i] = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < numbers; ++i) halves[i] = 0;
    for (int64_t g = 0; g < groups; ++g) enclose(g);
    return true;
  }

  void enclose(int64_t g) {
    const Chunk& chunk = codebook.chunks[g];
    const int32_t* codes = codebook.order + chunk.first_tile * tile_codes;
    const int64_t most = chunk.tiles * tile_codes;
    f8 low{}, high{};
    d8 total{};
    int64_t n = 0;
    for (; n < most && codes[n] >= 0; ++n) {
      const f8 p = load<f8>(codebook.places + (int64_t)codes[n] * axes);
      low = n == 0 || p < low ? p : low;
      high = n == 0 || p > high ? p : high;
      total += widen(p);
    }
    for (int a = 0; a < axes; ++a) {
      const float middle = (low[a] + high[a]) / 2;
      const double below = (double)middle - low[a], above = (double)high[a] - middle;
      const double half = below > above ? below : above;
      means[a * stride + g] = (float)(total[a] / (double)n);
      middles[a * stride + g] = middle;
      // Also covers the rounding of the codes' places and that of a row's distance from the middle.
      halves[a * stride + g] = (float)(half * (1 + 0x1p-19) + chunk.far_norm * 0x1p-22);
    }
  }

  // The group whose codes' mean is nearest to the projection p.
  int32_t nearest(const float* p) const {
    vf least = vf{} + std::numeric_limits<float>::infinity();
    vi where = vset(0);
    for (int64_t g = 0; g < stride; g += lanes) {
      vf total{};
#pragma GCC unroll 8
      for (int a = 0; a < axes; ++a) {
        const vf t = load<vf>(means + a * stride + g) - p[a];
        total = fma(t, t, total);
      }
      const auto closer = total < least;
      least = closer ? total : least;
      where = (vi)(closer ? (decltype(closer))vset((int32_t)g) : (decltype(closer))where);
    }
    float distances[lanes];
    int32_t firsts[lanes];
    store(distances, least);
    vstore(firsts, where);
    int best = 0;
    for (int i = 1; i < lanes; ++i) best = distances[i] < distances[best] ? i : best;
    return firsts[best] + best;
  }

  // squares [stride]: of the distances of p to the boxes, at most a share 2^-20 too large.
  void measure(const float* p, float* squares) const {
    for (int64_t g = 0; g < stride; g += lanes) {
      vf total{};
#pragma GCC unroll 8
      for (int a = 0; a < axes; ++a) {
        const vf t = load<vf>(middles + a * stride + g) - p[a];
        const vf u = (t > 0 ? t : -t) - load<vf>(halves + a * stride + g);
        const vf outside = u > 0 ? u : vf{};
        total = fma(outside, outside, total);
      }
      store(squares + g, total);
    }
  }
};

}  // namespace mmfast::MMFAST_ISA
