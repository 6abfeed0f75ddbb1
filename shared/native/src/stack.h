// All decoder layers of a Llama or Qwen2 and the final norm as one call, for up to sixteen rows of one sequence.
//
// One region of the thread pool a step, five meetings a layer. Keys and values go straight into the cache's own buffers.
// Does not know MLX, Python, tokens or logits; the caller says where the cache lies and that nobody else reads it now.
#pragma once

#include <memory>
#include <vector>

#include "matrix.h"

namespace specl {

struct Projection {
  std::shared_ptr<Matrix> weight;
  const float* bias = nullptr;
};

struct Layer {
  const float *input_norm, *post_norm;
  Projection q, k, v, o, gate, up, down;
};

struct StackShape {
  size_t hidden, heads, kv_heads, head_dim, intermediate;
  float eps;
};

struct CacheView {  // of one layer: [kv_heads, capacity, head_dim]
  float *keys, *values;
  size_t capacity;
};

class Stack {
 public:
  Stack(StackShape shape, const float* final_norm) : shape_(shape), final_norm_(final_norm) {}
  // Throws std::invalid_argument where the sizes do not fit each other.
  void append(Layer layer);
  const StackShape& shape() const { return shape_; }
  size_t layers() const { return layers_.size(); }
  // Rows m = 0 .. width-1 at positions offset + m. cos and sin: [width, head_dim / 2]. hidden and out: [width, hidden].
  void step(const Kernels& kernels, const float* hidden, size_t width, size_t offset, const CacheView* cache,
            const float* cos, const float* sin, float* out);

 private:
  struct Pass;
  StackShape shape_;
  const float* final_norm_;
  std::vector<Layer> layers_;
  Scratch scratch_;
};

}  // namespace specl
