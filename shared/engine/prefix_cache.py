"""Caches of finished requests, so that a chat's next turn need not read its earlier turns again.

`take` moves an entry out of the cache, or copies a prefix shorter than half of it, so that a common
beginning (a system prompt) does not cost another conversation its caches. A request of which
nothing may be kept returns the entry unchanged (`put_back`). The drafter's cache travels with the
target's, but only to a request with the same adapter; the target's fits any drafter. Least recently
used entries go first.

Each entry has an owner, and only its requests continue it: an answer says how many tokens of its
prompt were cached, so whoever guesses at another's prompt would be told how much of it is right.
Clients without a name share with each other.

A chat's next turn arrives as text, and its tokens may differ from those that were generated. So an
entry knows the text of its tokens, and `reuse_tokens` returns the same ids for the same text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from specl.shared.engine.sequence_state import PrefixOrigin, SequenceState

MIN_SHARED = 16  # shared tokens below which an entry is not used
COPY_BELOW = 0.5  # share of an entry below which its beginning is copied
# share of an entry's allocated memory that may be empty; caches grow by 256 tokens, so a text of 768
# tokens or more seldom needs a copy
SLACK = 0.25


@dataclass(slots=True)
class Entry:
    """A finished request's state. `text` is the text of its first `text_tokens` tokens, or empty
    where that is not known. `owner`: the client whose requests may continue it.
    """

    state: SequenceState
    adapter_id: str
    text: str = ""
    text_tokens: int = 0
    owner: str = ""
    last_used: float = field(default_factory=time.monotonic)

    @property
    def allocated_tokens(self) -> int:
        """Tokens that its allocated memory has room for, used or not."""
        return max([len(self.state.tokens), *(_capacity(layer) for layer in self.state.cache)])


class PrefixCache:
    """Finished requests in memory for at most `budget` tokens, whether it is filled or not."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Tokens that the allocated memory of all entries has room for."""
        return sum(entry.allocated_tokens for entry in self._entries)

    @property
    def texts(self) -> list[str]:
        """The texts of the entries whose text is known."""
        return [entry.text for entry in self._entries if entry.text]

    def take(self, prompt: list[int], adapter_id: str, owner: str = "") -> SequenceState | None:
        """The owner's state with the longest shared prefix of `prompt`, cut to it; None if that is
        too short.

        At least the prompt's last token is left to feed.
        """
        entries = [entry for entry in self._entries if entry.owner == owner]
        best = max(entries, key=lambda entry: _shared(entry.state.tokens, prompt), default=None)
        if best is None:
            return None
        count = min(_shared(best.state.tokens, prompt), len(prompt)) - 1
        if count < MIN_SHARED:
            return None
        if count < COPY_BELOW * len(best.state.tokens) and _is_plain(best.state):
            best.last_used = time.monotonic()
            return _copy_prefix(best.state, count)
        self._entries.remove(best)
        state = best.state
        state.origin = PrefixOrigin(best.adapter_id, best.text, best.text_tokens, best.owner)
        count = min(count, state.cached)
        state.trim_cache(count)
        state.trim_states(count)
        del state.tokens[count:]
        if state.drafter is not None:
            if best.adapter_id == adapter_id and state.drafter.length >= count:
                state.drafter.rewind(count)
            else:
                state.drafter = None
        return state

    def put(self, entry: Entry, reserved: int = 0) -> None:
        """Keep a finished state if it fits beside `reserved` tokens of running requests."""
        state = entry.state
        state.origin = None
        if len(state.tokens) + reserved > self.budget:
            return
        if (
            entry.allocated_tokens - len(state.tokens) > SLACK * entry.allocated_tokens
            or entry.allocated_tokens + reserved > self.budget
        ):
            _shrink_memory(state, state.cached)
        if entry.allocated_tokens + reserved <= self.budget:
            self._entries.append(entry)
            self.shrink(reserved)

    def put_back(self, state: SequenceState, cached: int, reserved: int = 0) -> None:
        """Return an entry that `take` moved out: the first `cached` tokens, which `state` came
        with.

        They are copied into memory that never held another text. The drafter is dropped, because
        its caches may hold more; the next turn makes a new one.
        """
        origin = state.origin
        if origin is None or not _is_plain(state):
            return
        tokens = state.tokens[: cached + 1]  # the token behind the cached ones was the entry's, too
        returned = _copy_prefix(state, cached)
        returned.tokens = tokens
        text = origin.text if origin.text_tokens <= len(tokens) else ""
        self.put(Entry(returned, origin.adapter_id, text, origin.text_tokens, origin.owner), reserved)

    def reuse_tokens(
        self, text: str, encode: Callable[[str], list[int]], special: Sequence[str], owner: str = ""
    ) -> list[int]:
        """Tokens of `text`: those of the owner's longest entry it begins with, then the encoding of
        the rest.

        Only where the rest begins with a special token, which no token reaches across: the ids then
        decode to the same text.
        """
        best: Entry | None = None
        for entry in self._entries:
            size = len(entry.text)
            if entry.owner != owner:
                continue
            if size > (len(best.text) if best else 0) and text.startswith(entry.text):
                best = entry if text.startswith(tuple(special), size) else best
        if best is None:
            return encode(text)
        return [*best.state.tokens[: best.text_tokens], *encode(text[len(best.text) :])]

    def shrink(self, reserved: int) -> None:
        """Drop the least recently used until everything fits beside `reserved` tokens."""
        self._entries.sort(key=lambda entry: entry.last_used)
        while self._entries and self.tokens + reserved > self.budget:
            self._entries.pop(0)

    def purge(self) -> None:
        """Forget every text: the prefix cache's part of a purge."""
        self._entries.clear()


def _is_plain(state: SequenceState) -> bool:
    """Whether every layer's cache is one whose beginning can be copied."""
    return all(type(layer) is KVCache for layer in state.cache)


def _copy_prefix(state: SequenceState, count: int) -> SequenceState:
    """An independent state with the first `count` tokens; its drafter is made from the states."""
    cache = []
    for layer in state.cache:
        copy = KVCache()
        copy.keys, copy.values, copy.offset = layer.keys, layer.values, layer.offset
        cache.append(copy)
    states = None if state.states is None else list(state.states)
    copied = SequenceState(state.tokens[:count], cache, None, states, count)
    _shrink_memory(copied, count)
    return copied


def _shrink_memory(state: SequenceState, count: int) -> None:
    """Copy the first `count` tokens of its caches and states into memory of just that size.

    By a product: `mx.contiguous` gives a view of the same memory where little more than 16 KB would
    be saved.
    """
    plain: list[Any] = [layer for layer in state.cache if type(layer) is KVCache and layer.keys is not None]
    for layer in plain:
        layer.keys, layer.values = (part[..., :count, :] * 1 for part in (layer.keys, layer.values))
        layer.offset = count
    if state.states is not None:
        state.states = [mx.concatenate(state.states)[:count] * 1] if state.states else []
    mx.eval([layer.keys for layer in plain], [layer.values for layer in plain], state.states or [])


def _capacity(layer: Any) -> int:
    """Tokens that fit into a layer's memory."""
    keys = layer.keys
    if isinstance(keys, (tuple, list)):  # quantised: packed values, scales, biases
        keys = keys[0]
    return 0 if keys is None else int(keys.shape[-2])


def _shared(a: list[int], b: list[int]) -> int:
    """Leading tokens that are equal."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
