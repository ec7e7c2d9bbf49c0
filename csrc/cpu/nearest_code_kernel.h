// Exact nearest codes by certified screening.
//
// Vectors and codes, less the codebook's mean, are rounded to integers, of 16 bits or, where their
// products are twice as fast and not too many codes are left, of 8; the integer dot products
// have no rounding of their own, so that the norms of the two rounding residuals bound the error
// of every score (Cauchy-Schwarz). Each row keeps the best and the second best score of each lane;
// the few codes that the bound cannot exclude are compared in float64.
//
// Scores are s = x.c - |c|^2 / 2 (euclidean) or x.c: larger is nearer.
#pragma once
#include "cpu/nearest_code_dense.h"
#if MMFAST_MATRIX
#include "cpu/nearest_code_matrix.h"
#endif
#include "cpu/nearest_code_plain.h"
#include "cpu/nearest_code_pruned.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t direct_rows = 6;           // below, packing the codebook does not pay
constexpr int64_t direct_work = 20000;       // nor for fewer comparisons than this
constexpr int64_t packing_rows = 1000;       // nor packing it as pairs rather than integers
constexpr int64_t pruning_pairs = 1 << 20;   // rows times codes from which grouping can pay
constexpr int64_t most_pairs_of_clusters = 12288;  // codes beyond which groups beat Form::pairs

// The rows of one call, handed out in blocks. Codes: how the method has them.
template <class T, class Method, class Codes = Codebook<T>>
struct Blocks {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Codes& codes;
  int64_t block_rows;
  int64_t ahead = 0;  // from a block to the one that its thread probably takes next
  bool stay = true;  // however hard the rows are
  std::atomic<int64_t> next;
  std::atomic<int64_t> refused;  // the first row that was too hard, or the number of rows
  std::atomic<bool> failed{false};

  Blocks(const NearestCodeArgs& a, const Exact<T>& e, const Codes& c, int64_t first,
         int threads)
      : args(a),
        exact(e),
        codes(c),
        block_rows(Method::rows_per_block(a.x.count - first, threads)),
        next(first),
        refused(a.x.count) {}

  void work() {
    Method method(args, exact, codes, block_rows);
    if constexpr (requires { method.ahead; }) method.ahead = ahead;
    if (!method.allocate()) {
      failed = true;
      return;
    }
    const int64_t rows = args.x.count;
    for (int64_t begin; refused == rows && (begin = next.fetch_add(block_rows)) < rows;)
      if (!method.run(begin, begin + block_rows < rows ? begin + block_rows : rows, stay))
        refuse(begin);
  }

  void refuse(int64_t begin) {
    int64_t first = refused;
    while (begin < first && !refused.compare_exchange_weak(first, begin)) continue;
  }

  // Decides the rows before `refused`, and perhaps some after it.
  bool run(const Parallel& parallel) {
    const int64_t blocks = (args.x.count - next + block_rows - 1) / block_rows;
    const int64_t threads = blocks < parallel.threads ? blocks : parallel.threads;
    ahead = threads * block_rows;
    if (threads == 1)
      work();
    else
      parallel.run(
          threads, [](void* context, int64_t, int64_t) { ((Blocks*)context)->work(); }, this);
    return !failed;
  }
};

// Whether matrix products cost less than int16 dot products, which leave no depth unused.
constexpr bool matrix_pays(int64_t width) { return MMFAST_MATRIX && width >= 24; }

// Whether products of bytes do, whose scores leave more codes to compare: that cost as much as the
// products of 24 Ki numbers saved.
constexpr bool bytes_pay(int64_t codes, int64_t width) {
  return MMFAST_BYTES && !MMFAST_MATRIX && width >= 16 && width <= 4096 && codes * width > 28 << 10;
}

// And those of pairs, as long as the rows' fit the first-level cache.
constexpr bool pairs_pay(int64_t width) { return width <= 84; }

// Compares all rows with all codes in float64.
template <class T>
static bool direct(const Exact<T>& exact, const Parallel& parallel) {
  const Body scan = [](void* context, int64_t begin, int64_t end) {
    const Exact<T>& e = *(const Exact<T>*)context;
    for (int64_t row = begin; row < end; ++row) e.scan(row);
  };
  const int64_t rows = exact.args.x.count;
  if (rows * exact.args.codes.count * exact.width < serial_work)
    scan((void*)&exact, 0, rows);
  else
    parallel.run(rows, scan, (void*)&exact);
  return true;
}

// Whether groups of codes look worth skipping: how near the nearest of a few codes is to a few
// rows, against all of these. 0.08 on patches of photographs, 0.1 on Gaussian data of 5 dimensions,
// 0.2 of 8, 0.6 of 64; pruning pays below about 0.13, beside products of matrices 0.06.
template <class T>
static bool clustered(const Exact<T>& exact) {
  constexpr int64_t most_rows = 32, most_codes = 128;
  const Rows &x = exact.args.x, &codes = exact.args.codes;
  T* buffer = (T*)std::malloc(2 * (size_t)exact.width * sizeof(T));
  if (!buffer) return false;
  const int64_t rows = x.count < most_rows ? x.count : most_rows;
  const int64_t count = codes.count < most_codes ? codes.count : most_codes;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* v = read_row<T>(x, x.count / rows * i, buffer);
    double least = infinity, sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = codes.count / count * j;
      const double d = exact.quick(v, 0, read_row<T>(codes, k, buffer + exact.width), k);
      least = d < least ? d : least;
      sum += d;
    }
    total += sum > 0 ? least / sum * (double)count : 1;
  }
  std::free(buffer);
  return total < (MMFAST_MATRIX ? 0.06 : 0.13) * (double)rows;
}

template <class T>
static bool nearest_code_typed(const NearestCodeArgs& args, const Parallel& parallel) {
  Exact<T> exact(args);
  if (!exact.prepare(parallel)) return false;
  const int64_t rows = args.x.count, codes = args.codes.count;
  if (rows < direct_rows || rows * codes * (args.x.width + 64) < direct_work)
    return direct(exact, parallel);
  if constexpr (sizeof(T) == 4)
    if (Plain::pays(codes, args.x.width)) {
      Plain plain(args, exact);
      if (!plain.allocate()) return false;
      return plain.prepare() ? plain.run(parallel) : direct(exact, parallel);
    }
  int64_t group_codes = 64;
  while (codes / group_codes > 1024) group_codes *= 2;
  const bool can_prune = args.metric == Metric::euclidean && codes >= 4 * group_codes;
  bool prune = can_prune && rows * codes > pruning_pairs && clustered(exact);
  Form form = matrix_pays(args.x.width)  ? Form::bfloat16
              : bytes_pay(codes, args.x.width) ? Form::bytes
                                        : Form::int16;
  if (prune && form == Form::bfloat16 && pairs_pay(args.x.width) &&
      codes <= most_pairs_of_clusters) {
    prune = false;
    form = Form::pairs;
  }
  int64_t first = 0;
  Codebook<T> codebook(args, exact);
  for (;;) {
    if (!codebook.prepare(parallel, form, prune ? group_codes : 0)) return false;
    if (codebook.beyond) return direct(exact, parallel);
    if (codebook.grouped) {
      Boxes<T> boxes(codebook);
      if (!boxes.prepare()) return false;
      return Blocks<T, Pruned<T>, Boxes<T>>(args, exact, boxes, first, parallel.threads)
          .run(parallel);
    }
#if MMFAST_MATRIX
    if (codebook.form != Form::int16) {
      Blocks<T, Matrix<T>> blocks(args, exact, codebook, first, parallel.threads);
      blocks.stay = form == Form::pairs && (prune || !can_prune);
      if (!blocks.run(parallel)) return false;
      first = blocks.refused;
      if (first == rows) return true;
      if (form == Form::pairs) prune = true;
      const bool again = pairs_pay(args.x.width) && rows - first > packing_rows;
      form = form == Form::pairs || again ? Form::pairs : Form::int16;
      continue;
    }
#endif
    Blocks<T, Dense<T>> blocks(args, exact, codebook, first, parallel.threads);
    blocks.stay = codebook.form == Form::int16 && (prune || !can_prune);
    if (!blocks.run(parallel)) return false;
    first = blocks.refused;
    if (first == rows) return true;
    // Too many codes had to be compared exactly: int16 and groups have finer scales.
    if (form == Form::bytes)
      form = Form::int16;
    else
      prune = true;
  }
}

static bool nearest_code(const NearestCodeArgs& args, const Parallel& parallel) {
  const bool wide = args.x.dtype == Dtype::float64 || args.codes.dtype == Dtype::float64;
  return wide ? nearest_code_typed<double>(args, parallel)
              : nearest_code_typed<float>(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
