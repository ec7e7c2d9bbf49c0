// Linear layers with an activation of their input, and the gradient of that input: products of
// matrices that have the activations' rows.
//
//   out    = act(x) weight^T + bias     columns: rows of weight
//   grad_x = (grad weight) act'(x)      columns: columns of weight
//
// A panel of columns is packed and stays in the second-level cache while rows are multiplied with
// it; rows are read where they lie unless they need a conversion. A sum is made of one product after
// another, so that its bits depend on nothing but its terms.
#pragma once
#include "cpu/linear_rows.h"
#include "cpu/linear_weight_kernel.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t linear_block = 22 * linear_strip;  // rows multiplied with a panel before the next
constexpr int64_t linear_buffer = 4 << 20;           // bytes of converted rows

template <class Kind, bool GRADIENT>
class LinearProduct {
  using Element = typename Kind::Element;
  using Number = typename Kind::Number;
  using V = typename Kind::V;
  static constexpr int64_t vector = sizeof(V) / sizeof(Number);

 public:
  explicit LinearProduct(const LinearArgs& args)
      : args_(args),
        rows_(GRADIENT ? args.grad : args.x),
        columns_(GRADIENT ? args.weight.width : args.weight.count),
        depth_(elements_of<Kind>(rows_.width)),
        piece_(piece_of(depth_, linear_depth)),
        panels_(parts_of(columns_, linear_columns)) {}

  bool run(const Parallel& parallel) {
    const bool direct = is_direct();
    const int64_t row = most(depth_, 1) * (int64_t)sizeof(Element);
    const int64_t together =
        direct ? rows_.count : piece_of(rows_.count, most(linear_buffer / row, linear_strip));
    LinearMemory<Element> buffer(direct ? 0 : together * depth_);
    if (!buffer.data) return false;
    for (begin_ = 0; begin_ < rows_.count && !failed_; begin_ += together) {
      count_ = least(together, rows_.count - begin_);
      if (direct) {
        a_ = {(const Element*)(rows_.data + begin_ * rows_.strides[0]),
              rows_.strides[0] / (int64_t)sizeof(Element), 1};
      } else {
        a_ = {buffer.data, depth_, 1};
        on_all(parallel, parts_of(count_, linear_strip), this, &LinearProduct::convert);
      }
      // Smaller blocks where there is not enough for all threads.
      block_ = linear_block;
      while (block_ > linear_strip && panels_ * parts_of(count_, block_) < 2 * parallel.threads)
        block_ = parts_of(block_ / 2, linear_strip) * linear_strip;
      on_all(parallel, panels_ * parts_of(count_, block_), this, &LinearProduct::multiply);
    }
    return !failed_;
  }

 private:
  // Rows of elements as they lie.
  bool is_direct() const {
    return rows_.dtype == args_.dtype && (GRADIENT || !args_.activated) &&
           size_of(args_.dtype) * Kind::numbers == (int64_t)sizeof(Element) &&
           rows_.width % Kind::numbers == 0 && rows_.strides[0] % (int64_t)sizeof(Element) == 0;
  }

  // Strips of rows into the buffer.
  void convert(int64_t begin, int64_t end) {
    const LinearReader<Kind> read(rows_, args_, !GRADIENT, rows_.width);
    if (!read.ready()) {
      failed_ = true;
      return;
    }
    const int64_t first = begin * linear_strip, last = least(end * linear_strip, count_);
    pack_along<Kind>(
        const_cast<Element*>(a_.data) + first * depth_, depth_,
        [&](int64_t i) { return read(begin_ + first + i, 0, rows_.width); }, last - first,
        rows_.width, args_.dtype);
  }

  void multiply(int64_t begin, int64_t end) {
    const LinearReader<Kind> read(args_.weight, args_, false,
                                  GRADIENT ? linear_columns : piece_ * Kind::numbers);
    LinearMemory<Element> panel(piece_ * linear_columns);
    LinearMemory<Number> sums(block_ * linear_columns);
    if (!read.ready() || !panel.data || !sums.data) {
      failed_ = true;
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % panels_ * linear_columns, row = task / panels_ * block_;
      const int64_t width = least(linear_columns, columns_ - column);
      const int64_t rows = least(block_, count_ - row);
      for (int64_t k = 0; k == 0 || k < depth_; k += piece_) {
        const int64_t depth = least(piece_, depth_ - k);
        pack(panel.data, read, column, width, k);
        LinearPrefetch next = following(task, end, column, k);
        next.divide(tiles_of<Kind>(rows));
        const bool last = k + depth == depth_;
        for (int64_t i = 0; i < rows; i += linear_strip) {
          const int64_t there = least(linear_strip, rows - i);
          Number* strip = sums.data + i * linear_columns;
          char* to = output(begin_ + row + i, column);
          multiply_strip<Kind>({a_.data + (row + i) * a_.row + k, a_.row, 1}, there, panel.data,
                               width, depth, strip, k == 0, next,
                               last ? written(to, width, there) : LinearPrefetch(),
                               last ? bent(begin_ + row + i, there, column, width)
                                    : LinearPrefetch());
          if (last) finish(strip, to, begin_ + row + i, there, column, width);
        }
      }
    }
  }

  // The numbers that elements k to k + piece_ are made of.
  int64_t numbers(int64_t k) const {
    return least(piece_ * Kind::numbers, rows_.width - k * Kind::numbers);
  }

  void pack(Element* panel, const LinearReader<Kind>& read, int64_t column, int64_t width,
            int64_t k) const {
    const int64_t first = k * Kind::numbers;
    const int64_t whole = parts_of(width, linear_vector<Kind>) * linear_vector<Kind>;
    if constexpr (GRADIENT)
      pack_across<Kind>(
          panel, linear_columns, [&](int64_t i) { return read(first + i, column, width); },
          numbers(k), width, whole, args_.dtype);
    else
      pack_transposed<Kind>(
          panel, linear_columns, [&](int64_t i) { return read(column + i, first, numbers(k)); },
          width, numbers(k), whole, args_.dtype);
  }

  // What is packed after elements k of columns from `column` on.
  LinearPrefetch following(int64_t task, int64_t end, int64_t column, int64_t k) const {
    k += piece_;
    if (k >= depth_) {
      if (task + 1 == end) return {};
      k = 0;
      column = (task + 1) % panels_ * linear_columns;
    }
    const int64_t width = least(linear_columns, columns_ - column), first = k * Kind::numbers;
    return GRADIENT ? LinearPrefetch(args_.weight, first, numbers(k), column, width)
                    : LinearPrefetch(args_.weight, column, width, first, numbers(k));
  }

  const LinearOutput& out() const { return GRADIENT ? args_.grad_x : args_.out; }
  char* output(int64_t row, int64_t column) const {
    return out().data + (row * columns_ + column) * size_of(out().dtype);
  }
  LinearPrefetch written(const char* to, int64_t width, int64_t rows) const {
    const int64_t size = size_of(out().dtype);
    return {to, columns_ * size, width * size, rows};
  }

  // What gradients are multiplied with the activation's derivative at.
  LinearPrefetch bent(int64_t row, int64_t rows, int64_t column, int64_t width) const {
    if (!GRADIENT || !args_.activated) return {};
    return {args_.x, row, rows, column, width};
  }

  void finish(const Number* sums, char* to, int64_t row, int64_t rows, int64_t column,
              int64_t width) const {
    with_output<Kind>(out().dtype, [&]<Dtype D>() {
      const int64_t size = size_of(D);
      if constexpr (GRADIENT) {
        const Dtype dtype = args_.x.dtype;
        const int64_t x_size = size_of(dtype), stride = args_.x.strides[0];
        const char* x = args_.x.data + row * stride + column * x_size;
        with_activation(args_, [&]<int A>() {
          each_vector<Kind>(sums, rows, width, [&](V v, int64_t i, int64_t d, int64_t count) {
            if constexpr (A >= 0) {
              const V at = read_first<V>(x + i * stride + d * x_size, dtype, count);
              v *= Activated<(Activation)A, V>::template at<true>(at).derivative;
            }
            write_first(to + (i * columns_ + d) * size, D, v, count);
          });
        });
      } else {
        const int64_t bias_size = size_of(args_.bias_dtype);
        alignas(64) Number bias[linear_columns]{};
        if (args_.bias)
          for (int64_t d = 0; d < width; d += vector)
            store(bias + d, read_first<V>(args_.bias + (column + d) * bias_size, args_.bias_dtype,
                                          least(vector, width - d)));
        each_vector<Kind>(sums, rows, width, [&](V v, int64_t i, int64_t d, int64_t count) {
          write_first(to + (i * columns_ + d) * size, D, v + load<V>(bias + d), count);
        });
      }
    });
  }

  const LinearArgs& args_;
  const Rows& rows_;
  const int64_t columns_, depth_, piece_, panels_;
  int64_t begin_ = 0, count_ = 0, block_ = 0;
  Broadcasts<Kind> a_{};
  std::atomic<bool> failed_{false};
};

template <class Kind>
static bool linear_of(const LinearArgs& args, const Parallel& parallel) {
  if (args.out.data) return LinearProduct<Kind, false>(args).run(parallel);
  if (args.grad_x.data && !LinearProduct<Kind, true>(args).run(parallel)) return false;
  if (!args.grad_weight.data && !args.grad_bias.data) return true;
  return LinearWeight<Kind>(args).run(parallel);
}

// The result, or where there is none the gradients.
static bool linear(const LinearArgs& args, const Parallel& given) {
  constexpr int64_t few = 1 << 17;  // products: threads would take longer to wake up
  const Parallel one{1, [](int64_t count, Body body, void* context) { body(context, 0, count); }};
  const bool small = args.x.count * args.weight.width <= few / most(args.weight.count, 1);
  const Parallel& parallel = small ? one : given;
  switch (args.dtype) {
    case Dtype::float64: return linear_of<Doubles>(args, parallel);
    case Dtype::bfloat16: return linear_of<HalfProducts>(args, parallel);
    default: return linear_of<Singles>(args, parallel);
  }
}

}  // namespace mmfast::MMFAST_ISA
