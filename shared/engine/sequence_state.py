"""The state of one sequence: its tokens, the caches that hold them, and its drafter.

A request works on it; afterwards it may live on in the prefix cache.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from specl.shared.engine.drafters import Drafter


@dataclass(frozen=True, slots=True)
class PrefixOrigin:
    """Identity of the prefix-cache entry this state was moved out of, so that it can be put back."""

    adapter_id: str
    text: str
    text_tokens: int
    owner: str


@dataclass(slots=True)
class SequenceState:
    """`cached` counts the `tokens` that are in the target's cache.

    `states` has the target's normed hidden state of each cached token, in order, as pieces [n,
    hidden]; None where the drafter does not read states. `origin`: the prefix-cache entry it was
    moved out of, None for a new one.
    """

    tokens: list[int]
    cache: list[Any]
    drafter: Drafter | None
    states: list[mx.array] | None = None
    cached: int = 0
    origin: PrefixOrigin | None = None

    def append_states(self, rows: mx.array) -> None:
        """Keep the states [n, hidden] of n newly cached tokens, where states are kept."""
        if self.states is not None:
            self.states.append(rows)

    def last_states(self, count: int) -> list[mx.array]:
        """The states of the last `count` cached tokens, in pieces."""
        pieces: list[mx.array] = []
        for piece in reversed(self.states or []):
            if count <= 0:
                break
            pieces.insert(0, piece[-count:] if count < piece.shape[0] else piece)
            count -= piece.shape[0]
        return pieces

    def trim_states(self, count: int) -> None:
        """Drop all but the first `count` states."""
        if self.states:
            self.states = [mx.concatenate(self.states)[:count]] if count else []

    def trim_cache(self, count: int) -> None:
        """Drop all but the first `count` tokens from the target's cache."""
        trim_prompt_cache(self.cache, self.cached - count)
        self.cached = count

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens, of which the last one is left to feed."""
        del self.tokens[length:]
        self.trim_cache(length - 1)
        self.trim_states(length - 1)
        if self.drafter is not None:
            self.drafter.rewind(length)
