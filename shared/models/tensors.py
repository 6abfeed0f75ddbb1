"""Named tensors of a module and of a safetensors file, with the types that MLX's stubs leave open."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Tensors = dict[str, mx.array]


def flat_parameters(parameters: dict[str, Any]) -> Tensors:
    """A module's parameter tree by dotted name."""
    return dict(tree_flatten(parameters))


def read_tensors(path: Path) -> Tensors:
    """A safetensors file's tensors, read when evaluated. Raises what `mx.load` raises: OSError,
    ValueError, RuntimeError.
    """
    tensors = mx.load(str(path))
    if not isinstance(tensors, dict):
        raise ValueError(f"{path.name} holds no named tensors")
    return tensors
