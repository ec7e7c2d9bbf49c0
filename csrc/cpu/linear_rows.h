// What linear layers and their gradients share: pieces, rows read in the dtype of the products,
// products of a strip of rows with a panel, results written.
#pragma once
#include <atomic>

#include "cpu/attention_products.h"
#include "cpu/gated_activation_kernel.h"
#include "cpu/kept_memory.h"
#include "cpu/linear.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t linear_columns = 64;   // of a panel
constexpr int64_t linear_depth = 1024;   // elements along the sums, of a packed panel
constexpr int64_t linear_strip = 8 * product_rows;  // rows whose sums stay in the first-level cache

MMFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MMFAST_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t parts_of(int64_t total, int64_t part) { return (total + part - 1) / part; }

// The length of as few equal pieces as none is longer than `longest`.
MMFAST_INLINE int64_t piece_of(int64_t total, int64_t longest) {
  return total <= longest ? most(total, 1) : parts_of(total, parts_of(total, longest));
}

// Tiles of a whole panel's products, about.
template <class Kind>
constexpr int64_t tiles_of(int64_t rows) {
  constexpr int64_t across = linear_columns * (int64_t)sizeof(typename Kind::Number) /
                             (int64_t)sizeof(typename Kind::V) / product_vectors;
  return parts_of(rows, product_rows) * across;
}

template <class Kind>
constexpr int64_t linear_vector = sizeof(typename Kind::V) / sizeof(typename Kind::Element);

// Memory of a thread or of all; no data when it ran out. What is large lies where outputs do, or it
// would stay with the C library, which nothing else takes it from.
template <class T>
struct LinearMemory {
  T* const kept;
  T* const data;
  explicit LinearMemory(int64_t count)
      : kept(count * (int64_t)sizeof(T) < least_kept
                 ? nullptr
                 : (T*)take_memory(count * (int64_t)sizeof(T))),
        data(kept ? kept : allocate<T>(count)) {}
  LinearMemory(const LinearMemory&) = delete;
  ~LinearMemory() {
    if (kept)
      give_memory(kept);
    else
      std::free(data);
  }
};

// Runs (object->*part)(begin, end) over [0, count) on all threads.
template <class T>
static void on_all(const Parallel& parallel, int64_t count, T* object,
                   void (T::*part)(int64_t, int64_t)) {
  struct Call {
    T* object;
    void (T::*part)(int64_t, int64_t);
  } call{object, part};
  const auto body = [](void* context, int64_t begin, int64_t end) {
    const Call& to = *(const Call*)context;
    (to.object->*to.part)(begin, end);
  };
  if (count > 0) parallel.run(count, body, &call);
}

template <class Work>
MMFAST_INLINE void with_activation(const LinearArgs& args, const Work& work) {
  if (!args.activated) return work.template operator()<-1>();
  switch (args.activation) {
    case Activation::gelu: return work.template operator()<(int)Activation::gelu>();
    case Activation::gelu_tanh: return work.template operator()<(int)Activation::gelu_tanh>();
    case Activation::silu: return work.template operator()<(int)Activation::silu>();
  }
}

// Rows as they are multiplied: activated if asked for, in the dtype of the products.
template <class Kind>
class LinearReader {
  using V = typename Kind::V;
  static constexpr int64_t per = sizeof(V) / sizeof(V{}[0]);
  static constexpr int64_t together = per < 2 ? 2 : per;  // rows that are packed at a time

 public:
  // Of at most `width` numbers at a time.
  LinearReader(const Rows& rows, const LinearArgs& args, bool activate, int64_t width)
      : rows_(rows),
        args_(args),
        activate_(activate && args.activated),
        stride_(parts_of(width, per) * per * 8),
        room_(as_they_are() ? 1 : stride_ * together) {}

  bool ready() const { return room_.data; }
  bool as_they_are() const { return rows_.dtype == args_.dtype && !activate_; }

  // Numbers [first, first + count) of row i, there until as many other rows are read.
  const char* operator()(int64_t i, int64_t first, int64_t count) const {
    const char* from = rows_.data + i * rows_.strides[0] + first * size_of(rows_.dtype);
    if (as_they_are()) return from;
    char* to = room_.data + i % together * stride_;
    if (activate_)
      with_activation(args_, [&]<int A>() { convert<A>(to, from, count); });
    else
      convert<-1>(to, from, count);
    return to;
  }

 private:
  template <int A>
  void convert(char* to, const char* from, int64_t count) const {
    const int64_t size = size_of(rows_.dtype), wanted = size_of(args_.dtype);
    for (int64_t d = 0; d < count; d += per) {
      V v = read_first<V>(from + d * size, rows_.dtype, count - d);
      if constexpr (A >= 0) v *= Activated<(Activation)A, V>::template at<false>(v).s;
      write_numbers(to + d * wanted, args_.dtype, v);
    }
  }

  const Rows& rows_;
  const LinearArgs& args_;
  const bool activate_;
  const int64_t stride_;
  LinearMemory<char> room_;
};

// A block of memory that is needed next, brought into the second-level cache meanwhile.
class LinearPrefetch {
 public:
  LinearPrefetch() = default;
  // rows of `bytes` bytes, in as many parts as divide(parts) says; all of them at first.
  LinearPrefetch(const char* at, int64_t stride, int64_t bytes, int64_t rows)
      : at_(at), stride_(stride), bytes_(bytes), rows_(bytes > 0 ? rows : 0) {
    divide(1);
  }
  LinearPrefetch(const Rows& rows, int64_t row, int64_t count, int64_t first, int64_t numbers)
      : LinearPrefetch(rows.data + row * rows.strides[0] + first * size_of(rows.dtype),
                       rows.strides[0], numbers * size_of(rows.dtype), count) {}

  void divide(int64_t parts) { part_ = parts_of(rows_ * parts_of(bytes_, 64), parts); }

  // The next part of it.
  static inline __attribute__((always_inline)) void next(LinearPrefetch& from) {
    for (int64_t lines = from.part_; lines > 0 && from.rows_ > 0; --lines) {
      _mm_prefetch(from.at_ + from.along_, _MM_HINT_T1);
      from.along_ += 64;
      if (from.along_ < from.bytes_) continue;
      from.along_ = 0;
      from.at_ += from.stride_;
      --from.rows_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, part_ = 0, along_ = 0;
};

// What a tile of sums starts from; meanwhile memory is brought in.
template <class T>
struct LinearStart {
  FromMemory<T> sums;
  bool zero;
  LinearPrefetch &inputs, &outputs, &others;
  template <class Tile>
  inline __attribute__((always_inline)) void operator()(Tile& tile, int64_t row,
                                                        int64_t column) const {
    if (zero)
      FromZero{}(tile, row, column);
    else
      sums(tile, row, column);
    LinearPrefetch::next(inputs);
    LinearPrefetch::next(outputs);
    LinearPrefetch::next(others);
  }
};

// sums[rows][linear_columns] += products of rows with a panel, or = at the beginning.
template <class Kind>
static __attribute__((noinline)) void multiply_strip(Broadcasts<Kind> a, int64_t rows,
                                                     const typename Kind::Element* panel,
                                                     int64_t width, int64_t depth,
                                                     typename Kind::Number* sums, bool beginning,
                                                     LinearPrefetch& inputs,
                                                     LinearPrefetch outputs,
                                                     LinearPrefetch others = {}) {
  using Number = typename Kind::Number;
  outputs.divide(tiles_of<Kind>(rows));
  others.divide(tiles_of<Kind>(rows));
  products<Kind>(a, rows, Panel<Kind>{panel, linear_columns},
                 parts_of(width, linear_vector<Kind>), depth,
                 LinearStart<Number>{{sums, linear_columns}, beginning, inputs, outputs, others},
                 ToMemory<Number>{sums, linear_columns});
}

// Calls work.operator()<D>() with the dtype of an output of the kind's numbers.
template <class Kind, class Work>
MMFAST_INLINE void with_output(Dtype dtype, const Work& work) {
  if constexpr (sizeof(typename Kind::Number) == 8) {
    work.template operator()<Dtype::float64>();
  } else {
    if (dtype == Dtype::float32)
      work.template operator()<Dtype::float32>();
    else if (dtype == Dtype::bfloat16)
      work.template operator()<Dtype::bfloat16>();
    else
      work.template operator()<Dtype::float16>();
  }
}

// For each vector of sums[rows][linear_columns], `width` wide: write(v, row, column, count).
template <class Kind, class Write>
MMFAST_INLINE void each_vector(const typename Kind::Number* sums, int64_t rows, int64_t width,
                               const Write& write) {
  using V = typename Kind::V;
  constexpr int64_t per = sizeof(V) / sizeof(V{}[0]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < width; d += per)
      write(load<V>(sums + i * linear_columns + d), i, d, least(per, width - d));
}

}  // namespace mmfast::MMFAST_ISA
