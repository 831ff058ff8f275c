#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "cpu/ops.h"

namespace adalora::cpu {

namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa chosen() {
  const char* wish = std::getenv("ADALORA_CPU_ISA");
  const Isa limit = widest();
  if (wish == nullptr || *wish == '\0') return limit;
  const std::string name(wish);
  STD_TORCH_CHECK(name == "baseline" || name == "avx2" || name == "avx512",
                  "ADALORA_CPU_ISA: expected baseline, avx2 or avx512, got ", name);
  const Isa wished = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kBaseline;
  STD_TORCH_CHECK(wished <= limit, "ADALORA_CPU_ISA: this machine has no ", name);
  return wished;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

std::string instruction_set() {
  return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : "baseline";
}

}  // namespace adalora::cpu
