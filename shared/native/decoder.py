"""All layers of a Llama or Qwen2 model as one C++ call: for which models and inputs, and how a
model is given it.

Knows mlx-lm's module tree for these two families. Does not know how the layers are computed (C++
does) nor how the weights are packed. Promises: a model, an input or a cache that differs from what
it knows takes MLX's own path.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import Llama3RoPE

from specl.shared.native.extension import MAX_WIDTH, native
from specl.shared.native.modules import PLAIN_CLASSES, packed_matrix

FAMILIES: dict[type[nn.Module], type[nn.Module]] = {
    llama.LlamaModel: llama.TransformerBlock,
    qwen2.Qwen2Model: qwen2.TransformerBlock,
}
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

_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}  # by the plain class


def why_not_fusable(inner: nn.Module) -> str:
    """Why this model's layers cannot be one call; empty where they can."""
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
            if type(layer[part][name]) not in PLAIN_CLASSES:
                return f"{name} is a {type(layer[part][name]).__name__}"
        if any(norm.weight.dtype != mx.float32 for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
            return "norms are not float32"
    if getattr(inner, "pipeline_size", 1) != 1:
        return "the model is split over machines"
    if type(inner.embed_tokens) not in (nn.Embedding, *PLAIN_CLASSES) or inner.embed_tokens.weight.dtype != mx.float32:
        return "the embedding is not float32"
    return ""


def plain_class(inner: nn.Module) -> type[nn.Module]:
    """mlx-lm's class of a model, fused or not."""
    kind = type(inner)
    return next((plain for plain, fused in _fused_classes.items() if fused is kind), kind)


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
            intermediate=packed_matrix(inner.layers[0].mlp.gate_proj).shape[0],
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
        self._extend_rotations(FIRST_POSITIONS)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None  # a copied model has other modules: it takes the ordinary path until accelerated itself

    def step(self, inner: nn.Module, ids: mx.array, cache: list[Any]) -> mx.array | None:
        """Hidden states after the final norm of `ids` after the cache's positions; None: take MLX's
        path.
        """
        # a number: the positions that the table of rotations is too short for
        states: mx.array | int | None = self._decoder.step(inner, ids, cache)
        if isinstance(states, int):
            self._extend_rotations(states)
            states = self._decoder.step(inner, ids, cache)
        return states if not isinstance(states, int) else None

    def step_lanes(self, inner: nn.Module, ids: list[list[int]], caches: list[list[Any]]) -> mx.array | None:
        """`step` for several sequences at once, at most sixteen ids together: [rows, hidden], in
        order.
        """
        states: mx.array | int | None = self._decoder.step_lanes(inner, ids, caches)
        if isinstance(states, int):
            self._extend_rotations(states)
            states = self._decoder.step_lanes(inner, ids, caches)
        return states if not isinstance(states, int) else None

    def intact(self, inner: nn.Module) -> bool:
        """Whether the model still has the weights that were packed."""
        return bool(self._decoder.intact(inner))

    def _append(self, layers: int, index: int, layer: nn.Module) -> None:
        number = self._guard(layers, index, layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self._guard_leaf(number, layer, norm, ("weight",))
        parts = {part: self._guard(number, part, layer[part]) for part in ("self_attn", "mlp")}
        weights, biases = [], []
        for part, name in PROJECTIONS:
            linear = layer[part][name]
            weights.append(packed_matrix(linear))
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

    def _guard_leaf(self, parent: int, parent_module: Mapping[str, Any], key: str, arrays: Iterable[str]) -> None:
        number = self._guard(parent, key, parent_module[key])
        for name in arrays:
            self._guard(number, name, parent_module[key][name])

    def _extend_rotations(self, positions: int) -> None:
        self._decoder.set_positions(*rotations(self._rope, self._dim, positions))


def rotations(rope: nn.Module, dim: int, positions: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines [at least `positions`, dim / 2] of the model's rotary module: it turns the
    pair (1, 0).
    """
    size = FIRST_POSITIONS
    while size < positions:
        size *= 2
    half = dim // 2
    probe = mx.concatenate([mx.ones((1, 1, size, half)), mx.zeros((1, 1, size, half))], axis=-1)
    turned = rope(probe)[0, 0]
    return turned[:, :half], turned[:, half:]


def stack_of(inner: nn.Module) -> Stack | None:
    """The stack of a fused model; None for a plain one, and for a copy of a fused one."""
    stack = getattr(inner, "native_stack", None)
    return stack if isinstance(stack, Stack) else None


def _fused_call(self: nn.Module, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> Any:
    """A few ids after a plain cache go to the stack, anything else to the plain class."""
    if cache is not None and input_embeddings is None and self.native_stack is not None and inputs.size <= MAX_WIDTH:
        states = self.native_stack.step(self, inputs, cache)
        if states is not None:
            return states
    return plain_class(self).__call__(self, inputs, cache, input_embeddings)


def fuse(inner: nn.Module) -> None:
    """Give the model its stack. Raises ValueError for sizes that the stack has no layout for."""
    plain = plain_class(inner)
    if plain not in _fused_classes:
        members = {"__call__": _fused_call, "__module__": __name__}
        _fused_classes[plain] = type(f"Fused{plain.__name__}", (plain,), members)
    inner.native_stack = Stack(inner)
    inner.__class__ = _fused_classes[plain]


def unfuse(inner: nn.Module) -> None:
    """Take the stack away again."""
    plain = plain_class(inner)
    if plain is not type(inner):
        inner.__class__ = plain
        del inner.native_stack
