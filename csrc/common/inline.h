// Functions that CPU and CUDA sources share, and that several instruction sets compile.
#pragma once

// static: an inline function compiled for AVX-512 must never stand in for its baseline copy where the linker merges.
#if defined(__CUDACC__)
#define ADALORA_INLINE static __host__ __device__ __forceinline__
#else
#define ADALORA_INLINE static inline __attribute__((always_inline))
#endif
