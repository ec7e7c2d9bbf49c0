// Segment sums in double, each code's rows added in their order, so that the bits depend on nothing
// but the values. Either the rows are streamed and added to sums that stay in the cache, threads
// sharing out the columns; or, where those sums are too many, the rows of each code are found by a
// counting sort, threads sharing out the codes.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/code_statistics.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct CodeStatistics {
  const CodeStatisticsArgs& args;
  int64_t slice;         // columns that are streamed together
  const int64_t* start;  // [K + 1] first position of each code in order
  const int32_t* order;  // [N] rows, sorted by code
  std::atomic<bool> failed{false};

  // A row's code; K, which takes what is out of range, for others.
  int64_t code(int64_t row) const {
    const char* p = args.indices + row * args.index_stride;
    const int64_t k = args.index_bytes == 8 ? load<int64_t>(p) : (int64_t)load<int32_t>(p);
    return k >= 0 && k < args.num_codes ? k : args.num_codes;
  }

  double weight(int64_t row) const {
    return args.weights
               ? load_one<double>(args.weights + row * args.weight_stride, args.weight_dtype)
               : 1.0;
  }

  // A row added to the sum before it, null before the first row.
  template <class T>
  __attribute__((always_inline)) void add(const double* before, double* total, double w,
                                          const T* x, int64_t width) const {
    if (!before && args.weights)
      for (int64_t d = 0; d < width; ++d) total[d] = 0.0 + w * (double)x[d];
    else if (!before)
      for (int64_t d = 0; d < width; ++d) total[d] = 0.0 + (double)x[d];
    else if (args.weights)
      for (int64_t d = 0; d < width; ++d) total[d] += w * (double)x[d];
    else
      for (int64_t d = 0; d < width; ++d) total[d] += (double)x[d];
  }

  void write(int64_t k, int64_t column, const double* total, int64_t width) const {
    const int64_t at = k * args.x.width + column;
    if (args.wide)
      std::memcpy((double*)args.sums + at, total, (size_t)width * sizeof(double));
    else
      for (int64_t d = 0; d < width; ++d) ((float*)args.sums)[at + d] = (float)total[d];
  }

  void write_count(int64_t k, double count) const {
    if (args.wide)
      ((double*)args.counts)[k] = count;
    else
      ((float*)args.counts)[k] = (float)count;
  }

  template <class T>
  void stream(int64_t first, int64_t last) {
    const int64_t codes = args.num_codes;
    T* buffer = (T*)std::malloc((size_t)slice * sizeof(T));
    double* totals = (double*)std::malloc((size_t)((codes + 1) * slice) * sizeof(double));
    double* counts = (double*)std::calloc((size_t)codes + 1, sizeof(double));
    if (!buffer || !totals || !counts) failed = true;
    for (int64_t s = first; s < last && !failed; ++s) {
      Rows x = args.x;
      const int64_t column = s * slice;
      x.data += column * x.step;
      if (x.width - column < slice)
        x.width -= column;
      else
        x.width = slice;
      const int64_t width = x.width;
      std::memset(totals, 0, (size_t)((codes + 1) * width) * sizeof(double));
      for (int64_t i = 0; i < x.count; ++i) {
        const double w = weight(i);
        const int64_t k = code(i);
        if (s == 0) counts[k] += w;
        const T* row = read_row<T>(x, i, buffer);
        double* total = totals + k * width;
        if (width == 64)
          add(total, total, w, row, 64);
        else if (width == 32)
          add(total, total, w, row, 32);
        else
          add(total, total, w, row, width);
      }
      for (int64_t k = 0; k < codes; ++k) {
        write(k, column, totals + k * width, width);
        if (s == 0) write_count(k, counts[k]);
      }
    }
    std::free(buffer);
    std::free(totals);
    std::free(counts);
  }

  template <class T>
  void gather(int64_t first, int64_t last) {
    const int64_t width = args.x.width;
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    double* total = (double*)std::malloc((size_t)width * sizeof(double));
    if (!buffer || !total) failed = true;
    for (int64_t k = first; k < last && !failed; ++k) {
      double count = 0;
      if (start[k] == start[k + 1]) std::memset(total, 0, (size_t)width * sizeof(double));
      for (int64_t i = start[k]; i < start[k + 1]; ++i) {
        // Rows of a code lie anywhere: ask for a later one while this one is added.
        if (i + 6 < start[last]) prefetch(order[i + 6]);
        const double w = weight(order[i]);
        count += w;
        add(i > start[k] ? total : nullptr, total, w, read_row<T>(args.x, order[i], buffer), width);
      }
      write(k, 0, total, width);
      write_count(k, count);
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

static bool gather_codes(CodeStatistics& work, const Parallel& parallel) {
  const int64_t rows = work.args.x.count, codes = work.args.num_codes;
  int64_t* start = (int64_t*)std::calloc((size_t)codes + 3, sizeof(int64_t));
  int32_t* order = (int32_t*)std::malloc((size_t)(rows + 1) * sizeof(int32_t));
  if (start && order) {
    // start[k + 2] counts code k; the running sum makes start[k + 1] its first position, and the
    // placing of its rows moves that to the first position of code k + 1.
    for (int64_t i = 0; i < rows; ++i) ++start[work.code(i) + 2];
    for (int64_t k = 0; k < codes; ++k) start[k + 2] += start[k + 1];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t k = work.code(i);
      if (k < codes) order[start[k + 1]++] = (int32_t)i;
    }
    work.start = start;
    work.order = order;
    parallel.run(
        codes,
        [](void* context, int64_t begin, int64_t end) {
          CodeStatistics& w = *(CodeStatistics*)context;
          w.args.x.dtype == Dtype::float64 ? w.gather<double>(begin, end)
                                           : w.gather<float>(begin, end);
        },
        &work);
  } else {
    work.failed = true;
  }
  std::free(start);
  std::free(order);
  return !work.failed;
}

static bool code_statistics(const CodeStatisticsArgs& args, const Parallel& parallel) {
  constexpr int64_t cache = 3 << 18;  // bytes of a thread's sums
  constexpr int64_t least = 16;       // columns, a cache line of float32
  const int64_t width = args.x.width, codes = args.num_codes;
  CodeStatistics work{args, 0, nullptr, nullptr};
  const int64_t fitting = cache / ((codes + 1) * (int64_t)sizeof(double)) / least * least;
  int64_t share = (width + parallel.threads - 1) / parallel.threads;
  share = (share + least - 1) / least * least;
  work.slice = share < fitting ? share : fitting;
  if (work.slice > width) work.slice = width;
  const int64_t slices = work.slice ? (width + work.slice - 1) / work.slice : 0;
  if (slices * 2 < parallel.threads || work.slice == 0) return gather_codes(work, parallel);
  parallel.run(
      slices,
      [](void* context, int64_t begin, int64_t end) {
        CodeStatistics& w = *(CodeStatistics*)context;
        w.args.x.dtype == Dtype::float64 ? w.stream<double>(begin, end)
                                         : w.stream<float>(begin, end);
      },
      &work);
  return !work.failed;
}

}  // namespace mmfast::MMFAST_ISA
