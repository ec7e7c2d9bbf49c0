// Products of small matrices, sums in registers: out(m, n) = sum over k of a(m, k) b(k, n). The
// lanes of a vector are neighbouring n, elements of a are broadcast.
//
// The kind of the products says what an element is: one float or double, or two bfloat16 that
// neighbour along k, lower first, which are multiplied by one instruction. Three ways to pack rows of
// any dtype into elements (k counts elements: `depth` of them):
//
//   pack_along       a(m, k) with k along a row:    [m][k]
//   pack_across      b(k, n) with n along a row:    [k][n]       (also a(m, k) with m along a row)
//   pack_transposed  b(k, n) with k along a row:    [k][n]
//
//   products<Kind>(a, rows, b, vectors, depth, start, put)
#pragma once
#include "cpu/numbers.h"

namespace mmfast::MMFAST_ISA {

struct Singles {
  using Number = float;
  using Element = float;
  using V = vf;
  static constexpr int64_t numbers = 1;  // in an element
  MMFAST_INLINE V broadcast(const Element* p) { return V{} + *p; }
  MMFAST_INLINE V read(const Element* p) { return load<V>(p); }
  MMFAST_INLINE void add(V& sum, V a, V b) { sum = fma(a, b, sum); }
  using Factor = V;
};

struct Doubles {
  using Number = double;
  using Element = double;
  using V = vd;
  static constexpr int64_t numbers = 1;
  MMFAST_INLINE V broadcast(const Element* p) { return V{} + *p; }
  MMFAST_INLINE V read(const Element* p) { return load<V>(p); }
  MMFAST_INLINE void add(V& sum, V a, V b) { sum = fma(a, b, sum); }
  using Factor = V;
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Number = float;  // of the sums
  using Element = uint32_t;
  using V = vf;
  static constexpr int64_t numbers = 2;
  using Factor = vi;
  MMFAST_INLINE Factor broadcast(const Element* p) { return vbroadcast(p); }
  MMFAST_INLINE Factor read(const Element* p) { return vload(p); }
  MMFAST_INLINE void add(V& sum, Factor a, Factor b) {
    // From an intrinsic GCC copies the accumulators.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
using HalfProducts = Pairs;  // of bfloat16

// Elements of which the lower number is from `low`, rounded.
MMFAST_INLINE vi pairs_of(vf low, vf high) {
  using halves = uint16_t __attribute__((vector_size(64)));
  const halves both = (halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vi)__builtin_shuffle(both, order);
}
#else
using HalfProducts = Singles;
#endif

template <class Kind>
constexpr int64_t elements_of(int64_t numbers) {
  return (numbers + Kind::numbers - 1) / Kind::numbers;
}

// Sums that fill the registers and leave room for the factors.
constexpr int tile_rows = 6;
constexpr int tile_vectors = lanes == 16 ? 4 : 2;

template <class V, int M, int N>
struct SumTile {
  static constexpr int rows = M, vectors = N;
  V v[M][N];
};

// Elements a(m, k) lie at data + m row + k step.
template <class Kind>
struct Broadcasts {
  const typename Kind::Element* data;
  int64_t row, step;
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
      for (int n = 0; n < N; ++n) Kind::add(s[m][n], factor, factors[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums.v[m][n] = s[m][n];
}

// out(m, n) for `rows` rows and `vectors` vectors of columns. For every tile of them start(sums, m, n)
// sets its sums, m and n its first row and column, and put(sums, m, n) takes them.
template <class Kind, class Start, class Put>
MMFAST_INLINE void products(Broadcasts<Kind> a, int64_t rows, Panel<Kind> b, int64_t vectors,
                            int64_t depth, const Start& start, const Put& put) {
  constexpr int per = sizeof(typename Kind::V) / sizeof(typename Kind::Element);
  const auto tile = [&]<int M, int N>(int64_t m, int64_t n) __attribute__((always_inline)) {
    SumTile<typename Kind::V, M, N> sums;
    start(sums, m, n);
    add_products<Kind>(sums, {a.data + m * a.row, a.row, a.step}, {b.data + n, b.step}, depth);
    put(sums, m, n);
  };
  const auto columns = [&]<int N>(int64_t n) __attribute__((always_inline)) {
    int64_t m = 0;
    for (; m + tile_rows <= rows; m += tile_rows) tile.template operator()<tile_rows, N>(m, n);
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
  for (; v + tile_vectors <= vectors && (tile_vectors < 4 || vectors - v != 5); v += tile_vectors)
    columns.template operator()<tile_vectors>(v * per);
  if constexpr (tile_vectors > 3)
    for (; v + 3 <= vectors; v += 3) columns.template operator()<3>(v * per);
  if constexpr (tile_vectors > 2)
    for (; v + 2 <= vectors; v += 2) columns.template operator()<2>(v * per);
  for (; v < vectors; ++v) columns.template operator()<1>(v * per);
}

// Starts and ends of tiles: zeros, and sums in memory, rows `step` numbers apart.
struct FromZero {
  template <class V, int M, int N>
  inline __attribute__((always_inline)) void operator()(SumTile<V, M, N>& sums, int64_t, int64_t) const {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums.v[m][n] = V{};
  }
};

template <class T>
struct FromMemory {
  const T* data;
  int64_t step;
  template <class V, int M, int N>
  inline __attribute__((always_inline)) void operator()(SumTile<V, M, N>& sums, int64_t row, int64_t column) const {
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
  inline __attribute__((always_inline)) void operator()(const SumTile<V, M, N>& sums, int64_t row,
                                       int64_t column) const {
    constexpr int per = sizeof(V) / sizeof(T);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        store(data + (row + m) * step + column + n * per, sums.v[m][n]);
  }
};

// The transpose of as many vectors as they have lanes.
template <class V>
MMFAST_INLINE void transpose(V* v) {
  constexpr int size = sizeof(V) / sizeof(V{}[0]);
  using I = decltype(V{} < V{});
  const auto stage = [&]<int D>() __attribute__((always_inline)) {
    if constexpr (D < size) {
      I low, high;
      for (int l = 0; l < size; ++l) {
        low[l] = l & D ? size + l - D : l;
        high[l] = l & D ? size + l : l + D;
      }
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i)
        if (!(i & D)) {
          const V a = v[i], b = v[i + D];
          v[i] = __builtin_shuffle(a, b, low);
          v[i + D] = __builtin_shuffle(a, b, high);
        }
    }
  };
  stage.template operator()<1>();
  stage.template operator()<2>();
  stage.template operator()<4>();
  stage.template operator()<8>();
}

// The numbers of a row from the first on, count of them, zeros behind them.
template <class V>
MMFAST_INLINE V read_some(const char* at, Dtype dtype, int64_t count) {
  constexpr int per = sizeof(V) / sizeof(V{}[0]);
  V v;
  if (count >= per) {
    read_numbers(at, dtype, v);
    return v;
  }
#if defined(__AVX512F__)
  if (per == 16 && count > 0) {
    const auto some = (__mmask16)((1u << count) - 1);
    if (dtype == Dtype::float32) return (V)_mm512_maskz_loadu_ps(some, at);
    if (dtype != Dtype::float64) {
      char halves[32];
      _mm256_storeu_si256((__m256i*)halves, _mm256_maskz_loadu_epi16(some, at));
      read_numbers(halves, dtype, v);
      return v;
    }
  }
#endif
  char padded[per * sizeof(double)]{};
  if (count > 0) std::memcpy(padded, at, (size_t)(count * size_of(dtype)));
  read_numbers(padded, dtype, v);
  return v;
}

// The first count numbers of a vector, less than all.
template <class V>
MMFAST_INLINE void store_first(void* at, V v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V{}[0]) == 4) {
    _mm512_mask_storeu_ps(at, (__mmask16)((1u << count) - 1), (__m512)v);
    return;
  }
#endif
  std::memcpy(at, &v, (size_t)count * sizeof(V{}[0]));
}

// `rows` rows of `width` numbers, row(i) where the i-th starts, `step` elements apart. The elements of
// a row are rounded up; of a pair, the missing second number is 0.
template <class Kind, class Row>
static void pack_along(typename Kind::Element* out, int64_t step, const Row& row, int64_t rows,
                       int64_t width, Dtype dtype) {
  for (int64_t i = 0; i < rows; ++i) {
    const char* from = row(i);
    auto* to = out + i * step;
    if constexpr (Kind::numbers == 2) {
      to[elements_of<Kind>(width) - (width > 0)] = 0;
      std::memcpy(to, from, (size_t)width * 2);
    } else {
      using V = typename Kind::V;
      constexpr int64_t per = sizeof(V) / sizeof(typename Kind::Element);
      int64_t d = 0;
      for (; d + per <= width; d += per)
        store(to + d, read_some<V>(from + d * size_of(dtype), dtype, per));
      if (d < width) {
        store_first(to + d, read_some<V>(from + d * size_of(dtype), dtype, width - d), width - d);
      }
    }
  }
}

// Rows become k: [elements_of(rows)][columns], columns at least width: zeros behind a row.
template <class Kind, class Row>
static void pack_across(typename Kind::Element* out, int64_t step, const Row& row, int64_t rows,
                        int64_t width, int64_t columns, Dtype dtype) {
  if constexpr (Kind::numbers == 2) {
    for (int64_t i = 0; i < rows; i += 2) {
      const char* low = row(i);
      const char* high = i + 1 < rows ? row(i + 1) : nullptr;
      auto* to = out + i / 2 * step;
      using half = uint16_t __attribute__((vector_size(2 * lanes)));
      using whole = uint32_t __attribute__((vector_size(4 * lanes)));
      int64_t d = 0;
      for (; d + lanes <= width; d += lanes) {
        const whole a = __builtin_convertvector(load<half>(low + 2 * d), whole);
        const whole b = high ? __builtin_convertvector(load<half>(high + 2 * d), whole) : whole{};
        store(to + d, a | (b << 16));
      }
      for (; d < width; ++d)
        to[d] = load<uint16_t>(low + 2 * d) |
                (high ? (uint32_t)load<uint16_t>(high + 2 * d) << 16 : 0u);
      for (; d < columns; ++d) to[d] = 0;
    }
  } else {
    pack_along<Kind>(out, step, row, rows, width, dtype);
    if (columns > width)
      for (int64_t i = 0; i < rows; ++i)
        std::memset(out + i * step + width, 0, (size_t)(columns - width) * sizeof *out);
  }
}

// Rows become columns: [elements_of(width)][columns], columns at least rows, a multiple of lanes:
// zeros behind the last row. `step` is at least columns.
template <class Kind, class Row>
static void pack_transposed(typename Kind::Element* out, int64_t step, const Row& row, int64_t rows,
                            int64_t width, int64_t columns, Dtype dtype) {
  using V = typename Kind::V;
  constexpr int64_t per = sizeof(V) / sizeof(typename Kind::Element);
  const int64_t depth = elements_of<Kind>(width);
  const Dtype read = Kind::numbers == 2 ? Dtype::float32 : dtype;  // pairs are moved as they are
  for (int64_t first = 0; first < columns; first += per)
    for (int64_t k = 0; k < depth; k += per) {
      V v[per];
      const int64_t count = depth - k < per ? depth - k : per;
      for (int64_t i = 0; i < per; ++i) {
        if (first + i >= rows) {
          v[i] = V{};
          continue;
        }
        const char* from = row(first + i) + k * Kind::numbers * size_of(dtype);
        if (Kind::numbers == 2 && k + per > width / 2) {
          v[i] = V{};
          std::memcpy(&v[i], from, (size_t)(width - 2 * k) * 2);
        } else {
          v[i] = read_some<V>(from, read, count);
        }
      }
      transpose(v);
      for (int64_t i = 0; i < count; ++i) store(out + (k + i) * step + first, v[i]);
    }
}

}  // namespace mmfast::MMFAST_ISA
