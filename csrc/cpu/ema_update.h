// What the ema_update kernel of every instruction set is given.
#pragma once
#include "cpu/sampler_step.h"

namespace mmfast {

// The numbers of a row lie together, and those of all codes.
struct EmaUpdateArgs {
  int64_t codes, width;                  // K, D
  SampleView codebook, embed_sum, sums;  // (K, D); the first two change
  SampleView cluster_size, counts;       // (K,); the first changes
  double decay, eps;
  bool normalize;
};

}  // namespace mmfast
