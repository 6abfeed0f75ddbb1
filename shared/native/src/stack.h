// All decoder layers of a Llama or Qwen2 and the final norm as one call, for up to sixteen rows of one or more sequences;
// or a head draft's one layer, with its entrance before it and its scores behind it.
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

// Rows of one sequence: `width` of them, from row `first` on, at positions offset ... One cache view a layer.
struct Lane {
  size_t first, width, offset;
  const CacheView* cache;
};

// How a head draft makes its residual stream: fc [norm(embedding), norm(state)].
struct Entrance {
  const float *embedding_norm, *state_norm;
  Projection fc;
};

// What one step reads and writes. Rows belong to `lanes` in order, none left out.
struct Step {
  const float* rows;              // [width, hidden]: embeddings
  const float* states = nullptr;  // [width, hidden], where there is an entrance
  size_t width = 0;
  const Lane* lanes = nullptr;
  size_t lane_count = 0;
  const float *cos = nullptr, *sin = nullptr;  // of positions 0 ..: [positions, head_dim / 2]
  float* out = nullptr;                        // [width, hidden]: after the final norm
  const Matrix* scorer = nullptr;              // scores the last row, where it is wanted
  float* scores = nullptr;                     // [scorer's n]
};

class Stack {
 public:
  Stack(StackShape shape, const float* final_norm) : shape_(shape), final_norm_(final_norm) {}
  // Throw std::invalid_argument where the sizes do not fit each other.
  void append(Layer layer);
  void enter_through(Entrance entrance);
  const StackShape& shape() const { return shape_; }
  size_t layers() const { return layers_.size(); }
  bool has_entrance() const { return entrance_.fc.weight != nullptr; }
  void step(const Kernels& kernels, const Step& step);

 private:
  struct Pass;
  StackShape shape_;
  const float* final_norm_;
  Entrance entrance_{};
  std::vector<Layer> layers_;
  Scratch scratch_;
};

}  // namespace specl
