"""LoRA on named linear layers: attach, fuse from the pristine base, detach (Hu et al. 2021, arXiv 2106.09685).

y = W x + scale * (x A) B with scale = alpha / rank, A [in, rank], B [rank, out], as mlx-lm names and stores them. The base is
never changed: a fused layer is a new layer beside it, and going back is exact. Knows modules, not adapter directories.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from specl.shared.errors import AdapterRejected
from specl.shared.runtime.incremental import Steps, run_all

Weights = dict[str, mx.array]
FIDELITY_LIMIT = 0.1  # share of an adapter's effect that fuse_steps may lose (FACTS: fp32 0, fp16 0.02-0.2, 4-bit > 3)


@dataclass(frozen=True, slots=True)
class LoraShape:
    """rank and alpha of an adapter, and the layers it stands on."""

    rank: int
    alpha: float
    dropout: float
    keys: tuple[str, ...]

    @property
    def scale(self) -> float:
        """alpha / rank: what mlx-lm calls scale."""
        return self.alpha / self.rank


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every dense or quantised linear layer under `module`, by dotted name. Embeddings and heads shared with a target are
    not among them (a draft owns only what is under its own module).
    """
    kinds = (nn.Linear, nn.QuantizedLinear, LoRALinear)
    found = {name: child for name, child in module.named_modules() if isinstance(child, kinds)}
    inner = {f"{name}.linear" for name, child in found.items() if isinstance(child, LoRALinear)}
    return {name: child for name, child in found.items() if name not in inner}


def choose_layers(module: nn.Module, wanted: list[str] | str) -> tuple[str, ...]:
    """The names that `target_modules` selects, by last part or whole name.

    Raises AdapterRejected for one that matches nothing.
    """
    names = sorted(name for name in linear_layers(module) if not name.endswith(("lm_head", "embed_tokens")))
    if wanted == "all":
        return tuple(names)
    chosen: set[str] = set()
    for want in wanted:
        hits = [name for name in names if name == want or name.rsplit(".", 1)[-1] == want]
        if not hits:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise AdapterRejected(
                f"training.lora.target_modules: the draft has no linear layer {want!r}; it has {known}"
            )
        chosen.update(hits)
    return tuple(sorted(chosen))


def attach(module: nn.Module, shape: LoraShape, weights: Weights | None = None) -> None:
    """Wrap the layers of `shape` for training or unfused use; B starts at zero unless `weights` gives A and B. There is no
    dropout before `train()`.
    """
    detach(module)
    layers = linear_layers(module)
    wrapped = [
        (name, LoRALinear.from_base(layers[name], r=shape.rank, dropout=shape.dropout, scale=shape.scale).eval())
        for name in shape.keys
    ]
    module.update_modules(tree_unflatten(wrapped))
    if weights:
        module.load_weights(list(weights.items()), strict=False)
    mx.eval(module.parameters())


def detach(module: nn.Module) -> None:
    """Put the pristine layers back; the very same objects."""
    wrapped = [(name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)]
    module.update_modules(tree_unflatten([(name, child.linear) for name, child in wrapped]))


def lora_weights(module: nn.Module) -> Weights:
    """A and B of every wrapped layer, under mlx-lm's names."""
    found: Weights = {}
    for name, child in module.named_modules():
        if isinstance(child, LoRALinear):
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = child.lora_a, child.lora_b
    return found


def interpolate(weights: Weights, share: float, start: Weights | None = None) -> Weights:
    """From `start` towards `weights` (Wortsman et al. 2022, arXiv 2109.01903). Without a `start` the way begins at no change at
    all: B alone is scaled, which is exact, and A may be any.
    """
    if start is not None:
        return {name: start[name] + share * (value - start[name]) for name, value in weights.items()}
    return {name: share * value if name.endswith(".lora_b") else value for name, value in weights.items()}


def problems(module: nn.Module, shape: LoraShape, weights: Weights) -> list[str]:
    """Everything that keeps `weights` from being an adapter for `module`: names, kinds, shapes, values. Empty means usable."""
    return run_all(check_steps(module, shape, weights))


def check_steps(module: nn.Module, shape: LoraShape, weights: Weights) -> Steps[list[str]]:
    """`problems`, a layer a piece."""
    layers, found, expected = linear_layers(module), [], set()
    for key in shape.keys:
        expected |= {f"{key}.lora_a", f"{key}.lora_b"}
        if key not in layers:
            found.append(f"the draft has no linear layer {key}")
            continue
        out, inner = _dense_shape(layers[key])
        sizes = {f"{key}.lora_a": (inner, shape.rank), f"{key}.lora_b": (shape.rank, out)}
        wrong = [problem for name, size in sizes.items() if (problem := _tensor_problem(name, size, weights))]
        # finite factors can still have a product that is not
        if not wrong and not _all_finite(_change(key, shape, weights).astype(_compute_dtype(layers[key]))):
            wrong = [f"{key}: its weight change overflows"]
        found += wrong
        yield
    found += [f"{name} is not part of this adapter" for name in sorted(weights.keys() - expected)]
    return found


def _tensor_problem(name: str, size: tuple[int, int], weights: Weights) -> str:
    if name not in weights:
        return f"{name} is missing"
    if not mx.issubdtype(weights[name].dtype, mx.floating):
        return f"{name} has values of type {str(weights[name].dtype).removeprefix('mlx.core.')}, not real numbers"
    if tuple(weights[name].shape) != size:
        return f"{name} has shape {tuple(weights[name].shape)}, not {size}"
    return "" if _all_finite(weights[name]) else f"{name} has values that are not finite"


def _all_finite(values: mx.array) -> bool:
    return mx.all(mx.isfinite(values)).item()


def _change(key: str, shape: LoraShape, weights: Weights) -> mx.array:
    """scale * A B of one layer in fp32, [in, out]."""
    a, b = (weights[f"{key}.{part}"].astype(mx.float32) for part in ("lora_a", "lora_b"))
    return shape.scale * (a @ b)


def change_norm(shape: LoraShape, weights: Weights) -> float:
    """Frobenius norm of all weight changes together: sqrt(sum ||scale * A B||^2)."""
    return run_all(change_norm_steps(shape, weights))


def change_norm_steps(shape: LoraShape, weights: Weights) -> Steps[float]:
    """`change_norm`, a layer a piece."""
    norms = []
    for key in shape.keys:
        norms.append(mx.linalg.norm(_change(key, shape, weights)).item())
        yield
    return math.hypot(*norms)


def _compute_dtype(layer: nn.Module) -> mx.Dtype:
    """What a layer's products are in: a quantised layer's scales say it."""
    layer = layer.linear if isinstance(layer, LoRALinear) else layer
    return layer.scales.dtype if isinstance(layer, nn.QuantizedLinear) else layer.weight.dtype


def _dense_shape(layer: nn.Module) -> tuple[int, int]:
    layer = layer.linear if isinstance(layer, LoRALinear) else layer
    out, inner = layer.weight.shape
    return (out, inner * 32 // layer.bits) if isinstance(layer, nn.QuantizedLinear) else (out, inner)


def fuse(module: nn.Module, shape: LoraShape, weights: Weights) -> str:
    """Make `module` compute with the adapter: fused from the pristine base where that keeps its effect, else beside it.

    Returns `fused` or `unfused`. Evaluates everything, so that the next forward pays nothing. The pristine layers stay
    reachable through `Pristine`, which the caller made before.
    """
    detach(module)
    form, layers = run_all(fuse_steps(linear_layers(module), shape, weights))
    module.update_modules(tree_unflatten(list(layers.items())))
    return form


def fuse_steps(
    layers: dict[str, nn.Module], shape: LoraShape, weights: Weights
) -> Steps[tuple[str, dict[str, nn.Module]]]:
    """Layers that compute with the adapter, made beside the pristine `layers` one at a time: `fused` or `unfused`, and they."""
    beside, made, lost = {}, {}, 0.0
    for key in shape.keys:
        beside[key] = _beside(layers[key], key, shape, weights)
        if not isinstance(layers[key], nn.QuantizedLinear):
            made[key] = _fused(beside[key], shape.scale)
            yield
            lost = max(lost, _lost(beside[key], made[key]))
        yield
    whole = len(made) == len(beside) and lost < FIDELITY_LIMIT
    return ("fused", made) if whole else ("unfused", beside)


def _beside(base: nn.Module, key: str, shape: LoraShape, weights: Weights) -> LoRALinear:
    """For use, not for training: without dropout, in whatever mode the module is."""
    layer = LoRALinear.from_base(base, r=shape.rank, scale=shape.scale).eval()
    layer.lora_a, layer.lora_b = weights[f"{key}.lora_a"], weights[f"{key}.lora_b"]
    return layer


def _fused(layer: LoRALinear, scale: float) -> nn.Linear:
    base = layer.linear
    out, inner = base.weight.shape
    made = nn.Linear(inner, out, bias="bias" in base)
    delta = (scale * (layer.lora_a @ layer.lora_b)).T
    made.weight = (base.weight.astype(mx.float32) + delta).astype(base.weight.dtype)
    if "bias" in base:
        made.bias = base.bias
    mx.eval(made.parameters())
    return made


def _lost(layer: LoRALinear, made: nn.Linear) -> float:
    """||fused - unfused|| / ||unfused - base|| on 64 probe rows."""
    probe = mx.random.normal((64, made.weight.shape[1]), key=mx.random.key(0)).astype(made.weight.dtype)
    base, unfused, fused = layer.linear(probe), layer(probe), made(probe)
    effect = mx.linalg.norm((unfused - base).astype(mx.float32)).item()
    return mx.linalg.norm((fused - unfused).astype(mx.float32)).item() / effect if effect > 0 else 0.0


class Pristine:
    """The draft's own layers, remembered once at load; `restore` puts them back, bit for bit the same objects."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = [
            (name, child) for name, child in linear_layers(module).items() if not isinstance(child, LoRALinear)
        ]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """They, by dotted name."""
        return dict(self._layers)

    def restore(self) -> None:
        """Undo any adapter."""
        self._module.update_modules(tree_unflatten(self._layers))
