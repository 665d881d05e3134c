#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace qwen3 {
namespace {

Isa detect() {
#ifdef QWEN3_HAS_avx512
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bf16");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

Isa choose() {
  const Isa best = detect();
  const char* env = std::getenv("QWEN3_CPU_ISA");
  if (env == nullptr || *env == 0) return best;
  for (Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (env != std::string(isa_name(wanted))) continue;
    if (wanted > best)
      throw std::runtime_error(std::string("QWEN3_CPU_ISA is ") + env + ", but the best this machine runs is " + isa_name(best));
    return wanted;
  }
  throw std::runtime_error(std::string("QWEN3_CPU_ISA is '") + env + "'; expected scalar, avx2 or avx512");
}

}  // namespace

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar"; }

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace qwen3
