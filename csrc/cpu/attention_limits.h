// Which keys take part: causality, masks and dropout of 64 queries and 64 keys, as bits, and masks
// that are added, as numbers.
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_products.h"
#include "cpu/philox.h"

namespace mmfast::MMFAST_ISA {

// Queries, and keys, of a block.
constexpr int64_t attention_block = 64;

struct QueryRow {
  int64_t head, index;  // of its stream, in its batch
  int stream;
};

// Bit j of word i becomes bit i of word j.
static void transpose_bits(uint64_t* words) {
  const auto stage = [&]<int D>(uint64_t low) __attribute__((always_inline)) {
    for (int first = 0; first < 64; first += 2 * D)
#pragma GCC unroll 4
      for (int i = first; i < first + D; ++i) {
        const uint64_t swapped = ((words[i] >> D) ^ words[i + D]) & low;
        words[i] ^= swapped << D;
        words[i + D] ^= swapped;
      }
  };
  stage.template operator()<32>(0x00000000FFFFFFFF);
  stage.template operator()<16>(0x0000FFFF0000FFFF);
  stage.template operator()<8>(0x00FF00FF00FF00FF);
  stage.template operator()<4>(0x0F0F0F0F0F0F0F0F);
  stage.template operator()<2>(0x3333333333333333);
  stage.template operator()<1>(0x5555555555555555);
}

// The lowest count bits, any number from none to all.
MMFAST_INLINE uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~0ull : (1ull << count) - 1;
}

// Which of count bytes, at most 64, `step` apart, are not 0.
static uint64_t nonzero_bytes(const char* at, int64_t step, int64_t count) {
  if (step == 0) return *at ? low_bits(count) : 0;
  uint64_t word = 0;
  if (step != 1) {
    for (int64_t j = 0; j < count; ++j) word |= (uint64_t)(at[j * step] != 0) << j;
    return word;
  }
  alignas(16) char padded[64];
  if (count < 64) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, at, (size_t)count);
    at = padded;
  }
  for (int part = 0; part < 4; ++part) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)at + part);
    const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
    word |= (uint64_t)(uint16_t)~zeros << (16 * part);
  }
  return word;
}

// Of a batch's queries and keys [first, first + count), at most 64 of each: bit j of words[i] says
// whether query i attends to key j. Bits and words beyond both counts are 0.
static void attended_bits(const AttentionArgs& args, int64_t batch, const QueryRow* rows,
                          int64_t queries, int64_t first, int64_t count, int64_t causal_offset,
                          uint64_t* words) {
  const AttentionMask& mask = args.mask;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t index = rows[i].index;
    uint64_t word = low_bits(count);
    if (args.causal != Causal::none) word &= low_bits(index + causal_offset - first + 1);
    if (mask.data && !mask.additive) {
      if (i && mask.row == 0 && rows[i].head == rows[i - 1].head)
        word &= words[i - 1];
      else
        word &= nonzero_bytes(mask.at(batch, rows[i].head, index, first), mask.column, count);
    }
    words[i] = word;
  }
  for (int64_t i = queries; i < attention_block; ++i) words[i] = 0;
}

// Likewise, whether dropout leaves it.
static void kept_bits(const AttentionArgs& args, const Random& random, int64_t batch,
                      const QueryRow* rows, int64_t queries, int64_t first, int64_t count,
                      uint64_t* words) {
  const int64_t length = args.queries[0].sequences.rows, keys = args.keys[0].sequences.rows;
  alignas(64) float numbers[attention_block];
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t row = (batch * args.heads + rows[i].head) * length + rows[i].index;
    fill_uniforms(random, row * keys + first, numbers, count);
    uint64_t word = 0;
    for (int64_t j = 0; j < count; ++j) word |= (uint64_t)(numbers[j] >= (float)args.dropout) << j;
    words[i] = word;
  }
  for (int64_t i = queries; i < attention_block; ++i) words[i] = 0;
}

// Numbers that are added to scores: out[j * attention_block + i] of query i and key first + j.
// Those of queries beyond theirs are any.
template <class V>
static void added_numbers(const AttentionArgs& args, int64_t batch, const QueryRow* rows,
                          int64_t queries, int64_t first, int64_t count,
                          std::remove_reference_t<decltype(V{}[0])>* out) {
  using T = std::remove_reference_t<decltype(V{}[0])>;
  constexpr int64_t per = sizeof(V) / sizeof(T);
  const AttentionMask& mask = args.mask;
  const int64_t size = size_of(mask.dtype);
  if (mask.row == 0 && rows[0].head == rows[queries - 1].head) {
    const char* at = mask.at(batch, rows[0].head, 0, first);
    for (int64_t j = 0; j < count; ++j, at += mask.column) {
      const V number = V{} + load_one<T>(at, mask.dtype);
      for (int64_t i = 0; i < queries; i += per) store(out + j * attention_block + i, number);
    }
    return;
  }
  if (mask.column != size) {
    for (int64_t i = 0; i < queries; ++i) {
      const char* at = mask.at(batch, rows[i].head, rows[i].index, first);
      for (int64_t j = 0; j < count; ++j)
        out[j * attention_block + i] = load_one<T>(at + j * mask.column, mask.dtype);
    }
    return;
  }
  for (int64_t i = 0; i < queries; i += per)
    for (int64_t j = 0; j < count; j += per) {
      V v[per];
      for (int64_t r = 0; r < per; ++r) {
        const QueryRow& row = rows[i + r < queries ? i + r : queries - 1];
        const char* at = mask.at(batch, row.head, row.index, first + j);
        v[r] = read_first<V>(at, mask.dtype, count - j);
      }
      transpose(v);
      for (int64_t r = 0; r < per && j + r < count; ++r)
        store(out + (j + r) * attention_block + i, v[r]);
    }
}

// v where the lane's bit is 1, else other.
template <class V>
MMFAST_INLINE V where_bits(uint64_t bits, V v, V other) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V{}[0]) == 4)
    return (V)_mm512_mask_mov_ps((__m512)other, (__mmask16)bits, (__m512)v);
  else
    return (V)_mm512_mask_mov_pd((__m512d)other, (__mmask8)bits, (__m512d)v);
#else
  using I = decltype(v < v);
  I lane{};
  for (int l = 0; l < (int)(sizeof(V) / sizeof(V{}[0])); ++l) lane[l] = 1 << l;
  return ((I{} + (int32_t)(bits & 0xFF)) & lane) != 0 ? v : other;
#endif
}

}  // namespace mmfast::MMFAST_ISA
