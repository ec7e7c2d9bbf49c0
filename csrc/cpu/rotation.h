// The rotation trick's gradient, eight rows at a time, so that they share the square roots and
// divisions.
//
// |c| / |x| (g - 2 (w g) w + 2 (q g) e), e and q the directions of x and c and w that of e + q, is a
// weighted sum of g, x and c, whose weights follow from five products.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr double least_norm = 1e-6;  // of the rotation's divisions

static double divisor(double norm) { return norm < least_norm ? least_norm : norm; }

struct RotatedRows {
  static constexpr int most = 8;
  const float *g[most], *x[most], *c[most];
  float* out[most];

  // With to_x (x - c) on top. Returns which of the n rows are left out, a bit each: those that point
  // away from their code, where the products cancel, and those with NaN.
  uint32_t write(int n, int64_t width, double to_x) const {
    alignas(64) double products[5][most];
    for (int r = 0; r < most; ++r) {
      const int from = r < n ? r : 0;
      const float *gr = g[from], *xr = x[from], *cr = c[from];
      d8 xx{}, cc{}, xc{}, xg{}, cg{};
      int64_t d = 0;
      for (; d + 8 <= width; d += 8) {
        const d8 p = load_wide(xr + d), q = load_wide(cr + d), s = load_wide(gr + d);
        xx += p * p;
        cc += q * q;
        xc += p * q;
        xg += p * s;
        cg += q * s;
      }
      double rest[5]{};
      for (; d < width; ++d) {
        const double p = xr[d], q = cr[d], s = gr[d];
        rest[0] += p * p;
        rest[1] += q * q;
        rest[2] += p * q;
        rest[3] += p * s;
        rest[4] += q * s;
      }
      const d8 sums[5]{xx, cc, xc, xg, cg};
      for (int i = 0; i < 5; ++i) products[i][r] = sum(sums[i]) + rest[i];
      if (r + 1 >= n) break;
    }
    for (int r = n; r < most; ++r)
      for (auto& product : products) product[r] = product[0];
    const d8 xx = load<d8>(products[0]), cc = load<d8>(products[1]), xc = load<d8>(products[2]);
    const d8 xg = load<d8>(products[3]), cg = load<d8>(products[4]);
    const d8 norm_x = sqrt(xx), norm_c = sqrt(cc), least = d8{} + least_norm;
    const d8 per_x = 1 / (norm_x < least ? least : norm_x);
    const d8 per_c = 1 / (norm_c < least ? least : norm_c);
    const d8 square = per_x * per_x * xx + per_c * per_c * cc + 2 * per_x * per_c * xc;
    const d8 along_w = 2 * (per_x * xg + per_c * cg) / square;
    const d8 scale = norm_c * per_x;
    alignas(64) double squares[most], weights[3][most];
    store(squares, square);
    store(weights[0], scale);
    store(weights[1], scale * per_x * (2 * per_c * cg - along_w) + to_x);
    store(weights[2], -scale * per_c * along_w - to_x);
    uint32_t left = 0;
    for (int r = 0; r < n; ++r) {
      if (!(squares[r] > 1e-3 && squares[r] < 5)) {
        left |= 1u << r;
        continue;
      }
      const double a = weights[0][r], b = weights[1][r], e = weights[2][r];
      int64_t d = 0;
      for (; d + 8 <= width; d += 8)
        store(out[r] + d, narrow(a * load_wide(g[r] + d) + b * load_wide(x[r] + d) +
                                 e * load_wide(c[r] + d)));
      for (; d < width; ++d)
        out[r][d] = (float)(a * g[r][d] + b * x[r][d] + e * c[r][d]);
    }
    return left;
  }
};

}  // namespace mmfast::MMFAST_ISA
