// Slopes of tanh: AVX-512 finds a polynomial for each number near zero by permutations.
#pragma once
#include "cpu/finite_scalar_quantize.h"
#include "cpu/sixteen.h"

namespace mmfast::MMFAST_ISA {

// 4 / (e^u + e^-u)^2
template <class V>
MMFAST_INLINE V square_of_sech(V u) {
  constexpr double twice = -2.88539008177792681;  // -2 / log 2
  const V e = power_of_two(absolute(u) * (decltype(u[0] + u[0]))twice), r = reciprocal(e + 1);
  return 4 * e * (r * r);
}

template <class T>
struct Slopes {
  using V = typename Sixteen<T>::V;
  static constexpr bool has_near = false;

  explicit Slopes(const SlopeTable&) {}
  V operator()(V u) const { return square_of_sech(u); }
};

#if defined(__AVX512F__)
template <>
class Slopes<float> {
  using V = Sixteen<float>::V;
  static constexpr int degree = SlopeTable::degree;

 public:
  static constexpr bool has_near = true;

  explicit Slopes(const SlopeTable& table) {
    for (int j = 0; j <= degree; ++j)
      for (int i = 0; i < 2; ++i)
        coefficients_[j][i] = _mm512_loadu_ps(table.coefficients[j] + 16 * i);
  }

  // A number's slope depends on no other number.
  __attribute__((always_inline)) V operator()(V u) const {
    V distance{};
    const V slope = near(u, distance);
    const __mmask16 far = beyond(distance);
    return far ? (V)_mm512_mask_mov_ps((__m512)slope, far, (__m512)square_of_sech(u)) : slope;
  }

  // The same where no lane of farthest, which grows as it must, is beyond() the table.
  __attribute__((always_inline)) V near(V u, V& farthest) const {
    const __m512 magic = _mm512_set1_ps(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const __m512 x =
        _mm512_abs_ps(_mm512_mul_ps((__m512)u, _mm512_set1_ps(1 / SlopeTable::width)));
    // As integers, NaN is above all numbers.
    farthest = (V)_mm512_max_epi32((__m512i)farthest, (__m512i)x);
    const __m512 segment = _mm512_add_ps(x, magic);
    const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(segment, magic));
    __m512 p = at(degree, segment);
#pragma GCC unroll 8
    for (int j = degree - 1; j >= 0; --j) p = _mm512_fmadd_ps(p, f, at(j, segment));
    return (V)p;
  }

  static __mmask16 beyond(V farthest) {
    const __m512i most = (__m512i)_mm512_set1_ps(SlopeTable::segments - 0.5f);
    return _mm512_cmpgt_epi32_mask((__m512i)farthest, most);
  }

 private:
  __m512 coefficients_[degree + 1][2];

  __attribute__((always_inline)) __m512 at(int j, __m512 segment) const {
    return _mm512_permutex2var_ps(coefficients_[j][0], (__m512i)segment, coefficients_[j][1]);
  }
};
#endif

}  // namespace mmfast::MMFAST_ISA
