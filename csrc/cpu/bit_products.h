// Distributions of independent bits. That of g bits is the outer product of the distributions u of
// its upper and v of its lower bits, so that a sum over vectors is a matrix product, and so are the
// products of a table with u and v.
#pragma once
#include "cpu/sixteen.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t bit_tile = 32;

// Sizes of a group's halves; the lower one fills a vector if it can.
struct Halves {
  int64_t upper, lower;  // bits
  int64_t heights;       // 2^upper
  int64_t lanes;         // 2^lower, and at least sixteen: what is too much is zero
  explicit Halves(int64_t group) {
    lower = group - group / 2;
    if (lower < 4) lower = group < 4 ? group : 4;
    upper = group - lower;
    heights = (int64_t)1 << upper;
    lanes = lower < 4 ? 16 : (int64_t)1 << lower;
  }
};

// Distributions of `bits` bits of a tile's vectors: out[code][row], the first bit the highest.
// p, q: [bits][bit_tile], the probabilities of one and of zero.
template <class T>
static void by_code(const T* p, const T* q, int64_t bits, T* out) {
  using V = typename Sixteen<T>::V;
  for (int64_t r = 0; r < bit_tile; r += 16) {
    store(out + r, V{} + 1);
    int64_t n = 1;
    for (int64_t i = 0; i < bits; ++i, n *= 2) {
      const V one = load<V>(p + i * bit_tile + r), zero = load<V>(q + i * bit_tile + r);
      for (int64_t k = n - 1; k >= 0; --k) {
        const V old = load<V>(out + k * bit_tile + r);
        store(out + (2 * k + 1) * bit_tile + r, old * one);
        store(out + 2 * k * bit_tile + r, old * zero);
      }
    }
  }
}

// The same, out[row][lanes].
template <class T>
static void by_row(const T* p, const T* q, int64_t bits, int64_t lanes, T* out) {
  using V = typename Sixteen<T>::V;
  for (int64_t r = 0; r < bit_tile; ++r, out += lanes) {
    T first[16]{1};
    int64_t n = 1, i = bits - 1;
    for (; i >= 0 && n < 16; --i, n *= 2)
      for (int64_t k = 0; k < n; ++k) {
        const T old = first[k];
        first[k] = old * q[i * bit_tile + r];
        first[n + k] = old * p[i * bit_tile + r];
      }
    std::memcpy(out, first, sizeof first);
    for (; i >= 0; --i, n *= 2) {
      const T one = p[i * bit_tile + r], zero = q[i * bit_tile + r];
      for (int64_t k = 0; k < n; k += 16) {
        const V old = load<V>(out + k);
        store(out + k, old * zero);
        store(out + n + k, old * one);
      }
    }
  }
}

// H x 16 L numbers of table += sum over the rows of u v.
template <class T, int H, int L>
__attribute__((always_inline)) inline void add_outer(const T* u, const T* v, int64_t lanes,
                                                     int64_t rows, T* table) {
  using V = typename Sixteen<T>::V;
  V sums[H][L];
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l) sums[h][l] = load<V>(table + h * lanes + l * 16);
  for (int64_t r = 0; r < rows; ++r) {
    V b[L];
    for (int l = 0; l < L; ++l) b[l] = load<V>(v + r * lanes + l * 16);
    for (int h = 0; h < H; ++h) {
      const V a = every<V>(u[h * bit_tile + r]);
      for (int l = 0; l < L; ++l) sums[h][l] = madd(a, b[l], sums[h][l]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l) store(table + h * lanes + l * 16, sums[h][l]);
}

// table [heights][lanes] += the outer products of the first `rows` vectors. u by code, v by row.
template <class T>
static void add_products(const T* u, const T* v, const Halves& size, int64_t rows, T* table) {
  const int64_t lanes = size.lanes;
  const bool many = sizeof(T) == 4 && size.heights >= 8 && lanes >= 32;
  for (int64_t l = 0; l < lanes; l += 32)
    for (int64_t h = 0; h < size.heights; h += many ? 8 : 4) {
      const T *a = u + h * bit_tile, *b = v + l;
      T* at = table + h * lanes + l;
      if (many)
        add_outer<T, 8, 2>(a, b, lanes, rows, at);
      else if (size.heights >= 4 && lanes >= 32)
        add_outer<T, 4, 2>(a, b, lanes, rows, at);
      else if (size.heights >= 4)
        add_outer<T, 4, 1>(a, b, lanes, rows, at);
      else
        for (int64_t i = 0; i < size.heights; ++i)
          for (int64_t j = 0; j < lanes && j < 32; j += 16)
            add_outer<T, 1, 1>(a + i * bit_tile, b + j, lanes, rows, at + i * lanes + j);
    }
}

// out[row][16 L] = sum over the codes of u[code][row] table[code][16 L].
template <class T, int L>
__attribute__((always_inline)) inline void times_lanes(const T* u, int64_t codes, const T* table,
                                                       int64_t lanes, T* out) {
  using V = typename Sixteen<T>::V;
  for (int64_t r = 0; r < bit_tile; r += 8) {
    V sums[8][L]{};
    for (int64_t h = 0; h < codes; ++h) {
      V b[L];
      for (int l = 0; l < L; ++l) b[l] = load<V>(table + h * lanes + l * 16);
      for (int i = 0; i < 8; ++i) {
        const V a = every<V>(u[h * bit_tile + r + i]);
        for (int l = 0; l < L; ++l) sums[i][l] = madd(a, b[l], sums[i][l]);
      }
    }
    for (int i = 0; i < 8; ++i)
      for (int l = 0; l < L; ++l) store(out + (r + i) * lanes + l * 16, sums[i][l]);
  }
}

// out[row][lanes] likewise.
template <class T>
static void times_table(const T* u, int64_t codes, const T* table, int64_t lanes, T* out) {
  constexpr int most = sizeof(T) == 4 ? 2 : 1;  // of double the sums fill the registers already
  int64_t l = 0;
  for (; l + 16 * most <= lanes; l += 16 * most)
    times_lanes<T, most>(u, codes, table + l, lanes, out + l);
  for (; l < lanes; l += 16) times_lanes<T, 1>(u, codes, table + l, lanes, out + l);
}

// Sums of w [2^bits] over the codes in which a bit is one, of every bit; returns the sum of all.
// w is lost.
template <class T>
static T sums_of_bits(T* w, int64_t bits, T* ones) {
  using V = typename Sixteen<T>::V;
  for (int64_t i = 0; i < bits; ++i) {
    const int64_t half = (int64_t)1 << (bits - i - 1);
    V totals{};
    T total = 0;
    int64_t k = 0;
    for (; k + 16 <= half; k += 16) {
      const V upper = load<V>(w + half + k);
      totals += upper;
      store(w + k, load<V>(w + k) + upper);
    }
    if (k) total = (T)sum_of(totals);
    for (; k < half; ++k) {
      total += w[half + k];
      w[k] += w[half + k];
    }
    ones[i] = total;
  }
  return w[0];
}

}  // namespace mmfast::MMFAST_ISA
