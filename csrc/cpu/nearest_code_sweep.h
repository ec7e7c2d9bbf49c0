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

// Best and second best score of each lane for tile_rows rows x [tile_rows][depth] over `tiles`
// tiles of codes. The low bits of a score, as id_mask says, hold the number of its tile.
// Few pairs are a template parameter, so that the compiler unrolls them. Reads the terms of one
// tile more.
template <int known_pairs, bool tagged>
static __attribute__((noinline)) void sweep(const int16_t* x, int64_t depth, const int16_t* codes,
                                            const float* terms, int64_t tiles, float term_unit,
                                            int32_t id_mask, int32_t (*best)[lanes],
                                            int32_t (*second)[lanes]) {
  const int64_t pairs = known_pairs ? known_pairs : depth / 2;
  if (known_pairs) depth = 2 * known_pairs;
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
    if constexpr (vector_by_vector && known_pairs > 0) {
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
        for (int64_t p = 0; p < known_pairs; ++p) {
          const vi c = vload(codes + (p * tile_vectors + v) * lanes * 2);
#pragma GCC unroll 8
          for (int r = 0; r < tile_rows; ++r)
            acc[r] = vdot16(acc[r], c, vbroadcast(x + r * depth + 2 * p));
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
        for (int v = 0; v < tile_vectors; ++v) acc[r][v] = vdot16(acc[r][v], c[v], b);
      }
    };
    if constexpr (known_pairs > 0) {
#pragma GCC unroll 16
      for (int64_t p = 0; p < known_pairs; ++p) accumulate(p);
    } else {
      for (int64_t p = 0; p < pairs; ++p) accumulate(p);
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

using Sweep = decltype(&sweep<0, false>);

static Sweep sweep_for(int64_t depth) {
  return depth == 8 ? sweep<4, true> : depth <= tagged_depth ? sweep<0, true> : sweep<0, false>;
}

}  // namespace mmfast::MMFAST_ISA
