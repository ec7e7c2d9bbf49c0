// Random numbers as a function of (seed, offset, element): Philox 4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", 2011), uniform numbers and Box-Muller normals.
//
//   const Random random(seed, offset);                       // once per sample
//   const auto v = normals<2>(random, element / 4).v;        // in registers: v[0] to v[3]
//   fill_normals(random, element, out, count);               // or to memory, from any element
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
  int32_t keys[rounds][2];
  int32_t lower, upper;  // counter words 1 and 3 of the second round and the first

  Random(int64_t seed, int64_t offset) {
    uint32_t a = (uint32_t)seed, b = (uint32_t)((uint64_t)seed >> 32);
    for (int i = 0; i < rounds; ++i, a += 0x9E3779B9u, b += 0xBB67AE85u) {
      keys[i][0] = (int32_t)a;
      keys[i][1] = (int32_t)b;
    }
    // In the first round all blocks multiply the offset.
    const uint64_t product = (uint64_t)(uint32_t)offset * multipliers[1];
    keys[0][0] ^= (int32_t)(product >> 32);
    lower = (int32_t)product;
    upper = (int32_t)((uint64_t)offset >> 32);
  }
};

// A word lies in the lower half of each 64 bits; what is in the upper half does not matter.
// v[0] v[1] of four blocks in a row lie in neighbouring 128 bits when they leave `ordered`.
#if defined(__AVX512F__)
MMFAST_INLINE vi count_from(int64_t block) {
  return _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm512_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
MMFAST_INLINE vi xor_key(vi a, vi b, const int32_t& key) {
  // From an intrinsic GCC makes a broadcast by itself, on a port that the products need.
  __asm__("vpternlogd $0x96, %2%{1to16%}, %1, %0" : "+v"(a) : "v"(b), "m"(key));
  return a;
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA);
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
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm256_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm256_srli_epi64(a, 32); }
MMFAST_INLINE vi xor_key(vi a, vi b, int32_t key) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), vset(key));
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
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
MMFAST_INLINE vi multiply_words(vi a, vi b) { return _mm_mul_epu32(a, b); }
MMFAST_INLINE vi upper_words(vi a) { return _mm_srli_epi64(a, 32); }
MMFAST_INLINE vi xor_key(vi a, vi b, int32_t key) {
  return _mm_xor_si128(_mm_xor_si128(a, b), vset(key));
}
MMFAST_INLINE vi pair_words(vi low, vi high) {
  return _mm_or_si128(_mm_and_si128(low, _mm_set1_epi64x(0xFFFFFFFF)), _mm_slli_epi64(high, 32));
}
MMFAST_INLINE vf first_ordered(vf even, vf odd) {
  return (vf)_mm_unpacklo_ps((__m128)even, (__m128)odd);
}
MMFAST_INLINE vf second_ordered(vf even, vf odd) {
  return (vf)_mm_unpackhi_ps((__m128)even, (__m128)odd);
}
#endif

// count times random_width words: 0 and 2 of the blocks, and 1 and 3. The elements that share a
// radius lie in one lane.
template <int count>
struct Words {
  vi even[count], odd[count];
};

template <int count>
MMFAST_INLINE Words<count> words(const Random& random, int64_t block) {
  const vi a = vset((int32_t)Random::multipliers[0]), b = vset((int32_t)Random::multipliers[1]);
  vi c0[count], c1[count], c2[count], c3[count];
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const vi counter = count_from(block + j * random_blocks);
    c3[j] = multiply_words(counter, a);
    c2[j] = xor_key(upper_words(c3[j]), vset(random.upper), random.keys[0][1]);
    c1[j] = vset(random.lower);
    c0[j] = xor_key(upper_words(counter), vi{}, random.keys[0][0]);
  }
#pragma GCC unroll 9
  for (int i = 1; i < Random::rounds; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) {
      const vi p = multiply_words(c0[j], a), q = multiply_words(c2[j], b);
      c0[j] = xor_key(upper_words(q), c1[j], random.keys[i][0]);
      c2[j] = xor_key(upper_words(p), c3[j], random.keys[i][1]);
      c1[j] = q;
      c3[j] = p;
    }
  Words<count> made;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    made.even[j] = pair_words(c0[j], c2[j]);
    made.odd[j] = pair_words(c1[j], c3[j]);
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
  const vw exponent = (bits - 0x3F2AAAAB) >> 23;  // the rest is from 2/3 to 4/3
  const vf f = (vf)(bits - (exponent << 23)) - 1.f;
  return fma(to_float(exponent), vf{} - 1.38629436f, f * log_quotient(f));
}

struct CosineSine {
  vf cosine, sine;
};

// Of 2 pi u, u from 0 to 1.
MMFAST_INLINE CosineSine cosine_and_sine(vf u) {
  const vf shifted = fma(u, vf{} + 4.f, vf{} + 0x1.8p23f);
  const vf r = fma(shifted - 0x1.8p23f, vf{} - 0.25f, u), z = r * r;
  vf s = fma(vf{} - 75.3935623f, z, vf{} + 81.5923538f);
  s = fma(s, z, vf{} - 41.3416634f);
  s = fma(s, z, vf{} + 6.28318548f) * r;
  vf c = fma(vf{} + 59.4243431f, z, vf{} - 85.4488220f);
  c = fma(c, z, vf{} + 64.9393692f);
  c = fma(c, z, vf{} - 19.7392082f);
  c = fma(c, z, vf{} + 1.f);
  const vw quarter = (vw)shifted;
  const auto turned = (quarter & 1) != 0;
  const vf cosine = turned ? s : c, sine = turned ? c : s;
  constexpr int32_t sign = INT32_MIN;
  return {(vf)((vw)cosine ^ (((quarter + 1) << 30) & sign)),
          (vf)((vw)sine ^ ((quarter << 30) & sign))};
}

// Elements 4 block to 4 block + count * random_width, in their order.
template <int count>
struct Numbers {
  vf v[2 * count];
};

template <int count>
MMFAST_INLINE Numbers<count> uniforms(const Random& random, int64_t block) {
  const Words<count> w = words<count>(random, block);
  Numbers<count> made;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const vf even = uniform(w.even[j]), odd = uniform(w.odd[j]);
    made.v[2 * j] = first_ordered(even, odd);
    made.v[2 * j + 1] = second_ordered(even, odd);
  }
  return made;
}

template <int count>
MMFAST_INLINE Numbers<count> normals(const Random& random, int64_t block) {
  const Words<count> w = words<count>(random, block);
  Numbers<count> made;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    const vf radius = sqrt(minus_two_log(uniform(w.even[j])));
    const auto [cosine, sine] = cosine_and_sine(uniform(w.odd[j]));
    const vf even = radius * cosine, odd = radius * sine;
    made.v[2 * j] = first_ordered(even, odd);
    made.v[2 * j + 1] = second_ordered(even, odd);
  }
  return made;
}

// Several random_width numbers from a block on, to out.
template <bool normal, int count>
MMFAST_INLINE void store_numbers(const Random& random, int64_t block, float* out) {
  const Numbers<count> made =
      normal ? normals<count>(random, block) : uniforms<count>(random, block);
#pragma GCC unroll 16
  for (int i = 0; i < 2 * count; ++i) store(out + i * lanes, made.v[i]);
}

// count numbers of a sample, from any element on.
template <bool normal>
static void fill_numbers(const Random& random, int64_t element, float* out, int64_t count) {
  const auto some = [&](int64_t skipped, int64_t most) {
    alignas(64) float made[random_width];
    store_numbers<normal, 1>(random, element / 4, made);
    const int64_t n = count < most ? count : most;
    std::memcpy(out, made + skipped, (size_t)n * sizeof(float));
    element += n;
    out += n;
    count -= n;
  };
  if (element % 4) some(element % 4, 4 - element % 4);
  constexpr int64_t many = 4 * random_width;
  for (; count >= many; element += many, out += many, count -= many)
    store_numbers<normal, 4>(random, element / 4, out);
  while (count > 0) some(0, random_width);
}

static void fill_normals(const Random& random, int64_t element, float* out, int64_t count) {
  fill_numbers<true>(random, element, out, count);
}

static inline void fill_uniforms(const Random& random, int64_t element, float* out, int64_t count) {
  fill_numbers<false>(random, element, out, count);
}

}  // namespace mmfast::MMFAST_ISA
