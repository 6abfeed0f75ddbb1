"""The drafters: a head that reads the target's states, a small language model, and n-gram matches.

One interface, one object a request. `extend` gives a drafter the tokens that the text grew by;
`propose` asks for at most k tokens with the distributions they were drawn from. It catches up with
the text in one batched call when it is next asked, so that rounds without a draft cost it nothing.
It does not know what was accepted, only what the text now is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from specl.shared.engine.answer_history import ClientAnswers
from specl.shared.engine.draft_length import DraftStopPolicy
from specl.shared.engine.sampling import Distribution, distribution, log_sum_exp, point_mass
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel
from specl.shared.sampling_params import SamplingParams

Noise = Callable[[int], np.ndarray]
CATCH_UP = 512  # rows a call: bounds the memory of a long catch-up


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens; the distribution each was drawn from (a point mass when greedy); the
    drafter's probability of each at temperature 1; the drafter's name.
    """

    tokens: list[int]
    draft_probs: list[Distribution]
    confidences: list[float]
    drafter: str


NO_DRAFT = Draft([], [], [], "none")


@dataclass(frozen=True, slots=True)
class Scores:
    """One row of draft logits, the index of the largest, and their log-sum-exp."""

    logits: np.ndarray
    best: int
    total: float

    @classmethod
    def of(cls, logits: np.ndarray) -> "Scores":
        """The scores of a row of logits."""
        return cls(logits, int(logits.argmax()), float(log_sum_exp(logits)))

    def probability(self, column: int) -> float:
        """The probability of one column at temperature 1."""
        return math.exp(float(self.logits[column]) - self.total)


@dataclass(frozen=True, slots=True)
class DraftSampler:
    """Draws draft tokens: the request's sampling, its source of uniform numbers, and noise when
    seeded.

    `noise(i)` belongs to the i-th token after the text as it stands. `stop_policy` may end a draft
    before k tokens.
    """

    sampling: SamplingParams
    uniform: Callable[[], float]
    noise: Noise | None
    stop_policy: DraftStopPolicy | None = None

    def draft(self, k: int, row: Scores, ids: np.ndarray | None, next_row: Callable[[int], Scores]) -> Draft:
        """At most k tokens: the first from `row`, each other from the `next_row` after its
        predecessor.

        `ids` names the columns of a row that scores a subset of the vocabulary.
        """
        tokens: list[int] = []
        draft_probs: list[Distribution] = []
        confidences: list[float] = []
        policy = self.stop_policy
        for step in range(k):
            if policy is not None and not policy.should_add(row.probability(row.best)):
                break
            token, probs, confidence = self.sample(row, ids, step)
            tokens.append(token)
            draft_probs.append(probs)
            confidences.append(confidence)
            if step + 1 == k or (policy is not None and not policy.should_continue()):
                break
            row = next_row(token)
        return Draft(tokens, draft_probs, confidences, "model")

    def sample(self, row: Scores, ids: np.ndarray | None, step: int) -> tuple[int, Distribution, float]:
        """A token of one row, the distribution it was drawn from, and its confidence."""
        if self.sampling.greedy:
            token = int(ids[row.best]) if ids is not None else row.best
            return token, point_mass(token), row.probability(row.best)
        probs = distribution(row.logits, self.sampling)
        named = probs if ids is None else Distribution(ids[probs.ids], probs.p)
        token = named.argmax_with(self.noise(step)) if self.noise is not None else named.draw(self.uniform())
        column = token if ids is None else int(np.searchsorted(ids, token))
        return token, named, row.probability(column)


class Drafter(Protocol):
    """The interface of a drafter."""

    @property
    def name(self) -> str:
        """The name under which its drafts are counted: "model" or "ngram"."""
        ...

    @property
    def reads_states(self) -> bool:
        """Whether `extend` needs the target's states."""
        ...

    @property
    def stops(self) -> bool:
        """Whether it asks the sampler's `stop_policy` before each token; if not, k is exact."""
        ...

    @property
    def length(self) -> int:
        """Tokens of the text that it knows."""
        ...

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """The text grew by these n tokens.

        `states`: the target's normed hidden states [n, hidden] that predicted them, without a row
        for the very first token of the text, which nothing predicted. None where states are not
        kept.
        """
        ...

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens that may follow."""
        ...

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        ...


class HeadDrafter:
    """Drafts with a head. Its cache has one entry for each token but the first."""

    name = "model"
    reads_states = True
    stops = True

    def __init__(self, draft: HeadDraft) -> None:
        self.draft = draft
        self.cache = KVCache()
        self._tokens: list[int] = []
        self._states: list[mx.array] = []
        self._started = False
        # output [1, hidden] of the last entry that rests on the text, and its scores
        self._last: tuple[mx.array, Scores] | None = None

    @property
    def length(self) -> int:
        """Tokens of the text that it knows."""
        return (self.cache.offset + len(self._tokens) + 1) if self._started else 0

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """The text grew. Raises ValueError where `states` are missing or too few."""
        if states is None:
            raise ValueError("a head drafter needs the target's states")
        if not self._started and tokens:
            tokens, self._started = tokens[1:], True
        if states.shape[0] != len(tokens):
            raise ValueError(f"{len(tokens)} tokens with {states.shape[0]} states")
        if tokens:
            self._tokens.extend(tokens)
            self._states.append(states)

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        pending = self.length - len(self._tokens)
        if length < pending:
            self.cache.trim(pending - length)
            self._tokens, self._states, self._last = [], [], None
        elif len(self._tokens) > length - pending:
            count = length - pending
            self._states = [mx.concatenate(self._states)[:count]] if count else []
            self._tokens = self._tokens[:count]
        self._started = self._started and length > 0

    def _catch_up(self) -> None:
        states = mx.concatenate(self._states) if len(self._states) > 1 else self._states[0]
        ids = self._tokens
        for start in range(0, len(ids), self.draft.prefill_rows):
            part = slice(start, start + self.draft.prefill_rows)
            self._last = self._step(states[part], ids[part])
        self._tokens, self._states = [], []

    def _step(self, states: mx.array, ids: list[int]) -> tuple[mx.array, Scores]:
        state, logits, best, total = self.draft.step(states, ids, self.cache)
        return state, Scores(logits, best, total)

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens. Their cache entries are dropped: true states will replace them."""
        if k > 0 and self._tokens:
            self._catch_up()
        if k <= 0 or self._last is None:
            return NO_DRAFT
        (state, row), length = self._last, self.cache.offset

        def next_row(token: int) -> Scores:
            nonlocal state
            state, scores = self._step(state, [token])
            return scores

        draft = sampler.draft(k, row, self.draft.hot, next_row)
        self.cache.trim(self.cache.offset - length)
        return draft


class ModelDrafter:
    """Drafts with a language model: a smaller sibling of the target, or some of its layers.

    `vocabulary` is the target's: a sibling's may be padded further, with tokens that do not exist.
    """

    name = "model"
    reads_states = False
    stops = True

    def __init__(self, model: LanguageModel, vocabulary: int) -> None:
        self.model, self._vocabulary = model, vocabulary
        self.cache = model.new_cache()
        self._cached: list[int] = []  # tokens in the cache: text, and drafts that may become text
        self._text: list[int] = []
        self._shared = 0  # leading tokens of both that the last sync found equal

    @property
    def length(self) -> int:
        """Tokens of the text that it knows."""
        return len(self._text)

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """The text grew by these tokens."""
        self._text.extend(tokens)

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        del self._text[length:]
        self._shared = min(self._shared, length)

    def _sync(self) -> int:
        """Trim the cache to the tokens that it shares with the text, and return their number.

        At least one token of the text is left to feed.
        """
        old = self._cached
        most = min(len(old), len(self._text) - 1)
        shared = min(self._shared, most)  # drafts are at the end: the rest was compared before
        while shared < most and old[shared] == self._text[shared]:
            shared += 1
        trim_prompt_cache(self.cache, len(old) - shared)
        del old[shared:]
        self._shared = shared
        return shared

    def _feed(self, tokens: list[int]) -> Scores:
        last = self.model.vocabulary_size - 1  # a sibling may have fewer rows than its target: MLX checks no index
        for start in range(0, len(tokens), CATCH_UP):
            ids = [min(token, last) for token in tokens[start : start + CATCH_UP]]
            states = self.model.hidden_states(mx.array([ids]), self.cache)
            mx.eval(states)
        self._cached.extend(tokens)
        logits = self.model.logits(states[:, -1])[0, : self._vocabulary]
        return Scores.of(np.array(logits.astype(mx.float32), copy=False))

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens that may follow."""
        if k <= 0 or not self._text:
            return NO_DRAFT
        row = self._feed(self._text[self._sync() :])
        return sampler.draft(k, row, None, lambda token: self._feed([token]))


@dataclass(frozen=True, slots=True)
class Match:
    """`tokens[end:]` may follow the running text, whose last `length` tokens stand before `end`."""

    tokens: list[int]
    end: int
    length: int


NO_MATCH = Match([], 0, 0)


class NgramDrafter:
    """Drafts what followed the same few tokens earlier, in the running text or the client's past
    answers.

    Prompt-lookup decoding (Saxena 2023) with the longest match first; the running text wins among
    equals. Its distributions are point masses.
    """

    name = "ngram"
    reads_states = False
    stops = False
    MIN, MAX = 2, 17

    def __init__(self, client_answers: ClientAnswers | None = None) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> the positions after it
        self._indexed = 0
        self._client_answers = client_answers

    @property
    def length(self) -> int:
        """Tokens of the text that it knows."""
        return len(self._text)

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """The text grew by these tokens."""
        self._text.extend(tokens)

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        if length < len(self._text):
            del self._text[length:]
            self._ends, self._indexed = {}, 0

    def _index(self) -> None:
        # an n-gram is entered only once something follows it, so a match always has a continuation
        for end in range(max(self._indexed, self.MIN), len(self._text)):
            self._ends.setdefault(tuple(self._text[end - self.MIN : end]), []).append(end)
        self._indexed = max(self._indexed, len(self._text))

    def match(self) -> Match:
        """The longest match; of length 0 where there is none. The latest wins among equals."""
        self._index()
        text, best, best_end = self._text, 0, 0
        if len(text) < self.MIN:
            return NO_MATCH
        for end in reversed(self._ends.get(tuple(text[-self.MIN :]), [])[-64:]):
            length = self.MIN
            while length < self.MAX and length < end and text[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best:
                best, best_end = length, end
            if best == self.MAX:
                break
        if self._client_answers is not None and best < self.MAX:
            past = Match(*self._client_answers.match(text, self.MAX))
            if past.length > best:
                return past
        return Match(text, best_end, best) if best else NO_MATCH

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens that may follow."""
        match = self.match()
        tokens = match.tokens[match.end : match.end + k]
        if not tokens:
            return NO_DRAFT
        return Draft(tokens, [point_mass(token) for token in tokens], [1.0] * len(tokens), self.name)
