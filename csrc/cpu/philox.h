// Random numbers as a function of (seed, offset, element): Philox 4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", 2011), uniform numbers and Box-Muller normals.
//
//   const Random random(seed, offset);          // once per sample
//   fill_normals(random, element, out, count);  // from any element on
//
// A round waits for the one before, so that calls which make several vectors side by side take less
// time for each: fill_normals makes eight.
//
// The operations of the normals are fixed, fused multiply-adds included, so that every instruction
// set with those gives the same bits, and kernels/philox.py too.
#pragma once
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

// Words are made for lanes / 2 blocks of four together: two vectors of them.
constexpr int64_t random_width = 2 * lanes;
constexpr int64_t random_blocks = lanes / 2;

// A sample's stream: the key is the seed, the counter's upper half the offset.
struct Random {
  static constexpr int rounds = 10;
  static constexpr uint32_t multipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  int32_t keys[rounds][2];  // with what all blocks have of the offset

  Random(int64_t seed, int64_t offset) {
    uint32_t a = (uint32_t)seed, b = (uint32_t)((uint64_t)seed >> 32);
    for (int i = 0; i < rounds; ++i, a += 0x9E3779B9u, b += 0xBB67AE85u) {
      keys[i][0] = (int32_t)a;
      keys[i][1] = (int32_t)b;
    }
    // In the first round all blocks multiply the offset.
    const uint64_t product = (uint64_t)(uint32_t)offset * multipliers[1];
    keys[0][0] ^= (int32_t)(product >> 32);
    keys[0][1] ^= (int32_t)((uint64_t)offset >> 32);
    keys[1][0] ^= (int32_t)product;
  }
};

// A word lies in the lower half of each 64 bits; what is in the upper half does not matter.
// v[0] v[1] of four blocks in a row lie in neighbouring 128 bits when they leave `ordered`.
#if defined(__AVX512F__)
MMFAST_INLINE vi count_from(int64_t block) {
  return _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
MMFAST_INLINE vi count_on(vi counter, int64_t n) {
  return _mm512_add_epi64(counter, _mm512_set1_epi64(n));
}
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm512_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
// From intrinsics GCC makes a broadcast by itself, on a port that the products need.
MMFAST_INLINE vi xor_key(vi a, const int32_t& key) {
  __asm__("vpxord %1%{1to16%}, %0, %0" : "+v"(a) : "m"(key));
  return a;
}
MMFAST_INLINE vi xor_key(vi a, vi b, const int32_t& key) {
  __asm__("vpternlogd $0x96, %2%{1to16%}, %1, %0" : "+v"(a) : "v"(b), "m"(key));
  return a;
}
MMFAST_INLINE vi xor_keys(vi a, vi b, const int32_t (&keys)[2]) {
  __asm__("vpternlogq $0x96, %2%{1to8%}, %1, %0" : "+v"(a) : "v"(b), "m"(keys));
  return a;
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA);
}
MMFAST_INLINE vi pair_upper_words(vi low, vi high) {
  return _mm512_mask_shuffle_epi32(high, 0x5555, low, _MM_PERM_DDBB);
}
MMFAST_INLINE vf flip_sign(vf x, vi bits) {
  return (vf)_mm512_ternarylogic_epi32((vi)x, bits, vset(INT32_MIN), 0x78);
}
MMFAST_INLINE vf first_ordered(vf even, vf odd) {
  return (vf)_mm512_unpacklo_ps((__m512)even, (__m512)odd);
}
MMFAST_INLINE vf second_ordered(vf even, vf odd) {
  return (vf)_mm512_unpackhi_ps((__m512)even, (__m512)odd);
}
#elif defined(__AVX2__)
MMFAST_INLINE vi count_from(int64_t block) {
  return _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_set_epi64x(3, 1, 2, 0));
}
MMFAST_INLINE vi count_on(vi counter, int64_t n) {
  return _mm256_add_epi64(counter, _mm256_set1_epi64x(n));
}
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm256_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm256_srli_epi64(a, 32); }
MMFAST_INLINE vi xor_key(vi a, int32_t key) { return _mm256_xor_si256(a, vset(key)); }
MMFAST_INLINE vi xor_key(vi a, vi b, int32_t key) { return xor_key(_mm256_xor_si256(a, b), key); }
MMFAST_INLINE vi xor_keys(vi a, vi b, const int32_t (&keys)[2]) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_set1_epi64x(load<int64_t>(keys)));
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
MMFAST_INLINE vi pair_upper_words(vi low, vi high) {
  return _mm256_blend_epi32(_mm256_srli_epi64(low, 32), high, 0xAA);
}
MMFAST_INLINE vf first_ordered(vf even, vf odd) {
  return (vf)_mm256_unpacklo_ps((__m256)even, (__m256)odd);
}
MMFAST_INLINE vf second_ordered(vf even, vf odd) {
  return (vf)_mm256_unpackhi_ps((__m256)even, (__m256)odd);
}
#else
MMFAST_INLINE vi count_from(int64_t block) {
  return _mm_add_epi64(_mm_set1_epi64x(block), _mm_set_epi64x(1, 0));
}
MMFAST_INLINE vi count_on(vi counter, int64_t n) {
  return _mm_add_epi64(counter, _mm_set1_epi64x(n));
}
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm_srli_epi64(a, 32); }
MMFAST_INLINE vi xor_key(vi a, int32_t key) { return _mm_xor_si128(a, vset(key)); }
MMFAST_INLINE vi xor_key(vi a, vi b, int32_t key) { return xor_key(_mm_xor_si128(a, b), key); }
MMFAST_INLINE vi xor_keys(vi a, vi b, const int32_t (&keys)[2]) {
  return _mm_xor_si128(_mm_xor_si128(a, b), _mm_set1_epi64x(load<int64_t>(keys)));
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm_or_si128(_mm_and_si128(low, _mm_set1_epi64x(0xFFFFFFFF)), _mm_slli_epi64(high, 32));
}
MMFAST_INLINE vi pair_upper_words(vi low, vi high) {
  return _mm_or_si128(_mm_srli_epi64(low, 32), _mm_andnot_si128(_mm_set1_epi64x(0xFFFFFFFF), high));
}
MMFAST_INLINE vf first_ordered(vf even, vf odd) {
  return (vf)_mm_unpacklo_ps((__m128)even, (__m128)odd);
}
MMFAST_INLINE vf second_ordered(vf even, vf odd) {
  return (vf)_mm_unpackhi_ps((__m128)even, (__m128)odd);
}
#endif
#if !defined(__AVX512F__)
// Where bits have their sign.
MMFAST_INLINE vf flip_sign(vf x, vi bits) {
  using vw = int32_t __attribute__((vector_size(4 * lanes)));
  return (vf)((vw)x ^ ((vw)bits & INT32_MIN));
}
#endif

// count times random_width words: 0 and 2 of the blocks, and 1 and 3. The elements that share a
// radius lie in one lane.
template <int count>
struct Words {
  vi even[count], odd[count];
};

// Of blocks whose counters have one upper word: it leaves them word 0 of the second round's counter
// in common, and word 3 of the third's.
template <int count>
MMFAST_INLINE Words<count> words(const Random& random, int64_t block) {
  constexpr int last = Random::rounds - 1;
  const auto& keys = random.keys;
  const vi a = vset((int32_t)Random::multipliers[0]), b = vset((int32_t)Random::multipliers[1]);
  const uint32_t common = (uint32_t)((uint64_t)block >> 32) ^ (uint32_t)keys[0][0];
  const uint64_t product = (uint64_t)common * Random::multipliers[0];
  const int32_t second = (int32_t)(product >> 32) ^ keys[1][1];
  const int32_t third = (int32_t)product ^ keys[2][1];
  const vi counter = count_from(block);
  vi c0[count], c1[count], c2[count], c3[count];
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const vi p = multiply_words(count_on(counter, j * random_blocks), a);
    c1[j] = multiply_words(xor_key(upper_words(p), keys[0][1]), b);
    c0[j] = xor_key(upper_words(c1[j]), keys[1][0]);
    c2[j] = xor_key(p, second);
  }
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    c3[j] = multiply_words(c0[j], a);
    const vi q = multiply_words(c2[j], b);
    c0[j] = xor_key(upper_words(q), c1[j], keys[2][0]);
    c2[j] = xor_key(upper_words(c3[j]), third);
    c1[j] = q;
  }
#pragma GCC unroll 9
  for (int i = 3; i < last; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) {
      const vi p = multiply_words(c0[j], a), q = multiply_words(c2[j], b);
      c0[j] = xor_key(upper_words(q), c1[j], keys[i][0]);
      c2[j] = xor_key(upper_words(p), c3[j], keys[i][1]);
      c1[j] = q;
      c3[j] = p;
    }
  Words<count> made;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const vi p = multiply_words(c0[j], a), q = multiply_words(c2[j], b);
    made.even[j] = xor_keys(pair_upper_words(q, p), pair_words(c1[j], c3[j]), keys[last]);
    made.odd[j] = pair_words(q, p);
  }
  return made;
}

using vw = int32_t __attribute__((vector_size(4 * lanes)));

MMFAST_INLINE vf to_float(vw v) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps((__m256i)v);
#else
  return (vf)_mm_cvtepi32_ps((__m128i)v);
#endif
}

// x 2^-32 + 2^-33, x as float32: from 2^-33 to 1.
MMFAST_INLINE vf uniform(vi x) {
#if defined(__AVX512F__)
  return fma((vf)_mm512_cvtepu32_ps(x), vf{} + 0x1p-32f, vf{} + 0x1p-33f);  // one rounding anyway
#else
  // Signed conversions of the halves are exact, and their sum rounds once.
  using vu = uint32_t __attribute__((vector_size(4 * lanes)));
  const vf upper = to_float((vw)((vu)x >> 16)) * 0x1p-16f;
  const vf lower = to_float((vw)((vu)x & 0xFFFF)) * 0x1p-32f;
  return upper + lower + 0x1p-33f;
#endif
}

// -2 log(1 + f) / f, f from -1/3 to 1/3.
MMFAST_INLINE vf log_quotient(vf f) {
  vf p = fma(vf{} + 0.254839301f, f, vf{} - 0.268676668f);
  p = fma(p, f, vf{} + 0.244531035f);
  p = fma(p, f, vf{} - 0.282339364f);
  p = fma(p, f, vf{} + 0.333535403f);
  p = fma(p, f, vf{} - 0.400076717f);
  p = fma(p, f, vf{} + 0.499997914f);
  p = fma(p, f, vf{} - 0.666666389f);
  p = fma(p, f, vf{} + 1.f);
  return fma(p, f, vf{} - 2.f);
}

// -2 log u, u normal.
MMFAST_INLINE vf minus_two_log(vf u) {
  const vw bits = (vw)u;
  // The exponent where it lies, 2^23 times as large. The rest is from 2/3 to 4/3.
  const vw exponent = (bits - 0x3F2AAAAB) & (int32_t)0xFF800000;
  const vf f = (vf)(bits - exponent) - 1.f;
  return fma(to_float(exponent), vf{} - 1.38629436f * 0x1p-23f, f * log_quotient(f));
}

struct CosineSine {
  vf cosine, sine;
};

// Of the angle that the lower 30 bits of a word are, an eighth of a turn at most; the next bit has
// sine and cosine change places.
MMFAST_INLINE CosineSine cosine_and_sine(vi word) {
  const vf r = fma(to_float((vw)word << 2), vf{} + 0x1p-34f, vf{} + 0x1p-33f), z = r * r;
  vf s = fma(vf{} - 75.3935623f, z, vf{} + 81.5923538f);
  s = fma(s, z, vf{} - 41.3416634f);
  s = fma(s, z, vf{} + 6.28318548f) * r;
  vf c = fma(vf{} + 59.4243431f, z, vf{} - 85.4488220f);
  c = fma(c, z, vf{} + 64.9393692f);
  c = fma(c, z, vf{} - 19.7392082f);
  c = fma(c, z, vf{} + 1.f);
  const auto turned = ((vw)word & (1 << 30)) != 0;
  return {turned ? s : c, turned ? c : s};
}

// Elements 4 block to 4 block + count * random_width, in their order.
template <int count>
struct Numbers {
  vf v[2 * count];
};

enum class Kind { words, uniforms, normals };

template <Kind kind, int count>
MMFAST_INLINE Numbers<count> numbers(const Random& random, int64_t block) {
  const Words<count> w = words<count>(random, block);
  Numbers<count> made;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    vf even = (vf)w.even[j], odd = (vf)w.odd[j];
    if constexpr (kind == Kind::uniforms) {
      even = uniform(w.even[j]);
      odd = uniform(w.odd[j]);
    } else if constexpr (kind == Kind::normals) {
      const vf radius = flip_sign(sqrt(minus_two_log(uniform(w.even[j]))), w.odd[j]);
      const auto [cosine, sine] = cosine_and_sine(w.odd[j]);
      even = radius * cosine;
      odd = radius * sine;
    }
    made.v[2 * j] = first_ordered(even, odd);
    made.v[2 * j + 1] = second_ordered(even, odd);
  }
  return made;
}

// Several random_width numbers from a block on, to out.
template <Kind kind, int count>
MMFAST_INLINE void store_numbers(const Random& random, int64_t block, void* out) {
  const Numbers<count> made = numbers<kind, count>(random, block);
#pragma GCC unroll 16
  for (int i = 0; i < 2 * count; ++i) store((vf*)out + i, made.v[i]);
}

// count numbers of a sample, from any element on.
template <Kind kind, class T>
static void fill_numbers(const Random& random, int64_t element, T* out, int64_t count) {
  static_assert(sizeof(T) == sizeof(float));
  constexpr int64_t many = 4 * random_width;
  constexpr int64_t alike = (int64_t)4 << 32;  // elements whose blocks have one upper word
  while (count > 0) {
    const int64_t until = alike - (element & (alike - 1));
    const int64_t end = element + (count < until ? count : until);
    count -= end - element;
    const auto some = [&](int64_t skipped, int64_t most) {
      alignas(64) T made[random_width];
      store_numbers<kind, 1>(random, element / 4, made);
      const int64_t n = end - element < most ? end - element : most;
      std::memcpy(out, made + skipped, (size_t)n * sizeof(T));
      element += n;
      out += n;
    };
    if (element % 4) some(element % 4, 4 - element % 4);
    for (; end - element >= many; element += many, out += many)
      store_numbers<kind, 4>(random, element / 4, out);
    while (element < end) some(0, random_width);
  }
}

static void fill_normals(const Random& random, int64_t element, float* out, int64_t count) {
  fill_numbers<Kind::normals>(random, element, out, count);
}

static inline void fill_uniforms(const Random& random, int64_t element, float* out, int64_t count) {
  fill_numbers<Kind::uniforms>(random, element, out, count);
}

static inline void fill_words(const Random& random, int64_t element, uint32_t* out, int64_t count) {
  fill_numbers<Kind::words>(random, element, out, count);
}

}  // namespace mmfast::MMFAST_ISA
