// Rows against the packed codebook: rounding to integers, scores, and the few codes left for float64.
#pragma once
#include "cpu/nearest_code_survivors.h"

namespace mmfast::MMFAST_ISA {

// The rows of a register tile. They share a scale.
using Tile = TileOf<tile_rows>;

template <class T>
struct RowScreen : Survivors<T> {
  using Base = Survivors<T>;
  using Base::args, Base::codebook, Base::depth, Base::exact, Base::inflation, Base::width, Base::x;
  using Base::add, Base::error_bound, Base::euclidean, Base::prefetch, Base::value, Base::value8;
  const bool bytes;
  const Sweep sweep;
  const Rescore rescorer;
  const float shift_magic;  // adding it rounds to whole multiples of 2^shift
  double max_factor = 0;    // limits a tile's scale so that no norm term leaves its range

  RowScreen(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& b)
      : Base(a, e, b),
        bytes(b.form == Form::bytes),
        sweep(sweep_for(b.depth, bytes)),
        rescorer(rescore_for(bytes)),
        shift_magic(std::ldexp(0x1.8p23f, b.shift())) {
    for (int64_t i = 0; i < b.num_chunks; ++i) {
      const double factor = b.chunks[i].scale * b.chunks[i].half_range;
      max_factor = factor > max_factor ? factor : max_factor;
    }
  }

  // Starts a tile on rows[0, n) of the block that begins at row `begin`, whose squares are known,
  // and for bytes their largest numbers.
  void start(Tile& tile, int64_t begin, const int32_t* rows, int64_t n, const double* squares,
             const double* peaks, int16_t* packed) const {
    tile.lower = d8{} - infinity;
    d8 error{}, bias{};
    for (int r = 0; r < tile_rows; ++r) {
      tile.rows[r] = r < n ? rows[r] : -1;
      tile.count[r] = 0;
      tile.exact[r] = false;
      if (r >= n) continue;
      tile.exact[r] = !(squares[rows[r]] < 1e280);
    }
    // Not written by element, for which the vector's load would stall.
    const auto square = [&](int r) __attribute__((always_inline)) {
      return r < n && r < tile_rows && !tile.exact[r] ? squares[rows[r]] : 0.0;
    };
    tile.norm = sqrt(d8{square(0), square(1), square(2), square(3), square(4), square(5), square(6),
                        square(7)}) *
                inflation;
    double highest = 0;
    for (int r = 0; r < tile_rows; ++r) highest = tile.norm[r] > highest ? tile.norm[r] : highest;
    double peak = highest;
    if (bytes) {
      peak = 0;
      for (int r = 0; r < n; ++r)
        if (!tile.exact[r] && peaks[rows[r]] > peak) peak = peaks[rows[r]];
    }
    double scale = peak > 0 ? codebook.largest() / peak : infinity;
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
#if MMFAST_BYTES
      if (bytes) {
        error[r] = round_bytes(v, scale, plain, (int8_t*)out, bias[r]);
        continue;
      }
#endif
      error[r] = plain ? round_float(v, scale, out) : round_double(v, scale, out);
    }
    tile.bias = bias;
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

#if MMFAST_BYTES
  // Rounds a row to out [2 * depth]. bias: what the codes' offset adds to its scores.
  double round_bytes(const T* v, double scale, bool plain, int8_t* out, double& bias) const {
    double rest = 0, total = 0;
    int64_t d = 0;
    if constexpr (sizeof(T) == 4) {
      if (plain) {
        const float s = (float)scale;
        vf error{}, wholes{};  // integers, exact in float32
        for (; d + lanes <= width; d += lanes) {
          const vf scaled = this->template values<vf>(v, d) * s;
          const vf shifted = scaled + shift_magic;
          const vf whole = shifted - shift_magic, e = scaled - whole;
          error = fma(e, e, error);
          wholes += whole;
          store(out + d, low_bytes((vi)shifted));
        }
        float sums[2];
        vsums(error, wholes, sums);
        rest = sums[0];
        total = sums[1];
      }
    }
    for (; d < width; ++d) {
      const double t = (double)v[d] - (euclidean() ? (double)codebook.mean[d] : 0.0);
      const double scaled = t * scale, whole = (scaled + 0x1.8p52) - 0x1.8p52;
      rest += (scaled - whole) * (scaled - whole);
      total += whole;
      out[d] = (int8_t)whole;
    }
    for (; d < 2 * depth; ++d) out[d] = 0;
    bias = byte_offset * total;
    return rest;
  }
#endif

  // Scores of a tile against a chunk. offset: what the integer scores lack.
  void screen(Tile& tile, int64_t begin, const int16_t* rows, int64_t i, d8 offset) const {
    const Chunk& chunk = codebook.chunks[i];
    const double unit = tile.scale * chunk.scale, per_unit = 1 / unit;
    alignas(64) int32_t best[tile_rows][lanes], second[tile_rows][lanes];
    sweep(rows, depth, codebook.packed + chunk.first_tile * tile_codes * depth,
          codebook.norm_terms + chunk.first_tile * tile_codes, chunk.tiles,
          (float)(chunk.half_range * unit),
          chunk.id_mask, best, second);
    // The id's bits and the rounding of the scaled norm term.
    const double noise = bytes
                             ? (chunk.id_mask + 2.0) * per_unit + 0x1p-21 * chunk.half_range
                             : (2.0 * chunk.id_mask + 256) * per_unit + 0x1p-23 * chunk.half_range;
    if (bytes) offset -= tile.bias * per_unit;
    const d8 bound = error_bound(tile, chunk, d8{} + noise);
    // Stored as a whole and read by element; the other way round stalls, so for all rows at once.
    alignas(64) double lowers[8], uppers[8];
    alignas(32) int32_t thresholds[8], most[8]{};
    const d8 below = offset + bound;
    store(thresholds, smallest((tile.lower - below) * unit));
    uint32_t rows_left = 0;
    for (int r = 0; r < tile_rows; ++r) {
      const vi top = vload(best[r]);
      if (!vge(top, vset(thresholds[r])) || !tile.screened(r)) continue;
      most[r] = vhmax(top);
      rows_left |= 1u << r;
    }
    if (!rows_left) return;
    const d8 reached = __builtin_convertvector(load<i32x8>(most), d8) * per_unit + (offset - bound);
    const d8 lower = reached > tile.lower ? reached : tile.lower;
    store(lowers, lower);
    store(uppers, below);
    store(thresholds, smallest((lower - below) * unit));
    alignas(64) double kept[8];
    store(kept, tile.lower);
    for (; rows_left; rows_left &= rows_left - 1) {
      const int r = __builtin_ctz(rows_left);
      kept[r] = lowers[r];
      collect(tile, begin, r, i, per_unit, uppers[r], kept[r], vset(thresholds[r]), best[r],
              second[r]);
    }
    tile.lower = load<d8>(kept);
  }

  // The smallest integers that scores of at least `scores` can have.
  static i32x8 smallest(d8 scores) {
    const d8 low = d8{} - 2147483648.0, high = d8{} + 2147483647.0;
    scores -= 2;
    scores = scores < low ? low : scores;
    return __builtin_convertvector(scores > high ? high : scores, i32x8);
  }

  // Adds the row's candidates in chunk i, whose scores are from threshold on.
  // upper: what makes the bound of a score.
  void collect(Tile& tile, int64_t begin, int r, int64_t i, double per_unit, double upper,
               double& lower, vi threshold, const int32_t* best, const int32_t* second) const {
    const Chunk& chunk = codebook.chunks[i];
    const int32_t padding = INT32_MIN + chunk.id_mask;
    for (uint32_t left = vge(vload(best), threshold); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (best[lane] <= padding) continue;
      const int64_t at = chunk.first_tile + (best[lane] & chunk.id_mask);
      add(tile, begin, r, lower, {best[lane] * per_unit + upper, (int32_t)(at * lanes + lane), 0});
      prefetch(at * tile_codes + lane);
    }
    const uint32_t again = vge(vload(second), threshold);
    if (!again) return;
    const int32_t most = vhmax(vload(second));
    if (most > padding)
      add(tile, begin, r, lower,
          {most * per_unit + upper, (int32_t)(-1 - i), this->by_lane ? (int32_t)again : most});
  }

  // Decides the tile's rows, whose rounded numbers are `rows`; returns how many codes were
  // compared.
  int64_t resolve(Tile& tile, int64_t begin, const int16_t* rows) const {
    return Base::resolve(
        tile, begin, [&](auto& contest, int r, double lower, const Candidate& candidate) {
          return rescreen(contest, rows + r * depth, tile.scale, lower, candidate);
        });
  }

  // Compares the codes of a chunk whose scores, made again, can be the best.
  int64_t rescreen(typename Base::Contest& contest, const int16_t* row, double scale, double lower,
                   const Candidate& candidate) const {
    const Chunk& chunk = codebook.chunks[-1 - candidate.where];
    if (this->by_lane) {
      int64_t codes = 0;
      for (uint32_t left = (uint32_t)candidate.whole; left; left &= left - 1)
        for (int64_t t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; ++t)
          codes += this->enter(contest, t * lanes + __builtin_ctz(left));
      return codes;
    }
    const double unit = scale * chunk.scale;
    const double base = candidate.upper - candidate.whole * (1 / unit);
    const int32_t threshold = smallest(d8{} + (lower - base) * unit)[0];
    int64_t codes = 0;
    for (int64_t t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; ++t) {
      uint32_t hits[tile_vectors];
      rescorer(row, depth, codebook.packed + t * tile_codes * depth,
               codebook.norm_terms + t * tile_codes, (float)(chunk.half_range * unit), threshold,
               hits);
      for (int v = 0; v < tile_vectors; ++v)
        for (uint32_t left = hits[v]; left; left &= left - 1, ++codes) {
          const int32_t k = codebook.order[t * tile_codes + v * lanes + __builtin_ctz(left)];
          if (k >= 0) this->enter_code(contest, k);
        }
    }
    return codes + chunk.tiles * tile_vectors;  // as much work as some more
  }
};

}  // namespace mmfast::MMFAST_ISA
