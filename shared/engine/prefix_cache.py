"""Caches that outlive their request, so that the next turn does not pay for the last one again. Least recently used go first.

An entry is handed out by moving: while a request runs on it, it is nobody else's. Only a small part of a long one is copied
out, so that a shared beginning (a system prompt) does not cost another conversation its caches; a request of which nothing
may be kept gives back what it was lent. The drafter's cache travels with the target's, but only to a request with the same
adapter; the target's fits whatever drafts.

A chat's next turn is text again, and its tokens may differ from those that were generated. So an entry knows the text that
it stands for, and `splice` gives the same ids back for the same text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from specl.shared.engine.decode import PrefixOrigin, State

WORTH = 16  # shared tokens below which an entry is left alone
COPY_BELOW = 0.5  # share of an entry below which its beginning is copied
SLACK = 0.25  # share of an entry's slots that may stand empty; caches grow by 256, so 768 tokens and more seldom need a copy


@dataclass(slots=True)
class Entry:
    """A finished request's state; `rendered` is the text of its first `said` tokens, or empty where that is not known."""

    state: State
    adapter_id: str
    rendered: str = ""
    said: int = 0
    used: float = field(default_factory=time.monotonic)

    @property
    def slots(self) -> int:
        """Tokens that its memory has room for."""
        return max([len(self.state.text), *(_capacity(layer) for layer in self.state.cache)])


class PrefixCache:
    """At most `budget` tokens' memory of finished requests: what their caches have room for, not what stands in them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: list[Entry] = []

    @property
    def tokens(self) -> int:
        """Tokens that the memory held has room for."""
        return sum(entry.slots for entry in self._entries)

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
        if keep < COPY_BELOW * len(best.state.text) and all(type(layer) is KVCache for layer in best.state.cache):
            best.used = time.monotonic()
            return _beginning(best.state, keep)
        self._entries.remove(best)
        state = best.state
        state.lent = PrefixOrigin(best.adapter_id, best.rendered, best.said)
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

    def put(self, entry: Entry, reserved: int = 0) -> None:
        """Keep a finished request's state if it fits beside `reserved` tokens of running ones."""
        state = entry.state
        state.lent = None
        if len(state.text) + reserved > self.budget:
            return
        if entry.slots - len(state.text) > SLACK * entry.slots or entry.slots + reserved > self.budget:
            _cut(state, state.cached)
        if entry.slots + reserved <= self.budget:
            self._entries.append(entry)
            self.shrink(reserved)

    def restore(self, state: State, cached: int, reserved: int = 0) -> None:
        """Take back what was lent: the first `cached` tokens that `state` came with, in memory that never held another text.

        The drafter is not taken: its caches may hold more. A next turn makes one anew.
        """
        lent = state.lent
        if lent is None or any(type(layer) is not KVCache for layer in state.cache):
            return
        text = state.text[: cached + 1]  # the token after them was the entry's, too
        back = _beginning(state, cached)
        back.text = text
        kept_whole = lent.said <= len(text)
        self.put(Entry(back, lent.adapter_id, lent.rendered if kept_whole else "", lent.said), reserved)

    def splice(self, text: str, encode: Callable[[str], list[int]], special: Sequence[str]) -> list[int]:
        """Tokens of `text`: those of the longest entry it begins with, then the encoding of the rest.

        Only where the rest begins with a special token, which no token reaches across: the ids then say the same text.
        """
        best: Entry | None = None
        for entry in self._entries:
            size = len(entry.rendered)
            if size > (len(best.rendered) if best else 0) and text.startswith(entry.rendered):
                best = entry if text.startswith(tuple(special), size) else best
        if best is None:
            return encode(text)
        return [*best.state.text[: best.said], *encode(text[len(best.rendered) :])]

    def shrink(self, reserved: int) -> None:
        """Drop the least recently used until everything fits beside `reserved` tokens."""
        self._entries.sort(key=lambda entry: entry.used)
        while self._entries and self.tokens + reserved > self.budget:
            self._entries.pop(0)

    def purge(self) -> None:
        """Forget every text. The purge hook of this room."""
        self._entries.clear()


def _beginning(state: State, keep: int) -> State:
    """A state of one's own with the first `keep` tokens; a drafter is made anew, from the states."""
    cache = []
    for layer in state.cache:
        copy = KVCache()
        copy.keys, copy.values, copy.offset = layer.keys, layer.values, layer.offset
        cache.append(copy)
    made = State(state.text[:keep], cache, None, None if state.states is None else list(state.states), keep)
    _cut(made, keep)
    return made


def _cut(state: State, keep: int) -> None:
    """Copy the first `keep` tokens of its caches and states into memory of just that size.

    By a product: `mx.contiguous` gives a view of the same memory where little more than 16 KB would be saved.
    """
    plain = [layer for layer in state.cache if type(layer) is KVCache and layer.keys is not None]
    for layer in plain:
        layer.keys, layer.values = (part[..., :keep, :] * 1 for part in (layer.keys, layer.values))
        layer.offset = keep
    if state.states is not None:
        state.states = [mx.concatenate(state.states)[:keep] * 1] if state.states else []
    mx.eval([layer.keys for layer in plain], [layer.values for layer in plain], state.states or [])


def _capacity(layer: Any) -> int:
    """Positions that a layer's memory has room for."""
    keys = layer.keys
    if isinstance(keys, (tuple, list)):  # quantised: packed values, scales, biases
        keys = keys[0]
    return 0 if keys is None else keys.shape[-2]


def _shared(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
