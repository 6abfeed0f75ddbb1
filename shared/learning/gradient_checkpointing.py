"""Gradient checkpointing of chosen modules within a block: their activations are recomputed in the
backward pass.

A module gets another class for the time of the block. Other instances are not patched, and
nothing accumulates in a process that trains many times (mlx-lm's `grad_checkpoint` patches the
class for good).
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_seeds = itertools.count()


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.training for m in module.modules())


@cache
def _checkpointed(kind: type) -> type:
    def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        seed = next(_seeds) if _has_dropout(self) else None

        def run(*a: Any, **k: Any) -> Any:
            if seed is not None:  # the backward pass runs this again and must drop the same activations
                mx.random.seed(seed)
            return kind.__call__(self, *a, **k)

        return nn.utils.checkpoint(self, run)(*inputs, **named)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})


@contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, these modules keep no activations for the backward pass."""
    chosen = [(module, type(module)) for module in modules]
    for module, kind in chosen:
        module.__class__ = _checkpointed(kind)
    try:
        yield
    finally:
        for module, kind in chosen:
            module.__class__ = kind
