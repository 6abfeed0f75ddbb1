"""Native kernels on Linux CPUs for a loaded model, where `specl.shared.native` is built; elsewhere
nothing changes.

A quantised model is computed in dense fp32 on CPU, but a few rows are read from the file's own
blocks: the same weights bit for bit at a seventh of the memory traffic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from specl.shared.native.accelerate import accelerate
from specl.shared.native.decoder import stack_of
from specl.shared.native.drafting import DraftStack, why_not_fusable
from specl.shared.native.extension import MAX_WIDTH, available, instruction_set
from specl.shared.native.modules import packed_weight
from specl.shared.native.packing import Affine, Weights, affine_from_mlx

FEW_ROWS = MAX_WIDTH  # rows that the kernels take at once; more go through MLX


@dataclass(frozen=True, slots=True)
class Kernels:
    """How a model computes few rows. `description` is part of the key that measured costs are filed
    under.
    """

    description: str
    one_call: bool = False  # all layers in one native call


AS_LOADED = Kernels("as loaded")


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def blocks_of(model: nn.Module) -> dict[str, Affine]:
    """The affine blocks of every quantised layer, by path, before the model is made dense."""
    if not available():
        return {}
    return {
        path: affine_from_mlx(
            module.weight, module.scales, module.biases, bits=module.bits, group_size=module.group_size
        )
        for path, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        and getattr(module, "mode", "affine") == "affine"
        and module.biases is not None
    }


def use_cpu_kernels(
    model: nn.Module, blocks: Mapping[str, Affine] | None = None, fuse: bool = True, weights: Weights = "auto"
) -> Kernels:
    """Let `model` compute few rows natively, where that is possible. Safe to call again after
    layers changed.

    `weights` "auto" rounds nothing; "bf16" rounds, which only a draft may: its guesses are checked.
    """
    result = accelerate(model, weights, exact=blocks or {}, fuse=fuse)
    if not result.active:
        return Kernels(result.reason)
    formats = ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
    one_call = ", layers as one call" if result.fused else ""
    return Kernels(f"native {instruction_set()}: {formats}{one_call}", result.fused)


class _Holder(nn.Module):
    """Gives a lone layer the path `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def use_cpu_kernels_in_layer(layer: nn.Module, blocks: Affine | None = None, weights: Weights = "auto") -> None:
    """`use_cpu_kernels` for one layer that belongs to no model yet; `blocks` are the layer's, where
    its file had any.
    """
    use_cpu_kernels(_Holder(layer), {"layer": blocks} if blocks is not None else {}, fuse=False, weights=weights)


def is_packed_from_blocks(layer: nn.Module) -> bool:
    """Whether the kernels read this layer's weight in its file's own blocks."""
    packed = packed_weight(layer)
    return packed is not None and packed.of(layer.weight) and packed.matrix.format not in ("f32", "bf16")


def batch_step(inner: nn.Module, ids: Sequence[Sequence[int]], caches: Sequence[list[Any]]) -> mx.array | None:
    """One native step of several sequences: hidden states [rows, hidden] in order; None where the
    model has no such step.
    """
    stack = stack_of(inner)
    return stack.step_lanes(inner, [list(row) for row in ids], list(caches)) if stack is not None else None


def draft_stack(head: nn.Module, embedding: mx.array) -> DraftStack | None:
    """A head draft as one native call, or None where that is not possible; `embedding` is its
    target's, dense fp32.
    """
    if not available() or embedding.dtype != mx.float32 or why_not_fusable(head):
        return None
    try:
        return DraftStack(head, embedding)
    except ValueError:  # sizes that it has no layout for
        return None
