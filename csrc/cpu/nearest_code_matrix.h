// Every row against every chunk by products of bfloat16 matrices: float32 sums, whose rounding is
// part of the bound, of scores scaled by a power of two.
#pragma once
#include "cpu/nearest_code_matrix_sweep.h"
#include "cpu/nearest_code_survivors.h"

namespace mmfast::MMFAST_ISA {

using MatrixTile = TileOf<8>;

template <class T>
struct Matrix {
  static constexpr int64_t max_block_rows = 256;
  static constexpr int tiles_per_strip = strip_rows / 8;
  static constexpr double largest_norm = 0x1p100;  // scaled; no product overflows
  const MatrixRegisters registers;
  Survivors<T> survivors;
  const Codebook<T>& codebook;
  const int64_t width, depth;
  const MatrixSweep sweep;
  const bool pairs;
  const double scale, unit;
  const double relative;  // error of a product, relative to the norms
  int64_t block_rows;
  MatrixTile* tiles = nullptr;  // [block_rows / 8]
  int16_t* packed = nullptr;    // [block_rows][depth]
  float* folded = nullptr;      // [matrix_tiles][strip_rows][lanes]
  int64_t screened = 0, compared = 0;  // rows so far, and codes compared in float64

  Matrix(const NearestCodeArgs& args, const Exact<T>& exact, const Codebook<T>& c, int64_t rows)
      : survivors(args, exact, c),
        codebook(c),
        width(c.width),
        depth(c.depth),
        sweep(matrix_sweep_for(c.depth)),
        pairs(c.form == Form::pairs),
        scale(c.chunks[0].scale),
        unit(scale * scale),
        // Float32 sums in whatever order; products of two lower parts, which are left out; and a
        // margin for terms of second order.
        relative(((double)(depth + 16) * 0x1p-24 + (pairs ? 0x1p-16 : 0)) * 0x1.1p0),
        block_rows(rows) {}
  ~Matrix() {
    std::free(tiles);
    std::free(packed);
    std::free(folded);
  }

  static int64_t rows_per_block(int64_t rows, int threads) {
    const int64_t share = (rows + threads - 1) / threads;
    const int64_t most = share < max_block_rows ? share : max_block_rows;
    return (most + strip_rows - 1) / strip_rows * strip_rows;
  }

  bool allocate() {
    const size_t n = (size_t)block_rows;
    tiles = (MatrixTile*)std::aligned_alloc(64, n / 8 * sizeof(MatrixTile));
    packed = (int16_t*)std::aligned_alloc(64, n * (size_t)depth * 2);
    folded = (float*)std::aligned_alloc(64, matrix_tiles * strip_rows * lanes * 4);
    return tiles && packed && folded && survivors.allocate();
  }

  // False if the rows are too hard and may be left to another method: nothing is decided then.
  bool run(int64_t begin, int64_t end, bool stay) {
    const int64_t n = end - begin, strips = (n + strip_rows - 1) / strip_rows;
    screened += n;
    for (int64_t t = 0; t < strips * tiles_per_strip; ++t) start(tiles[t], begin, t * 8, n);
    for (int64_t i = 0; i < codebook.num_chunks; ++i)
      for (int64_t s = 0; s < strips; ++s) {
        const Chunk& chunk = codebook.chunks[i];
        sweep(packed + s * strip_rows * depth, depth,
                     codebook.packed + chunk.first_tile * tile_codes * depth,
                     codebook.norm_terms + chunk.first_tile * tile_codes, chunk.tiles, folded);
        for (int t = 0; t < tiles_per_strip; ++t)
          screen(tiles[s * tiles_per_strip + t], begin, chunk, folded + t * 8 * lanes);
      }
    if (!stay) {
      for (int64_t t = 0; t < strips * tiles_per_strip; ++t)
        compared += survivors.pending(tiles[t]);
      if (too_hard()) return false;
    }
    const auto none = [](const auto&...) { return 0; };  // no chunk is ever looked through again
    for (int64_t t = 0; t < strips * tiles_per_strip; ++t) survivors.resolve(tiles[t], begin, none);
    return true;
  }

  // Whether comparing codes in float64 costs more than finer screening would, and packing them
  // again.
  bool too_hard() const {
    const int64_t all = codebook.unique * width, each = width + 60;
    return compared > screened * (4 + all / ((pairs ? 16 : 64) * each)) + 4 * all / each;
  }

  // Starts a tile on rows first to first + 7 of the n of a block that begins at row `begin`.
  void start(MatrixTile& tile, int64_t begin, int64_t first, int64_t n) const {
    tile.lower = d8{} - infinity;
    tile.scale = scale;
    d8 square{}, error{};
    for (int r = 0; r < 8; ++r) {
      int16_t* out = packed + (first + r) * depth;
      tile.rows[r] = first + r < n ? (int32_t)(first + r) : -1;
      tile.count[r] = 0;
      tile.exact[r] = false;
      Rounded rounded{};
      if (tile.rows[r] >= 0) {
        rounded = round(read_row<T>(survivors.args.x, begin + first + r, survivors.x), out);
        tile.exact[r] = !(rounded.square < largest_norm * largest_norm);
      }
      if (!tile.screened(r)) {
        std::memset(out, 0, (size_t)depth * 2);
        continue;
      }
      square[r] = rounded.square;
      error[r] = rounded.error;
    }
    tile.norm = sqrt(square) * (survivors.inflation / scale);
    tile.residual = (sqrt(error) * survivors.inflation + codebook.lost()) / scale;
  }

  struct Rounded {
    double square, error;  // |x|^2 and |x - x'|^2, scaled
  };

  // Rounds a row to out [depth]. In pairs it is its upper parts, twice, and its lower parts.
  Rounded round(const T* v, int16_t* out) const {
    if (width < depth) std::memset(out + width, 0, (size_t)(depth - width) * 2);
    if constexpr (sizeof(T) == 4)
      if (scale > 1e-20 && scale < 1e20) {
        const Rounded rounded = round_float(v, out);
        // Squares neither overflowed nor vanished.
        if (rounded.square > 1e-24 && rounded.square < 1e30) return rounded;
      }
    return round_double(v, out);
  }

  Rounded round_float(const float* v, int16_t* out) const {
    __m512 square = _mm512_setzero_ps(), error = _mm512_setzero_ps();
    const __m512 factor = _mm512_set1_ps((float)scale);
    const bool centred = survivors.euclidean();
    for (int64_t d = 0; d < width; d += lanes) {
      const __mmask16 mask = width - d < lanes ? (__mmask16)((1 << (width - d)) - 1) : 0xFFFF;
      __m512 a = _mm512_maskz_loadu_ps(mask, v + d);
      if (centred)
        a = _mm512_sub_ps(a, _mm512_maskz_loadu_ps(mask, (const float*)codebook.mean + d));
      a = _mm512_mul_ps(a, factor);
      square = _mm512_fmadd_ps(a, a, square);
      const __m256i upper = nearest_bfloat16(a);
      a = _mm512_sub_ps(a, back(upper));
      _mm256_mask_storeu_epi16(out + d, mask, upper);
      if (pairs) {
        const __m256i lower = nearest_bfloat16(a);
        a = _mm512_sub_ps(a, back(lower));
        _mm256_mask_storeu_epi16(out + codebook.part() + d, mask, upper);
        _mm256_mask_storeu_epi16(out + 2 * codebook.part() + d, mask, lower);
      }
      error = _mm512_fmadd_ps(a, a, error);
    }
    return {_mm512_reduce_add_ps(square), _mm512_reduce_add_ps(error)};
  }

  static __m256i nearest_bfloat16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
  static __m512 back(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

  Rounded round_double(const T* v, int16_t* out) const {
    Rounded rounded{};
    for (int64_t d = 0; d < width; ++d) {
      const double t = (double)v[d] - (survivors.euclidean() ? (double)codebook.mean[d] : 0.0);
      const double scaled = t * scale;
      rounded.square += scaled * scaled;
      const i32x8 upper = Codebook<T>::nearest_bfloat16(d8{} + scaled);
      double e = scaled - (double)((f8)upper)[0];
      out[d] = (int16_t)(upper[0] >> 16);
      if (pairs) {
        const i32x8 lower = Codebook<T>::nearest_bfloat16(d8{} + e);
        e -= (double)((f8)lower)[0];
        out[codebook.part() + d] = out[d];
        out[2 * codebook.part() + d] = (int16_t)(lower[0] >> 16);
      }
      rounded.error += e * e;
    }
    return rounded;
  }

  // Candidates among a chunk's codes. scores: [tiles] of [8][lanes], a strip apart.
  void screen(MatrixTile& tile, int64_t begin, const Chunk& chunk, const float* scores) const {
    constexpr int64_t stride = strip_rows * lanes;
    const double per_unit = 1 / unit;
    const d8 most = (tile.norm + tile.residual) * (chunk.max_norm + chunk.max_residual);
    const d8 noise = relative * (most + chunk.half_range) + (double)depth * 0x1p-124 * per_unit;
    const d8 bound = survivors.error_bound(tile, chunk, noise);
    __m512 best[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) best[r] = _mm512_load_ps(scores + r * lanes);
    for (int64_t t = 1; t < chunk.tiles; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
        best[r] = _mm512_max_ps(best[r], _mm512_load_ps(scores + t * stride + r * lanes));
    alignas(32) float tops[8], thresholds[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) tops[r] = _mm512_reduce_max_ps(best[r]);
    const f8 top = load<f8>(tops);
    const d8 reached = widen(top) * per_unit - chunk.reference - bound;
    tile.lower = reached > tile.lower ? reached : tile.lower;
    const f8 threshold = at_least((tile.lower + chunk.reference - bound) * unit);
    uint32_t rows = _mm256_cmp_ps_mask((__m256)top, (__m256)threshold, _CMP_GE_OQ);
    if (!rows) return;
    store(thresholds, threshold);
    // Stored as a whole and read by element: the other way round would stall.
    alignas(64) double adds[8], lowers[8];
    store(adds, bound - chunk.reference);
    store(lowers, tile.lower);
    for (; rows; rows &= rows - 1) {
      const int r = __builtin_ctz(rows);
      if (!tile.screened(r)) continue;
      const float* p = scores + r * lanes;
      // Which scores reach the threshold, four tiles a word.
      uint64_t hits[matrix_tiles / 4]{};
      const __m512 least = _mm512_set1_ps(thresholds[r]);
      for (int64_t t = 0; t < chunk.tiles; ++t) {
        const uint16_t mask = _mm512_cmp_ps_mask(_mm512_load_ps(p + t * stride), least, _CMP_GE_OQ);
        store((uint16_t*)hits + t, mask);
      }
      for (int64_t word = 0; word < (chunk.tiles + 3) / 4; ++word)
        for (uint64_t left = hits[word]; left; left &= left - 1) {
          const int64_t t = 4 * word + __builtin_ctzll(left) / lanes;
          const int64_t lane = __builtin_ctzll(left) % lanes, at = chunk.first_tile + t;
          survivors.add(tile, begin, r, lowers[r],
                        {p[t * stride + lane] * per_unit + adds[r],
                         (int32_t)(at * lanes + lane), 0});
          survivors.prefetch(at * tile_codes + lane);
        }
    }
  }

  // A float32 that no score below it, by more than its rounding, can have.
  static f8 at_least(d8 score) {
    return __builtin_convertvector(score - (score < 0 ? -score : score) * 0x1p-22, f8);
  }
};

}  // namespace mmfast::MMFAST_ISA
