// Memory of outputs.
#pragma once
#include <cstdint>
#include <optional>

#include "cpu/glue.h"
#include "cpu/kept_memory.h"

namespace mmfast {

// A new tensor beside like, of its dtype unless another is given; not initialised. A large one lies in
// kept memory.
Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

}  // namespace mmfast
