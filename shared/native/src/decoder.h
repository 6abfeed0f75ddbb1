// The stack behind an mlx-lm model: finds the weights unchanged, the cache fit and its buffers unshared, then steps.
//
// Runs at once instead of lazily: a step's input is a token that the host already knows, and a write into the cache's
// buffer is only right while nobody else can see it, which can be known now and not later.
#pragma once

#include <mlx/array.h>
#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <vector>

#include "stack.h"

namespace specl {

class Decoder {
 public:
  // `cache_type`: the one class of cache whose keys and values are understood (mlx-lm's KVCache).
  Decoder(StackShape shape, mlx::core::array final_norm, mlx::core::array embedding, nanobind::object cache_type);
  void append(const std::vector<std::shared_ptr<Matrix>>& weights,
              const std::vector<std::optional<mlx::core::array>>& biases, mlx::core::array input_norm,
              mlx::core::array post_norm);
  // The way from the model to something the stack relies on: entry `parent` (-1: the model itself), then this key or
  // index, must give this very object; an array must also still be the same array.
  void guard(int parent, nanobind::object key, nanobind::object expected);
  // cos and sin of positions 0 ..: [positions, head_dim / 2].
  void set_positions(mlx::core::array cos, mlx::core::array sin);
  bool intact(nanobind::handle model) const;
  // An array of hidden states; a number: positions needed, call set_positions and again; None: take the ordinary path.
  nanobind::object step(nanobind::handle model, mlx::core::array& ids, nanobind::handle cache);

 private:
  struct Guard {
    int parent;
    nanobind::object key;  // text or number: no way back to the model, so no cycle
    PyObject* expected;    // borrowed: compared, and followed only after it was found again
    std::uintptr_t array;  // its identity where it is an array; `kept_` holds it, so that it cannot be taken by another
  };
  const float* keep(const mlx::core::array& a);

  std::vector<mlx::core::array> kept_;  // before what points into it
  Stack stack_;
  std::vector<Guard> guards_;
  mlx::core::array embedding_, cos_, sin_;
  nanobind::object cache_type_;
};

}  // namespace specl
