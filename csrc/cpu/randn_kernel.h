// Normals of every sample, in pieces that threads share out.
#pragma once
#include "cpu/blocks.h"
#include "cpu/philox.h"
#include "cpu/randn.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

struct Randn {
  static constexpr int64_t piece = 16384;  // elements, a multiple of `some`
  static constexpr int64_t some = 512;     // that are converted while they are in the cache
  const RandnArgs& args;
  const int64_t pieces;  // of a sample

  explicit Randn(const RandnArgs& a) : args(a), pieces((a.count + piece - 1) / piece) {}

  void run(int64_t at) const {
    const int64_t sample = at / pieces, first = at % pieces * piece;
    const int64_t rest = args.count - first, count = rest < piece ? rest : piece;
    const Random random(args.seeds[sample * args.seed_step],
                        args.offsets[sample * args.offset_step]);
    char* out = args.out + (sample * args.count + first) * size_of(args.dtype);
    if (args.dtype == Dtype::float32) {
      fill_normals(random, first, (float*)out, count);
      return;
    }
    for (int64_t i = 0; i < count; i += some) {
      const int64_t n = count - i < some ? count - i : some;
      if (args.dtype == Dtype::float64)
        in_double(random, first + i, (double*)out + i, n);
      else
        in_half(random, first + i, (uint16_t*)out + i, n);
    }
  }

  void in_half(const Random& random, int64_t first, uint16_t* out, int64_t count) const {
    alignas(64) float values[some];
    fill_normals(random, first, values, count);
    for (int64_t i = 0; i < count; i += 8) {
      const f8 v = load<f8>(values + i);
      const i16x8 halves = args.dtype == Dtype::float16 ? to_half(v) : to_bfloat16(v);
      std::memcpy(out + i, &halves, (size_t)(count - i < 8 ? count - i : 8) * 2);
    }
  }

  static void in_double(const Random& random, int64_t first, double* out, int64_t count) {
    alignas(64) uint32_t words[some];
    fill_words(random, first, words, (count + 1) / 2 * 2);
    for (int64_t i = 0; i < count; i += 2) {
      const uint32_t angle = words[i + 1];
      const double u = (float)words[i] * 0x1p-32f + 0x1p-33f;
      const double turns = (float)(int32_t)(angle << 2) * 0x1p-34f + 0x1p-33f;
      const double radius = __builtin_sqrt(-2 * __builtin_log(u)) * (angle >> 31 ? -1 : 1);
      const double c = radius * __builtin_cos(turns * 6.283185307179586);
      const double s = radius * __builtin_sin(turns * 6.283185307179586);
      const bool turned = angle >> 30 & 1;
      out[i] = turned ? s : c;
      if (i + 1 < count) out[i + 1] = turned ? c : s;
    }
  }
};

static void randn(const RandnArgs& args, const Parallel& parallel) {
  const Randn work(args);
  for_blocks(
      args.samples * work.pieces, [&](int64_t at) { work.run(at); }, parallel);
}

}  // namespace mmfast::MMFAST_ISA
