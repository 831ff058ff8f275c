// Which compiled copy of the hot loops runs. csrc/cpu/simd/*.cpp are compiled once per instruction set (setup.py), each
// copy into a namespace of that name; each defines one table of function pointers.
#pragma once

#if defined(__x86_64__)
#define ADALORA_DECLARE_KERNELS(Table, table)     \
  namespace baseline { extern const Table table; } \
  namespace avx2 { extern const Table table; }     \
  namespace avx512 { extern const Table table; }
#define ADALORA_KERNELS(table)                                                   \
  (::adalora::cpu::isa() == ::adalora::cpu::Isa::kAvx512 ? ::adalora::cpu::avx512::table \
   : ::adalora::cpu::isa() == ::adalora::cpu::Isa::kAvx2 ? ::adalora::cpu::avx2::table   \
                                                         : ::adalora::cpu::baseline::table)
#else
#define ADALORA_DECLARE_KERNELS(Table, table) namespace baseline { extern const Table table; }
#define ADALORA_KERNELS(table) (::adalora::cpu::baseline::table)
#endif

namespace adalora::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest instruction set of this machine, or the narrower one that ADALORA_CPU_ISA (baseline, avx2, avx512) names.
Isa isa();

}  // namespace adalora::cpu
