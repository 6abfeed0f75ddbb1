"""LoRA on named linear layers: attach, fuse from the pristine base, detach (Hu et al.
2021, arXiv 2106.09685).

y = W x + scale * (x A) B with scale = alpha / rank, A [in, rank], B [rank, out], as mlx-lm names
and stores them. The base is never changed: a fused layer is a new layer, and going back to the base
is exact. Knows modules, not adapter directories. What takes longer than a decode round is a
generator (`..._steps`) that yields between layers; `run_all` runs one at once.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from specl.shared.errors import AdapterRejected
from specl.shared.runtime.incremental import Steps

Weights = dict[str, mx.array]
FIDELITY_LIMIT = (
    0.1  # share of an adapter's effect that fuse_steps may lose (measured: fp32 0, fp16 0.02-0.2, 4-bit > 3)
)
PROBE_ROWS = 64  # of random input that the loss is measured on

# how a draft computes with an adapter: merged into its weights, or as two products added to each
# layer's
AdapterForm = Literal["fused", "unfused"]


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Rank and alpha of an adapter, and the dotted names of the layers that it changes."""

    rank: int
    alpha: float
    dropout: float
    keys: tuple[str, ...]

    @property
    def scale(self) -> float:
        """alpha / rank: what mlx-lm calls scale."""
        return self.alpha / self.rank


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every dense or quantised linear layer under `module`, by dotted name. Embeddings and heads
    shared with a target are not among them: they are not under a draft's module.
    """
    kinds = (nn.Linear, nn.QuantizedLinear, LoRALinear)
    layers = {name: child for name, child in module.named_modules() if isinstance(child, kinds)}
    inner = {f"{name}.linear" for name, child in layers.items() if isinstance(child, LoRALinear)}
    return {name: child for name, child in layers.items() if name not in inner}


def choose_layers(module: nn.Module, target_modules: list[str] | str) -> tuple[str, ...]:
    """The layers that `target_modules` selects, by last part or whole name; "all" for every layer.

    Raises AdapterRejected for a name that matches nothing.
    """
    names = sorted(name for name in linear_layers(module) if not name.endswith(("lm_head", "embed_tokens")))
    if target_modules == "all":
        return tuple(names)
    chosen: set[str] = set()
    for target in target_modules:
        matches = [name for name in names if name == target or name.rsplit(".", 1)[-1] == target]
        if not matches:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise AdapterRejected(
                f"training.lora.target_modules: the draft has no linear layer {target!r}; it has {known}"
            )
        chosen.update(matches)
    return tuple(sorted(chosen))


def attach(module: nn.Module, shape: LoraShape, weights: Weights | None = None) -> None:
    """Wrap the layers of `shape` in LoRALinear for training; B starts at zero unless `weights`
    gives A and B. There is no dropout before `train()`.
    """
    detach(module)
    layers = linear_layers(module)
    wrapped = [
        (
            name,
            LoRALinear.from_base(
                cast(nn.Linear, layers[name]), r=shape.rank, dropout=shape.dropout, scale=shape.scale
            ).eval(),
        )
        for name in shape.keys
    ]
    module.update_modules(tree_unflatten(wrapped))
    if weights:
        module.load_weights(list(weights.items()), strict=False)
    mx.eval(module.parameters())


def detach(module: nn.Module) -> None:
    """Put the pristine layers back: the same objects that were wrapped."""
    wrapped = [(name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)]
    module.update_modules(tree_unflatten([(name, child.linear) for name, child in wrapped]))


def lora_weights(module: nn.Module) -> Weights:
    """A and B of every wrapped layer, under mlx-lm's names."""
    weights: Weights = {}
    for name, child in module.named_modules():
        if isinstance(child, LoRALinear):
            weights[f"{name}.lora_a"], weights[f"{name}.lora_b"] = child.lora_a, child.lora_b
    return weights


def interpolate(weights: Weights, alpha: float, start: Weights | None = None) -> Weights:
    """start + alpha * (weights - start) (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    Without `start` the other end is no change at all: B alone is scaled, which is exact, whatever A
    is.
    """
    if start is not None:
        return {name: start[name] + alpha * (value - start[name]) for name, value in weights.items()}
    return {name: alpha * value if name.endswith(".lora_b") else value for name, value in weights.items()}


def check_steps(module: nn.Module, shape: LoraShape, weights: Weights) -> Steps[list[str]]:
    """Everything that keeps `weights` from being an adapter for `module`: names, types, shapes,
    values. Empty means usable.
    """
    layers, problems = linear_layers(module), []
    expected: set[str] = set()
    for key in shape.keys:
        expected |= {f"{key}.lora_a", f"{key}.lora_b"}
        if key not in layers:
            problems.append(f"the draft has no linear layer {key}")
            continue
        out, inner = _dense_shape(layers[key])
        sizes = {f"{key}.lora_a": (inner, shape.rank), f"{key}.lora_b": (shape.rank, out)}
        wrong = [problem for name, size in sizes.items() if (problem := _tensor_problem(name, size, weights))]
        # finite factors can still have a product that is not
        if not wrong and not _all_finite(_change(key, shape, weights).astype(_compute_dtype(layers[key]))):
            wrong = [f"{key}: its weight change overflows"]
        problems += wrong
        yield
    problems += [f"{name} is not part of this adapter" for name in sorted(weights.keys() - expected)]
    return problems


def _tensor_problem(name: str, size: tuple[int, int], weights: Weights) -> str:
    if name not in weights:
        return f"{name} is missing"
    if not mx.issubdtype(weights[name].dtype, mx.floating):
        return f"{name} has values of type {str(weights[name].dtype).removeprefix('mlx.core.')}, not real numbers"
    if tuple(weights[name].shape) != size:
        return f"{name} has shape {tuple(weights[name].shape)}, not {size}"
    return "" if _all_finite(weights[name]) else f"{name} has values that are not finite"


def _all_finite(values: mx.array) -> bool:
    return bool(mx.all(mx.isfinite(values)))


def _change(key: str, shape: LoraShape, weights: Weights) -> mx.array:
    """scale * A B of one layer in fp32, [in, out]."""
    a, b = (weights[f"{key}.{part}"].astype(mx.float32) for part in ("lora_a", "lora_b"))
    return shape.scale * (a @ b)


def change_norm_steps(shape: LoraShape, weights: Weights) -> Steps[float]:
    """Frobenius norm of all weight changes together: sqrt(sum ||scale * A B||^2)."""
    norms = []
    for key in shape.keys:
        norms.append(float(mx.linalg.norm(_change(key, shape, weights))))
        yield
    return math.hypot(*norms)


def _compute_dtype(layer: nn.Module) -> mx.Dtype:
    """The type of a layer's output: that of its weight, or of its scales where it is quantised."""
    layer = layer.linear if isinstance(layer, LoRALinear) else layer
    dtype: mx.Dtype = layer.scales.dtype if isinstance(layer, nn.QuantizedLinear) else layer.weight.dtype
    return dtype


def _dense_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a layer, quantised or not."""
    layer = layer.linear if isinstance(layer, LoRALinear) else layer
    out, inner = layer.weight.shape
    return (out, inner * 32 // layer.bits) if isinstance(layer, nn.QuantizedLinear) else (out, inner)


def fuse_steps(
    layers: dict[str, nn.Module], shape: LoraShape, weights: Weights
) -> Steps[tuple[AdapterForm, dict[str, nn.Module]]]:
    """New layers that compute with the adapter, by name; the pristine `layers` stay as they are.

    Layers are fused where all of them are dense and none loses FIDELITY_LIMIT of the adapter's
    effect, else unfused. Everything is evaluated, so that the next forward pays nothing.
    """
    unfused, fused, largest_loss = {}, {}, 0.0
    for key in shape.keys:
        unfused[key] = _unfused(layers[key], key, shape, weights)
        if not isinstance(layers[key], nn.QuantizedLinear):
            fused[key] = _fused(unfused[key], shape.scale)
            yield
            largest_loss = max(largest_loss, _fusing_loss(unfused[key], fused[key]))
        yield
    if len(fused) == len(unfused) and largest_loss < FIDELITY_LIMIT:
        return "fused", dict(fused)
    return "unfused", dict(unfused)


def _unfused(base: nn.Module, key: str, shape: LoraShape, weights: Weights) -> LoRALinear:
    """A LoRALinear for use, not for training: without dropout, in whatever mode the module is."""
    layer: LoRALinear = LoRALinear.from_base(cast(nn.Linear, base), r=shape.rank, scale=shape.scale).eval()
    layer.lora_a, layer.lora_b = weights[f"{key}.lora_a"], weights[f"{key}.lora_b"]
    return layer


def _fused(layer: LoRALinear, scale: float) -> nn.Linear:
    base = layer.linear
    outputs, inputs = base.weight.shape
    fused = nn.Linear(inputs, outputs, bias="bias" in base)
    delta = (scale * (layer.lora_a @ layer.lora_b)).T
    fused.weight = (base.weight.astype(mx.float32) + delta).astype(base.weight.dtype)
    if "bias" in base:
        fused.bias = base.bias
    mx.eval(fused.parameters())
    return fused


def _fusing_loss(layer: LoRALinear, fused: nn.Linear) -> float:
    """||fused - unfused|| / ||unfused - base|| on random rows: the share of the adapter's effect
    that rounding loses.
    """
    rows = mx.random.normal((PROBE_ROWS, fused.weight.shape[1]), key=mx.random.key(0)).astype(fused.weight.dtype)
    base_output, unfused_output, fused_output = layer.linear(rows), layer(rows), fused(rows)
    effect = float(mx.linalg.norm((unfused_output - base_output).astype(mx.float32)))
    difference = float(mx.linalg.norm((fused_output - unfused_output).astype(mx.float32)))
    return difference / effect if effect > 0 else 0.0


class Pristine:
    """The draft's layers as they were loaded; `restore` puts the same objects back."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = [
            (name, child) for name, child in linear_layers(module).items() if not isinstance(child, LoRALinear)
        ]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The pristine layers, by dotted name."""
        return dict(self._layers)

    def restore(self) -> None:
        """Undo any adapter."""
        self._module.update_modules(tree_unflatten(self._layers))
