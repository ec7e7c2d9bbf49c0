// What the guidance_factors kernel of every instruction set is given.
#pragma once
#include "cpu/sampler_step.h"

namespace mmfast {

struct GuidanceFactorsArgs {
  static constexpr int64_t block = 8192;  // numbers; decides the order of the sums
  int64_t samples, elements;              // B, E
  SampleView conditional, unconditional;
  bool project;
  double scale;        // of guidance, for the guided output's sums
  SampleView average;  // of the differences, with momentum; updated
  double momentum;
  // Of each block: sums of two numbers, a and b, and of their products.
  // Projection: a conditional, b its difference to the unconditional, or the average; aa, ab, bb.
  // Else: a conditional, b guided; their means, and the sums of the squared deviations from them.
  double* parts;  // [B, blocks, 4]

  int64_t blocks() const { return (elements + block - 1) / block; }
};

}  // namespace mmfast
