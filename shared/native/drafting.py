"""A head draft's step as one C++ call: input projection, layer, final norm and scores of
the last row.

Knows the module names of a one-layer head (models/head.py). Does not know what is done with the
scores. Promises: layers that were exchanged since (an adapter kept beside its base, for example)
take MLX's path.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from specl.shared.native.decoder import FIRST_POSITIONS, PROJECTIONS, rotations
from specl.shared.native.extension import available, native
from specl.shared.native.modules import PLAIN_CLASSES, packed_matrix, packed_weight

_NORMS = ("embedding_norm", "state_norm", "input_layernorm", "post_attention_layernorm", "norm")


# a number: the positions that the table of rotations is too short for
NativeResult = tuple[mx.array, mx.array, int, float] | int | None


def why_not_fusable(head: nn.Module) -> str:
    """Why this head cannot be one call; empty where it can."""
    if not available():
        return "the native kernels cannot be used"
    layers = {name: head[part][name] for part, name in PROJECTIONS} | {"fc": head.fc}
    for name, layer in layers.items():
        if type(layer) not in PLAIN_CLASSES or "bias" in layer:
            return f"{name} is a {type(layer).__name__}"
    if type(head.self_attn.rope) is not nn.RoPE or head.self_attn.rope.traditional:
        return "rotary positions of another kind"
    if any(head[name].weight.dtype != mx.float32 for name in _NORMS):
        return "norms are not float32"
    return ""


class DraftStack:
    """The C++ side of one head, built from its packed layers. `embedding` [vocabulary, hidden] fp32
    is the target's.

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
        matrices = [packed_matrix(head[part][name]) for part, name in PROJECTIONS]
        norms = head.input_layernorm.weight, head.post_attention_layernorm.weight
        self._decoder.append(matrices, [None] * len(matrices), *norms)
        self._decoder.enter_through(head.embedding_norm.weight, head.state_norm.weight, packed_matrix(head.fc))
        self._guard_all(head)
        self._decoder.set_positions(*rotations(self._rope, self._dim, FIRST_POSITIONS))

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None  # a copied head has other modules: it takes MLX's path until it is given a stack of its own

    def _guard_all(self, head: nn.Module) -> None:
        guards = 0

        def guard(parent: int, key: str, expected: object) -> int:
            nonlocal guards
            self._decoder.guard(parent, key, expected)
            guards += 1
            return guards - 1

        parts = {part: guard(-1, part, head[part]) for part in ("self_attn", "mlp")}
        parents = [(parts[part], head[part], name) for part, name in PROJECTIONS]
        parents += [(-1, head, name) for name in ("fc", *_NORMS)]
        for parent, module, name in parents:
            guard(guard(parent, name, module[name]), "weight", module[name]["weight"])

    def step(
        self, states: mx.array, ids: list[int], cache: Any, scorer: nn.Module
    ) -> tuple[mx.array, mx.array, int, float] | None:
        """Feed `ids` with `states` [n, hidden]: (last output [1, hidden], its scores [hot], the
        index of the best score, their log-sum-exp). None: take MLX's path.
        """
        packed = packed_weight(scorer)
        if packed is None or not packed.of(scorer.weight):
            return None
        result: NativeResult = self._decoder.draft(self._head, states, ids, [cache], packed.matrix)
        if isinstance(result, int):
            self._decoder.set_positions(*rotations(self._rope, self._dim, result))
            result = self._decoder.draft(self._head, states, ids, [cache], packed.matrix)
        return result if not isinstance(result, int) else None
