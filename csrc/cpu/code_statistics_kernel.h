// Counts and sums of the vectors of each code, rounded once.
#pragma once
#include "cpu/code_statistics.h"
#include "cpu/code_statistics_segments.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct CodeStatistics {
  const CodeStatisticsArgs& args;

  void operator()(int64_t k, int64_t column, const double* total, int64_t width,
                  double count) const {
    const int64_t at = k * args.x.width + column;
    if (args.wide) {
      std::memcpy((double*)args.sums + at, total, (size_t)width * sizeof(double));
      if (column == 0) ((double*)args.counts)[k] = count;
      return;
    }
    for (int64_t d = 0; d < width; ++d) ((float*)args.sums)[at + d] = (float)total[d];
    if (column == 0) ((float*)args.counts)[k] = (float)count;
  }
};

static bool code_statistics(const CodeStatisticsArgs& args, const Parallel& parallel) {
  return segment_sums(args, CodeStatistics{args}, parallel);
}

}  // namespace mmfast::MMFAST_ISA
