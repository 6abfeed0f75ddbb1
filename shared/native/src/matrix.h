// A weight matrix in the layout of kernels.h: packed once when a model is loaded, then only read.
//
// Promises: `unpack` gives back exactly what the products use, so that a loader can compare it with the dense weights.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace specl {

class Matrix {
 public:
  // `owner` keeps borrowed rows alive (kF32 without padding); everything else is copied.
  static std::shared_ptr<Matrix> from_float(Format format, const float* rows, size_t n, size_t k,
                                            std::shared_ptr<const void> owner);
  // Affine weights: values 0 .. 2^bits-1, one a byte, scale and offset of each run of `group` inputs.
  static std::shared_ptr<Matrix> from_affine(int bits, size_t group, const uint8_t* values, const float* scales,
                                             const float* offsets, size_t n, size_t k);
  ~Matrix();
  Matrix(const Matrix&) = delete;

  const MatrixView& view() const { return view_; }
  size_t tiles() const { return (view_.n + kTileRows - 1) / kTileRows; }
  size_t bytes() const { return bytes_; }
  void unpack(float* rows) const;  // [n, k]

 private:
  Matrix() = default;
  void allocate(size_t bytes);

  MatrixView view_{};
  size_t bytes_ = 0;
  void* memory_ = nullptr;
  std::shared_ptr<const void> owner_;
};

// y[m, n] = x[m, k] W^T (+ bias), split over the pool.
void multiply(const Kernels& kernels, const Matrix& w, const float* x, size_t m, const float* bias, float* y);

// Floats on a 64-byte border, zero at first; grows and never shrinks.
class Scratch {
 public:
  float* zeroed(size_t floats);

 private:
  std::vector<float> memory_;
};

uint16_t float_to_half_exact(float f, bool* exact);

}  // namespace specl
