// What products of attention multiply: elements, and rows of any dtype packed into them.
//
// An element is one float or double, or two bfloat16 that neighbour along k, the index that is
// summed over, lower first: one instruction multiplies both. Three ways to pack, for sums over k of
// a(m, k) b(k, n), where k counts elements:
//
//   pack_along       a(m, k) with k along a row:    [m][k]
//   pack_across      b(k, n) with n along a row:    [k][n]       (also a(m, k) with m along a row)
//   pack_transposed  b(k, n) with k along a row:    [k][n]
#pragma once
#include "cpu/numbers.h"

namespace mmfast::MMFAST_ISA {

// Not V{} + number, which adds 0 each time.
MMFAST_INLINE vd broadcast_double(const double* p) {
#if defined(__AVX512F__)
  return (vd)_mm512_set1_pd(*p);
#elif defined(__AVX2__)
  return (vd)_mm256_set1_pd(*p);
#else
  return (vd)_mm_set1_pd(*p);
#endif
}

struct Singles {
  using Number = float;  // of the sums
  using Element = float;
  using V = vf;       // sums
  using Factor = vf;  // elements
  static constexpr int64_t numbers = 1;  // in an element
  MMFAST_INLINE Factor broadcast(const Element* p) { return (vf)vbroadcast(p); }
  MMFAST_INLINE Factor read(const Element* p) { return load<vf>(p); }
  MMFAST_INLINE V add(V sum, Factor a, Factor b) { return fma(a, b, sum); }
};

struct Doubles {
  using Number = double;
  using Element = double;
  using V = vd;
  using Factor = vd;
  static constexpr int64_t numbers = 1;
  MMFAST_INLINE Factor broadcast(const Element* p) { return broadcast_double(p); }
  MMFAST_INLINE Factor read(const Element* p) { return load<vd>(p); }
  MMFAST_INLINE V add(V sum, Factor a, Factor b) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Number = float;
  using Element = uint32_t;
  using V = vf;
  using Factor = vi;
  static constexpr int64_t numbers = 2;
  MMFAST_INLINE Factor broadcast(const Element* p) { return vbroadcast(p); }
  MMFAST_INLINE Factor read(const Element* p) { return vload(p); }
  MMFAST_INLINE V add(V sum, Factor a, Factor b) {
    // From an intrinsic GCC copies the accumulators.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
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

// Calls work.operator()<D>() with the dtype known when this is compiled, of those that are packed
// into elements of a kind.
template <class Kind, class Work>
MMFAST_INLINE void with_dtype(Dtype dtype, const Work& work) {
  if constexpr (Kind::numbers == 2)
    work.template operator()<Dtype::bfloat16>();
  else if constexpr (sizeof(typename Kind::Number) == 8)
    work.template operator()<Dtype::float64>();
  else if (dtype == Dtype::float32)
    work.template operator()<Dtype::float32>();
  else if (dtype == Dtype::bfloat16)
    work.template operator()<Dtype::bfloat16>();
  else
    work.template operator()<Dtype::float16>();
}

// Elements of a row from the k-th on that its first `width` numbers are in, zeros behind them.
template <class Kind, Dtype D>
MMFAST_INLINE typename Kind::V read_elements(const char* row, int64_t k, int64_t width) {
  using V = typename Kind::V;
  const int64_t first = k * Kind::numbers;
  if constexpr (Kind::numbers == 2)
    return load_first<V>(row + first * 2, (width - first) * 2);
  else
    return read_first<V>(row + first * size_of(D), D, width - first);
}

// `rows` rows of `width` numbers, row(i) where the i-th starts, `step` elements apart. Of a pair, a
// missing second number is 0.
template <class Kind, class Row>
static void pack_along(typename Kind::Element* out, int64_t step, const Row& row, int64_t rows,
                       int64_t width, Dtype dtype) {
  using V = typename Kind::V;
  constexpr int64_t size = sizeof(typename Kind::Element), per = sizeof(V) / size;
  const int64_t depth = elements_of<Kind>(width);
  with_dtype<Kind>(dtype, [&]<Dtype D>() {
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = row(i);
      for (int64_t k = 0; k < depth; k += per)
        store_first(out + i * step + k, read_elements<Kind, D>(from, k, width),
                    (depth - k) * size);
    }
  });
}

// Rows become k: [elements_of(rows)][columns], columns at least width: zeros behind a row.
template <class Kind, class Row>
static void pack_across(typename Kind::Element* out, int64_t step, const Row& row, int64_t rows,
                        int64_t width, int64_t columns, Dtype dtype) {
  if constexpr (Kind::numbers == 2) {
    using half = uint16_t __attribute__((vector_size(2 * lanes)));
    using whole = uint32_t __attribute__((vector_size(4 * lanes)));
    const auto read = [&](const char* from, int64_t d) __attribute__((always_inline)) {
      if (d + lanes <= width) return __builtin_convertvector(load<half>(from + 2 * d), whole);
      const whole both = load_first<whole>(from + 2 * d, (width - d) * 2);
      half low;
      std::memcpy(&low, &both, sizeof low);
      return __builtin_convertvector(low, whole);
    };
    for (int64_t i = 0; i < rows; i += 2) {
      const char* low = row(i);
      const char* high = i + 1 < rows ? row(i + 1) : nullptr;
      auto* to = out + i / 2 * step;
      int64_t d = 0;
      for (; d < width; d += lanes)
        store_first(to + d, read(low, d) | ((high ? read(high, d) : whole{}) << 16),
                    (columns - d) * 4);
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
  with_dtype<Kind>(dtype, [&]<Dtype D>() {
    for (int64_t first = 0; first < columns; first += per) {
      const int64_t there = rows - first;  // of these columns
      const char* from[per];
      for (int64_t i = 0; i < per; ++i)
        from[i] = there > 0 ? row(first + (i < there ? i : 0)) : nullptr;
      for (int64_t k = 0; k < depth; k += per) {
        V v[per];
        auto* to = out + k * step + first;
        if (there >= per && (k + per) * Kind::numbers <= width) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < per; ++i)
            v[i] = read_elements<Kind, D>(from[i], k, INT64_MAX / 8);  // all are there
          transpose(v);
#pragma GCC unroll 16
          for (int64_t i = 0; i < per; ++i) store(to + i * step, v[i]);
          continue;
        }
        for (int64_t i = 0; i < per; ++i)
          v[i] = i < there ? read_elements<Kind, D>(from[i], k, width) : V{};
        transpose(v);
        for (int64_t i = 0; i < per && k + i < depth; ++i) store(to + i * step, v[i]);
      }
    }
  });
}

}  // namespace mmfast::MMFAST_ISA
