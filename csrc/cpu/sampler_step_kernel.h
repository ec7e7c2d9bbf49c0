// A step of a sampler. Tiles that stay in the first-level cache; within one, a few vectors at a
// time, whose sums live in registers: every number comes from memory once and goes there once.
// Everything is read before anything is written, so that out may be x.
#pragma once
#include "cpu/past_cache.h"
#include "cpu/philox.h"
#include "cpu/sampler_step_plan.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct SamplerStep {
  using V = typename Native<T>::V;
  using Plan = SamplerPlan<T>;
  static constexpr int vectors = 4;
  static constexpr int64_t chunk = vectors * native_width<T>, tile = 16 * chunk;
  static constexpr int64_t block = 256 * chunk;

  const SamplerStepArgs& args;

  struct Chunk {
    V v[vectors];
  };

  // NATIVE: all numbers are of type T, and so known when this is compiled.
  template <bool NATIVE = false>
  MMFAST_INLINE Chunk read(const char* at, Dtype dtype, int64_t count) {
    if (NATIVE) dtype = Native<T>::dtype;
    char padded[chunk * sizeof(double)];
    if (count < chunk) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, at, (size_t)(count * size_of(dtype)));
      at = padded;
    }
    Chunk c;
    for (int i = 0; i < vectors; ++i)
      read_numbers(at + i * native_width<T> * size_of(dtype), dtype, c.v[i]);
    return c;
  }

  template <bool NATIVE = false>
  MMFAST_INLINE void write(char* at, Dtype dtype, const Chunk& c, int64_t count) {
    if (NATIVE) dtype = Native<T>::dtype;
    char padded[chunk * sizeof(double)];
    char* to = count < chunk ? padded : at;
    for (int i = 0; i < vectors; ++i)
      write_numbers(to + i * native_width<T> * size_of(dtype), dtype, c.v[i]);
    if (count < chunk) std::memcpy(at, padded, (size_t)(count * size_of(dtype)));
  }

  MMFAST_INLINE void add(Chunk& sum, const Chunk& c, T weight) {
    for (int i = 0; i < vectors; ++i) sum.v[i] = fma(c.v[i], every<V>(weight), sum.v[i]);
  }

  // The sum at elements [e, e + count) of the sample.
  template <bool NATIVE>
  MMFAST_INLINE Chunk total(const Plan& plan, const typename Plan::Sum& sum,
                            const Chunk& denoised, int64_t e, int64_t count) {
    Chunk result{};
    for (int i = 0; i < sum.count; ++i) {
      const typename Plan::Source& source = plan.sources[sum.terms[i].source];
      const char* at = source.at + e * (NATIVE ? (int64_t)sizeof(T) : source.size);
      add(result, read<NATIVE>(at, source.dtype, count), sum.terms[i].weight);
    }
    if (sum.of_denoised != 0) add(result, denoised, sum.of_denoised);
    return result;
  }

  MMFAST_INLINE void clamp(const Plan& plan, Chunk& p) {
    // Comparisons that are false for NaN leave it as it is.
    const V low = V{} + plan.low, high = V{} + plan.high, t = V{} + plan.threshold;
    for (V& v : p.v) {
      if (plan.thresholds) {
        v = v > t ? t : v;
        v = (v < -t ? -t : v) / t;
      }
      if (!plan.clamps) continue;
      v = v > high ? high : v;
      v = v < low ? low : v;
    }
  }

  template <bool NATIVE>
  MMFAST_INLINE void step(const Plan& plan, int64_t e, int64_t count) {
    Chunk p{};
    if (plan.predicts) {
      p = total<NATIVE>(plan, plan.denoised, p, e, count);
      clamp(plan, p);
    }
    const auto put = [&](const typename Plan::Target& target,
                         const Chunk& c) __attribute__((always_inline)) {
      char* at = target.at + e * (NATIVE ? (int64_t)sizeof(T) : target.size);
      if (NATIVE && target.past_cache) {
        for (int i = 0; i < vectors; ++i) store_past_cache(at + i * sizeof(V), c.v[i]);
        return;
      }
      write<NATIVE>(at, target.dtype, c, count);
    };
    Chunk next = total<NATIVE>(plan, plan.next, p, e, count);
    if (plan.writes == 1) {
      put(plan.slot_targets[0], total<NATIVE>(plan, plan.slots[0], p, e, count));
    } else if (plan.writes > 1) {
      Chunk made[Plan::most_slots];
      for (int s = 0; s < plan.writes; ++s)
        made[s] = total<NATIVE>(plan, plan.slots[s], p, e, count);
      for (int s = 0; s < plan.writes; ++s) put(plan.slot_targets[s], made[s]);
    }
    if (plan.prediction.at) put(plan.prediction, p);
    put(plan.out, next);
    if (plan.copies == 0) return;
    for (V& v : next.v) v *= plan.input_scale;
    for (int i = 0; i < plan.copies; ++i) put(plan.input[i], next);
  }

  // Noise that is drawn, or scaled by a variance, is made for a tile at a time.
  static void make_noise(const Plan& plan, bool drawn, int64_t e, int64_t count, T* out) {
    if (drawn) {
      const Random random(plan.seed, plan.offset);
      if constexpr (sizeof(T) == 4) {
        fill_normals(random, plan.first + e, out, count);
      } else {
        float narrow[tile];
        fill_normals(random, plan.first + e, narrow, count);
        for (int64_t i = 0; i < count; ++i) out[i] = narrow[i];
      }
    } else {
      const typename Plan::Source& noise = plan.sources[Plan::noise];
      for (int64_t i = 0; i < count; i += chunk) {
        const int64_t n = count - i < chunk ? count - i : chunk;
        write((char*)(out + i), Native<T>::dtype,
              read(noise.at + (e + i) * noise.size, noise.dtype, n), n);
      }
    }
    if (!plan.scaled) return;
    for (int64_t i = 0; i < count; i += chunk) {
      const int64_t n = count - i < chunk ? count - i : chunk;
      Chunk logarithm{}, noise = read((char*)(out + i), Native<T>::dtype, n);
      for (V& v : logarithm.v) v += plan.bias;
      const typename Plan::Source& variance = plan.variance;
      if (plan.factor != 0)
        add(logarithm, read(variance.at + (e + i) * variance.size, variance.dtype, n),
            plan.factor);
      for (int j = 0; j < vectors; ++j) noise.v[j] *= exponential(logarithm.v[j]);
      write((char*)(out + i), Native<T>::dtype, noise, n);
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t blocks = (args.elements + block - 1) / block;
    Plan plan;
    alignas(64) T noise[tile];
    bool past_cache = false;
    for (int64_t i = begin, planned = -1; i < end; ++i) {
      const int64_t b = i / blocks, e = i % blocks * block;
      if (b != planned) plan.make(args, planned = b);
      past_cache = past_cache || plan.past_cache;
      const int64_t last = e + block < args.elements ? e + block : args.elements;
      const bool makes = plan.noisy && (args.seeds || plan.scaled);
      if (!makes) {
        sweep(plan, e, last);
        continue;
      }
      // The source of the plan's noise becomes the tile's.
      const typename Plan::Source given = plan.sources[Plan::noise];
      for (int64_t at = e; at < last; at += tile) {
        const int64_t n = last - at < tile ? last - at : tile;
        plan.sources[Plan::noise] = given;
        make_noise(plan, args.seeds != nullptr, at, n, noise);
        plan.sources[Plan::noise] = {(const char*)noise - at * (int64_t)sizeof(T),
                                     Native<T>::dtype, sizeof(T)};
        sweep(plan, at, at + n);
      }
      plan.sources[Plan::noise] = given;
    }
    if (past_cache) _mm_sfence();
  }

  static void sweep(const Plan& plan, int64_t e, int64_t last) {
    if (plan.native)
      for (; e + chunk <= last; e += chunk) step<true>(plan, e, chunk);
    for (; e < last; e += chunk) step<false>(plan, e, last - e < chunk ? last - e : chunk);
  }
};

template <class T>
static void run_sampler_step(const SamplerStepArgs& args, const Parallel& parallel) {
  const SamplerStep<T> work{args};
  const int64_t blocks = (args.elements + work.block - 1) / work.block * args.samples;
  if (args.samples * args.elements <= work.block)
    work.run(0, blocks);
  else
    parallel.run(
        blocks,
        [](void* context, int64_t begin, int64_t end) {
          ((const SamplerStep<T>*)context)->run(begin, end);
        },
        (void*)&work);
}

static void sampler_step(const SamplerStepArgs& args, const Parallel& parallel) {
  args.wide ? run_sampler_step<double>(args, parallel) : run_sampler_step<float>(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
