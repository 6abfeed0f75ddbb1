"""A head draft's step as one call: entrance, layer, final norm and scores of the last row.

Knows the module names of a one-layer head (models/head.py). Does not know what is done with the scores. Promises: layers
that were exchanged since (an adapter kept beside its base, say) take the ordinary path.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from specl.shared.native.decoder import FIRST_POSITIONS, PROJECTIONS, rotations
from specl.shared.native.extension import available, native
from specl.shared.native.modules import DENSE

_NORMS = ("embedding_norm", "state_norm", "input_layernorm", "post_attention_layernorm", "norm")


def unfit(head: nn.Module) -> str:
    """Why this head cannot be one call; empty when it can."""
    if not available():
        return "the native kernels are not there"
    layers = {name: head[part][name] for part, name in PROJECTIONS} | {"fc": head.fc}
    for name, layer in layers.items():
        if type(layer) not in DENSE or "bias" in layer:
            return f"{name} is a {type(layer).__name__}"
    if type(head.self_attn.rope) is not nn.RoPE or head.self_attn.rope.traditional:
        return "rotary positions of another kind"
    if any(head[name].weight.dtype != mx.float32 for name in _NORMS):
        return "norms are not float32"
    return ""


class DraftStack:
    """The C++ side of one head, built from its packed layers. `embedding` [vocabulary, hidden] fp32 is the target's.

    Raises ValueError for sizes that it has no layout for.
    """

    def __init__(self, head: nn.Module, embedding: mx.array) -> None:
        attention = head.self_attn
        self._rope, self._dim = attention.rope, attention.dim
        self._head = head
        self._decoder = native().Decoder(
            hidden=head.norm.weight.shape[0],
            heads=attention.n,
            kv_heads=attention.kv,
            head_dim=attention.dim,
            intermediate=head.mlp.gate_proj.weight.shape[0],
            eps=head.norm.eps,
            norm=head.norm.weight,
            embedding=embedding,
            cache_type=KVCache,
        )
        matrices = [head[part][name]._packed.matrix for part, name in PROJECTIONS]
        norms = head.input_layernorm.weight, head.post_attention_layernorm.weight
        self._decoder.append(matrices, [None] * len(matrices), *norms)
        self._decoder.enter_through(head.embedding_norm.weight, head.state_norm.weight, head.fc._packed.matrix)
        self._guard_all(head)
        self._decoder.set_positions(*rotations(self._rope, self._dim, FIRST_POSITIONS))

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copied head has other modules: it takes the ordinary path until it is sped up itself

    def _guard_all(self, head: nn.Module) -> None:
        guards = 0

        def guard(parent: int, key: str, expected: object) -> int:
            nonlocal guards
            self._decoder.guard(parent, key, expected)
            guards += 1
            return guards - 1

        parts = {part: guard(-1, part, head[part]) for part in ("self_attn", "mlp")}
        owners = [(parts[part], head[part], name) for part, name in PROJECTIONS]
        owners += [(-1, head, name) for name in ("fc", *_NORMS)]
        for parent, owner, name in owners:
            guard(guard(parent, name, owner[name]), "weight", owner[name]["weight"])

    def step(
        self, states: mx.array, ids: list[int], cache: Any, scorer: nn.Module
    ) -> tuple[mx.array, mx.array, int, float] | None:
        """(last output [1, hidden], scores [n], place of the best, their log-sum-exp) after `ids` with `states` [n, hidden],
        or None: take the ordinary path.
        """
        if type(scorer) not in DENSE or not scorer._packed.of(scorer.weight):
            return None
        out = self._decoder.draft(self._head, states, ids, [cache], scorer._packed.matrix)
        if isinstance(out, int):
            self._decoder.set_positions(*rotations(self._rope, self._dim, out))
            out = self._decoder.draft(self._head, states, ids, [cache], scorer._packed.matrix)
        return out
