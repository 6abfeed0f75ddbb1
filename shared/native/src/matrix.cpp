// Packing, unpacking and the product split over threads; see matrix.h and kernels.h for the layout.
#include "matrix.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace specl {
namespace {

constexpr size_t kSlack = 4096;  // prefetches and the last vector of scales may look past the end

float bf16_to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 64);  // a quiet NaN stays one
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// Where weight k of a row lies inside its block: byte or half-word index, and for 4 bits the shift.
size_t bf16_index(size_t k) { return (k / 32) * 32 + (k % 16) * 2 + (k % 32) / 16; }

// Rows lie two and two: the odd row has the upper half of each word of lane i. `p` is where the row alone would begin.
uint16_t* nibble_word(uint8_t* p, size_t lane, size_t row) {
  return reinterpret_cast<uint16_t*>(p - (lane % 2) * row) + lane % 2;
}

Format affine_format(int bits, size_t group, bool half) {
  for (int f = kQ4G32H; f < kFormats; ++f) {
    const auto& s = kShapes[f];
    if (s.bits == bits && (size_t)s.group == group && (s.scale_bytes == 2) == half) return (Format)f;
  }
  return kFormats;
}

}  // namespace

uint16_t float_to_half_exact(float f, bool* exact) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
  const float a = std::fabs(f);
  uint16_t h = 0;
  if (a > 0 && a < 6.103515625e-5f) {
    h = (uint16_t)(a * 16777216.0f);  // subnormal: a whole number of 2^-24
  } else if (a >= 6.103515625e-5f && a <= 65504.0f) {
    const uint32_t v = u & 0x7fffffffu;
    h = (uint16_t)(((v >> 23) - 112) << 10 | ((v >> 13) & 1023u));
  }
  h |= sign;
  if (exact) *exact = half_to_float(h) == f;
  return h;
}

void Matrix::allocate(size_t bytes) {
  bytes_ = bytes;
  const size_t huge = size_t{2} << 20, whole = bytes + kSlack;
  const size_t align = whole >= huge ? huge : 64;
  memory_ = std::aligned_alloc(align, (whole + align - 1) / align * align);
  if (!memory_) throw std::bad_alloc();
  if (align == huge) madvise(memory_, whole, MADV_HUGEPAGE);  // fewer page walks; refusing is fine
  std::memset(memory_, 0, whole);
  view_.data = memory_;
}

Matrix::~Matrix() { std::free(memory_); }

std::shared_ptr<Matrix> Matrix::from_float(Format format, const float* rows, size_t n, size_t k,
                                           std::shared_ptr<const void> owner) {
  if (format != kF32 && format != kBf16) throw std::invalid_argument("from_float packs f32 or bf16");
  std::shared_ptr<Matrix> w(new Matrix());
  const size_t blocks = (k + kBlock - 1) / kBlock;
  w->view_ = {format, n, k, blocks, blocks * kBlock, nullptr};
  if (format == kF32) {
    if (k % kBlock == 0) {
      w->view_.data = rows;
      w->owner_ = std::move(owner);
      return w;
    }
    w->allocate(n * blocks * kBlock * sizeof(float));
    auto* out = static_cast<float*>(w->memory_);
    for (size_t r = 0; r < n; ++r) std::memcpy(out + r * blocks * kBlock, rows + r * k, k * sizeof(float));
    return w;
  }
  const size_t per_block = block_bytes(format), row = row_bytes(format);
  w->allocate(w->tiles() * blocks * per_block);
  auto* out = static_cast<uint8_t*>(w->memory_);
  for (size_t r = 0; r < n; ++r) {
    uint8_t* base = out + (r / kTileRows) * blocks * per_block + (r % kTileRows) * row;
    for (size_t i = 0; i < k; ++i) {
      auto* block = reinterpret_cast<uint16_t*>(base + (i / kBlock) * per_block);
      block[bf16_index(i % kBlock)] = float_to_bf16(rows[r * k + i]);
    }
  }
  return w;
}

std::shared_ptr<Matrix> Matrix::from_affine(int bits, size_t group, const uint8_t* values, const float* scales,
                                            const float* offsets, size_t n, size_t k) {
  if (k % group != 0) throw std::invalid_argument("inputs are not a whole number of groups");
  // A group of 128 is two of 64 with the same scale; a model's inputs may end inside a block.
  const size_t kept = group > 64 ? 64 : group, per_row = k / group, split = group / kept;
  bool half = true;
  for (size_t i = 0; i < n * per_row && half; ++i) {
    bool a, b;
    float_to_half_exact(scales[i], &a);
    float_to_half_exact(offsets[i], &b);
    half = a && b;
  }
  Format format = affine_format(bits, kept, half);
  if (format == kFormats) format = affine_format(bits, kept, half = false);
  if (format == kFormats || group % kept != 0) throw std::invalid_argument("no layout for these bits and group");
  std::shared_ptr<Matrix> w(new Matrix());
  const size_t blocks = (k + kBlock - 1) / kBlock, per_block = block_bytes(format), row = row_bytes(format);
  w->view_ = {format, n, k, blocks, blocks * kBlock, nullptr};
  w->allocate(w->tiles() * blocks * per_block);
  auto* out = static_cast<uint8_t*>(w->memory_);
  const size_t in_block = kBlock / kept;
  for (size_t r = 0; r < n; ++r) {
    uint8_t* tile = out + (r / kTileRows) * blocks * per_block;
    const size_t lane = r % kTileRows;
    for (size_t i = 0; i < k; ++i) {
      uint8_t* p = tile + (i / kBlock) * per_block + lane * row;
      const size_t at = i % kBlock;
      if (bits == 8) {
        p[at] = values[r * k + i];
      } else {
        nibble_word(p, lane, row)[2 * (at % 16)] |= (uint16_t)((values[r * k + i] & 15u) << (4 * (at / 16)));
      }
    }
    for (size_t g = 0; g < k / kept; ++g) {
      uint8_t* p = tile + (g / in_block) * per_block + kTileRows * row;
      const size_t at = 2 * (lane * in_block + g % in_block);
      const float pair[2] = {scales[r * per_row + g / split], offsets[r * per_row + g / split]};
      for (size_t j = 0; j < 2; ++j) {
        if (half) {
          reinterpret_cast<uint16_t*>(p)[at + j] = float_to_half_exact(pair[j], nullptr);
        } else {
          reinterpret_cast<float*>(p)[at + j] = pair[j];
        }
      }
    }
  }
  return w;
}

void Matrix::unpack(float* rows) const {
  const auto& s = kShapes[view_.format];
  const size_t per_block = block_bytes(view_.format), row = row_bytes(view_.format);
  const size_t in_block = s.group ? kBlock / (size_t)s.group : 0;
  for (size_t r = 0; r < view_.n; ++r) {
    if (view_.format == kF32) {
      std::memcpy(rows + r * view_.k, static_cast<const float*>(view_.data) + r * view_.stride, view_.k * 4);
      continue;
    }
    const auto* tile = static_cast<const uint8_t*>(view_.data) + (r / kTileRows) * view_.blocks * per_block;
    const size_t lane = r % kTileRows;
    for (size_t i = 0; i < view_.k; ++i) {
      const uint8_t* block = tile + (i / kBlock) * per_block;
      const uint8_t* p = block + lane * row;
      const size_t at = i % kBlock;
      float& out = rows[r * view_.k + i];
      if (view_.format == kBf16) {
        out = bf16_to_float(reinterpret_cast<const uint16_t*>(p)[bf16_index(at)]);
        continue;
      }
      const float q = s.bits == 8 ? p[at] : (float)((nibble_word(const_cast<uint8_t*>(p), lane, row)[2 * (at % 16)] >> (4 * (at / 16))) & 15);
      const size_t pair = 2 * (lane * in_block + at / (size_t)s.group);
      const uint8_t* scales = block + kTileRows * row;
      const auto read = [&](size_t j) {
        return s.scale_bytes == 2 ? half_to_float(reinterpret_cast<const uint16_t*>(scales)[j])
                                  : reinterpret_cast<const float*>(scales)[j];
      };
      out = std::fma(read(pair), q, read(pair + 1));
    }
  }
}

float* Scratch::zeroed(size_t floats) {
  memory_.assign(floats + 16, 0.0f);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
}

void multiply(const Kernels& kernels, const Matrix& w, const float* x, size_t m, const float* bias, float* y) {
  const auto& v = w.view();
  thread_local Scratch scratch;  // of the thread that runs this stream's operations
  float* packed = scratch.zeroed(m * v.blocks * kBlock);
  for (size_t r = 0; r < m; ++r) {
    for (size_t i = 0; i < v.k; i += kBlock) {
      std::memcpy(packed + packed_at(m, r, i), x + r * v.k + i, std::min(kBlock, v.k - i) * sizeof(float));
    }
  }
  const size_t tiles = w.tiles();
  const auto piece = [&](size_t first, size_t last) {
    kernels.rows[v.format](v, packed, m, first, last, y, v.n);
    if (!bias) return;
    const size_t n0 = first * kTileRows, n1 = std::min(last * kTileRows, v.n);
    for (size_t r = 0; r < m; ++r) kernels.add(y + r * v.n + n0, bias + n0, n1 - n0);
  };
  // smaller than a hand-over between threads: do it here
  const auto pool = v.n * v.blocks * kBlock * m < (1u << 17) ? nullptr : shared_pool();
  if (!pool || pool->size() == 1) {
    piece(0, tiles);
    return;
  }
  // Pieces of about 32 kB: small enough to even out, large enough to run.
  const size_t size = std::max<size_t>(1, (32u << 10) / (v.blocks * block_bytes(v.format)));
  const size_t pieces = (tiles + size - 1) / size;
  pool->run(1, [&](Crew& crew) {
    crew.phase(pieces, [&](size_t i) { piece(i * size, std::min(tiles, (i + 1) * size)); });
  });
}

}  // namespace specl
