// Segment sums in double, each code's rows added in their order, so that the bits depend on nothing
// but the values. Either the rows are streamed and added to sums that stay in the cache, threads
// sharing out the columns and the codes; or, where those sums are too many, the rows of each code
// are found by a counting sort, threads sharing out the codes.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/code_statistics.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

// Takes the sums of code k in columns [column, column + width). count is the sum of its weights
// where column is 0.
using TakeSums = void (*)(const void* context, int64_t k, int64_t column, const double* total,
                          int64_t width, double count);

struct SegmentSums {
  const Segments& args;
  const TakeSums take;
  const void* context;
  int64_t slice = 0, range = 0;    // columns and codes that are streamed together
  int64_t slices = 0;              // of columns
  const int64_t* start = nullptr;  // [K + 1] first position of each code in order
  const int32_t* order = nullptr;  // [N] rows, sorted by code
  std::atomic<bool> failed{false};

  SegmentSums(const Segments& a, TakeSums t, const void* c) : args(a), take(t), context(c) {}

  int64_t code(int64_t row) const {
    const char* p = args.indices + row * args.index_stride;
    return args.index_bytes == 8 ? load<int64_t>(p) : (int64_t)load<int32_t>(p);
  }

  double weight(int64_t row) const {
    return load_one<double>(args.weights + row * args.weight_stride, args.weight_dtype);
  }

  // A row added to total. fixed: its width, if it is known.
  template <bool weighted, int fixed, class T>
  static void add(double* total, double w, const T* x, int64_t width) {
    if (fixed) width = fixed;
    const d8 weights = d8{} + w;
    int64_t d = 0;
#pragma GCC unroll 8
    for (; d + 8 <= width; d += 8) {
      const d8 v = load_wide(x + d);
      store(total + d, load<d8>(total + d) + (weighted ? weights * v : v));
    }
    for (; d < width; ++d) total[d] += weighted ? w * (double)x[d] : (double)x[d];
  }

  template <bool weighted, int fixed, class T>
  void stream_rows(const Rows& x, int64_t first, double* totals, double* counts,
                   T* buffer) const {
    const uint64_t codes = (uint64_t)(args.num_codes - first < range ? args.num_codes - first
                                                                     : range);
    constexpr int64_t together = 256;
    int64_t rows[together], places[together];
    for (int64_t begin = 0; begin < x.count; begin += together) {
      // Which rows have their codes here is a matter of chance: no branch could be foreseen.
      const int64_t end = begin + together < x.count ? begin + together : x.count;
      int64_t found = 0;
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t k = (uint64_t)code(i) - (uint64_t)first;
        rows[found] = i;
        places[found] = (int64_t)k;
        found += k < codes;
      }
      for (int64_t j = 0; j < found; ++j) {
        const double w = weighted ? weight(rows[j]) : 1.0;
        counts[places[j]] += w;
        add<weighted, fixed>(totals + places[j] * x.width, w, read_row<T>(x, rows[j], buffer),
                             x.width);
      }
    }
  }

  // Units are numbered by ranges of codes, then by slices of columns.
  template <class T>
  void stream(int64_t begin, int64_t end) {
    T* buffer = allocate<T>(slice);
    double* totals = allocate<double>(range * slice);
    double* counts = allocate<double>(range);
    if (!buffer || !totals || !counts) failed = true;
    for (int64_t unit = begin; unit < end && !failed; ++unit) {
      const int64_t first = unit / slices * range, column = unit % slices * slice;
      const int64_t left = args.x.width - column;
      const Rows x = args.x.columns(column, left < slice ? left : slice);
      std::memset(totals, 0, (size_t)(range * x.width) * sizeof(double));
      std::memset(counts, 0, (size_t)range * sizeof(double));
      if (args.weights)
        stream_rows<true, 0>(x, first, totals, counts, buffer);
      else if (x.width == 64)
        stream_rows<false, 64>(x, first, totals, counts, buffer);
      else if (x.width == 32)
        stream_rows<false, 32>(x, first, totals, counts, buffer);
      else if (x.width == 16)
        stream_rows<false, 16>(x, first, totals, counts, buffer);
      else
        stream_rows<false, 0>(x, first, totals, counts, buffer);
      for (int64_t k = 0; k < range && first + k < args.num_codes; ++k)
        take(context, first + k, column, totals + k * x.width, x.width, counts[k]);
    }
    std::free(buffer);
    std::free(totals);
    std::free(counts);
  }

  template <class T>
  void gather(int64_t begin, int64_t end) {
    const int64_t width = args.x.width;
    T* buffer = allocate<T>(width);
    double* total = allocate<double>(width);
    if (!buffer || !total) failed = true;
    for (int64_t k = begin; k < end && !failed; ++k) {
      double count = 0;
      std::memset(total, 0, (size_t)width * sizeof(double));
      for (int64_t i = start[k]; i < start[k + 1]; ++i) {
        // Rows of a code lie anywhere: ask for a later one while this one is added.
        if (i + 6 < start[end]) prefetch(order[i + 6]);
        const T* row = read_row<T>(args.x, order[i], buffer);
        const double w = args.weights ? weight(order[i]) : 1.0;
        count += w;
        if (args.weights)
          add<true, 0>(total, w, row, width);
        else
          add<false, 0>(total, w, row, width);
      }
      take(context, k, 0, total, width, count);
    }
    std::free(buffer);
    std::free(total);
  }

  void prefetch(int64_t row) const {
    const char* p = args.x.row(row);
    for (int64_t at = 0; at < args.x.width * args.x.step && at < 1024; at += 64)
      __builtin_prefetch(p + at);
  }

  bool gather_codes(const Parallel& parallel) {
    const int64_t rows = args.x.count, codes = args.num_codes;
    int64_t* starts = (int64_t*)std::calloc((size_t)codes + 3, sizeof(int64_t));
    int32_t* places = allocate<int32_t>(rows);
    if (starts && places) {
      // starts[k + 2] counts code k; the running sum makes starts[k + 1] its first position, and
      // the placing of its rows moves that to the first position of code k + 1.
      for (int64_t i = 0; i < rows; ++i)
        if ((uint64_t)code(i) < (uint64_t)codes) ++starts[code(i) + 2];
      for (int64_t k = 0; k < codes; ++k) starts[k + 2] += starts[k + 1];
      for (int64_t i = 0; i < rows; ++i)
        if ((uint64_t)code(i) < (uint64_t)codes) places[starts[code(i) + 1]++] = (int32_t)i;
      start = starts;
      order = places;
      parallel.run(
          codes,
          [](void* context, int64_t begin, int64_t end) {
            SegmentSums& w = *(SegmentSums*)context;
            w.args.x.dtype == Dtype::float64 ? w.gather<double>(begin, end)
                                             : w.gather<float>(begin, end);
          },
          this);
    } else {
      failed = true;
    }
    std::free(starts);
    std::free(places);
    return !failed;
  }

  bool run(const Parallel& parallel) {
    constexpr int64_t cache = 1 << 20;  // bytes of a thread's sums
    constexpr int64_t least = 16;       // columns, a cache line of float32
    constexpr int64_t most_scans = 4;   // of the indices by a thread, beyond which sorting pays
    const int64_t width = args.x.width, codes = args.num_codes, threads = parallel.threads;
    slice = (width + threads - 1) / threads;
    slice = (slice + least - 1) / least * least;
    if (slice > width) slice = width;
    slices = slice ? (width + slice - 1) / slice : 1;
    range = slice ? cache / (slice * (int64_t)sizeof(double)) : codes;
    const int64_t ranges_for_threads = (threads + slices - 1) / slices;
    const int64_t share = (codes + ranges_for_threads - 1) / ranges_for_threads;
    if (range > share) range = share;
    const int64_t units = range ? (codes + range - 1) / range * slices : 0;
    if (!range || units > most_scans * threads) return gather_codes(parallel);
    parallel.run(
        units,
        [](void* context, int64_t begin, int64_t end) {
          SegmentSums& w = *(SegmentSums*)context;
          w.args.x.dtype == Dtype::float64 ? w.stream<double>(begin, end)
                                           : w.stream<float>(begin, end);
        },
        this);
    return !failed;
  }
};

// take(k, column, total, width, count), as TakeSums.
template <class Take>
static bool segment_sums(const Segments& args, const Take& take, const Parallel& parallel) {
  const TakeSums call = [](const void* context, int64_t k, int64_t column, const double* total,
                           int64_t width, double count) {
    (*(const Take*)context)(k, column, total, width, count);
  };
  return SegmentSums(args, call, &take).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
