// Segment sums: the rows of each code are found by a counting sort and added in their order, in
// double, by one thread, so that the bits do not depend on the number of threads.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/code_statistics.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct CodeStatistics {
  const CodeStatisticsArgs& args;
  const int64_t* start;  // [K + 1] first position of each code in order
  const int32_t* order;  // [N] rows, sorted by code
  std::atomic<bool> failed{false};

  double weight(int64_t row) const {
    return args.weights
               ? load_one<double>(args.weights + row * args.weight_stride, args.weight_dtype)
               : 1.0;
  }

  template <class T>
  void run(int64_t first, int64_t last) {
    const int64_t width = args.x.width;
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    double* total = (double*)std::malloc((size_t)width * sizeof(double));
    if (!buffer || !total) failed = true;
    for (int64_t k = first; k < last && !failed; ++k) {
      double count = 0;
      for (int64_t i = start[k]; i < start[k + 1]; ++i) {
        // Rows of a code lie anywhere: ask for a later one while this one is added.
        if (i + 6 < start[last]) prefetch(order[i + 6]);
        const double w = weight(order[i]);
        count += w;
        const T* x = read_row<T>(args.x, order[i], buffer);
        if (i == start[k])
          for (int64_t d = 0; d < width; ++d) total[d] = w * (double)x[d];
        else
          for (int64_t d = 0; d < width; ++d) total[d] += w * (double)x[d];
      }
      if (start[k] == start[k + 1])
        for (int64_t d = 0; d < width; ++d) total[d] = 0;
      if (args.wide) {
        ((double*)args.counts)[k] = count;
        std::memcpy((double*)args.sums + k * width, total, (size_t)width * sizeof(double));
      } else {
        ((float*)args.counts)[k] = (float)count;
        float* sums = (float*)args.sums + k * width;
        for (int64_t d = 0; d < width; ++d) sums[d] = (float)total[d];
      }
    }
    std::free(buffer);
    std::free(total);
  }

  void prefetch(int64_t row) const {
    const char* p = args.x.row(row);
    for (int64_t at = 0; at < args.x.width * args.x.step && at < 1024; at += 64)
      __builtin_prefetch(p + at);
  }
};

static bool code_statistics(const CodeStatisticsArgs& args, const Parallel& parallel) {
  const int64_t rows = args.x.count, codes = args.num_codes;
  int64_t* start = (int64_t*)std::calloc((size_t)codes + 2, sizeof(int64_t));
  int32_t* order = (int32_t*)std::malloc((size_t)(rows + 1) * sizeof(int32_t));
  if (!start || !order) {
    std::free(start);
    std::free(order);
    return false;
  }
  const auto index = [&](int64_t i) -> int64_t {
    const char* p = args.indices + i * args.index_stride;
    return args.index_bytes == 8 ? load<int64_t>(p) : (int64_t)load<int32_t>(p);
  };
  // start[k + 2] counts code k; the running sum makes start[k + 1] its first position, and the
  // placing of its rows moves that to the first position of code k + 1.
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t k = index(i);
    if (k >= 0 && k < codes) ++start[k + 2];
  }
  for (int64_t k = 0; k < codes; ++k) start[k + 2] += start[k + 1];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t k = index(i);
    if (k >= 0 && k < codes) order[start[k + 1]++] = (int32_t)i;
  }
  CodeStatistics work{args, start, order};
  parallel.run(
      codes,
      [](void* context, int64_t begin, int64_t end) {
        CodeStatistics& w = *(CodeStatistics*)context;
        if (w.args.x.dtype == Dtype::float64)
          w.run<double>(begin, end);
        else
          w.run<float>(begin, end);
      },
      &work);
  std::free(start);
  std::free(order);
  return !work.failed;
}

}  // namespace mmfast::MMFAST_ISA
