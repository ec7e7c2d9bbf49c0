// The lookup, then one pass that writes the codes. The squared distances of the lookup are the
// terms of the losses, so that x is not read again; other metrics compute them in the pass.
// Sums are those of fixed blocks of rows, whatever the threads.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/nearest_code_kernel.h"
#include "cpu/simd.h"
#include "cpu/vector_quantize.h"
#include "cpu/workspace.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

static double squared_difference(const double* a, const double* b, int64_t width) {
  d8 total{};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8) {
    const d8 t = load<d8>(a + d) - load<d8>(b + d);
    total += t * t;
  }
  double rest = sum(total);
  for (; d < width; ++d) rest += (a[d] - b[d]) * (a[d] - b[d]);
  return rest;
}

struct VectorQuantize {
  const VectorQuantizeArgs& args;
  const int64_t rows, width, bytes;  // bytes: of a quantized row
  const int64_t blocks;
  double* distances = nullptr;  // [N] metric at the index
  double* errors = nullptr;     // [blocks] sums of squared differences
  int64_t* starts = nullptr;    // [blocks + 1] rows inside the mask before each block
  int64_t* counts = nullptr;    // [K]
  std::atomic<bool> failed{false};

  explicit VectorQuantize(const VectorQuantizeArgs& a)
      : args(a),
        rows(a.x.count),
        width(a.x.width),
        bytes(a.x.width * size_of(a.x.dtype)),
        blocks(blocks_of(a.x.count)) {}
  VectorQuantize(const VectorQuantize&) = delete;
  ~VectorQuantize() {
    std::free(distances);
    std::free(errors);
    std::free(starts);
    std::free(counts);
  }

  int64_t inside() const { return starts[blocks]; }

  bool run(const Parallel& parallel) {
    distances = allocate<double>(rows);
    errors = allocate<double>(blocks);
    starts = allocate<int64_t>(blocks + 1);
    counts = (int64_t*)std::calloc((size_t)args.codes.count, sizeof(int64_t));
    if (!distances || !errors || !starts || !counts) return false;
    starts[0] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const auto [begin, end] = block_of(b, rows);
      starts[b + 1] = starts[b] + end - begin;
      if (args.mask)
        for (int64_t i = begin; i < end; ++i) starts[b + 1] -= !args.mask[i];
    }
    if (!look_up(parallel)) return false;
    for_blocks(blocks, [this](int64_t block) { gather(block); }, parallel);
    if (failed) return false;
    double error = 0;
    for (int64_t b = 0; b < blocks; ++b) error += errors[b];
    const int64_t terms = inside() * width;
    write(args.commitment, 0, error / (double)(terms > 1 ? terms : 1));
    write(args.codebook_loss, 0, error / (double)(terms > 1 ? terms : 1));
    for (int64_t i = 0; i < rows; ++i)
      if (args.indices[i] >= 0) ++counts[args.indices[i]];
    for (int64_t k = 0; k < args.codes.count; ++k) write(args.counts, k, (double)counts[k]);
    return true;
  }

  void write(void* numbers, int64_t i, double value) const {
    if (args.wide)
      ((double*)numbers)[i] = value;
    else
      ((float*)numbers)[i] = (float)value;
  }

  // Rows outside the mask are not looked up: the others are packed where `quantized` will be.
  bool look_up(const Parallel& parallel) {
    if (inside() == 0) {
      for (int64_t i = 0; i < rows; ++i) args.indices[i] = -1;
      return true;
    }
    NearestCodeArgs nearest{};
    nearest.x = args.x;
    nearest.codes = args.codes;
    nearest.metric = args.metric;
    nearest.indices = args.indices;
    nearest.distances = distances;
    nearest.wide = true;
    const bool masked = inside() < rows;
    if (masked) {
      for_blocks(blocks, [this](int64_t block) { pack(block); }, parallel);
      nearest.x = {args.quantized, args.x.dtype, inside(), width, size_of(args.x.dtype),
                   1,              {inside()},   {bytes}};
    }
    if (failed || !nearest_code(nearest, parallel)) return false;
    if (masked)
      for (int64_t i = rows - 1, from = inside(); i >= 0; --i) {
        if (args.mask[i]) --from;
        args.indices[i] = args.mask[i] ? args.indices[from] : -1;
        distances[i] = args.mask[i] ? distances[from] : 0;
      }
    return true;
  }

  void pack(int64_t block) {
    double* buffer = allocate<double>(width);
    if (!buffer) failed = true;
    const auto [begin, end] = block_of(block, rows);
    char* out = args.quantized + starts[block] * bytes;
    for (int64_t i = begin; i < end && !failed; ++i) {
      if (!args.mask[i]) continue;
      convert_row(out, args.x.dtype, args.x, i, buffer);
      out += bytes;
    }
    std::free(buffer);
  }

  void gather(int64_t block) {
    double* buffer = allocate<double>(2 * padded(width));
    if (!buffer) failed = true;
    const auto [begin, end] = block_of(block, rows);
    double error = 0;
    for (int64_t i = begin; i < end && !failed; ++i) {
      char* out = args.quantized + i * bytes;
      const int64_t k = args.indices[i];
      if (k < 0) {
        convert_row(out, args.x.dtype, args.x, i, buffer);
        continue;
      }
      convert_row(out, args.x.dtype, args.codes, k, buffer);
      error += args.metric == Metric::euclidean
                   ? distances[i]
                   : squared_difference(read_row<double>(args.x, i, buffer),
                                        read_row<double>(args.codes, k, buffer + padded(width)), width);
    }
    errors[block] = error;
    std::free(buffer);
  }
};

static bool vector_quantize(const VectorQuantizeArgs& args, const Parallel& parallel) {
  return VectorQuantize(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
