"""`accelerate` gives a loaded model the native path and returns what the model got.

Knows the order: pack the layers, fuse the stack where the family allows it, compare with MLX's
path, keep or undo. Does not know where weights come from. Promises: a model whose comparison fails
is left exactly as it was.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from specl.shared.native import decoder, modules
from specl.shared.native.extension import available, reason
from specl.shared.native.packing import Affine, Matrix, Weights

# The largest difference allowed between the native and the ordinary path, as a share of the largest
# logit. Orders of summation alone give about 1e-6 a layer; a wrong kernel gives about 1.
EXACT, ROUNDED = 2e-3, 0.5


@dataclass(slots=True, eq=False)
class Acceleration:
    """What a model got: how many layers in which format, whether all layers are one call, and why
    not.
    """

    active: bool
    reason: str = ""  # why nothing was packed, or why the layers are not one call
    fused: bool = False
    formats: dict[str, int] = field(default_factory=dict)
    packed_bytes: int = 0
    _model: Any = None
    _weights: Weights = "auto"
    _exact: Mapping[str, Affine] = field(default_factory=dict)
    _fuse: bool = True

    def refresh(self) -> "Acceleration":
        """Pack again what changed since (a fused adapter, for example); until then those layers
        take MLX's path.
        """
        return accelerate(self._model, self._weights, exact=self._exact, fuse=self._fuse)

    def intact(self) -> bool:
        """Whether the fused stack still matches the model's weights."""
        inner = _inner(self._model)
        stack = decoder.stack_of(inner) if inner is not None else None
        return self.fused and inner is not None and stack is not None and stack.intact(inner)

    def release(self) -> None:
        """Give the model back as it was."""
        _undo(self._model)
        self.active = self.fused = False


def accelerate(
    model: nn.Module,
    weights: Weights = "auto",
    *,
    exact: Mapping[str, Affine] | None = None,
    fuse: bool = True,
    check: bool = True,
) -> Acceleration:
    """Let `model` compute up to sixteen rows natively; everything else stays on MLX's modules.

    `weights`: "auto" loses nothing: a layer named in `exact` (module path -> its tensor in the
    file's blocks) is read in that form if it is bit for bit the dense weight, any other as bf16 if
    that is exact, else as fp32. "bf16", "q8" and "q4" round. `fuse`: all layers as one call where
    the family allows it. `check`: compare with MLX's path first.
    """
    exact = exact or {}
    result = Acceleration(available(), reason(), _model=model, _weights=weights, _exact=exact, _fuse=fuse)
    if not result.active:
        return result
    mx.eval(model.parameters())
    before = _probe(model) if check and not _is_packed(model) else None
    _pack_layers(model, weights, exact, result)
    inner = _inner(model)
    if fuse and inner is not None:
        result.reason = _fuse_layers(inner)
        result.fused = not result.reason
    difference = _difference(before, _probe(model)) if before is not None else 0.0
    limit = EXACT if weights in ("auto", "f32") else ROUNDED
    if not difference <= limit:  # a NaN is wrong too
        _undo(model)
        text = f"the native path differs from the ordinary one by {difference:.2g} of the largest logit and is off"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return Acceleration(False, text, _model=model, _weights=weights, _exact=exact, _fuse=fuse)
    return result


def _pack_layers(model: nn.Module, weights: Weights, exact: Mapping[str, Affine], result: Acceleration) -> None:
    counts: Counter[str] = Counter()

    def visit(path: str, module: nn.Module) -> None:
        matrix = _still_packed(module) or modules.attach(module, weights, exact.get(path))
        if matrix is not None:
            counts[matrix.format] += 1
            result.packed_bytes += matrix.nbytes

    modules.each_layer(model, _tied(model), visit)
    result.formats = dict(counts)


def _fuse_layers(inner: nn.Module) -> str:
    """Make all layers one call; why that is not possible, or empty."""
    problem = decoder.why_not_fusable(inner)
    if not problem:
        try:
            decoder.fuse(inner)
        except ValueError as error:  # sizes that the stack has no layout for
            problem = str(error)
    if problem:
        decoder.unfuse(inner)
    return problem


def _inner(model: nn.Module) -> nn.Module | None:
    inner = model.get("model") if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) and decoder.plain_class(inner) in decoder.FAMILIES else None


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "args", None), "tie_word_embeddings", False))


def _is_packed(model: nn.Module) -> bool:
    return any(type(module) in modules.PLAIN_CLASSES for _, module in model.named_modules())


def _still_packed(module: nn.Module) -> Matrix | None:
    packed = modules.packed_weight(module)
    return packed.matrix if packed is not None and packed.of(module.weight) else None


def _probe(model: nn.Module) -> list[mx.array] | None:
    """Logits after a few tokens at widths 7 and 1, the cache rewound in between; None for any other
    module.
    """
    if _inner(model) is None:
        return None
    cache = make_prompt_cache(model)
    ids = mx.array([[1 + 37 * i % (model.args.vocab_size - 1) for i in range(7)]])
    wide = model(ids, cache=cache)
    mx.eval(wide)
    for entry in cache:
        entry.trim(2)
    narrow = model(ids[:, 5:6], cache=cache)
    mx.eval(narrow)
    return [wide, narrow]


def _difference(before: list[mx.array] | None, after: list[mx.array] | None) -> float:
    if before is None or after is None:
        return 0.0
    return max(float(mx.abs(a - b).max() / mx.abs(b).max()) for a, b in zip(after, before, strict=True))


def _undo(model: nn.Module) -> None:
    inner = _inner(model)
    if inner is not None:
        decoder.unfuse(inner)
    for _, module in model.named_modules():
        modules.detach(module)
