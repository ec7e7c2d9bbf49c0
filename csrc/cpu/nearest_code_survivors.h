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
  int64_t where;  // tile * lanes + lane; or -1 - (chunk * lanes + lane), to look through that lane
};

// Rows that are screened together.
template <int size>
struct TileOf {
  d8 norm;      // upper bounds of |x|, x less the mean
  d8 residual;  // upper bounds of |x - x' / scale|
  d8 lower;     // the best score is at least this
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
  const double inflation;  // covers the rounding of the float32 sums of D squares
  T* x = nullptr;          // [D]
  T* c = nullptr;          // [D]

  Survivors(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& b)
      : args(a),
        exact(e),
        codebook(b),
        width(b.width),
        depth(b.depth),
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
  f8 value8(const float* v, int64_t d) const {
    return euclidean() ? load<f8>(v + d) - load<f8>((const float*)codebook.mean + d)
                       : load<f8>(v + d);
  }

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
      // Squares neither overflowed nor vanished.
      if (rest > 1e-24f && rest < 1e30f) return rest;
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

  // The codes of one tile and lane, which will be compared in float64.
  void prefetch(int64_t position) const {
    for (int v = 0; v < tile_vectors; ++v) {
      const int32_t k = codebook.order[position + v * lanes];
      if (k < 0) continue;
      const char* p = args.codes.row(k);
      for (int64_t at = 0; at < width * args.codes.step && at < 1024; at += 64)
        __builtin_prefetch(p + at);
    }
  }

  template <int size>
  static void add(TileOf<size>& tile, int r, double lower, Candidate candidate) {
    if (tile.count[r] == capacity) {
      Candidate* all = tile.candidates[r];
      int kept = 0;
      for (int j = 0; j < capacity; ++j)
        if (all[j].upper >= lower) all[kept++] = all[j];
      tile.count[r] = kept;
      if (kept == capacity) {
        tile.exact[r] = true;
        return;
      }
    }
    tile.candidates[r][tile.count[r]++] = candidate;
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
        const bool lane = candidate.where < 0;
        codes += tile_vectors * (lane ? codebook.chunks[(-1 - candidate.where) / lanes].tiles : 1);
      }
    }
    return codes;
  }

  // Decides the tile's rows.
  template <int size>
  void resolve(const TileOf<size>& tile, int64_t begin) const {
    for (int r = 0; r < size; ++r) {
      if (tile.rows[r] < 0) continue;
      const int64_t row = begin + tile.rows[r];
      const T* v = read_row<T>(args.x, row, x);
      if (tile.exact[r]) {
        exact.scan(row, v, c);
        continue;
      }
      Nearest<T> best = exact.start(v);
      for (int j = 0; j < tile.count[r]; ++j) {
        const Candidate& candidate = tile.candidates[r][j];
        if (candidate.upper >= tile.lower[r]) compare(best, candidate.where);
      }
      exact.write(row, best);
    }
  }

  void compare(Nearest<T>& best, int64_t where) const {
    int64_t first = where / lanes, tiles = 1, lane = where % lanes;
    if (where < 0) {
      const Chunk& chunk = codebook.chunks[(-1 - where) / lanes];
      first = chunk.first_tile;
      tiles = chunk.tiles;
      lane = (-1 - where) % lanes;
    }
    const int32_t* codes = codebook.order + first * tile_codes + lane;
    for (int64_t j = 0; j < tiles * tile_vectors; ++j)
      if (codes[j * lanes] >= 0) exact.consider(best, codes[j * lanes], c);
  }
};

}  // namespace mmfast::MMFAST_ISA
