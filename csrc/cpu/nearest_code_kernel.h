// Exact nearest codes by certified screening.
//
// Vectors and codes, less the codebook's mean, are rounded to integers; the integer dot products
// have no rounding of their own, so that the norms of the two rounding residuals bound the error
// of every score (Cauchy-Schwarz). Each row keeps the best and the second best score of each lane;
// the few codes that the bound cannot exclude are compared in float64.
//
// Scores are s = x.c - |c|^2 / 2 (euclidean) or x.c: larger is nearer.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/nearest_code.h"
#include "cpu/nearest_code_exact.h"
#include "cpu/nearest_code_screen.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

// Work of one call: the packed codebook, and the rows handed out in blocks.
template <class T>
struct NearestCode {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Screen<T>& screen;
  int64_t block_rows;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void run() {
    Scratch<T> scratch;
    if (!scratch.allocate(screen, block_rows)) {
      failed = true;
      return;
    }
    const int64_t rows = args.x.count;
    for (;;) {
      const int64_t begin = next.fetch_add(block_rows);
      if (begin >= rows) break;
      screen.rows(scratch, begin, begin + block_rows < rows ? begin + block_rows : rows);
    }
  }
};

template <class T>
static bool nearest_code_typed(const NearestCodeArgs& args, const Parallel& parallel) {
  const int64_t rows = args.x.count, codes = args.codes.count, width = args.x.width;
  Exact<T> exact(args);
  if (!exact.prepare(parallel)) return false;
  // Packing a code costs about as much as comparing it a few times.
  if (rows < direct_rows) {
    const auto scan = [](void* context, int64_t begin, int64_t end) {
      const Exact<T>& e = *(const Exact<T>*)context;
      for (int64_t row = begin; row < end; ++row) e.scan(row);
    };
    if (rows * codes * width < serial_work)
      scan(&exact, 0, rows);
    else
      parallel.run(rows, scan, &exact);
    return true;
  }
  Screen<T> screen(args, exact);
  if (!screen.prepare(parallel)) return false;
  NearestCode<T> work{args, exact, screen, screen.block_rows(parallel.threads)};
  const auto body = [](void* context, int64_t, int64_t) { ((NearestCode<T>*)context)->run(); };
  const int64_t blocks = (rows + work.block_rows - 1) / work.block_rows;
  const int64_t threads = blocks < parallel.threads ? blocks : parallel.threads;
  if (threads == 1)
    body(&work, 0, 1);
  else
    parallel.run(threads, body, &work);
  return !work.failed;
}

static bool nearest_code(const NearestCodeArgs& args, const Parallel& parallel) {
  const bool wide = args.x.dtype == Dtype::float64 || args.codes.dtype == Dtype::float64;
  return wide ? nearest_code_typed<double>(args, parallel)
              : nearest_code_typed<float>(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
