// Gradients of a linear layer's weight, grad^T act(x), and of its bias, the sums of grad over rows.
//
// A piece of the rows at a time, of that some columns of grad, which are packed once in the order
// that products read them, and a panel of columns of x at a time. Pieces are added up in their order, whose number depends on the shape
// alone.
#pragma once
#include "cpu/linear_rows.h"

namespace mmfast::MMFAST_ISA {

template <class Kind>
class LinearWeight {
  using Element = typename Kind::Element;
  using Number = typename Kind::Number;
  using V = typename Kind::V;
  static constexpr int64_t group = 2 * linear_strip;  // rows of the weight that are packed together
  static constexpr int64_t tiles = group / product_rows;
  static constexpr int64_t packed = 2 << 20;  // bytes of packed grad, about,
  static constexpr int64_t fewest = 12;       // but so many groups: x is packed for each of them
  static constexpr int64_t summed = 32;       // rows added up before they go on in double
  static constexpr int64_t number_vector = sizeof(V) / sizeof(Number);

 public:
  explicit LinearWeight(const LinearArgs& args)
      : args_(args),
        groups_(parts_of(args.weight.count, group)),
        panels_(parts_of(args.weight.width, linear_columns)),
        depth_(elements_of<Kind>(args.x.count)) {
    piece_ = piece_of(depth_, linear_depth);
    tile_ = product_rows * piece_ + linear_vector<Kind>;
    const int64_t bytes = tiles * tile_ * (int64_t)sizeof(Element);
    together_ = piece_of(groups_, most(fewest, packed / bytes));
  }

  bool run(const Parallel& parallel) {
    const int64_t rows = args_.weight.count;
    const bool sums_apart = piece_ < depth_ && args_.grad_weight.data &&
                            size_of(args_.grad_weight.dtype) != (int64_t)sizeof(Number);
    LinearMemory<Element> grad(args_.grad_weight.data ? together_ * tiles * tile_ : 0);
    LinearMemory<Number> sums(sums_apart ? rows * args_.weight.width : 0);
    LinearMemory<double> bias(args_.grad_bias.data ? rows : 0);
    if (!grad.data || !sums.data || !bias.data) return false;
    grad_ = grad.data;
    sums_ = sums_apart ? sums.data : (Number*)args_.grad_weight.data;
    bias_ = bias.data;
    // Where there are fewer panels than threads keep busy, each is for some of the groups.
    splits_ = least(together_, most(1, parts_of(2 * parallel.threads, most(panels_, 1))));
    if (args_.grad_bias.data)
      for (int64_t i = 0; i < rows; ++i) bias_[i] = 0;
    // Without rows, gradients are still written: zeros.
    first_ = 0;
    do {
      count_ = least(piece_ * Kind::numbers, args_.x.count - first_);
      for (from_ = 0; from_ < groups_; from_ += together_) {
        past_ = least(from_ + together_, groups_);
        on_all(parallel, past_ - from_, this, &LinearWeight::pack);
        if (args_.grad_weight.data)
          on_all(parallel, panels_ * splits_, this, &LinearWeight::multiply);
      }
      first_ += count_;
    } while (first_ < args_.x.count && !failed_);
    if (args_.grad_bias.data) write_bias();
    return !failed_;
  }

 private:
  Element* packed_group(int64_t g) const { return grad_ + (g - from_) * tiles * tile_; }
  int64_t width(int64_t g) const { return least(group, args_.weight.count - g * group); }

  void pack(int64_t begin, int64_t end) {
    const LinearReader<Kind> read(args_.grad, args_, false, group);
    alignas(64) Element some[summed / Kind::numbers * group + linear_vector<Kind>];
    if (!read.ready()) {
      failed_ = true;
      return;
    }
    // Some rows at a time, so that they are read along their length.
    for (int64_t i = 0; i < count_; i += summed) {
      const int64_t rows = least(summed, count_ - i);
      for (int64_t g = from_ + begin; g < from_ + end; ++g) {
        if (args_.grad_bias.data) add_rows(g, first_ + i, rows);
        if (!args_.grad_weight.data) continue;
        pack_across<Kind>(
            some, group, [&](int64_t j) { return read(first_ + i + j, g * group, width(g)); },
            rows, width(g), group, args_.dtype);
        Element* to = packed_group(g) + i / Kind::numbers * product_rows;
        for (int64_t t = 0; t < parts_of(width(g), product_rows); ++t)
          into_tile(to + t * tile_, some + t * product_rows, elements_of<Kind>(rows));
      }
    }
  }

  // product_rows elements of each of `depth` rows, one after another. More is written with each,
  // over which the next is: tiles lie as far apart.
  static void into_tile(Element* __restrict to, const Element* __restrict from, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t m = 0; m < product_rows; m += linear_vector<Kind>)
        store(to + k * product_rows + m, load<V>(from + k * group + m));
  }

  // To the sums over rows of the columns of a group.
  void add_rows(int64_t g, int64_t first, int64_t rows) {
    const int64_t size = size_of(args_.grad.dtype), stride = args_.grad.strides[0];
    for (int64_t d = 0; d < width(g); d += number_vector) {
      const int64_t count = least(number_vector, width(g) - d);
      const char* from = args_.grad.data + first * stride + (g * group + d) * size;
      V sum{};
      for (int64_t j = 0; j < rows; ++j)
        sum += read_first<V>(from + j * stride, args_.grad.dtype, count);
      double* sums = bias_ + g * group + d;
      for (int64_t j = 0; j < count; ++j) sums[j] += (double)sum[j];
    }
  }

  void write_bias() const {
    const int64_t size = size_of(args_.grad_bias.dtype);
    for (int64_t d = 0; d < args_.weight.count; d += number_vector) {
      const int64_t count = least(number_vector, args_.weight.count - d);
      V v{};
      for (int64_t j = 0; j < count; ++j) v[j] = (Number)bias_[d + j];
      write_first(args_.grad_bias.data + d * size, args_.grad_bias.dtype, v, count);
    }
  }

  void multiply(int64_t begin, int64_t end) {
    const LinearReader<Kind> read(args_.x, args_, true, linear_columns);
    LinearMemory<Element> panel(piece_ * linear_columns);
    alignas(64) Number sums[linear_strip * linear_columns];
    if (!read.ready() || !panel.data) {
      failed_ = true;
      return;
    }
    const int64_t each = parts_of(past_ - from_, splits_), depth = elements_of<Kind>(count_);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / splits_ * linear_columns;
      const int64_t there = least(linear_columns, args_.weight.width - column);
      pack_across<Kind>(
          panel.data, linear_columns,
          [&](int64_t i) { return read(first_ + i, column, there); }, count_, there,
          parts_of(there, linear_vector<Kind>) * linear_vector<Kind>, args_.dtype);
      LinearPrefetch next = following(task, end);
      next.divide(tiles_of<Kind>(each * group));
      const int64_t last = least(past_, from_ + (task % splits_ + 1) * each);
      for (int64_t g = from_ + task % splits_ * each; g < last; ++g)
        for (int64_t i = 0; i < width(g); i += linear_strip) {
          const int64_t row = g * group + i, rows = least(linear_strip, width(g) - i);
          multiply_strip<Kind>(
              {packed_group(g) + i / product_rows * tile_, 1, product_rows, tile_}, rows,
              panel.data, there, depth, sums, true, next, written(row, rows, column, there));
          finish(sums, row, rows, column, there);
        }
    }
  }

  // The columns of x that are packed after a task.
  LinearPrefetch following(int64_t task, int64_t end) const {
    if (task + 1 == end || (task + 1) % splits_ != 0) return {};
    const int64_t column = (task + 1) / splits_ * linear_columns;
    return {args_.x, first_, count_, column, least(linear_columns, args_.weight.width - column)};
  }

  bool is_first() const { return first_ == 0; }
  bool is_last() const { return first_ + count_ == args_.x.count; }

  LinearPrefetch written(int64_t row, int64_t rows, int64_t column, int64_t there) const {
    const int64_t at = row * args_.weight.width + column;
    const bool apart = !is_first() || !is_last();
    const int64_t size = apart ? (int64_t)sizeof(Number) : size_of(args_.grad_weight.dtype);
    const char* data = apart ? (const char*)sums_ : args_.grad_weight.data;
    return {data + at * size, args_.weight.width * size, there * size, rows};
  }

  void finish(const Number* sums, int64_t row, int64_t rows, int64_t column,
              int64_t there) const {
    const int64_t width = args_.weight.width, at = row * width + column;
    if (is_first() && is_last())
      with_output<Kind>(args_.grad_weight.dtype, [&]<Dtype D>() {
        char* to = args_.grad_weight.data + at * size_of(D);
        each_vector<Kind>(sums, rows, there, [&](V v, int64_t i, int64_t d, int64_t count) {
          write_first(to + (i * width + d) * size_of(D), D, v, count);
        });
      });
    else
      add(sums, row, rows, column, there);
  }

  // To the sums of the pieces before.
  void add(const Number* sums, int64_t row, int64_t rows, int64_t column, int64_t there) const {
    const int64_t width = args_.weight.width, size = size_of(args_.grad_weight.dtype);
    each_vector<Kind>(sums, rows, there, [&](V v, int64_t i, int64_t d, int64_t count) {
      const int64_t at = (row + i) * width + column + d;
      const int64_t bytes = count * (int64_t)sizeof(Number);
      if (!is_first()) v += load_first<V>(sums_ + at, bytes);
      if (is_last())
        write_first(args_.grad_weight.data + at * size, args_.grad_weight.dtype, v, count);
      else
        store_first(sums_ + at, v, bytes);
    });
  }

  const LinearArgs& args_;
  const int64_t groups_, panels_, depth_;
  int64_t piece_ = 0, tile_ = 0, together_ = 1, splits_ = 1;
  int64_t first_ = 0, count_ = 0, from_ = 0, past_ = 0;
  Element* grad_ = nullptr;
  Number* sums_ = nullptr;
  double* bias_ = nullptr;
  std::atomic<bool> failed_{false};
};

}  // namespace mmfast::MMFAST_ISA
