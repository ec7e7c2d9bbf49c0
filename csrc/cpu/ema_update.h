// What the ema_update kernel of every instruction set is given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

struct EmaUpdateArgs {
  Rows codebook, embed_sum, sums;  // (K, D)
  Rows cluster_size, counts;       // (1, K)
  double decay, eps;
  bool normalize;
  // Of the old ones' dtypes.
  char *new_codebook, *new_embed_sum;  // (K, D)
  char* new_cluster_size;              // (K,)
};

}  // namespace mmfast
