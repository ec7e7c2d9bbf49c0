// Exact nearest codes by certified screening.
//
// Vectors and codes, less the codebook's mean, are rounded to integers; the integer dot products
// have no rounding of their own, so that the norms of the two rounding residuals bound the error
// of every score (Cauchy-Schwarz). Each row keeps the best and the second best score of each lane;
// the few codes that the bound cannot exclude are compared in float64.
//
// Scores are s = x.c - |c|^2 / 2 (euclidean) or x.c: larger is nearer.
#pragma once
#include "cpu/nearest_code_dense.h"
#include "cpu/nearest_code_pruned.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t direct_rows = 6;  // below, packing the codebook does not pay

// The rows of one call, handed out in blocks.
template <class T, class Method>
struct Blocks {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Codebook<T>& codebook;
  int64_t block_rows;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  Blocks(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& c, int threads)
      : args(a), exact(e), codebook(c), block_rows(Method::rows_per_block(a.x.count, threads)) {}

  void work() {
    Method method(args, exact, codebook, block_rows);
    if (!method.allocate()) {
      failed = true;
      return;
    }
    const int64_t rows = args.x.count;
    for (int64_t begin; (begin = next.fetch_add(block_rows)) < rows;)
      method.run(begin, begin + block_rows < rows ? begin + block_rows : rows);
  }

  bool run(const Parallel& parallel) {
    const int64_t blocks = (args.x.count + block_rows - 1) / block_rows;
    const int64_t threads = blocks < parallel.threads ? blocks : parallel.threads;
    if (threads == 1)
      work();
    else
      parallel.run(
          threads, [](void* context, int64_t, int64_t) { ((Blocks*)context)->work(); }, this);
    return !failed;
  }
};

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

template <class T>
static bool nearest_code_typed(const NearestCodeArgs& args, const Parallel& parallel) {
  Exact<T> exact(args);
  if (!exact.prepare(parallel)) return false;
  if (args.x.count < direct_rows) return direct(exact, parallel);
  Codebook<T> codebook(args, exact);
  const char* e = getenv("MMG");
  if (!codebook.prepare(parallel, e ? atoi(e) : 0)) return false;
  if (codebook.beyond) return direct(exact, parallel);
  if (codebook.grouped) return Blocks<T, Pruned<T>>(args, exact, codebook, parallel.threads).run(parallel);
  return Blocks<T, Dense<T>>(args, exact, codebook, parallel.threads).run(parallel);
}

static bool nearest_code(const NearestCodeArgs& args, const Parallel& parallel) {
  const bool wide = args.x.dtype == Dtype::float64 || args.codes.dtype == Dtype::float64;
  return wide ? nearest_code_typed<double>(args, parallel)
              : nearest_code_typed<float>(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
