// The best of logit / temperature + Gumbel noise. Float32 gives every code an interval for its score,
// whose ends contain all rounding errors; the codes whose interval reaches the best lower end are
// evaluated in float64.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/philox.h"
#include "cpu/sample_code.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

struct SampleCode {
  static constexpr int tile = lanes == 16 ? 8 : 4;  // rows whose products share the codes' loads
  static constexpr int64_t group = 2 * lanes;       // codes of a register tile
  static constexpr float below_one = 0x1.fffffep-1f;
  const SampleCodeArgs& args;
  const int64_t width, count, groups;
  const int64_t stride;      // elements of the stream from one row to the next
  double* codes = nullptr;   // [K][D]
  double* norms = nullptr;   // [K]
  double* mean = nullptr;    // [D], what the screening subtracts from both sides
  float* packed = nullptr;   // [groups][D][group]
  float* squares = nullptr;  // [groups][group], of the packed codes
  double largest = 0, largest_given = 0;  // norms of codes with and without the mean subtracted
  bool trusted = true;                    // whether float32 can hold the codes
  std::atomic<bool> failed{false};

  explicit SampleCode(const SampleCodeArgs& a)
      : args(a),
        width(a.x.width),
        count(a.codes.count),
        groups((a.codes.count + group - 1) / group),
        stride((a.codes.count + 3) / 4 * 4) {}
  SampleCode(const SampleCode&) = delete;
  ~SampleCode() {
    std::free(codes);
    std::free(norms);
    std::free(mean);
    std::free(packed);
    std::free(squares);
  }

  bool run(const Parallel& parallel) {
    codes = allocate<double>(count * width);
    norms = allocate<double>(count);
    mean = (double*)std::calloc((size_t)width, sizeof(double));
    packed = allocate<float>(groups * width * group);
    squares = allocate<float>(groups * group);
    if (!codes || !norms || !mean || !packed || !squares) return false;
    prepare();
    const int64_t blocks = (args.x.count + block - 1) / block;
    for_blocks(
        blocks, [this](int64_t at) { rows_of_block(at); }, parallel);
    return !failed;
  }

  static constexpr int64_t block = 32;  // rows, a multiple of tile

  double norm_of(const double* v) const {
    double total = 0;
    for (int64_t d = 0; d < width; ++d) total += v[d] * v[d];
    return std::sqrt(total);
  }

  static bool tame(double norm) { return norm > 1e-15 && norm < 1e15; }

  void prepare() {
    for (int64_t k = 0; k < count; ++k) {
      double* code = codes + k * width;
      const double* given = read_row<double>(args.codes, k, code);
      if (given != code) std::memcpy(code, given, (size_t)width * sizeof(double));
      norms[k] = norm_of(code);
      trusted &= norms[k] == 0 || tame(norms[k]);
      largest_given = norms[k] > largest_given ? norms[k] : largest_given;
      if (args.metric == Metric::euclidean)
        for (int64_t d = 0; d < width; ++d) mean[d] += code[d] / (double)count;
    }
    std::memset(packed, 0, (size_t)(groups * width * group) * sizeof(float));
    std::memset(squares, 0, (size_t)(groups * group) * sizeof(float));
    for (int64_t k = 0; k < count && trusted; ++k) {
      const double scale = args.metric != Metric::cosine ? 1 : norms[k] > 0 ? 1 / norms[k] : 0;
      float* to = packed + k / group * width * group + k % group;
      double square = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double v = (codes[k * width + d] - mean[d]) * scale;
        to[d * group] = (float)v;
        square += v * v;
      }
      squares[k] = (float)square;
      const double norm = std::sqrt(square);
      largest = norm > largest ? norm : largest;
    }
  }

  Random random_of(int64_t row) const {
    const int64_t sample = row / args.rows;
    return Random(args.seeds[sample * args.seed_step], args.offsets[sample * args.offset_step]);
  }

  void rows_of_block(int64_t at) {
    const int64_t begin = at * block;
    const int64_t end = begin + block < args.x.count ? begin + block : args.x.count;
    double* x = allocate<double>(tile * (width + 1));
    float* a = allocate<float>(tile * width);
    float* u = allocate<float>(tile * groups * group);
    float* upper = allocate<float>(tile * groups * group);
    if (x && a && u && upper)
      for (int64_t row = begin; row < end; row += tile)
        rows_of_tile(row, end - row < tile ? (int)(end - row) : tile, x, a, u, upper);
    else
      failed = true;
    std::free(x);
    std::free(a);
    std::free(u);
    std::free(upper);
  }

  void rows_of_tile(int64_t first, int n, double* x, float* a, float* u, float* upper) const {
    const int64_t padded_count = groups * group;
    float square[tile] = {}, slack[tile] = {}, noise[tile] = {};
    bool screened[tile] = {}, any = false;
    std::memset(a, 0, (size_t)(tile * width) * sizeof(float));
    for (int r = 0; r < n; ++r) {
      double* row = x + r * width;
      const double* given = read_row<double>(args.x, first + r, row);
      if (given != row) std::memcpy(row, given, (size_t)width * sizeof(double));
      const int64_t within = (first + r) % args.rows * args.heads + args.head;
      fill_uniforms(random_of(first + r), within * stride, u + r * padded_count, count);
      for (int64_t k = count; k < padded_count; ++k) u[r * padded_count + k] = 0.5f;
      screened[r] = start(row, a + r * width, &square[r], &slack[r], &noise[r]);
      any |= screened[r];
    }
    float best[tile];
    if (any) intervals(a, u, square, slack, noise, upper, best);
    for (int r = 0; r < n; ++r)
      args.indices[first + r] =
          choose(x + r * width, u + r * padded_count,
                 screened[r] ? upper + r * padded_count : nullptr, screened[r] ? best[r] : 0);
  }

  // The float32 side of a row; false if its numbers are too large or too small for that.
  bool start(const double* row, float* a, float* square, float* slack, float* noise) const {
    if (!trusted) return false;
    const double given = norm_of(row);
    const bool cosine = args.metric == Metric::cosine;
    if (!(given < 1e15) || (cosine && !tame(given))) return false;
    double total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double v = cosine ? row[d] / given : row[d] - mean[d];
      a[d] = (float)v;
      total += v * v;
    }
    const double norm = std::sqrt(total), relative = (double)(width + 16) * 0x1p-22;
    // How far the float32 logit (its square, if euclidean) may lie from the exact one.
    double error = relative * (norm * largest), size = norm * largest;
    if (args.metric == Metric::euclidean) {
      const double both = norm + largest;
      error = both * (both * relative + (given + 2 * largest_given) * 0x1p-49);
      size = both;
    }
    size /= args.temperature;
    *square = (float)total;
    *slack = (float)(error * 1.01 + 1e-30);
    // Of the Gumbel noise, of the division and the sum.
    *noise = (float)(4e-5 + 8 * 0x1p-24 * size);
    return size < 1e25 && 1 / args.temperature < 1e25 && error < 1e30;
  }

  MMFAST_INLINE vf gumbel(vf u) {
    const vf v = u < below_one ? u : vf{} + below_one;
    const vf w = 1.f - v;
    const vw bits = (vw)w, exponent = (bits - 0x3F2AAAAB) >> 23;
    vf f = (vf)(bits - (exponent << 23)) - 1.f;
    f = v < 0.33f ? -v : f;  // without the rounding of 1 - v
    const vf waiting = fma(to_float(exponent), vf{} - 1.38629436f, f * log_quotient(f));
    return 0.5f * minus_two_log(0.5f * waiting);
  }

  // The upper ends of the scores, [tile][groups * group], and the best of the lower ends.
  void intervals(const float* a, const float* u, const float* square, const float* slack,
                 const float* noise, float* upper, float* best) const {
    const float per_temperature = (float)(1 / args.temperature);
    const int64_t padded_count = groups * group;
    vf bests[tile];
    for (int r = 0; r < tile; ++r) bests[r] = vf{} - 3e38f;
    for (int64_t g = 0; g < groups; ++g) {
      const float* c = packed + g * width * group;
      vf product[tile][2] = {};
      for (int64_t d = 0; d < width; ++d) {
        const vf c0 = load<vf>(c + d * group), c1 = load<vf>(c + d * group + lanes);
#pragma GCC unroll 8
        for (int r = 0; r < tile; ++r) {
          const vf v = (vf)vbroadcast(a + r * width + d);
          product[r][0] = fma(v, c0, product[r][0]);
          product[r][1] = fma(v, c1, product[r][1]);
        }
      }
      for (int r = 0; r < tile; ++r)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = g * group + half * lanes;
          const vf p = product[r][half], e = vf{} + slack[r];
          vf high = p + e, low = p - e;
          if (args.metric == Metric::euclidean) {
            const vf d = square[r] + load<vf>(squares + at) - 2.f * p;
            const vf near = d - e;
            high = -sqrt(near > 0.f ? near : vf{});
            low = -sqrt(d + e > 0.f ? d + e : vf{});
          }
          const vf noisy = gumbel(load<vf>(u + r * padded_count + at));
          high = fma(high, vf{} + per_temperature, noisy) + noise[r];
          low = fma(low, vf{} + per_temperature, noisy) - noise[r];
          if (at + lanes > count)
            for (int64_t i = count > at ? count - at : 0; i < lanes; ++i)
              high[i] = low[i] = -3e38f;
          store(upper + r * padded_count + at, high);
          bests[r] = low > bests[r] ? low : bests[r];
        }
    }
    for (int r = 0; r < tile; ++r) {
      best[r] = bests[r][0];
      for (int i = 1; i < lanes; ++i) best[r] = bests[r][i] > best[r] ? bests[r][i] : best[r];
    }
  }

  // The definition, down to the order of the sums.
  double score(const double* x, double norm, int64_t k, float u) const {
    const double* c = codes + k * width;
    double logit = 0;
    if (args.metric == Metric::euclidean) {
      for (int64_t d = 0; d < width; ++d) logit += (x[d] - c[d]) * (x[d] - c[d]);
      logit = -std::sqrt(logit);
    } else {
      for (int64_t d = 0; d < width; ++d) logit += x[d] * c[d];
      if (args.metric == Metric::cosine) {
        const double product = norm * norms[k];
        logit = product == 0 ? std::fabs(logit) * 0 : logit / product;
      }
    }
    const double v = u < below_one ? u : below_one;
    return logit / args.temperature - std::log(-std::log1p(-v));
  }

  int64_t choose(const double* x, const float* u, const float* upper, float best) const {
    const double norm = args.metric == Metric::cosine ? norm_of(x) : 0;
    int64_t index = -1;
    double highest = 0;
    const auto consider = [&](int64_t k) {
      const double mine = score(x, norm, k, u[k]);
      if (index < 0 || mine > highest || (mine != mine && highest == highest)) {
        index = k;
        highest = mine;
      }
    };
    if (!upper) {
      // A NaN is the best, as in torch.argmax: the first one ends the search.
      for (int64_t k = 0; k < count && highest == highest; ++k) consider(k);
      return index;
    }
    for (int64_t at = 0; at < count; at += lanes)
      for (uint32_t left = le(vf{} + best, load<vf>(upper + at)); left; left &= left - 1)
        consider(at + __builtin_ctz(left));
    return index;
  }
};

static bool sample_code(const SampleCodeArgs& args, const Parallel& parallel) {
  return SampleCode(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
