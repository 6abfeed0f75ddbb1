"""All layers of a Llama or Qwen2 as one call: which models and inputs that is for, and how a model comes to use it.

Knows mlx-lm's module tree for these two families. Does not know how the layers are computed (C++ does) nor how the
weights are packed. Promises: anything it does not know exactly, in the model, the input or the cache, takes the
ordinary path.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import Llama3RoPE

from specl.shared.native.extension import MAX_WIDTH, native
from specl.shared.native.modules import DENSE, Packed

FAMILIES = {llama.LlamaModel: llama.TransformerBlock, qwen2.Qwen2Model: qwen2.TransformerBlock}
PROJECTIONS = (
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)
FIRST_POSITIONS = 1024  # of the table of rotations; it doubles when a text outgrows it

_faces: dict[type, type] = {}


def unfit(inner: nn.Module) -> str:
    """Why this model's layers cannot be one call; empty when they can."""
    block = FAMILIES.get(plain_class(inner))
    if block is None:
        return f"{type(inner).__name__} is not Llama or Qwen2"
    for layer in inner.layers:
        attention = layer.self_attn
        if type(layer) is not block or getattr(layer, "use_sliding", False):
            return "a layer is not an ordinary one with full attention"
        if type(attention.rope) not in (nn.RoPE, Llama3RoPE) or getattr(attention.rope, "traditional", False):
            return f"rotary positions of the kind {type(attention.rope).__name__}"
        for part, name in PROJECTIONS:
            if type(layer[part][name]) not in DENSE:
                return f"{name} is a {type(layer[part][name]).__name__}"
        if any(norm.weight.dtype != mx.float32 for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
            return "norms are not float32"
    if getattr(inner, "pipeline_size", 1) != 1:
        return "the model is split over machines"
    if type(inner.embed_tokens) not in (nn.Embedding, *DENSE) or inner.embed_tokens.weight.dtype != mx.float32:
        return "the embedding is not float32"
    return ""


def plain_class(inner: nn.Module) -> type:
    """The model's class without the fast face."""
    kind = type(inner)
    return next((plain for plain, face in _faces.items() if face is kind), kind)


class Stack:
    """The C++ decoder of one model, built from its packed layers."""

    def __init__(self, inner: nn.Module) -> None:
        first = inner.layers[0].self_attn
        self._dim = inner.layers[0].self_attn.k_proj.weight.shape[0] // first.n_kv_heads
        self._rope = first.rope
        self._decoder = native().Decoder(
            hidden=inner.norm.weight.shape[0],
            heads=first.n_heads,
            kv_heads=first.n_kv_heads,
            head_dim=self._dim,
            intermediate=inner.layers[0].mlp.gate_proj._packed.matrix.shape[0],
            eps=inner.norm.eps,
            norm=inner.norm.weight,
            embedding=inner.embed_tokens.weight,
            cache_type=KVCache,
        )
        self._guards = 0
        self._guard_leaf(-1, inner, "embed_tokens", ("weight",))
        self._guard_leaf(-1, inner, "norm", ("weight",))
        layers = self._guard(-1, "layers", inner["layers"])
        for index, layer in enumerate(inner.layers):
            self._append(layers, index, layer)
        self._grow(FIRST_POSITIONS)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copied model has other modules: it takes the ordinary path until accelerated itself

    def step(self, inner: nn.Module, ids: mx.array, cache: list[Any]) -> mx.array | None:
        """Final-normed hidden states of `ids` after the cache's positions, or None: take the ordinary path."""
        out = self._decoder.step(inner, ids, cache)
        if isinstance(out, int):
            self._grow(out)
            out = self._decoder.step(inner, ids, cache)
        return out

    def intact(self, inner: nn.Module) -> bool:
        """Whether the model still has the weights that were packed."""
        return self._decoder.intact(inner)

    def _append(self, layers: int, index: int, layer: nn.Module) -> None:
        at = self._guard(layers, index, layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self._guard_leaf(at, layer, norm, ("weight",))
        parts = {part: self._guard(at, part, layer[part]) for part in ("self_attn", "mlp")}
        weights, biases = [], []
        for part, name in PROJECTIONS:
            linear = layer[part][name]
            packed: Packed = linear._packed
            weights.append(packed.matrix)
            biases.append(linear.get("bias"))
            arrays = [key for key in ("weight", "bias", "scales", "biases") if key in linear]
            self._guard_leaf(parts[part], layer[part], name, arrays)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if norms[0].eps != layer.post_attention_layernorm.eps:
            raise ValueError("norms of one layer differ in their epsilon")
        self._decoder.append(weights, biases, norms[0].weight, norms[1].weight)

    def _guard(self, parent: int, key: str | int, expected: object) -> int:
        self._decoder.guard(parent, key, expected)
        self._guards += 1
        return self._guards - 1

    def _guard_leaf(self, parent: int, owner: Mapping[str, Any], key: str, arrays: Any) -> None:
        at = self._guard(parent, key, owner[key])
        for name in arrays:
            self._guard(at, name, owner[key][name])

    def step_lanes(self, inner: nn.Module, ids: list[list[int]], caches: list[list[Any]]) -> mx.array | None:
        """The same for several sequences at once, at most sixteen ids together: [rows, hidden], in order."""
        out = self._decoder.step_lanes(inner, ids, caches)
        if isinstance(out, int):
            self._grow(out)
            out = self._decoder.step_lanes(inner, ids, caches)
        return out

    def _grow(self, positions: int) -> None:
        self._decoder.set_positions(*rotations(self._rope, self._dim, positions))


def rotations(rope: nn.Module, dim: int, positions: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines [at least `positions`, dim / 2] by the model's own rope: what it makes of ones and zeros."""
    size = FIRST_POSITIONS
    while size < positions:
        size *= 2
    half = dim // 2
    probe = mx.concatenate([mx.ones((1, 1, size, half)), mx.zeros((1, 1, size, half))], axis=-1)
    turned = rope(probe)[0, 0]
    return turned[:, :half], turned[:, half:]


def _fused_call(self: nn.Module, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> Any:
    """The model's own call, with a few ids after a plain cache answered by the stack."""
    if cache is not None and input_embeddings is None and self._stack is not None and inputs.size <= MAX_WIDTH:
        out = self._stack.step(self, inputs, cache)
        if out is not None:
            return out
    return super(type(self), self).__call__(inputs, cache, input_embeddings)


def fuse(inner: nn.Module) -> None:
    """Give the model its stack. Raises ValueError where `unfit` would have had something to say about sizes."""
    plain = plain_class(inner)
    if plain not in _faces:
        _faces[plain] = type(f"Fused{plain.__name__}", (plain,), {"__call__": _fused_call, "__module__": __name__})
    inner._stack = Stack(inner)
    inner.__class__ = _faces[plain]


def unfuse(inner: nn.Module) -> None:
    """Take the stack away again."""
    plain = plain_class(inner)
    if plain is not type(inner):
        inner.__class__ = plain
        del inner._stack
