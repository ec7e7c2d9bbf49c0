#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace mmfast {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

std::vector<Level> levels() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  return {{&baseline_kernels, true},
          {&avx2_kernels, avx2},
          {&avx512_kernels, avx512},
          {&avx512vnni_kernels, vnni}};
}

const Kernels& choose() {
  const char* wanted = std::getenv("MMFAST_ISA");
  const Kernels* best = nullptr;
  std::string names;
  for (const Level& level : levels()) {
    names += std::string(names.empty() ? "" : ", ") + level.kernels->isa;
    if (level.supported) best = level.kernels;
    if (wanted && std::string(wanted) == level.kernels->isa) {
      if (level.supported) return *level.kernels;
      throw std::runtime_error("MMFAST_ISA=" + std::string(wanted) +
                               ": this processor does not have it");
    }
  }
  if (wanted && *wanted)
    throw std::runtime_error("MMFAST_ISA must be one of " + names + ", got " + wanted);
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.supported) names.emplace_back(level.kernels->isa);
  return names;
}

}  // namespace mmfast
