// Functions that CPU and CUDA sources share, and that several instruction sets compile.
#pragma once

// static: one inline function compiled for AVX-512 must never stand in for its baseline copy when the linker merges them.
#if defined(__CUDACC__)
#define ADALORA_INLINE static __host__ __device__ __forceinline__
#else
#define ADALORA_INLINE static inline __attribute__((always_inline))
#endif
