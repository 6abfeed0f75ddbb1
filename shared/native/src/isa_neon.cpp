// The kernels for 64-bit ARM: the plain lanes, which the compiler turns into NEON; only the fp16 scales need intrinsics.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define SPECL_ISA_NEON
namespace {
#include "lanes.h"
#include "rows.inl"
#include "layer.inl"
}  // namespace

const specl::Kernels* specl::neon_kernels() { return table("neon"); }
#else
const specl::Kernels* specl::neon_kernels() { return nullptr; }
#endif
