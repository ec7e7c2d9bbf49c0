// Rows and the codes that screening leaves them: how far a score can be from the true one, and the
// comparison in float64.
#pragma once
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code_codebook.h"
#include "cpu/nearest_code_exact.h"
#include "cpu/nearest_code_sweep.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int capacity = 32;  // candidates of a row
constexpr double infinity = std::numeric_limits<double>::infinity();

struct Candidate {
  double upper;   // bound of the score
  int32_t where;  // tile * lanes + lane; or -1 - chunk, to look through that chunk
  int32_t whole;  // in that case, the integer score that upper is made of
};

// Rows that are screened together.
template <int size>
struct TileOf {
  d8 norm;      // upper bounds of |x|, x less the mean
  d8 residual;  // upper bounds of |x - x' / scale|
  d8 lower;     // the best score is at least this
  d8 bias;      // of bytes: what their integer scores have too much
  double scale;  // of all rows
  int32_t rows[size];   // within the block; -1 for none
  int32_t count[size];  // candidates
  bool exact[size];     // screening cannot serve this row
  Candidate candidates[size][capacity];

  bool screened(int r) const { return rows[r] >= 0 && !exact[r]; }
};

template <class T>
struct Survivors {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Codebook<T>& codebook;
  const int64_t width, depth;
  const bool far;          // the codes are not in the second-level cache
  const bool rough;        // there are so many candidates that float32 distances come first
  const double inflation;  // covers the rounding of the float32 sums of D squares
  T* x = nullptr;          // [D]
  T* c = nullptr;          // [D]

  Survivors(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& b)
      : args(a),
        exact(e),
        codebook(b),
        width(b.width),
        depth(b.depth),
        far(b.args.codes.count * b.width * b.args.codes.step > 1 << 19),
        rough(sizeof(T) == 4 && b.form == Form::bytes && a.metric == Metric::euclidean),
        inflation(inflate + (double)b.width * 0x1p-27) {}
  Survivors(const Survivors&) = delete;
  ~Survivors() {
    std::free(x);
    std::free(c);
  }

  bool allocate() {
    x = (T*)std::malloc((size_t)width * sizeof(T));
    c = (T*)std::malloc((size_t)width * sizeof(T));
    return x && c;
  }

  bool euclidean() const { return args.metric == Metric::euclidean; }

  // Only for the Euclidean metric does the mean shift the rows too; a product's argmax ignores it.
  T value(const T* v, int64_t d) const { return euclidean() ? v[d] - codebook.mean[d] : v[d]; }
  template <class V>
  V values(const float* v, int64_t d) const {
    return euclidean() ? load<V>(v + d) - load<V>((const float*)codebook.mean + d) : load<V>(v + d);
  }
  f8 value8(const float* v, int64_t d) const { return values<f8>(v, d); }

  // |x|^2 and the largest number, x less the mean.
  struct Size {
    double square, peak;
  };

  Size size(const T* v) const {
    T most = 0;
    int64_t d = 0;
    if constexpr (sizeof(T) == 4) {
      vf total0{}, total1{};
      vi largest = vset(0);
      const auto take = [&](vf& total) __attribute__((always_inline)) {
        const vf a = values<vf>(v, d);
        total = fma(a, a, total);
        // Numbers without a sign are in the order of their bits.
        largest = vmax(largest, (vi)a & vset(INT32_MAX));
        d += lanes;
      };
      while (d + 2 * lanes <= width) {
        take(total0);
        take(total1);
      }
      if (d + lanes <= width) take(total0);
      const int32_t bits = vhmax(largest);
      std::memcpy(&most, &bits, sizeof bits);
      float square = vsum(total0 + total1);
      for (; d < width; ++d) {
        const T a = std::fabs(value(v, d));
        square += a * a;
        most = a > most ? a : most;
      }
      if (settled(square)) return {square, most};
    }
    for (; d < width; ++d) {
      const T a = std::fabs(value(v, d));
      most = a > most ? a : most;
    }
    return {square(v), most};
  }

  // Whether squares neither overflowed nor vanished in this float32 sum.
  static bool settled(float square) { return square > 1e-24f && square < 1e30f; }

  // |x|^2, x less the mean; not finite if x is not.
  double square(const T* v) const {
    if constexpr (sizeof(T) == 4) {
      f8 total0{}, total1{};
      int64_t d = 0;
      for (; d + 16 <= width; d += 16) {
        const f8 a = value8(v, d), b = value8(v, d + 8);
        total0 += a * a;
        total1 += b * b;
      }
      for (; d + 8 <= width; d += 8) {
        const f8 a = value8(v, d);
        total0 += a * a;
      }
      float rest = sum(total0 + total1);
      for (; d < width; ++d) rest += value(v, d) * value(v, d);
      if (settled(rest)) return rest;
    }
    double total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double t = (double)v[d] - (euclidean() ? (double)codebook.mean[d] : 0.0);
      total += t * t;
    }
    return total;
  }

  // How far a score can be from the true one.
  // noise: what the arithmetic of the scores adds.
  template <int size>
  d8 error_bound(const TileOf<size>& tile, const Chunk& chunk, d8 noise) const {
    // Rounding of x - mean and of the norm terms; the definition's own rounding in float64.
    const double storage = sizeof(T) == 4 ? 0x1p-23 : 0x1p-49;
    const double definition = (double)(width + 16) * 0x1p-50;
    d8 bound = tile.residual * chunk.max_norm + (tile.norm + tile.residual) * chunk.max_residual +
               noise + storage * tile.norm * chunk.far_norm;
    if (euclidean()) {
      const d8 distance = tile.norm + chunk.far_norm;
      bound += definition * distance * distance;
    } else {
      bound += definition * tile.norm *
               (args.metric == Metric::cosine ? 4.0 : 4 * (exact.max_norm + codebook.mean_norm));
      if (args.metric == Metric::cosine) bound += storage * tile.norm;
    }
    if (codebook.grouped) bound += dot_error() * tile.norm * chunk.centre_norm;
    return bound;
  }

  // Relative error of a product with a group's centre: four sums of D / 4 float32 terms.
  double dot_error() const { return (double)(width / 4 + 8) * 0x1p-24; }

  // The codes of one tile and lane, which will be compared.
  void prefetch(int64_t position) const {
    if (!far) return;
    for (int v = 0; v < tile_vectors; ++v) {
      const int32_t k = codebook.order[position + v * lanes];
      if (k < 0) continue;
      const char* p = args.codes.row(k);
      for (int64_t at = 0; at < width * args.codes.step && at < 1024; at += 64)
        __builtin_prefetch(p + at);
    }
  }

  // Adds a candidate, and finds out more about the row's where there is no room for it.
  template <int size>
  void add(TileOf<size>& tile, int64_t begin, int r, double& lower, Candidate candidate) const {
    if (tile.count[r] == capacity) drop(tile, r, lower);
    if (tile.count[r] == capacity && euclidean()) {
      Contest contest(exact.start(read_row<T>(args.x, begin + tile.rows[r], x)));
      const int first = most_promising(tile, r);
      if (tile.candidates[r][first].where >= 0) enter(contest, tile.candidates[r][first].where);
      lower = better(lower, tile.norm[r], contest);
      drop(tile, r, lower);
    }
    if (tile.count[r] == capacity)
      tile.exact[r] = true;
    else
      tile.candidates[r][tile.count[r]++] = candidate;
  }

  // Drops the candidates that cannot be the nearest.
  template <int size>
  static void drop(TileOf<size>& tile, int r, double lower) {
    Candidate* all = tile.candidates[r];
    int kept = 0;
    for (int j = 0; j < tile.count[r]; ++j)
      if (all[j].upper >= lower) all[kept++] = all[j];
    tile.count[r] = kept;
  }

  // Of the candidates, the single code with the highest score; the first if there is none.
  template <int size>
  static int most_promising(const TileOf<size>& tile, int r) {
    const Candidate* all = tile.candidates[r];
    int first = 0;
    for (int j = 1; j < tile.count[r]; ++j)
      if (all[j].where >= 0 && !(all[first].where >= 0 && all[j].upper <= all[first].upper))
        first = j;
    return first;
  }

  // Codes that compete for a row: of most, float32 shows that they lose.
  struct Contest {
    static constexpr int most = 2 * capacity;
    Nearest<T> best;  // of those compared in float64
    int count = 0;    // of those that may have to be
    float nearest = std::numeric_limits<float>::infinity();  // distance of any
    int32_t codes[most];
    float distances[most];

    explicit Contest(Nearest<T> start) : best(start) {}
  };

  void enter_code(Contest& contest, int32_t k) const {
    if constexpr (sizeof(T) == 4)
      if (rough) {
        if (contest.count == Contest::most) decide(contest);
        const float distance = exact.rough(contest.best.x, read_row<T>(args.codes, k, c));
        if (distance >= 0 && distance < contest.nearest) contest.nearest = distance;
        contest.codes[contest.count] = k;
        contest.distances[contest.count++] = distance;
        return;
      }
    exact.consider(contest.best, k, c);
  }

  // The codes of a lane of a tile.
  int64_t enter(Contest& contest, int64_t where) const {
    const int32_t* codes = codebook.order + where / lanes * tile_codes + where % lanes;
#pragma GCC unroll 8
    for (int64_t v = 0; v < tile_vectors; ++v)
      if (codes[v * lanes] >= 0) enter_code(contest, codes[v * lanes]);
    return tile_vectors;
  }

  void decide(Contest& contest) const {
    if (contest.count == 0) return;
    const double error = exact.rough_error(), limit = contest.nearest * (1 + error);
    for (int j = 0; j < contest.count; ++j)
      if (contest.distances[j] * (1 - error) <= limit)
        exact.consider(contest.best, contest.codes[j], c);
    contest.count = 0;
  }

  // What the best score is at least, knowing the contest so far. norm: upper bound of |x|.
  double better(double lower, double norm, const Contest& contest) const {
    const double storage = sizeof(T) == 4 ? 0x1p-23 : 0x1p-49, terms = (double)(width + 16);
    const double lost = norm * norm * (2 * (inflation - 1) + terms * storage);
    const double value = rough ? contest.nearest : contest.best.value;
    const double reached = (norm * norm - lost - value * (1 + terms * storage)) / 2;
    return reached > lower ? reached : lower;
  }

  // Rows that every code will be compared with.
  template <int size>
  static int unscreened(const TileOf<size>& tile) {
    int rows = 0;
    for (int r = 0; r < size; ++r) rows += tile.rows[r] >= 0 && tile.exact[r];
    return rows;
  }

  // Codes that resolve() will compare.
  template <int size>
  int64_t pending(const TileOf<size>& tile) const {
    int64_t codes = 0;
    for (int r = 0; r < size; ++r) {
      if (tile.rows[r] < 0) continue;
      if (tile.exact[r]) codes += args.codes.count;
      for (int j = 0; !tile.exact[r] && j < tile.count[r]; ++j) {
        const Candidate& candidate = tile.candidates[r][j];
        if (candidate.upper < tile.lower[r]) continue;
        codes += tile_vectors;
      }
    }
    return codes;
  }

  // Decides the tile's rows; returns how many codes were compared. rescreen(contest, r,
  // lower, candidate) looks through a chunk.
  template <int size, class Rescreen>
  int64_t resolve(TileOf<size>& tile, int64_t begin, const Rescreen& rescreen) const {
    int64_t codes = 0;
    for (int r = 0; r < size; ++r) {
      if (tile.rows[r] < 0) continue;
      const int64_t row = begin + tile.rows[r];
      const T* v = read_row<T>(args.x, row, x);
      if (tile.exact[r] || tile.count[r] == 0) {
        exact.scan(row, v, c);
        codes += args.codes.count;
        continue;
      }
      Contest contest(exact.start(v));
      double lower = tile.lower[r];
      Candidate* all = tile.candidates[r];
      int count = tile.count[r];
      // The most promising first: what it reaches is more than screening could promise.
      const int first = most_promising(tile, r);
      if (all[first].where >= 0) {
        codes += enter(contest, all[first].where);
        if (euclidean() && count > 1) lower = better(lower, tile.norm[r], contest);
        all[first] = all[--count];
      }
      for (int j = 0; j < count; ++j)
        if (all[j].where >= 0 && all[j].upper >= lower) codes += enter(contest, all[j].where);
      for (int j = 0; j < count; ++j)
        if (all[j].where < 0 && all[j].upper >= lower) codes += rescreen(contest, r, lower, all[j]);
      decide(contest);
      exact.write(row, contest.best);
    }
    return codes;
  }
};

}  // namespace mmfast::MMFAST_ISA
