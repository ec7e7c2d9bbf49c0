// The integer products of a register tile and the comparison of its scores.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int tile_rows = lanes == 16 ? 6 : 4;  // rows of a register tile
constexpr int tile_vectors = 2;                 // vectors of codes of a register tile
constexpr int tile_codes = tile_vectors * lanes;
// Sixteen registers hold the best scores of a tile's rows, and the sums of one vector of codes.
constexpr bool vector_by_vector = lanes == 8;

// With few dimensions the comparison costs as much as the products. There, both factors are
// multiples of 2^tag_shift, so that the low bits of a score stay those it starts from: the id.
constexpr int64_t tagged_depth = 16;
constexpr int tag_shift = 4;
constexpr int64_t chunk_tiles = 1 << 2 * tag_shift;  // limits the bits that an id takes

template <bool bytes>
MMFAST_INLINE vi multiply(vi acc, vi c, vi b) {
#if MMFAST_BYTES
  if constexpr (bytes) return vdot8(acc, c, b);
#endif
  return vdot16(acc, c, b);
}

// Best and second best score of each lane for tile_rows rows x [tile_rows][depth] over `tiles`
// tiles of codes. The low bits of a score, as id_mask says, hold the number of its tile.
// Few words, of two int16 or four bytes, are a template parameter, so that the compiler unrolls
// them. Reads the terms of one tile more.
template <int known_words, bool tagged, bool bytes>
static __attribute__((noinline)) void sweep(const int16_t* x, int64_t depth, const int16_t* codes,
                                            const float* terms, int64_t tiles, float term_unit,
                                            int32_t id_mask, int32_t (*best)[lanes],
                                            int32_t (*second)[lanes]) {
  const int64_t words = known_words ? known_words : depth / 2;
  if (known_words) depth = 2 * known_words;
  const vi mask = vset(id_mask);
  vi high[tile_rows], low[tile_rows];
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) high[r] = low[r] = vset(INT32_MIN);
  // What a tile's scores start from, made while the tile before it is multiplied: its latency
  // would stand before every product.
  vi start[tile_vectors];
  const auto prepare = [&](int64_t t) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < tile_vectors; ++v) {
      start[v] = vscale(terms + t * tile_codes + v * lanes, term_unit);
      if constexpr (tagged) start[v] = vtag(start[v], mask, vset((int32_t)t));
    }
  };
  const auto take = [&](int r, vi s, int64_t t) __attribute__((always_inline)) {
    if constexpr (!tagged) s = vtag(s, mask, vset((int32_t)t));
    low[r] = vmax(low[r], vmin(high[r], s));
    high[r] = vmax(high[r], s);
  };
  prepare(0);
  for (int64_t t = 0; t < tiles; ++t) {
    if constexpr (vector_by_vector && known_words > 0) {
      vi first[tile_vectors];
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) first[v] = start[v];
      prepare(t + 1);
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) {
        vi acc[tile_rows];
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r) acc[r] = first[v];
#pragma GCC unroll 16
        for (int64_t p = 0; p < known_words; ++p) {
          const vi c = vload(codes + (p * tile_vectors + v) * lanes * 2);
#pragma GCC unroll 8
          for (int r = 0; r < tile_rows; ++r)
            acc[r] = multiply<bytes>(acc[r], c, vbroadcast(x + r * depth + 2 * p));
        }
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r) take(r, acc[r], t);
      }
      codes += tile_codes * depth;
      continue;
    }
    vi acc[tile_rows][tile_vectors];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) acc[r][v] = start[v];
    prepare(t + 1);
    const auto accumulate = [&](int64_t p) __attribute__((always_inline)) {
      vi c[tile_vectors];
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) c[v] = vload(codes + v * lanes * 2);
      codes += tile_codes * 2;
#pragma GCC unroll 8
      for (int r = 0; r < tile_rows; ++r) {
        const vi b = vbroadcast(x + r * depth + 2 * p);
#pragma GCC unroll 8
        for (int v = 0; v < tile_vectors; ++v) acc[r][v] = multiply<bytes>(acc[r][v], c[v], b);
      }
    };
    if constexpr (known_words > 0) {
#pragma GCC unroll 16
      for (int64_t p = 0; p < known_words; ++p) accumulate(p);
    } else {
      for (int64_t p = 0; p < words; ++p) accumulate(p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r) {
      // The codes of one tile and lane compete as one: whoever needs the winner compares them all.
      vi s = acc[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < tile_vectors; ++v) s = vmax(s, acc[r][v]);
      take(r, s, t);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) {
    vstore(best[r], high[r]);
    vstore(second[r], low[r]);
  }
}

// Which codes of a tile have scores from threshold on, for one row, without ids in them.
template <bool bytes>
static __attribute__((noinline)) void rescore(const int16_t* x, int64_t depth, const int16_t* codes,
                                              const float* terms, float term_unit,
                                              int32_t threshold, uint32_t* hits) {
  const int64_t words = depth / 2;
  vi acc[tile_vectors][2];  // two sums, which need not wait for each other
#pragma GCC unroll 8
  for (int v = 0; v < tile_vectors; ++v) {
    acc[v][0] = vscale(terms + v * lanes, term_unit);
    acc[v][1] = vset(0);
  }
  const auto accumulate = [&](int64_t p, int i) __attribute__((always_inline)) {
    const vi b = vbroadcast(x + 2 * p);
#pragma GCC unroll 8
    for (int v = 0; v < tile_vectors; ++v)
      acc[v][i] = multiply<bytes>(acc[v][i], vload(codes + (p * tile_vectors + v) * lanes * 2), b);
  };
  int64_t p = 0;
  for (; p + 2 <= words; p += 2) {
    accumulate(p, 0);
    accumulate(p + 1, 1);
  }
  if (p < words) accumulate(p, 0);
#pragma GCC unroll 8
  for (int v = 0; v < tile_vectors; ++v)
    hits[v] = vge(vadd(acc[v][0], acc[v][1]), vset(threshold));
}

using Sweep = decltype(&sweep<0, false, false>);

using Rescore = decltype(&rescore<false>);

static Rescore rescore_for(bool bytes) {
#if MMFAST_BYTES
  if (bytes) return rescore<true>;
#endif
  return rescore<false>;
}

static Sweep sweep_for(int64_t depth, bool bytes) {
#if MMFAST_BYTES
  if (bytes) return sweep<0, false, true>;
#endif
  return depth == 8              ? sweep<4, true, false>
         : depth <= tagged_depth ? sweep<0, true, false>
                                 : sweep<0, false, false>;
}

}  // namespace mmfast::MMFAST_ISA
