// The kernels, the packing, the pool and the stack without MLX or Python, to be run under a sanitizer: every format, odd
// shapes, all instruction sets of the machine, several threads; products and steps compared between sets bit for bit.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "pool.h"
#include "stack.h"

using namespace specl;

static std::mt19937 noise(1);
static float normal() { return std::normal_distribution<float>()(noise); }

static std::shared_ptr<Matrix> make(int format, size_t n, size_t k, std::vector<std::vector<float>>& kept) {
  const auto& s = kShapes[format];
  if (!s.group) {
    kept.emplace_back(n * k);
    for (float& w : kept.back()) w = normal();
    return Matrix::from_float((Format)format, kept.back().data(), n, k, nullptr);
  }
  std::vector<uint8_t> values(n * k);
  for (auto& v : values) v = (uint8_t)(noise() % (1u << s.bits));
  std::vector<float> scales(n * k / s.group), offsets(scales.size());
  for (float& x : scales) x = s.scale_bytes == 2 ? (float)(noise() % 64) / 32 : normal();
  for (float& x : offsets) x = s.scale_bytes == 2 ? (float)(noise() % 64) / 64 : normal();
  return Matrix::from_affine(s.bits, (size_t)s.group, values.data(), scales.data(), offsets.data(), n, k);
}

static int wrong = 0;

static void products(const std::vector<const Kernels*>& sets) {
  for (int format = 0; format < kFormats; ++format) {
    for (size_t n : {1, 5, 66}) {
      for (size_t k : {64, 192, 1088}) {
        std::vector<std::vector<float>> kept;
        const auto w = make(format, n, k, kept);
        std::vector<float> dense(n * k), x(16 * k), first(16 * n);
        w->unpack(dense.data());
        for (float& v : x) v = normal();
        for (size_t m : {1, 2, 3, 5, 8, 13, 16}) {
          for (const auto* kernels : sets) {
            std::vector<float> y(m * n, NAN), bias(n, 0.0f);
            multiply(*kernels, *w, x.data(), m, bias.data(), y.data());
            for (size_t i = 0; i < m * n; ++i) {
              if (kernels == sets[0]) first[i] = y[i];
              double right = 0, room = 1e-6;
              for (size_t j = 0; j < k; ++j) {
                const double term = (double)x[i / n * k + j] * dense[i % n * k + j];
                right += term, room += std::fabs(term);
              }
              if (std::fabs(y[i] - right) > 4e-7 * room || y[i] != first[i]) ++wrong;
            }
          }
        }
      }
    }
  }
}

static void steps(const std::vector<const Kernels*>& sets) {
  const StackShape shape{96, 6, 2, 16, 224, 1e-5f};
  std::vector<float> norm(96, 1.0f), bias(224, 0.1f);
  std::vector<std::vector<float>> kept;
  for (int format : {(int)kBf16, (int)kQ4G32H, (int)kQ8G32F}) {
    Stack stack(shape, norm.data());
    for (int l = 0; l < 2; ++l) {
      Layer layer{norm.data(), norm.data(), {}, {}, {}, {}, {}, {}, {}};
      layer.q = {make(format, 96, 96, kept), bias.data()};
      layer.k = {make(format, 32, 96, kept), bias.data()};
      layer.v = {make(format, 32, 96, kept), nullptr};
      layer.o = {make(format, 96, 96, kept), nullptr};
      layer.gate = {make(format, 224, 96, kept), bias.data()};
      layer.up = {make(format, 224, 96, kept), nullptr};
      layer.down = {make(format, 96, 224, kept), bias.data()};
      stack.append(layer);
    }
    const size_t capacity = 320;
    std::vector<float> start(4 * 2 * capacity * 16), turn(capacity * 8, 0.6f), hidden(16 * 96);
    for (float& v : start) v = normal();
    for (float& v : hidden) v = normal();
    for (size_t width : {1, 4, 7, 16}) {
      for (size_t offset : {size_t{0}, size_t{61}, capacity - width}) {
        std::vector<float> first;
        for (const auto* kernels : sets) {
          auto memory = start;
          std::vector<CacheView> cache;
          for (size_t l = 0; l < 2; ++l) {
            float* at = memory.data() + l * 2 * 2 * capacity * 16;
            cache.push_back({at, at + 2 * capacity * 16, capacity});
          }
          std::vector<float> out(width * 96, NAN);
          const Lane lane{0, width, offset, cache.data()};
          Step step{hidden.data()};
          step.width = width;
          step.lanes = &lane;
          step.lane_count = 1;
          step.cos = step.sin = turn.data();
          step.out = out.data();
          stack.step(*kernels, step);
          if (first.empty()) first = out;
          for (size_t i = 0; i < out.size(); ++i) wrong += !(std::isfinite(out[i]) && out[i] == first[i]);
        }
      }
    }
  }
}

static void rows(const std::vector<const Kernels*>& sets) {
  for (size_t n : {1, 15, 16, 1000}) {
    std::vector<float> logits(n);
    for (float& v : logits) v = normal();
    for (const auto* kernels : sets) {
      const size_t k = n < 32 ? n : 32;
      std::vector<int32_t> ids(k);
      std::vector<float> values(k);
      const auto s = kernels->row_stats(logits.data(), n, k, ids.data(), values.data());
      for (float v : logits) wrong += v > logits[(size_t)s.argmax];
    }
  }
}

int main() {
  std::vector<const Kernels*> sets;
  for (const auto* k : {avx512_kernels(), avx2_kernels(), neon_kernels(), scalar_kernels()}) {
    if (k) sets.push_back(k);
  }
  for (size_t n : {1, 3}) {
    set_threads(n);
    products(sets);
    steps(sets);
    rows(sets);
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
