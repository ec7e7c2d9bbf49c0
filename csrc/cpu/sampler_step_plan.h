// A row of a sampler's table as lists of what is to be read and written. Columns: see
// mmfast/schedule/layout.py.
#pragma once
#include "cpu/numbers.h"
#include "cpu/sampler_step.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct SamplerPlan {
  static constexpr int most_slots = SamplerStepArgs::most_slots;

  struct Source {
    const char* at;
    Dtype dtype;
    int64_t size;  // bytes of a number
  };
  struct Term {
    int source;
    T weight;
  };
  // A weighted sum of the sources and of the denoised prediction.
  struct Sum {
    Term terms[5 + most_slots];
    int count;
    T of_denoised;
  };
  struct Target {
    char* at;
    Dtype dtype;
    int64_t size;
    bool past_cache;
  };

  enum { x, conditional, unconditional, noise, slot };  // sources
  Source sources[slot + most_slots];
  bool noisy, scaled;  // whether any sum has noise, and whether a variance scales it
  T bias, factor;
  Source variance;
  int64_t seed, offset, first;  // of the noise, if it is drawn; the sample's first element

  Sum denoised;
  bool predicts, clamps, thresholds;
  T low, high, threshold;
  Sum next;
  T input_scale;
  int writes;  // slots that change
  Sum slots[most_slots];
  Target slot_targets[most_slots], out, prediction, input[2];
  int copies;
  bool native;      // all of these are of type T
  bool past_cache;  // any target is written past the cache

  void make(const SamplerStepArgs& args, int64_t b) {
    native = true;
    used = 0;
    const int64_t row = args.steps[b * args.step_stride];
    const double* c = args.table + row * args.columns;
    sources[x] = source(args.x, b);
    sources[conditional] = source(args.conditional, b);
    sources[unconditional] = source(args.unconditional, b);
    sources[noise] = source(args.noise, b);
    for (int s = 0; s < args.slots; ++s) sources[slot + s] = source(args.history[s], b);
    variance = source(args.variance, b);
    seed = args.seeds ? args.seeds[b * args.seed_stride] : 0;
    offset = args.offsets ? args.offsets[b * args.offset_stride] : row;
    first = args.seed_stride ? 0 : b * args.elements;

    constexpr int guided = 7, scale_of_input = 8, next_at = 9;
    double with = 1, without = 0;
    if (args.unconditional.data) {
      const double* pair = args.guidance + b * args.guidance_stride;
      with = 1 + c[guided] * (pair[0] - 1);
      without = c[guided] * pair[1];
    }
    noisy = false;
    gather(denoised, c, 3, with, without);
    clamps = !(c[3] == -__builtin_inf() && c[4] == __builtin_inf());
    low = (T)c[3];
    high = (T)c[4];
    thresholds = args.threshold != nullptr;
    threshold = thresholds ? (T)args.threshold[b] : 0;
    const int width = 4 + args.slots;
    gather(next, c + next_at, width, with, without);
    predicts = next.of_denoised != 0 || args.denoised.data;
    input_scale = (T)c[scale_of_input];
    writes = 0;
    for (int s = 0; s < args.slots; ++s) {
      const double* weights = c + next_at + (1 + s) * width;
      bool stays = true;
      for (int i = 0; i < width; ++i) stays = stays && weights[i] == (i == 4 + s ? 1 : 0);
      if (stays) continue;
      gather(slots[writes], weights, width, with, without);
      predicts = predicts || slots[writes].of_denoised != 0;
      slot_targets[writes++] = target(args.history[s], b);
    }
    bias = (T)c[5];
    factor = (T)c[6];
    scaled = noisy && args.variance.data && (c[5] != 0 || c[6] != 0);
    out = target(args.out, b);
    prediction = target(args.denoised, b);
    copies = args.model_input.data ? (int)args.copies : 0;
    for (int i = 0; i < copies; ++i) input[i] = target(args.model_input, i * args.samples + b);
    choose_stores(args);
  }

 private:
  // What is written in a call has left the cache before it is read if it is more than this.
  static constexpr int64_t past_cache_from = int64_t(4) << 20;
  uint32_t used;  // bit i: source i

  // Past the cache goes what was not read into it just before.
  void choose_stores(const SamplerStepArgs& args) {
    const int targets = 1 + writes + (prediction.at != nullptr) + copies;
    past_cache = native && targets * args.samples * args.elements * (int64_t)sizeof(T) >=
                               past_cache_from;
    if (!past_cache) return;
    past_cache = false;
    choose_stores(out, used >> x & 1 && out.at == sources[x].at);
    for (int i = 0; i < writes; ++i) {
      bool read = false;
      for (int s = 0; s < args.slots; ++s)
        read = read || (used >> (slot + s) & 1 && slot_targets[i].at == sources[slot + s].at);
      choose_stores(slot_targets[i], read);
    }
    if (prediction.at) choose_stores(prediction, false);
    for (int i = 0; i < copies; ++i) choose_stores(input[i], false);
  }
  void choose_stores(Target& target, bool read) {
    target.past_cache = !read && (uintptr_t)target.at % sizeof(typename Native<T>::V) == 0;
    past_cache = past_cache || target.past_cache;
  }

  Source source(const SampleView& view, int64_t b) {
    native = native && (!view.data || view.dtype == Native<T>::dtype);
    return {view.data + b * view.stride, view.dtype, size_of(view.dtype)};
  }
  Target target(const SampleView& view, int64_t b) {
    native = native && (!view.data || view.dtype == Native<T>::dtype);
    return {view.data ? view.data + b * view.stride : nullptr, view.dtype, size_of(view.dtype),
            false};
  }

  void gather(Sum& sum, const double* weights, int width, double with, double without) {
    sum.count = 0;
    sum.of_denoised = width > 3 ? (T)weights[3] : 0;
    const auto add = [&](int source, double weight) {
      if (weight == 0) return;
      sum.terms[sum.count++] = {source, (T)weight};
      used |= uint32_t(1) << source;
    };
    add(x, weights[0]);
    add(conditional, weights[1] * with);
    if (weights[1] != 0) add(unconditional, weights[1] * without);
    add(noise, weights[2]);
    noisy = noisy || weights[2] != 0;
    for (int i = 4; i < width; ++i) add(slot + i - 4, weights[i]);
  }
};

}  // namespace mmfast::MMFAST_ISA
