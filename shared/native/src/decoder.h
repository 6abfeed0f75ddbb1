// The stack behind an mlx-lm model or a head draft: finds the weights unchanged, the caches fit and their buffers unshared,
// then steps.
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
  // A head draft: its rows come from a state and an embedding.
  void enter_through(mlx::core::array embedding_norm, mlx::core::array state_norm, std::shared_ptr<Matrix> fc);
  // The way from the model to something the stack relies on: entry `parent` (-1: the model itself), then this key or
  // index, must give this very object; an array must also still be the same array.
  void guard(int parent, nanobind::object key, nanobind::object expected);
  // cos and sin of positions 0 ..: [positions, head_dim / 2].
  void set_positions(mlx::core::array cos, mlx::core::array sin);
  bool intact(nanobind::handle model) const;
  // What all three give: None: take the ordinary path; a number: positions needed, call set_positions and again.
  // Otherwise hidden states after the final norm, [1, width, hidden].
  nanobind::object step(nanobind::handle model, mlx::core::array& ids, nanobind::handle cache);
  // The same for several sequences at once, each with its own ids and cache: [rows, hidden].
  nanobind::object step_lanes(nanobind::handle model, const std::vector<std::vector<int64_t>>& ids, nanobind::list caches);
  // For a head draft: (last output [1, hidden], its scores [n], the best score's place, log-sum-exp of the scores).
  nanobind::object draft(nanobind::handle model, mlx::core::array& states, const std::vector<int64_t>& ids,
                         nanobind::handle cache, const std::shared_ptr<Matrix>& scorer);

 private:
  struct Guard {
    int parent;
    nanobind::object key;  // text or number: no way back to the model, so no cycle
    PyObject* expected;    // borrowed: compared, and followed only after it was found again
    std::uintptr_t array;  // its identity where it is an array; `kept_` holds it, so that it cannot be taken by another
  };
  struct Fetched {
    nanobind::object cache, keys, values;  // keys and values may be None
  };
  // The caches of one sequence during a step.
  struct Borrowed {
    std::vector<Fetched> layers;
    std::vector<CacheView> views;
    size_t offset = 0, width = 0;
  };
  struct Ready {
    std::vector<Borrowed> lanes;
    std::vector<mlx::core::array> held;  // keeps the buffers through the step; taken after they were found unshared
    std::optional<mlx::core::array> rows;
    size_t width = 0;
    nanobind::object refusal;  // what to return instead, if anything
  };
  bool look(nanobind::handle cache, Borrowed& lane) const;
  bool open(Borrowed& lane, std::vector<mlx::core::array>& held) const;
  Ready prepare(nanobind::handle model, const std::vector<std::vector<int64_t>>& ids,
                const std::vector<nanobind::handle>& caches) const;
  void run(Ready& ready, Step step);
  const float* keep(const mlx::core::array& a);

  std::vector<mlx::core::array> kept_;  // before what points into it
  Stack stack_;
  std::vector<Guard> guards_;
  mlx::core::array embedding_, cos_, sin_;
  nanobind::object cache_type_;
};

}  // namespace specl
