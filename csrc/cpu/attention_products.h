// Products of small matrices, sums in registers: out(m, n) = sum over k of a(m, k) b(k, n). The
// lanes of a vector are neighbouring n, elements of a are broadcast.
//
//   products<Kind>(a, rows, b, vectors, depth, start, put)
#pragma once
#include "cpu/attention_elements.h"

namespace mmfast::MMFAST_ISA {

// Sums that fill the registers and leave room for the factors.
constexpr int product_rows = 6;
constexpr int product_vectors = lanes == 16 ? 4 : 2;

template <class V, int M, int N>
struct SumTile {
  static constexpr int rows = M, vectors = N;
  V v[M][N];
};

// Elements a(m, k) lie at data + m row + k step; where `tile` is given, product_rows of the rows do,
// and the next as many `tile` elements further.
template <class Kind>
struct Broadcasts {
  const typename Kind::Element* data;
  int64_t row, step, tile = 0;

  MMFAST_INLINE const typename Kind::Element* at(Broadcasts a, int64_t m) {
    return a.data + (a.tile ? m / product_rows * a.tile + m % product_rows * a.row : m * a.row);
  }
};

// Elements b(k, n) lie at data + k step + n.
template <class Kind>
struct Panel {
  const typename Kind::Element* data;
  int64_t step;
};

template <class Kind, int M, int N>
MMFAST_INLINE void add_products(SumTile<typename Kind::V, M, N>& sums, Broadcasts<Kind> a,
                                Panel<Kind> b, int64_t depth) {
  constexpr int per = sizeof(typename Kind::V) / sizeof(typename Kind::Element);
  const auto* __restrict pa = a.data;
  const auto* __restrict pb = b.data;
  // Local, or GCC keeps the sums in memory.
  typename Kind::V s[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) s[m][n] = sums.v[m][n];
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, pa += a.step, pb += b.step) {
    typename Kind::Factor factors[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) factors[n] = Kind::read(pb + n * per);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Kind::Factor factor = Kind::broadcast(pa + m * a.row);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) s[m][n] = Kind::add(s[m][n], factor, factors[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums.v[m][n] = s[m][n];
}

// A tile of products, in a function of its own: elsewhere GCC runs out of registers and keeps sums
// in memory.
template <class Kind, int M, int N, class Start, class Put>
static __attribute__((noinline)) void tile_products(Broadcasts<Kind> a, Panel<Kind> b,
                                                    int64_t depth, const Start& start,
                                                    const Put& put, int64_t m, int64_t n) {
  SumTile<typename Kind::V, M, N> sums;
  start(sums, m, n);
  add_products<Kind>(sums, a, b, depth);
  put(sums, m, n);
}

// out(m, n) for `rows` rows and `vectors` vectors of columns. For every tile of them
// start(sums, m, n) sets its sums, m and n its first row and column; put(sums, m, n) takes them.
template <class Kind, class Start, class Put>
MMFAST_INLINE void products(Broadcasts<Kind> a, int64_t rows, Panel<Kind> b, int64_t vectors,
                            int64_t depth, const Start& start, const Put& put) {
  constexpr int per = sizeof(typename Kind::V) / sizeof(typename Kind::Element);
  const auto tile = [&]<int M, int N>(int64_t m, int64_t n) __attribute__((always_inline)) {
    tile_products<Kind, M, N>({Broadcasts<Kind>::at(a, m), a.row, a.step}, {b.data + n, b.step},
                              depth, start, put, m, n);
  };
  const auto columns = [&]<int N>(int64_t n) __attribute__((always_inline)) {
    int64_t m = 0;
    for (; m + product_rows <= rows; m += product_rows)
      tile.template operator()<product_rows, N>(m, n);
    if (rows - m >= 4) {
      tile.template operator()<4, N>(m, n);
      m += 4;
    }
    if (rows - m >= 2) {
      tile.template operator()<2, N>(m, n);
      m += 2;
    }
    if (rows > m) tile.template operator()<1, N>(m, n);
  };
  int64_t v = 0;
  // Five as three and two: one alone would wait for what is broadcast.
  for (; v + product_vectors <= vectors && (product_vectors < 4 || vectors - v != 5);
       v += product_vectors)
    columns.template operator()<product_vectors>(v * per);
  if constexpr (product_vectors > 3)
    for (; v + 3 <= vectors; v += 3) columns.template operator()<3>(v * per);
  if constexpr (product_vectors > 2)
    for (; v + 2 <= vectors; v += 2) columns.template operator()<2>(v * per);
  for (; v < vectors; ++v) columns.template operator()<1>(v * per);
}

// Starts and ends of tiles: zeros, and sums in memory, rows `step` numbers apart.
struct FromZero {
  template <class V, int M, int N>
  inline __attribute__((always_inline)) void operator()(SumTile<V, M, N>& sums, int64_t,
                                                        int64_t) const {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums.v[m][n] = V{};
  }
};

template <class T>
struct FromMemory {
  const T* data;
  int64_t step;
  template <class V, int M, int N>
  inline __attribute__((always_inline)) void operator()(SumTile<V, M, N>& sums, int64_t row,
                                                        int64_t column) const {
    constexpr int per = sizeof(V) / sizeof(T);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sums.v[m][n] = load<V>(data + (row + m) * step + column + n * per);
  }
};

template <class T>
struct ToMemory {
  T* data;
  int64_t step;
  template <class V, int M, int N>
  inline __attribute__((always_inline)) void operator()(const SumTile<V, M, N>& sums,
                                                        int64_t row, int64_t column) const {
    constexpr int per = sizeof(V) / sizeof(T);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        store(data + (row + m) * step + column + n * per, sums.v[m][n]);
  }
};

}  // namespace mmfast::MMFAST_ISA
