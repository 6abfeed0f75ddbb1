"""Answers that the target writes to many prompts at once, with its top-k distributions and hidden
states, for training a draft.

Tokens, top-k and states are taken in one pass, while generating. Rows of a batch are left-padded;
finished rows leave it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from specl.shared.engine.sampling import largest, log_sum_exp, top_indices
from specl.shared.errors import ModelError
from specl.shared.learning.examples import Example
from specl.shared.models.language_model import LanguageModel

SHRINK_AT = 0.75  # finished rows leave the batch once no more than this share of its rows still runs
LANES = 8  # answers side by side, each with its own cache
OnTokens = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to answer; temperature 0 is greedy."""

    id: str
    tokens: list[int]
    temperature: float = 0.0


class _Row:
    """One answer under way."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.output: list[int] = []
        self.done = False
        self._ids: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._states: list[np.ndarray] = []

    def add_states(self, states: np.ndarray) -> None:
        """Hidden states fp16 [n, hidden] of the next n tokens that the target has read."""
        self._states.append(states)

    def sample(self, logits: np.ndarray, k: int, rng: np.random.Generator) -> int:
        """Choose the next token from `logits` [vocabulary], recording the k largest."""
        ids = top_indices(logits, k)
        return self.sample_with_top_k(logits, ids, logits[ids] - log_sum_exp(logits), rng)

    def sample_with_top_k(
        self, logits: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, rng: np.random.Generator
    ) -> int:
        """Choose the next token, recording `ids`, the largest of `logits`, and their
        log-probabilities.
        """
        self._ids.append(ids.astype(np.uint32))
        self._logprobs.append(logprobs.astype(np.float16))
        if self.prompt.temperature == 0:
            token = int(ids[0])
        else:
            weights = np.exp((logits - logits.max()).astype(np.float64) / self.prompt.temperature)
            cumulative = np.cumsum(weights)
            token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        self.output.append(token)
        return token

    def example(self, with_states: bool) -> Example:
        tokens = np.array([*self.prompt.tokens, *self.output], np.uint32)
        return Example(
            self.prompt.id,
            tokens,
            len(self.prompt.tokens),
            np.stack(self._ids),
            np.stack(self._logprobs),
            np.ones(len(self.output), np.float32),
            np.concatenate(self._states)[: len(tokens) - 1] if with_states else None,
            self.prompt.temperature == 0,
        )


@dataclass(frozen=True, slots=True)
class _Generation:
    """State that all rows of one call share."""

    target: LanguageModel
    max_tokens: int
    k: int
    with_states: bool
    rng: np.random.Generator
    on_tokens: OnTokens

    def ends(self, row: _Row, token: int) -> bool:
        return token in self.target.stop_tokens or len(row.output) >= self.max_tokens


def batch_generate(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    max_tokens: int,
    k: int,
    with_states: bool,
    rng: np.random.Generator,
    on_tokens: OnTokens = lambda count: None,
) -> list[Example]:
    """Answer all prompts; `on_tokens` is called with the number of tokens of every step, and may
    raise to stop.

    Where a few rows run on native kernels, lanes with caches of their own are faster than a padded
    batch. Raises ModelError for a target whose caches cannot be batched.
    """
    rows = [_Row(prompt) for prompt in prompts]
    generation = _Generation(target, max_tokens, k, with_states, rng, on_tokens)
    if target.few_rows_native:
        _generate_in_lanes(generation, rows)
    else:
        _generate_padded(generation, rows)
    return [row.example(with_states) for row in rows]


def _generate_padded(generation: _Generation, rows: Sequence[_Row]) -> None:
    """All rows as one left-padded batch."""
    target = generation.target
    active = list(rows)
    cache, last = _prefill_padded(target, rows, generation.with_states)
    for _ in range(generation.max_tokens):
        logits = np.array(target.logits(last).astype(mx.float32), copy=False)
        tokens = [
            0 if row.done else row.sample(line, generation.k, generation.rng)
            for row, line in zip(active, logits, strict=True)
        ]
        generation.on_tokens(sum(not row.done for row in active))
        for row, token in zip(active, tokens, strict=True):
            row.done = row.done or generation.ends(row, token)
        running = [i for i, row in enumerate(active) if not row.done]
        if not running:
            return
        if len(running) <= SHRINK_AT * len(active):
            for layer in cache:
                layer.filter(mx.array(running))
            active, tokens = [active[i] for i in running], [tokens[i] for i in running]
        states = target.hidden_states(mx.array(tokens)[:, None], cache)
        last = states[:, -1]
        mx.eval(last)
        if generation.with_states:
            for row, state in zip(active, np.array(states.astype(mx.float16)), strict=True):
                if not row.done:
                    row.add_states(state)


def _prefill_padded(target: LanguageModel, rows: Sequence[_Row], with_states: bool) -> tuple[list[Any], mx.array]:
    """Read all prompts at once: the batch's cache, and the last hidden state of each row [rows,
    hidden].
    """
    if any(type(layer) is not KVCache for layer in target.new_cache()):
        raise ModelError(f"{target.name} cannot be run in batches: its cache is not a plain one")
    longest = max(len(row.prompt.tokens) for row in rows)
    padding = [longest - len(row.prompt.tokens) for row in rows]
    cache = [BatchKVCache(padding) for _ in target.new_cache()]
    ids = np.array([[0] * pad + row.prompt.tokens for pad, row in zip(padding, rows, strict=True)])
    states = target.hidden_states(mx.array(ids), cache)
    if with_states:
        for row, pad, row_states in zip(rows, padding, np.array(states.astype(mx.float16)), strict=True):
            row.add_states(row_states[pad:])
    return cache, states[:, -1]


def _generate_in_lanes(generation: _Generation, rows: Sequence[_Row]) -> None:
    """A few answers side by side, each with its own cache; a finished one leaves its lane to the
    next prompt.
    """
    target = generation.target
    waiting = list(reversed(rows))
    lanes: list[tuple[_Row, list[Any], mx.array]] = []  # row, cache, last hidden state [1, hidden]
    while waiting or lanes:
        while waiting and len(lanes) < LANES:
            row, cache = waiting.pop(), target.new_cache()
            states = target.prefill(row.prompt.tokens, cache)
            if generation.with_states:
                row.add_states(np.array(states.astype(mx.float16)))
            lanes.append((row, cache, states[-1:]))
        logits = np.array(target.logits(mx.concatenate([last for _, _, last in lanes])).astype(mx.float32), copy=False)
        best, values, totals = largest(logits, generation.k)
        for i, (row, _, _) in enumerate(lanes):
            token = row.sample_with_top_k(logits[i], best[i], values[i] - totals[i], generation.rng)
            row.done = generation.ends(row, token)
        generation.on_tokens(len(lanes))
        running = [(row, cache) for row, cache, _ in lanes if not row.done]
        if not running:
            lanes = []
            continue
        states = target.batch_hidden_states([row.output[-1:] for row, _ in running], [cache for _, cache in running])
        if generation.with_states:
            for (row, _), state in zip(running, np.array(states.astype(mx.float16)), strict=True):
                row.add_states(state[None])
        lanes = [(row, cache, states[i : i + 1]) for i, (row, cache) in enumerate(running)]
