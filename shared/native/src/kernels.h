// What the instruction-set files offer and everything else calls: weight formats, their layout, and a table of functions.
//
// Knows: how a packed matrix lies in memory. Does not know MLX, Python or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace specl {

constexpr size_t kTileRows = 4;    // output rows whose blocks lie interleaved, so that a product is one linear read
constexpr size_t kBlock = 64;      // inputs in a block; every input length is padded with zeros to a multiple of it
constexpr size_t kMaxWidth = 16;   // rows the fused stack takes; the product itself takes any number
constexpr size_t kMaxScales = 32;  // scale and offset of each group of a tile's block

// A matrix W[N, K]. Tiled formats: tile t holds rows 4t .. 4t+3; its blocks follow each other; a block holds the four
// rows' weights and then, for affine formats, scale and offset of each row's groups.
//   kF32: not tiled, the caller's own rows of `stride` floats.
//   kBf16: a word of lane i holds inputs i (low half) and 16+i (high half) of a run of 32.
//   kQ4: rows two and two; a word of lane i holds inputs i, 16+i, 32+i, 48+i of the even row, then those of the odd one.
//   kQ8: bytes in order.
// Affine names: group length, then H where scales and offsets are fp16, F where fp32.
enum Format : int { kF32, kBf16, kQ4G32H, kQ4G32F, kQ4G64H, kQ4G64F, kQ8G32H, kQ8G32F, kQ8G64H, kQ8G64F, kQ8G16F, kFormats };

struct FormatShape {
  const char* name;
  int bits;         // of a stored weight
  int group;        // inputs that share a scale; 0 for plain formats
  int scale_bytes;  // of a scale, and of an offset
};
constexpr FormatShape kShapes[kFormats] = {
    {"f32", 32, 0, 0},     {"bf16", 16, 0, 0},    {"q4g32h", 4, 32, 2}, {"q4g32f", 4, 32, 4},
    {"q4g64h", 4, 64, 2},  {"q4g64f", 4, 64, 4},  {"q8g32h", 8, 32, 2}, {"q8g32f", 8, 32, 4},
    {"q8g64h", 8, 64, 2},  {"q8g64f", 8, 64, 4},  {"q8g16f", 8, 16, 4},
};
constexpr size_t row_bytes(Format f) { return kBlock * kShapes[f].bits / 8; }
constexpr size_t block_bytes(Format f) {
  const auto& s = kShapes[f];
  return kTileRows * (row_bytes(f) + (s.group ? kBlock / s.group * 2 * s.scale_bytes : 0));
}

struct MatrixView {
  Format format;
  size_t n, k;            // as the caller sees them
  size_t blocks, stride;  // blocks of a row; floats of a row (kF32)
  const void* data;
};

// y[i*ldy + n] = sum_k x[i, k] * W[n, k] for m rows and the tiles first .. last-1.
// x lies in blocks [blocks][m][64], zeros after its last input, on 64-byte borders: one pointer reaches all rows.
using RowsFn = void (*)(const MatrixView& w, const float* x, size_t m, size_t first, size_t last, float* y, size_t ldy);
inline size_t packed_at(size_t m, size_t row, size_t k) { return (k / kBlock * m + row) * kBlock + k % kBlock; }

// Rows of queries over the same keys and values: row i sees the first `length[i]`, lengths never falling.
struct Attention {
  const float* q;        // scaled rows
  size_t ldq;            // floats from a row to the next
  const float *k, *v;    // [positions, dim], rows contiguous
  const size_t* length;  // per row
  size_t rows, dim;
  float* scores;         // rows x ld_scores, ld_scores a multiple of 16 and >= every length
  size_t ld_scores;
  float* out;            // [rows, dim]
};

// One row of logits: largest entry (the lowest index wins ties), log-sum-exp, the k largest in falling order.
struct RowStats {
  int32_t argmax;
  float logsumexp;
};

struct Kernels {
  const char* name;
  RowsFn rows[kFormats];
  void (*rmsnorm)(const float* x, const float* w, float eps, size_t n, float* y);
  void (*rope)(float* v, const float* cos, const float* sin, size_t half);
  void (*attend)(const Attention& a);
  void (*silu_mul)(float* gate, const float* up, size_t n);
  void (*add)(float* a, const float* b, size_t n);
  RowStats (*row_stats)(const float* logits, size_t n, size_t k, int32_t* ids, float* values);
};

const Kernels* avx512_kernels();  // nullptr where the compiler or the machine lacks them
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* scalar_kernels();

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero and subnormals: the integer times 2^-24 is exact
    const float f = (float)mantissa * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

}  // namespace specl
