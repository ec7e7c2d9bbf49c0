// Rows against the packed codebook: rounding, scores, and the few codes left for float64.
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

// The rows of a register tile. They share a scale.
struct Tile {
  d8 norm;      // upper bounds of |x|, x less the mean
  d8 residual;  // upper bounds of |x - x' / scale|
  d8 lower;     // the best score is at least this
  double scale;
  int32_t rows[tile_rows];  // within the block; -1 for none
  int32_t count[tile_rows];  // candidates
  bool exact[tile_rows];     // screening cannot serve this row
  Candidate candidates[tile_rows][capacity];

  bool screened(int r) const { return rows[r] >= 0 && !exact[r]; }
};

template <class T>
struct RowScreen {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Codebook<T>& codebook;
  const int64_t width, depth;
  const double inflation;  // covers the rounding of the float32 sums of D squares
  const Sweep sweep;
  const float shift_magic;  // adding it rounds to whole multiples of 2^shift
  T* x = nullptr;           // [D]
  T* c = nullptr;           // [D]
  mutable int64_t compared = 0;  // codes compared in float64
  double max_factor = 0;    // limits a tile's scale so that no norm term leaves its range

  RowScreen(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& b)
      : args(a),
        exact(e),
        codebook(b),
        width(b.width),
        depth(b.depth),
        inflation(inflate + (double)b.width * 0x1p-27),
        sweep(sweep_for(b.depth)),
        shift_magic(std::ldexp(0x1.8p23f, b.shift())) {
    for (int64_t i = 0; i < b.num_chunks; ++i) {
      const double factor = b.chunks[i].scale * b.chunks[i].half_range;
      max_factor = factor > max_factor ? factor : max_factor;
    }
  }
  RowScreen(const RowScreen&) = delete;
  ~RowScreen() {
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

  // Starts a tile on rows[0, n) of the block that begins at row `begin`, whose squares are known.
  void start(Tile& tile, int64_t begin, const int32_t* rows, int64_t n, const double* squares,
             int16_t* packed) const {
    tile.lower = d8{} - infinity;
    d8 square{}, error{};
    for (int r = 0; r < tile_rows; ++r) {
      tile.rows[r] = r < n ? rows[r] : -1;
      tile.count[r] = 0;
      tile.exact[r] = false;
      if (r >= n) continue;
      tile.exact[r] = !(squares[rows[r]] < 1e280);
      square[r] = tile.exact[r] ? 0 : squares[rows[r]];
    }
    tile.norm = sqrt(square) * inflation;
    double highest = 0;
    for (int r = 0; r < tile_rows; ++r) highest = tile.norm[r] > highest ? tile.norm[r] : highest;
    double scale = highest > 0 ? codebook.largest() / highest : infinity;
    if (norm_term_range < scale * max_factor) scale = norm_term_range / max_factor;
    if (!(scale < 1e200)) scale = 1;
    tile.scale = scale;
    // Float32 serves where neither the values nor the scale come near its limits.
    const bool plain = sizeof(T) == 4 && scale > 1e-20 && scale < 1e20 && highest > 1e-10;
    for (int r = 0; r < tile_rows; ++r) {
      int16_t* out = packed + r * depth;
      if (!tile.screened(r)) {
        std::memset(out, 0, (size_t)depth * 2);
        continue;
      }
      const T* v = read_row<T>(args.x, begin + tile.rows[r], x);
      error[r] = plain ? round_float(v, scale, out) : round_double(v, scale, out);
    }
    tile.residual = sqrt(error) * (inflation / scale);
  }

  // Rounds a row to out [depth]; returns the sum of the squared rounding errors, in integers.
  double round_float(const T* v, double scale, int16_t* out) const {
    const float s = (float)scale;
    float rest = 0;
    int64_t d = 0;
    if constexpr (sizeof(T) == 4) {
      f8 error{};
      for (; d + 8 <= width; d += 8) {
        const f8 scaled = value8(v, d) * s;
        const f8 shifted = scaled + shift_magic;
        const f8 e = scaled - (shifted - shift_magic);
        error += e * e;
        // The low bits of the shifted value are the multiple.
        store(out + d, __builtin_convertvector((i32x8)shifted << codebook.shift(), i16x8));
      }
      rest = sum(error);
    }
    for (; d < width; ++d) {
      const float scaled = (float)value(v, d) * s;
      const float whole = (scaled + shift_magic) - shift_magic;
      rest += (scaled - whole) * (scaled - whole);
      out[d] = (int16_t)whole;
    }
    for (; d < depth; ++d) out[d] = 0;
    return rest;
  }

  double round_double(const T* v, double scale, int16_t* out) const {
    const double magic = std::ldexp(0x1.8p52, codebook.shift());
    double rest = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double t = (double)v[d] - (euclidean() ? (double)codebook.mean[d] : 0.0);
      const double scaled = t * scale, whole = (scaled + magic) - magic;
      rest += (scaled - whole) * (scaled - whole);
      out[d] = (int16_t)whole;
    }
    for (int64_t d = width; d < depth; ++d) out[d] = 0;
    return rest;
  }

  // How far a score can be from the true one.
  d8 error_bound(const Tile& tile, const Chunk& chunk, double per_unit) const {
    // Rounding of x - mean and of the norm terms; the definition's own rounding in float64.
    const double storage = sizeof(T) == 4 ? 0x1p-23 : 0x1p-49;
    const double definition = (double)(width + 16) * 0x1p-50;
    // The id's bits and the rounding of the scaled norm term.
    const double noise = (2.0 * chunk.id_mask + 256) * per_unit + 0x1p-23 * chunk.half_range;
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

  // Scores of a tile against a chunk. offset: what the integer scores lack.
  void screen(Tile& tile, const int16_t* rows, int64_t i, d8 offset) const {
    const Chunk& chunk = codebook.chunks[i];
    const double unit = tile.scale * chunk.scale, per_unit = 1 / unit;
    alignas(64) int32_t best[tile_rows][lanes], second[tile_rows][lanes];
    sweep(rows, depth, codebook.packed + chunk.first_tile * tile_codes * depth,
          codebook.norm_terms + chunk.first_tile * tile_codes, chunk.tiles,
          (float)(chunk.half_range * unit),
          chunk.id_mask, best, second);
    const d8 bound = error_bound(tile, chunk, per_unit);
    // Stored as a whole and read by element: the other way round would stall.
    alignas(64) double offsets[8], bounds[8], lowers[8];
    store(offsets, offset);
    store(bounds, bound);
    store(lowers, tile.lower);
    for (int r = 0; r < tile_rows; ++r) {
      const vi threshold = vset(smallest(lowers[r] - offsets[r] - bounds[r], unit));
      if (vge(vload(best[r]), threshold) && tile.screened(r))
        lowers[r] = collect(tile, r, i, unit, offsets[r], bounds[r], lowers[r], best[r], second[r]);
    }
    tile.lower = load<d8>(lowers);
  }

  // The smallest integer that a score of at least `score` can have.
  static int32_t smallest(double score, double unit) {
    const double limit = score * unit - 2;
    return limit < -2147483648.0 ? INT32_MIN : limit > 2147483647.0 ? INT32_MAX : (int32_t)limit;
  }

  // Adds the row's candidates in chunk i; returns what its best score now is at least.
  double collect(Tile& tile, int r, int64_t i, double unit, double offset, double bound,
                 double lower, const int32_t* best, const int32_t* second) const {
    const Chunk& chunk = codebook.chunks[i];
    const double per_unit = 1 / unit;
    const vi top = vload(best);
    const double reached = vhmax(top) * per_unit + offset - bound;
    lower = reached > lower ? reached : lower;
    const vi threshold = vset(smallest(lower - offset - bound, unit));
    for (uint32_t left = vge(top, threshold); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const int64_t at = chunk.first_tile + (best[lane] & chunk.id_mask);
      if (codebook.order[at * tile_codes + lane] < 0) continue;
      add(tile, r, lower, {best[lane] * per_unit + offset + bound, at * lanes + lane});
      prefetch(at * tile_codes + lane);
    }
    for (uint32_t left = vge(vload(second), threshold); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (second[lane] > INT32_MIN + chunk.id_mask)
        add(tile, r, lower,
            {second[lane] * per_unit + offset + bound, -1 - (i * lanes + lane)});
    }
    return lower;
  }

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

  static void add(Tile& tile, int r, double lower, Candidate candidate) {
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

  void resolve(const Tile& tile, int64_t begin) const {
    for (int r = 0; r < tile_rows; ++r) {
      if (tile.rows[r] < 0) continue;
      const int64_t row = begin + tile.rows[r];
      const T* v = read_row<T>(args.x, row, x);
      if (tile.exact[r]) {
        exact.scan(row, v, c);
        compared += args.codes.count;
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
    compared += tiles * tile_vectors;
    for (int64_t j = 0; j < tiles * tile_vectors; ++j)
      if (codes[j * lanes] >= 0) exact.consider(best, codes[j * lanes], c);
  }
};

}  // namespace mmfast::MMFAST_ISA
