// The product as an MLX operation, usable anywhere in a graph.
#pragma once

#include <mlx/array.h>
#include <mlx/primitives.h>

#include <memory>
#include <optional>

#include "matrix.h"

namespace specl {

const Kernels& kernels();             // those in use: the machine's best unless `use` chose others
bool use(const std::string& name);    // false where the machine lacks them

// x[..., K] @ W^T (+ bias): fp32 in, fp32 out. Computed at once where the inputs are there already, else lazily.
mlx::core::array linear(const mlx::core::array& x, std::shared_ptr<Matrix> w, const std::optional<mlx::core::array>& bias);

}  // namespace specl
