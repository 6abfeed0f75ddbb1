"""The one call that gives a loaded model the native path, and the record of what came of it.

Knows the order: pack the layers, fuse the stack where the family allows it, compare with the ordinary path, keep or
undo. Does not know where weights come from. Promises: a model whose comparison fails is left exactly as it was.
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
from specl.shared.native.packing import Affine, Weights

# The largest difference allowed between the native and the ordinary path, as a share of the largest logit. Orders of
# summation alone give about 1e-6 a layer; a wrong kernel gives about 1.
EXACT, ROUNDED = 2e-3, 0.5


@dataclass(slots=True, eq=False)
class Acceleration:
    """What a model got: how many layers in which format, whether its stack is one call, and why not where not."""

    active: bool
    reason: str = ""  # why nothing at all, or why no stack
    fused: bool = False
    formats: dict[str, int] = field(default_factory=dict)
    packed_bytes: int = 0
    _model: Any = None
    _weights: Weights = "auto"
    _exact: Mapping[str, Affine] = field(default_factory=dict)
    _fuse: bool = True

    def refresh(self) -> "Acceleration":
        """Pack again what changed since (a fused adapter, say); until then those layers run the ordinary way."""
        return accelerate(self._model, self._weights, exact=self._exact, fuse=self._fuse)

    def intact(self) -> bool:
        """Whether the fused stack still matches the model's weights."""
        inner = _inner(self._model)
        return self.fused and inner is not None and inner._stack is not None and inner._stack.intact(inner)

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
    """Let `model` answer up to sixteen rows natively; everything else stays on its own modules.

    `weights`: "auto" loses nothing: a layer named in `exact` (module path -> its tensor in the file's own blocks) is
    read in that form if it is bit for bit the dense weight, any other as bf16 if that is exact, else as fp32. "bf16",
    "q8" and "q4" round. `fuse`: all layers as one call where the family allows it. `check`: compare with the ordinary
    path first.
    """
    if not available():
        return Acceleration(False, reason(), _model=model, _weights=weights, _exact=exact or {}, _fuse=fuse)
    mx.eval(model.parameters())
    exact = exact or {}
    result = Acceleration(True, _model=model, _weights=weights, _exact=exact, _fuse=fuse)
    before = _probe(model) if check and not _is_fast(model) else None
    counts: Counter[str] = Counter()

    def visit(path: str, module: nn.Module) -> None:
        packed = _still_packed(module) or modules.attach(module, weights, exact.get(path))
        if packed is not None:
            counts[packed.format] += 1
            result.packed_bytes += packed.nbytes

    modules.each_layer(model, _tied(model), visit)
    result.formats = dict(counts)
    inner = _inner(model)
    if fuse and inner is not None:
        result.reason = decoder.unfit(inner)
        if not result.reason:
            try:
                decoder.fuse(inner)
                result.fused = True
            except ValueError as error:  # sizes that the stack has no layout for
                result.reason = str(error)
        if not result.fused:
            decoder.unfuse(inner)
    if before is not None:
        wrong = _difference(before, _probe(model))
        limit = EXACT if weights in ("auto", "f32") else ROUNDED
        if not wrong <= limit:  # a NaN is wrong too
            _undo(model)
            text = f"the native path differs from the ordinary one by {wrong:.2g} of the largest logit and is off"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return Acceleration(False, text, _model=model, _weights=weights, _exact=exact, _fuse=fuse)
    return result


def _inner(model: nn.Module) -> nn.Module | None:
    inner = model.get("model") if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) and decoder.plain_class(inner) in decoder.FAMILIES else None


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "args", None), "tie_word_embeddings", False))


def _is_fast(model: nn.Module) -> bool:
    return any(type(module) in modules.DENSE for _, module in model.named_modules())


def _still_packed(module: nn.Module) -> Any:
    packed = module._packed if type(module) in modules.DENSE else None
    return packed.matrix if packed is not None and packed.of(module.weight) else None


def _probe(model: nn.Module) -> list[mx.array] | None:
    """Logits after a few tokens at widths 7 and 1, the cache rewound in between; None for any other module."""
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
    return max((mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in zip(after, before, strict=True))


def _undo(model: nn.Module) -> None:
    inner = _inner(model)
    if inner is not None:
        decoder.unfuse(inner)
    for _, module in model.named_modules():
        modules.detach(module)
