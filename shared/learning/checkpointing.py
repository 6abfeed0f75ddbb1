"""Gradient checkpointing of chosen modules, for as long as a block runs: activations are recomputed in the backward pass.

A module changes its class and gets it back: nothing is patched for other instances, and nothing stacks up in a process
that trains many times (mlx-lm's `grad_checkpoint` patches the class for good).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.nn as nn


@cache
def _checkpointed(kind: type) -> type:
    def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        return nn.utils.checkpoint(self, lambda *a, **k: kind.__call__(self, *a, **k))(*inputs, **named)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})


@contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block these modules keep no activations for the backward pass."""
    chosen = [(module, type(module)) for module in modules]
    for module, kind in chosen:
        module.__class__ = _checkpointed(kind)
    try:
        yield
    finally:
        for module, kind in chosen:
            module.__class__ = kind
