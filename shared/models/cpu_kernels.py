"""Native speed on Linux CPUs for a loaded model, where `specl.shared.native` is built; elsewhere everything stays as it is.

A quantised model is computed in dense fp32 on CPU, but a few rows are read from the file's own blocks: the same weights bit
for bit at a seventh of the memory traffic.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ONE_CALL = "layers as one call"


def blocks_of(model: nn.Module) -> dict[str, Any]:
    """The affine blocks of every quantised layer, by path, before the model is made dense."""
    from specl.shared.native import affine_from_mlx, available

    if not available():
        return {}
    found = {}
    for path, module in model.named_modules():
        if (
            isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
            and getattr(module, "mode", "affine") == "affine"
        ):
            parts = (module.weight, module.scales, module.biases)
            found[path] = affine_from_mlx(*parts, bits=module.bits, group_size=module.group_size)
    return found


def use_cpu_kernels(
    model: nn.Module, blocks: Mapping[str, Any] | None = None, fuse: bool = True, weights: str = "auto"
) -> str:
    """Let `model` answer few rows natively; a word on what it got, or why nothing. Safe to call again after a change.

    `weights` "auto" rounds nothing; "bf16" rounds, which only a draft may: its guesses are checked.
    """
    from specl.shared.native import accelerate, instruction_set

    result = accelerate(model, weights, exact=blocks or {}, fuse=fuse)
    if not result.active:
        return result.reason
    formats = ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
    return f"native {instruction_set()}: {formats}" + (f", {ONE_CALL}" if result.fused else "")


class _Holder(nn.Module):
    """Gives a lone layer a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def use_cpu_kernels_in_layer(layer: nn.Module, blocks: Any = None, weights: str = "auto") -> None:
    """`use_cpu_kernels` for one layer that belongs to no model yet; `blocks` are its own, where its file had any."""
    use_cpu_kernels(_Holder(layer), {"layer": blocks} if blocks is not None else {}, fuse=False, weights=weights)


def draft_stack(head: nn.Module, embedding: mx.array) -> Any:
    """A head draft as one native call, or None where that is not possible; `embedding` is its target's, dense fp32."""
    from specl.shared.native import available, drafting

    if not available() or embedding.dtype != mx.float32 or drafting.unfit(head):
        return None
    try:
        return drafting.DraftStack(head, embedding)
    except ValueError:  # sizes that it has no layout for
        return None


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    return mx.default_device().type == mx.DeviceType.cpu
