"""Caches that outlive their request, so that the next turn does not pay for the last one again. Least recently used go first.

An entry is handed out by moving, never by copying: while a request runs on it, it is nobody else's. The drafter's cache
travels with the target's, but only to a request with the same adapter; the target's fits whatever drafts.
"""

import time
from dataclasses import dataclass, field

from mlx_lm.models.cache import trim_prompt_cache

from specl.shared.engine.decode import State

WORTH = 16  # shared tokens below which an entry is left alone


@dataclass(slots=True)
class Entry:
    """A finished request's state."""

    state: State
    adapter_id: str
    owner: str
    used: float = field(default_factory=time.monotonic)


class PrefixCache:
    """At most `budget` tokens of finished requests."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: list[Entry] = []

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(len(entry.state.text) for entry in self._entries)

    def take(self, prompt: list[int], adapter_id: str) -> State | None:
        """A state that holds the longest shared prefix of `prompt`, cut to it; None where too little is shared.

        At least the prompt's last token is left to feed.
        """
        best = max(self._entries, key=lambda entry: _shared(entry.state.text, prompt), default=None)
        if best is None:
            return None
        keep = min(_shared(best.state.text, prompt), len(prompt)) - 1
        if keep < WORTH:
            return None
        self._entries.remove(best)
        state = best.state
        keep = min(keep, state.cached)
        trim_prompt_cache(state.cache, state.cached - keep)
        state.cached = keep
        state.keep_states(keep)
        del state.text[keep:]
        if state.drafter is not None:
            if best.adapter_id == adapter_id and state.drafter.length >= keep:
                state.drafter.rewind(keep)
            else:
                state.drafter = None
        return state

    def put(self, state: State, adapter_id: str, owner: str, reserved: int = 0) -> None:
        """Keep a finished request's state if it fits beside `reserved` tokens of running ones."""
        if len(state.text) + reserved > self.budget:
            return
        self._entries.append(Entry(state, adapter_id, owner))
        self.shrink(reserved)

    def shrink(self, reserved: int) -> None:
        """Drop the least recently used until everything fits beside `reserved` tokens."""
        self._entries.sort(key=lambda entry: entry.used)
        while self._entries and self.tokens + reserved > self.budget:
            self._entries.pop(0)

    def purge(self) -> None:
        """Forget every text. The purge hook of this room."""
        self._entries.clear()


def _shared(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
