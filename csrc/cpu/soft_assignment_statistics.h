// What the soft_assignment_statistics kernels of every instruction set are given.
#pragma once
#include "cpu/tensor_view.h"

namespace mmfast {

enum class Logits : int32_t { euclidean, distance, cosine, dot };

struct SoftAssignmentArgs {
  Rows x;               // (G N, D)
  Rows codes;           // (K, D)
  const char* weights;  // (G N,), or null
  Dtype weights_dtype;
  int64_t groups;  // G
  double temperature;
  Logits metric;
  bool wide;  // whether the following are float64, else float32
  void* means;    // (G, K)
  void* entropy;  // (G,)
  void* saved;    // (G N, 2)
};

struct SoftAssignmentBwdArgs {
  SoftAssignmentArgs forward;  // means and entropy are their gradients, or null
  char* x_gradient;            // (G N, D), of x's dtype; or null
  char* codebook_gradient;     // (K, D), of the codes' dtype; or null
};

}  // namespace mmfast
