// What AVX-512's permutations make of scalar quantisation: levels found by halving, and sums of rows
// that vectors cut anywhere.
#pragma once
#include "cpu/finite_scalar_quantize.h"
#include "cpu/sixteen.h"

namespace mmfast::MMFAST_ISA {

#if defined(__AVX512F__)
// Tables of 32 places, some for each kind of dimension, through which sixteen lanes go side by side.
struct HalvingTables {
  static constexpr int places = 32, most_steps = 5;
  int steps = 0;  // 0: there is not room enough
  // Of a place reached with 2^k levels left to tell apart, the threshold between their halves.
  alignas(64) float thresholds[most_steps][places];
  alignas(64) float values[places];

  // A kind of dimension is its number of levels. first: [dimensions], the place of level 0.
  template <class Threshold, class Value>
  void prepare(const ScalarLevels* levels, int64_t dimensions, int32_t* first,
               const Threshold& threshold, const Value& value) {
    int most = 2;
    for (int64_t d = 0; d < dimensions; ++d)
      if (levels[d].count > most) most = levels[d].count;
    int needed = 0;
    while (1 << needed < most && needed <= most_steps) ++needed;
    int kinds = 0;
    for (int64_t d = 0; d < dimensions; ++d) {
      int64_t before = 0;
      while (levels[before].count != levels[d].count) ++before;
      if (before < d) {
        first[d] = first[before];
        continue;
      }
      if ((kinds + 1) << needed > places) return;
      first[d] = kinds++ << needed;
      for (int l = 0; l < 1 << needed; ++l) {
        for (int k = 0; k < needed; ++k) {
          const int next = l + (1 << k) - 1;
          thresholds[k][first[d] + l] =
              next + 1 < levels[d].count ? threshold(levels[d], next) : __builtin_nanf("");
        }
        values[first[d] + l] = value(levels[d], l < levels[d].count ? l : 0);
      }
    }
    steps = needed;
  }
};

// Levels by STEPS comparisons, with the tables in registers.
template <int STEPS>
class Halving {
  using V = Sixteen<float>::V;
  using I = Sixteen<float>::I;

 public:
  // firsts: [phases][16], the places of level 0.
  Halving(const HalvingTables& tables, const int32_t* firsts) : firsts_(firsts) {
    for (int k = 0; k < STEPS; ++k) read(tables.thresholds[k], thresholds_[k]);
    read(tables.values, values_);
  }

  __attribute__((always_inline)) V operator()(V z, int64_t phase, int64_t, I& level) const {
    const __m512i first = _mm512_load_si512(firsts_ + phase * 16);
    __m512i place = first;
#pragma GCC unroll 5
    for (int k = STEPS - 1; k >= 0; --k) {
      const __mmask16 reached =
          _mm512_cmp_ps_mask((__m512)z, at(thresholds_[k], place), _CMP_GE_OQ);
      place = _mm512_mask_add_epi32(place, reached, place, _mm512_set1_epi32(1 << k));
    }
    level = (I)_mm512_sub_epi32(place, first);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)z, (__m512)z, _CMP_UNORD_Q);
    return (V)_mm512_mask_mov_ps(at(values_, place), nan, (__m512)z);
  }

 private:
  const int32_t* firsts_;
  __m512 thresholds_[STEPS][2], values_[2];

  MMFAST_INLINE void read(const float* table, __m512 (&registers)[2]) {
    registers[0] = _mm512_load_ps(table);
    registers[1] = _mm512_load_ps(table + 16);
  }
  MMFAST_INLINE __m512 at(const __m512 (&table)[2], __m512i place) {
    return _mm512_permutex2var_ps(table[0], place, table[1]);
  }
};
#endif

// Sums of rows of `width` numbers, which lie one after another.
class RowSums {
 public:
  explicit RowSums(int64_t width) : width_(width) {
#if defined(__AVX512F__)
    int64_t common = 1;
    while (common < 16 && width % (2 * common) == 0) common *= 2;
    if (width == 1 || width / common > most_vectors) return;
    rows_ = 16 / common;
    vectors_ = (int)(width / common);
    step_ = width % 2 ? 1 : 2;
    for (int64_t d = 0; d < width; d += step_)
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t at = row * width + d;
        for (int pair = 0; pair < most_vectors / 2; ++pair)
          places_[d / step_][pair][row] = (int32_t)(at % 32);
        masks_[d / step_][at / 32] |= (uint16_t)(1 << row);
      }
#endif
  }

  void sum(const int32_t* numbers, int64_t rows, int32_t* out) const {
    int64_t row = 0;
#if defined(__AVX512F__)
    switch ((vectors_ + 1) / 2) {
      case 1: row = sum_groups<1>(numbers, rows, out); break;
      case 2: row = sum_groups<2>(numbers, rows, out); break;
      case 3: row = sum_groups<3>(numbers, rows, out); break;
      case 4: row = sum_groups<4>(numbers, rows, out); break;
    }
#endif
    for (; row < rows; ++row) {
      int32_t total = 0;
      for (int64_t d = 0; d < width_; ++d) total += numbers[row * width_ + d];
      out[row] = total;
    }
  }

 private:
  int64_t width_;

#if defined(__AVX512F__)
  static constexpr int most_vectors = 8, most_terms = 16;

  // So many rows fill so many vectors.
  int64_t rows_ = 0;
  int vectors_ = 0, step_ = 1;
  // Of every step_-th number of a row, lane by lane: where it is in each pair of vectors, and
  // which pair it is in.
  alignas(64) int32_t places_[most_terms][most_vectors / 2][16]{};
  uint16_t masks_[most_terms][most_vectors / 2]{};

  // Those groups of rows that are whole; how many rows these are.
  template <int PAIRS>
  int64_t sum_groups(const int32_t* numbers, int64_t rows, int32_t* out) const {
    const __mmask16 written = (__mmask16)((1 << rows_) - 1);
    const int terms = (int)(width_ / step_);
    int64_t row = 0;
    for (; row + rows_ <= rows; row += rows_, numbers += 16 * vectors_) {
      __m512i v[2 * PAIRS];
      for (int i = 0; i < 2 * PAIRS; ++i) {
        v[i] = _mm512_loadu_si512(numbers + 16 * (i < vectors_ ? i : 0));
        if (step_ == 2) v[i] = _mm512_add_epi32(v[i], _mm512_srli_epi64(v[i], 32));
      }
      __m512i total = _mm512_setzero_si512();
      for (int d = 0; d < terms; ++d) {
        const auto pair = [&](int i) __attribute__((always_inline)) {
          return _mm512_permutex2var_epi32(v[2 * i], _mm512_load_si512(places_[d][i]),
                                           v[2 * i + 1]);
        };
        __m512i term = pair(0);
        for (int i = 1; i < PAIRS; ++i)
          term = _mm512_mask_mov_epi32(term, masks_[d][i], pair(i));
        total = _mm512_add_epi32(total, term);
      }
      _mm512_mask_storeu_epi32(out + row, written, total);
    }
    return row;
  }
#endif
};

}  // namespace mmfast::MMFAST_ISA
