#pragma once
#include "cpu/numbers.h"
#include "cpu/timestep_embedding.h"

namespace mmfast::MMFAST_ISA {

// Sine and cosine of any x. Quarter turns are taken off in three parts of pi / 2, of which the
// first two have so few bits that their products with less than 2^20 are exact; polynomials of
// fdlibm's k_sin.c and k_cos.c.
MMFAST_INLINE void sine_cosine(vd x, vd& sine, vd& cosine) {
  using words = int64_t __attribute__((vector_size(4 * lanes)));
  constexpr double magic = 0x1.8p52;  // adding it rounds to an integer
  const vd shifted = x * 0.63661977236758134308 + magic, n = shifted - magic;
  vd r = x - n * 1.57079632673412561417e+00;
  r -= n * 6.07710050630396597660e-11;
  r -= n * 2.02226624879595063154e-21;
  const vd z = r * r;
  vd p = fma(vd{} + 1.58969099521155010221e-10, z, vd{} - 2.50507602534068634195e-08);
  p = fma(p, z, vd{} + 2.75573137070700676789e-06);
  p = fma(p, z, vd{} - 1.98412698298579493134e-04);
  p = fma(p, z, vd{} + 8.33333333332248946124e-03);
  p = fma(p, z, vd{} - 1.66666666666666324348e-01);
  const vd s = fma(p * z, r, r);
  p = fma(vd{} - 1.13596475577881948265e-11, z, vd{} + 2.08757232129817482790e-09);
  p = fma(p, z, vd{} - 2.75573143513906633035e-07);
  p = fma(p, z, vd{} + 2.48015872894767294178e-05);
  p = fma(p, z, vd{} - 1.38888888888741095749e-03);
  p = fma(p, z, vd{} + 4.16666666666666019037e-02);
  const vd c = fma(z * z, p, 1 - 0.5 * z);
  const words quarter = (words)shifted;  // its last bits
  const words odd = -(quarter & 1), half = (quarter & 2) << 62, next = ((quarter + 1) & 2) << 62;
  sine = (vd)((((words)s & ~odd) | ((words)c & odd)) ^ half);
  cosine = (vd)((((words)c & ~odd) | ((words)s & odd)) ^ next);
  for (int i = 0; i < native_width<double>; ++i)
    if (!(x[i] < 1e6 && x[i] > -1e6)) {
      sine[i] = __builtin_sin(x[i]);
      cosine[i] = __builtin_cos(x[i]);
    }
}

static void embed_timesteps(const TimestepEmbeddingArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t width = native_width<double>;
  const int64_t half = args.dim / 2, size = size_of(args.dtype);
  for (int64_t b = begin; b < end; ++b) {
    char* first = args.out + b * args.dim * size;
    char* second = first + half * size;
    char *sines = args.cos_first ? second : first, *cosines = args.cos_first ? first : second;
    for (int64_t i = 0; i < half; i += width) {
      vd sine, cosine, frequencies{};
      const int64_t count = half - i < width ? half - i : width;
      std::memcpy(&frequencies, args.frequencies + i, (size_t)count * sizeof(double));
      sine_cosine(args.timesteps[b] * frequencies, sine, cosine);
      if (count == width) {
        write_numbers(sines + i * size, args.dtype, sine);
        write_numbers(cosines + i * size, args.dtype, cosine);
        continue;
      }
      char padded[2][sizeof(vd)];
      write_numbers(padded[0], args.dtype, sine);
      write_numbers(padded[1], args.dtype, cosine);
      std::memcpy(sines + i * size, padded[0], (size_t)(count * size));
      std::memcpy(cosines + i * size, padded[1], (size_t)(count * size));
    }
    if (args.dim % 2) std::memset(second + half * size, 0, (size_t)size);
  }
}

static void timestep_embedding(const TimestepEmbeddingArgs& args, const Parallel& parallel) {
  const auto run = [](void* context, int64_t begin, int64_t end) {
    embed_timesteps(*(const TimestepEmbeddingArgs*)context, begin, end);
  };
  if (args.batch * args.dim <= 1 << 14)
    run((void*)&args, 0, args.batch);
  else
    parallel.run(args.batch, run, (void*)&args);
}

}  // namespace mmfast::MMFAST_ISA
