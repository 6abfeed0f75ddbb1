"""Who guesses: a head that reads the target's states, a language model of its own, or repeats of the running text.

One interface, one object a request. A drafter is told how the text grew (`extend`) and asked for at most k tokens with the
laws they were drawn from (`propose`). It catches up with what it was told in one batched call when it is next asked, so
that rounds without drafting cost it nothing. It does not know what was accepted, only what the text now is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from specl.shared.engine.answer_history import ClientAnswers
from specl.shared.engine.costs import DraftStopPolicy
from specl.shared.engine.sampling import Distribution, distribution, log_sum_exp, point_mass
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel
from specl.shared.sampling_params import SamplingParams

Noise = Callable[[int], np.ndarray]
# acceptance by length of the match, from 2 tokens on, before anything is known: long matches are copies
NGRAM_PRIOR = np.array([0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92] + [0.95] * 8)
CATCH_UP = 512  # rows a call: bounds the memory of a long catch-up


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens; the law each was drawn from (point masses when greedy); the drafter's own probability of each
    at temperature 1.
    """

    tokens: list[int]
    draft_probs: list[Distribution]
    confidences: list[float]
    drafter: str


NOTHING = Draft([], [], [], "none")


@dataclass(frozen=True, slots=True)
class Scores:
    """One row of draft logits, the place of the largest, and their log-sum-exp."""

    logits: np.ndarray
    best: int
    total: float

    @classmethod
    def of(cls, logits: np.ndarray) -> "Scores":
        """Read off a row."""
        return cls(logits, int(logits.argmax()), float(log_sum_exp(logits)))

    def probability(self, place: int) -> float:
        """What the row gives one of its columns at temperature 1."""
        return math.exp(float(self.logits[place]) - self.total)


@dataclass(frozen=True, slots=True)
class DraftSampler:
    """How a drafter draws: the request's law, its uniform source, and the noise of output positions when seeded.

    `noise(i)` belongs to the i-th token after the text as it stands. `stopper` may end a draft before k tokens.
    """

    sampling: SamplingParams
    uniform: Callable[[], float]
    noise: Noise | None
    stopper: DraftStopPolicy | None = None

    def grow(self, k: int, row: Scores, ids: np.ndarray | None, after: Callable[[int], Scores]) -> "Draft":
        """DraftSampler up to k tokens, the first from `row`, each other from the row `after` the one before it."""
        tokens, draft_probs, confidences = [], [], []
        for step in range(k):
            if self.stopper is not None and not self.stopper.include(row.probability(row.best)):
                break
            token, probs, confidence = self.pick(row, ids, step)
            tokens.append(token)
            draft_probs.append(probs)
            confidences.append(confidence)
            if step + 1 == k or (self.stopper is not None and not self.stopper.more()):
                break
            row = after(token)
        return Draft(tokens, draft_probs, confidences, "model")

    def pick(self, row: Scores, ids: np.ndarray | None, step: int) -> tuple[int, Distribution, float]:
        """A token from one row, its law and its confidence; `ids` names the columns of a subset."""
        if self.sampling.greedy:
            token = int(ids[row.best]) if ids is not None else row.best
            return token, point_mass(token), row.probability(row.best)
        probs = distribution(row.logits, self.sampling)
        named = probs if ids is None else Distribution(ids[probs.ids], probs.p)
        token = named.argmax_with(self.noise(step)) if self.noise is not None else named.draw(self.uniform())
        place = token if ids is None else int(np.searchsorted(ids, token))
        return token, named, row.probability(place)


class Drafter(Protocol):
    """What a drafter is. `states` of `extend`: the target's normed hidden states [n, hidden] from which each of the n tokens
    was predicted; the text's very first token has none, so its row is left out. None where nobody computed them.
    """

    name: str
    reads_states: bool
    stops: bool  # whether it asks `draw.stopper` before each token; one that does not is told an exact k

    @property
    def length(self) -> int:
        """Tokens of the text it has been told."""
        ...

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """The text grew by these tokens."""
        ...

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """At most k tokens that may follow."""
        ...

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens of the text still stand."""
        ...


class HeadDrafter:
    """Runs a `head` draft. Its cache has one entry a token but the first (see models/head.py)."""

    name = "model"
    reads_states = True
    stops = True

    def __init__(self, draft: HeadDraft) -> None:
        self.draft = draft
        self.cache = KVCache()
        self._tokens: list[int] = []
        self._states: list[mx.array] = []
        self._started = False
        self._last: mx.array | None = None  # output [1, hidden] of the last true entry, and its scores
        self._row: Scores | None = None

    @property
    def length(self) -> int:
        """Tokens of the text it has been told."""
        return (self.cache.offset + len(self._tokens) + 1) if self._started else 0

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """See Drafter."""
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
        """See Drafter."""
        pending = self.length - len(self._tokens)
        if length < pending:
            self.cache.trim(pending - length)
            self._tokens, self._states, self._last = [], [], None
        elif len(self._tokens) > length - pending:
            keep = length - pending
            states = mx.concatenate(self._states)[:keep] if keep else None
            self._tokens, self._states = self._tokens[:keep], [states] if states is not None else []
        self._started = self._started and length > 0

    def _catch_up(self) -> None:
        states = mx.concatenate(self._states) if len(self._states) > 1 else self._states[0]
        ids = self._tokens
        for start in range(0, len(ids), self.draft.rows_at_once):
            part = slice(start, start + self.draft.rows_at_once)
            self._last, *scores = self.draft.step(states[part], ids[part], self.cache)
            self._row = Scores(*scores)
        self._tokens, self._states = [], []

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """See Drafter. Entries that rest on its own guesses are dropped at once; true states will replace them."""
        if k <= 0 or not (self._tokens or self._last is not None):
            return NOTHING
        if self._tokens:
            self._catch_up()
        state, entered = self._last, self.cache.offset

        def after(token: int) -> Scores:
            nonlocal state
            state, *scores = self.draft.step(state, [token], self.cache)
            return Scores(*scores)

        draft = draw.grow(k, self._row, self.draft.hot, after)
        self.cache.trim(self.cache.offset - entered)
        return draft


class ModelDrafter:
    """Runs a language model of its own (a sibling or some of the target's layers). `vocabulary` is the target's: a sibling's
    may be padded further, with tokens that do not exist.
    """

    name = "model"
    reads_states = False
    stops = True

    def __init__(self, model: LanguageModel, vocabulary: int) -> None:
        self.model, self._vocabulary = model, vocabulary
        self.cache = model.new_cache()
        self._in_cache: list[int] = []  # what the cache holds: text, and drafts that may become text
        self._text: list[int] = []
        self._same = 0  # tokens of both that the last sync knew to be equal

    @property
    def length(self) -> int:
        """Tokens of the text it has been told."""
        return len(self._text)

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """See Drafter."""
        self._text.extend(tokens)

    def rewind(self, length: int) -> None:
        """See Drafter."""
        del self._text[length:]
        self._same = min(self._same, length)

    def _sync(self) -> int:
        """Trim the cache to what it shares with the text, always leaving one token to feed; how many it then holds."""
        old = self._in_cache
        most = min(len(old), len(self._text) - 1)
        shared = min(self._same, most)  # drafts live at the end: no need to compare all of the text every round
        while shared < most and old[shared] == self._text[shared]:
            shared += 1
        trim_prompt_cache(self.cache, len(old) - shared)
        del old[shared:]
        self._same = shared
        return shared

    def _feed(self, tokens: list[int]) -> Scores:
        for start in range(0, len(tokens), CATCH_UP):
            states = self.model.hidden_states(mx.array([tokens[start : start + CATCH_UP]]), self.cache)
            mx.eval(states)
        self._in_cache.extend(tokens)
        logits = self.model.logits(states[:, -1])[0, : self._vocabulary]
        return Scores.of(np.array(logits.astype(mx.float32), copy=False))

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """See Drafter."""
        if k <= 0 or not self._text:
            return NOTHING
        row = self._feed(self._text[self._sync() :])
        return draw.grow(k, row, None, lambda token: self._feed([token]))


@dataclass(frozen=True, slots=True)
class Match:
    """`text[place:]` follows what stands at the end of the running text; the last `length` tokens before are the same."""

    text: list[int]
    place: int
    length: int


NO_MATCH = Match([], 0, 0)


class NgramDrafter:
    """Repeats of the running text or of the client's past answers: what followed where the same few tokens stood. Point masses.

    After prompt-lookup decoding (Saxena 2023) with the longest match first; the running text wins among equals.
    """

    name = "ngram"
    reads_states = False
    stops = False
    MIN, MAX = 2, 17

    def __init__(self, past: ClientAnswers | None = None) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0
        self._past = past

    @property
    def length(self) -> int:
        """Tokens of the text it has been told."""
        return len(self._text)

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """See Drafter."""
        self._text.extend(tokens)

    def rewind(self, length: int) -> None:
        """See Drafter."""
        if length < len(self._text):
            del self._text[length:]
            self._places, self._indexed = {}, 0

    def _index(self) -> None:
        # an n-gram is entered only once something follows it, so a match always has a continuation
        for end in range(max(self._indexed, self.MIN), len(self._text)):
            self._places.setdefault(tuple(self._text[end - self.MIN : end]), []).append(end)
        self._indexed = max(self._indexed, len(self._text))

    def match(self) -> Match:
        """The best one; of length 0 where there is none. Latest wins among equals."""
        self._index()
        text, best, place = self._text, 0, 0
        if len(text) < self.MIN:
            return NO_MATCH
        for end in reversed(self._places.get(tuple(text[-self.MIN :]), [])[-64:]):
            length = self.MIN
            while length < self.MAX and length < end and text[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best:
                best, place = length, end
            if best == self.MAX:
                break
        if self._past is not None and best < self.MAX:
            past = Match(*self._past.match(text, self.MAX))
            if past.length > best:
                return past
        return Match(text, place, best) if best else NO_MATCH

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """See Drafter."""
        found = self.match()
        tokens = found.text[found.place : found.place + k]
        if not tokens:
            return NOTHING
        return Draft(tokens, [point_mass(token) for token in tokens], [1.0] * len(tokens), self.name)
