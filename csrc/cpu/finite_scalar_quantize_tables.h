// What AVX-512's permutations make of scalar quantisation: levels found by halving, and indices of
// rows that vectors cut anywhere.
#pragma once
#include "cpu/finite_scalar_quantize.h"
#include "cpu/sixteen.h"

namespace mmfast::MMFAST_ISA {

#if defined(__AVX512F__)
// Tables of 32 places, some for each kind of dimension, through which sixteen lanes go side by side.
struct HalvingTables {
  static constexpr int places = 32, most_steps = 5;
  int steps = 0;  // 0: there is not room enough
  int used = 0;   // places
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
    used = kinds << needed;
  }
};

// Levels by STEPS comparisons, with tables of so many REGISTERS. A level is told by its place.
template <int STEPS, int REGISTERS>
class Halving {
  using V = Sixteen<float>::V;
  using I = Sixteen<float>::I;

 public:
  // firsts, middles: [phases][16], places of level 0, and the thresholds there of the first step.
  Halving(const HalvingTables& tables, const int32_t* firsts, const float* middles)
      : firsts_(firsts), middles_(middles) {
    for (int k = 0; k < STEPS - 1; ++k) read(tables.thresholds[k], thresholds_[k]);
    read(tables.values, values_);
  }

  __attribute__((always_inline)) V operator()(V z, int64_t phase, int64_t, I& level) const {
    __m512i place = _mm512_load_si512(firsts_ + phase * 16);
    halve(z, _mm512_load_ps(middles_ + phase * 16), STEPS - 1, place);
#pragma GCC unroll 5
    for (int k = STEPS - 2; k >= 0; --k) halve(z, at(thresholds_[k], place), k, place);
    level = (I)place;
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)z, (__m512)z, _CMP_ORD_Q);
    if constexpr (REGISTERS == 1)
      return (V)_mm512_mask_permutexvar_ps((__m512)z, number, place, values_[0]);
    else
      return (V)_mm512_mask_mov_ps((__m512)z, number, at(values_, place));
  }

 private:
  const int32_t* firsts_;
  const float* middles_;
  __m512 thresholds_[STEPS][REGISTERS], values_[REGISTERS];

  MMFAST_INLINE void halve(V z, __m512 threshold, int k, __m512i& place) {
    const __mmask16 reached = _mm512_cmp_ps_mask((__m512)z, threshold, _CMP_GE_OQ);
    place = _mm512_mask_add_epi32(place, reached, place, _mm512_set1_epi32(1 << k));
  }
  MMFAST_INLINE void read(const float* table, __m512 (&registers)[REGISTERS]) {
    for (int i = 0; i < REGISTERS; ++i) registers[i] = _mm512_load_ps(table + 16 * i);
  }
  MMFAST_INLINE __m512 at(const __m512 (&table)[REGISTERS], __m512i place) {
    if constexpr (REGISTERS == 1)
      return _mm512_permutexvar_ps(place, table[0]);
    else
      return _mm512_permutex2var_ps(table[0], place, table[1]);
  }
};

// Indices of sixteen rows at a time. Their places, 16 bits each in as few vectors as hold them, are
// permuted to pairs of neighbouring dimensions, a row in each lane; one instruction multiplies them
// by their bases and adds.
class RowIndices {
 public:
  static constexpr int most_width = 16, most_words = most_width / 2;

  // firsts: [width], what a dimension's places are above its levels. Places take 15 bits.
  RowIndices(const ScalarLevels* levels, int64_t width, const int32_t* firsts)
      : words_((int)(width + 1) / 2) {
    const auto basis = [&](int64_t d) { return d < width ? levels[d].basis : 0; };
    for (int64_t d = 0; d < width; ++d) {
      above_ += (uint32_t)basis(d) * (uint32_t)firsts[d];
      factored_ |= basis(d) > INT16_MAX;
    }
    for (int pair = 0; pair < words_; ++pair) {
      const int64_t d = 2 * pair;
      factors_[pair] = factored_ ? basis(d) : 1;
      const int32_t low = basis(d) / factors_[pair], high = basis(d + 1) / factors_[pair];
      bases_[pair] = low | (int32_t)((uint32_t)high << 16);
      for (int64_t row = 0; row < 16; ++row)
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t e = row * width + d + (d + i < width ? i : 0);
          // Vectors are packed two by two, four numbers of each in turn.
          const int64_t word = e / 32, in_pair = e % 32, lane = in_pair % 16;
          const int64_t at = lane / 4 * 8 + in_pair / 16 * 4 + lane % 4;
          const int64_t to = 2 * row + i;
          masks_[pair][word] |= (uint32_t)1 << to;
          places_[pair][word < 2 ? 0 : word - 1][to] = (uint16_t)(word == 1 ? at + 32 : at);
        }
    }
  }

  // words: [most_words], packed places.
  __m512i of(const __m512i* words) const {
    switch (words_) {
      case 1: return of_words<1>(words);
      case 2: return of_words<2>(words);
      case 3: return of_words<3>(words);
      case 4: return of_words<4>(words);
      default: return of_words<0>(words);
    }
  }

 private:
  int words_;
  bool factored_ = false;  // whether a basis takes more than 15 bits
  uint32_t above_ = 0;
  int32_t bases_[most_words], factors_[most_words];
  // Where, and in which words, the numbers of a pair of dimensions are; the first of the tables is
  // of two words together.
  alignas(64) uint16_t places_[most_words][most_words][32]{};
  uint32_t masks_[most_words][most_words]{};

  template <int WORDS>
  __attribute__((always_inline)) __m512i of_words(const __m512i* words) const {
    const int count = WORDS ? WORDS : words_;
    __m512i total = _mm512_set1_epi32((int32_t)-above_);
#pragma GCC unroll 4
    for (int pair = 0; pair < count; ++pair) {
      const auto place = [&](int i) __attribute__((always_inline)) {
        return _mm512_load_si512(places_[pair][i]);
      };
      __m512i two = WORDS == 1 ? _mm512_permutexvar_epi16(place(0), words[0])
                               : _mm512_permutex2var_epi16(words[0], place(0), words[1]);
#pragma GCC unroll 4
      for (int word = 2; word < count; ++word)
        two = _mm512_mask_permutexvar_epi16(two, masks_[pair][word], place(word - 1), words[word]);
      __m512i sum = _mm512_madd_epi16(two, _mm512_set1_epi32(bases_[pair]));
      if (factored_) sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(factors_[pair]));
      total = _mm512_add_epi32(total, sum);
    }
    return total;
  }
};
#endif

}  // namespace mmfast::MMFAST_ISA
