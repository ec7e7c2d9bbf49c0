// Sums over samples in double: each block's by itself, so that threads do not change their order.
#pragma once
#include "cpu/guidance_factors.h"
#include "cpu/numbers.h"

namespace mmfast::MMFAST_ISA {

struct GuidanceSums {
  static constexpr int64_t width = native_width<double>;
  const GuidanceFactorsArgs& args;

  struct Two {
    vd a, b;
  };

  static const char* at(const SampleView& view, int64_t b, int64_t e) {
    return view.data + b * view.stride + e * size_of(view.dtype);
  }

  // The first count of numbers in a row, zeros behind them.
  MMFAST_INLINE vd take(const SampleView& view, int64_t b, int64_t e, int64_t count) {
    return read_first<vd>(at(view, b, e), view.dtype, count);
  }

  void block(int64_t index) const {
    const int64_t b = index / args.blocks(), first = index % args.blocks() * args.block;
    const int64_t last = first + args.block < args.elements ? first + args.block : args.elements;
    double* part = args.parts + index * 4;
    args.project ? products(b, first, last, part) : deviations(b, first, last, part);
  }

  void products(int64_t b, int64_t first, int64_t last, double* part) const {
    vd aa{}, ab{}, bb{};
    for (int64_t e = first; e < last; e += width) {
      const int64_t n = last - e < width ? last - e : width;
      const vd c = take(args.conditional, b, e, n);
      vd d = c - take(args.unconditional, b, e, n);
      if (args.average.data) {
        d += args.momentum * take(args.average, b, e, n);
        // What is kept has been rounded, and is what the factors are for.
        char written[width * sizeof(double)];
        write_numbers(written, args.average.dtype, d);
        read_numbers(written, args.average.dtype, d);
        write_first((char*)at(args.average, b, e), args.average.dtype, d, n);
      }
      aa = fma(c, c, aa);
      ab = fma(c, d, ab);
      bb = fma(d, d, bb);
    }
    part[0] = sum_lanes(aa);
    part[1] = sum_lanes(ab);
    part[2] = sum_lanes(bb);
  }

  Two both(int64_t b, int64_t e, int64_t n) const {
    const vd c = take(args.conditional, b, e, n), u = take(args.unconditional, b, e, n);
    return {c, args.scale * c + (1 - args.scale) * u};
  }

  void deviations(int64_t b, int64_t first, int64_t last, double* part) const {
    vd a{}, g{};
    for (int64_t e = first; e < last; e += width) {
      const Two v = both(b, e, last - e < width ? last - e : width);
      a += v.a;
      g += v.b;
    }
    const double count = (double)(last - first);
    part[0] = sum_lanes(a) / count;
    part[1] = sum_lanes(g) / count;
    a = g = vd{};
    for (int64_t e = first; e < last; e += width) {
      const int64_t n = last - e < width ? last - e : width;
      Two v = both(b, e, n);
      v.a -= part[0];
      v.b -= part[1];
      for (int64_t i = n; i < width; ++i) v.a[i] = v.b[i] = 0;
      a = fma(v.a, v.a, a);
      g = fma(v.b, v.b, g);
    }
    part[2] = sum_lanes(a);
    part[3] = sum_lanes(g);
  }
};

static void guidance_factors(const GuidanceFactorsArgs& args, const Parallel& parallel) {
  const GuidanceSums sums{args};
  const int64_t blocks = args.samples * args.blocks();
  const auto run = [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ((const GuidanceSums*)context)->block(i);
  };
  if (blocks == 1)
    run((void*)&sums, 0, 1);
  else
    parallel.run(blocks, run, (void*)&sums);
}

}  // namespace mmfast::MMFAST_ISA
