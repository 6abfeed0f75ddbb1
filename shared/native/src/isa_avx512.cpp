// The kernels for x86 with AVX-512 (F, BW, VL, DQ). Chosen at run time; see kernels.h.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SPECL_ISA_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace {
#include "lanes.h"
#include "rows.inl"
#include "layer.inl"
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

const specl::Kernels* specl::avx512_kernels() {
  __builtin_cpu_init();
  const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("fma");
  return can ? table("avx512") : nullptr;
}
#else
const specl::Kernels* specl::avx512_kernels() { return nullptr; }
#endif
