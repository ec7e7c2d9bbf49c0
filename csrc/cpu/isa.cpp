#include "cpu/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace mmfast {
namespace {

struct Level {
  Kernels kernels;
  bool supported;
};

template <class Lookups, class Transformers, class Streams>
Level level(const char* name, bool supported) {
  Level made{{name}, supported};
  if (!supported) return made;  // even filling in addresses is code of that instruction set
  add_lookups<Lookups>(made.kernels);
  add_transformers<Transformers>(made.kernels);
  add_streams<Streams>(made.kernels);
  add_linear<Transformers>(made.kernels);  // bfloat16 products make a difference to both
  return made;
}

// Linux lets a process use tiles once it has asked: their state would not fit the signal stacks
// of those that know nothing of it.
bool tiles_granted() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

// From the slowest to the fastest.
std::vector<Level> levels() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  const bool amx = bf16 && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-bf16") && tiles_granted();
  // Intel's cores multiply pairs of bfloat16 at half the rate of as many float32 products.
  const bool pairs_pay = !__builtin_cpu_is("intel");
  using namespace isa;
  std::vector<Level> levels{
      level<baseline, baseline, baseline>("baseline", true),
      level<isa::avx2, isa::avx2, isa::avx2>("avx2", avx2),
      level<isa::avx512, isa::avx512, isa::avx512>("avx512", avx512),
      level<avx512vnni, isa::avx512, isa::avx512>("avx512vnni", vnni),
      level<avx512vnni, avx512bf16, isa::avx512>("avx512bf16", bf16),
      pairs_pay ? level<isa::amx, avx512bf16, isa::avx512>("amx", amx)
                : level<isa::amx, isa::avx512, isa::avx512>("amx", amx)};
  if (bf16 && !pairs_pay) std::swap(levels[3], levels[4]);
  return levels;
}

Kernels choose() {
  const char* wanted = std::getenv("MMFAST_ISA");
  Kernels best{};
  std::string names;
  for (const Level& level : levels()) {
    names += std::string(names.empty() ? "" : ", ") + level.kernels.isa;
    if (level.supported) best = level.kernels;
    if (wanted && std::string(wanted) == level.kernels.isa) {
      if (level.supported) return level.kernels;
      throw std::runtime_error("MMFAST_ISA=" + std::string(wanted) +
                               ": this processor does not have it");
    }
  }
  if (wanted && *wanted)
    throw std::runtime_error("MMFAST_ISA must be one of " + names + ", got " + wanted);
  return best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.supported) names.emplace_back(level.kernels.isa);
  return names;
}

}  // namespace mmfast
