// What the sampler_step kernel of every instruction set is given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

// (B, E): the numbers of a sample one after another.
struct SampleView {
  char* data;  // null where the tensor is absent
  Dtype dtype;
  int64_t stride;  // bytes from a sample to the next
};

struct SamplerStepArgs {
  static constexpr int most_slots = 16;
  int64_t samples, elements;  // B, E
  bool wide;                  // compute in double
  // Sources.
  SampleView x, conditional, unconditional, noise, variance;
  // Rows of coefficients, laid out as mmfast/schedule/layout.py says; steps[b * step_stride] is
  // the row of sample b, and in range.
  const double* table;
  int slots;
  int64_t columns;
  const int64_t* steps;
  int64_t step_stride;
  const double* guidance;  // pairs; 0 or 2 numbers from a sample's to the next one's
  int64_t guidance_stride;
  const double* threshold;  // [B], or null
  // seeds[b * seed_stride]; null: no noise is drawn. With one seed for all, their numbers follow
  // each other in its stream. The stream's offset is likewise one of offsets, or the row.
  const int64_t *seeds, *offsets;
  int64_t seed_stride, offset_stride;
  // What is written, where there is any.
  SampleView out, denoised, model_input, history[most_slots];
  int64_t copies;  // of the model's input, `samples` after one another
};

}  // namespace mmfast
