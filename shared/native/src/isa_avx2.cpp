// The kernels for x86 with AVX2, FMA and F16C. Chosen at run time; see kernels.h.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SPECL_ISA_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
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

const specl::Kernels* specl::avx2_kernels() {
  __builtin_cpu_init();
  const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return can ? table("avx2") : nullptr;
}
#else
const specl::Kernels* specl::avx2_kernels() { return nullptr; }
#endif
