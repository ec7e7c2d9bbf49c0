// Moving averages in double: one pass over the sizes, whose sum smooths them, then one over the
// sums and codes.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/blocks.h"
#include "cpu/ema_update.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

struct EmaUpdate {
  const EmaUpdateArgs& args;
  const int64_t codes, width, blocks;
  double* sizes = nullptr;   // [K] new cluster sizes
  double* totals = nullptr;  // [blocks] of them
  double total = 0;
  std::atomic<bool> failed{false};

  explicit EmaUpdate(const EmaUpdateArgs& a)
      : args(a),
        codes(a.codebook.count),
        width(a.codebook.width),
        blocks(blocks_of(a.codebook.count)) {}
  EmaUpdate(const EmaUpdate&) = delete;
  ~EmaUpdate() {
    std::free(sizes);
    std::free(totals);
  }

  bool run(const Parallel& parallel) {
    sizes = allocate<double>(codes);
    totals = allocate<double>(blocks);
    if (!sizes || !totals) return false;
    for_blocks(blocks, [this](int64_t block) { average_sizes(block); }, parallel);
    for (int64_t b = 0; b < blocks; ++b) total += totals[b];
    for_blocks(blocks, [this](int64_t block) { update(block); }, parallel);
    return !failed;
  }

  // decay of the old, the rest of the new, as torch.lerp rounds it.
  template <class V>
  V average(V old, V latest) const {
    return args.decay < 0.5 ? latest + args.decay * (old - latest)
                            : old - (old - latest) * (1 - args.decay);
  }

  void average_sizes(int64_t block) const {
    const auto [begin, end] = block_of(block, codes);
    double old_buffer[block_rows], latest_buffer[block_rows], sum = 0;
    const double* old =
        read_row<double>(args.cluster_size.columns(begin, end - begin), 0, old_buffer);
    const double* latest =
        read_row<double>(args.counts.columns(begin, end - begin), 0, latest_buffer);
    for (int64_t k = begin; k < end; ++k)
      sum += sizes[k] = average(old[k - begin], latest[k - begin]);
    totals[block] = sum;
    const Dtype dtype = args.cluster_size.dtype;
    write_row(args.new_cluster_size + begin * size_of(dtype), dtype, sizes + begin, end - begin);
  }

  void update(int64_t block) {
    double* buffers = allocate<double>(3 * padded(width));
    if (!buffers) {
      failed = true;
      return;
    }
    const auto [begin, end] = block_of(block, codes);
    for (int64_t k = begin; k < end; ++k) update_code(k, buffers);
    std::free(buffers);
  }

  void update_code(int64_t k, double* buffers) const {
    const double* old = read_row<double>(args.embed_sum, k, buffers);
    const double* latest = read_row<double>(args.sums, k, buffers + padded(width));
    double* sums = buffers + 2 * padded(width);
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
      store(sums + d, average(load<d8>(old + d), load<d8>(latest + d)));
    for (; d < width; ++d) sums[d] = average(old[d], latest[d]);
    write_row(args.new_embed_sum + k * width * size_of(args.embed_sum.dtype), args.embed_sum.dtype,
              sums, width);
    double* code = buffers;
    if (total > 0) {
      const double smooth =
          (sizes[k] + args.eps) / (total + (double)codes * args.eps) * total;
      for (d = 0; d + 8 <= width; d += 8) store(code + d, load<d8>(sums + d) / smooth);
      for (; d < width; ++d) code[d] = sums[d] / smooth;
    } else {
      // Nothing was ever counted: the codes stay.
      const double* stays = read_row<double>(args.codebook, k, code);
      if (stays != code) std::memcpy(code, stays, (size_t)width * sizeof(double));
    }
    if (args.normalize) scale_to_unit(code);
    write_row(args.new_codebook + k * width * size_of(args.codebook.dtype), args.codebook.dtype,
              code, width);
  }

  void scale_to_unit(double* code) const {
    constexpr double least = 1e-6;  // of the divisor
    d8 squares{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) squares += load<d8>(code + d) * load<d8>(code + d);
    double square = sum(squares);
    for (; d < width; ++d) square += code[d] * code[d];
    const double norm = std::sqrt(square), divisor = norm < least ? least : norm;
    for (d = 0; d < width; ++d) code[d] /= divisor;
  }
};

static bool ema_update(const EmaUpdateArgs& args, const Parallel& parallel) {
  return EmaUpdate(args).run(parallel);
}

}  // namespace mmfast::MMFAST_ISA
