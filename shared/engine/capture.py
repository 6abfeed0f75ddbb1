"""What a round tells, kept for training: the target's top-k at every emitted position, and the disagreements.

Only rows up to and including the first rejection: what follows is conditioned on a wrong prefix and is kept nowhere. All
rows of a round are read at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specl.shared.engine.sampling import largest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What a client may see of one position: the emitted token's log-probability, and the likeliest tokens with theirs."""

    logprob: float
    ids: list[int]
    logprobs: list[float]


def told(logits: np.ndarray, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """For rows [n, vocabulary] that predicted `tokens` [n]: natural log-probabilities at temperature 1, `count` alternatives."""
    ids, values, totals = largest(logits, max(count, 1))
    chosen = logits[np.arange(len(tokens)), list(tokens)] - totals
    rows = zip(chosen.tolist(), ids[:, :count].tolist(), (values - totals[:, None])[:, :count].tolist(), strict=True)
    return [TokenLogprobs(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class RejectedDraft:
    """The first draft of a round that did not stand. `position` counts output tokens from 0, `depth` drafts from 1."""

    position: int
    draft_token: int
    target_token: int
    draft_confidence: float
    target_confidence: float
    drafter: str
    depth: int


@dataclass(slots=True)
class Capture:
    """Grows with the output. Arrays have one row an output token: ids [n, k], log-probabilities [n, k] (natural,
    temperature 1), tail mass [n], entropy [n] (nats, the tail as one outcome: a lower bound).
    """

    k: int
    ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    rejected: list[RejectedDraft] = field(default_factory=list)

    def rows(self, logits: np.ndarray) -> None:
        """Keep the rows [n, vocabulary] that predicted the tokens just emitted."""
        ids, values, totals = largest(logits, self.k)
        logprobs = (values - totals[:, None]).astype(np.float32)
        p = np.exp(logprobs, dtype=np.float64)
        tail = np.maximum(0.0, 1.0 - p.sum(axis=1))
        entropy = -(p * logprobs).sum(axis=1) - tail * np.log(np.where(tail > 0, tail, 1.0))
        self.ids.extend(ids.astype(np.uint32))
        self.logprobs.extend(logprobs)
        self.tail.extend(tail.tolist())
        self.entropy.extend(entropy.tolist())

    def confidence(self, row: int, token: int) -> float:
        """The target's probability of a token at an output position, 0 where it is outside the top k."""
        hit = np.flatnonzero(self.ids[row] == token)
        return float(np.exp(self.logprobs[row][hit[0]])) if len(hit) else 0.0

    def cut(self, length: int) -> None:
        """Forget positions from `length` on (the answer ended inside a round)."""
        for rows in (self.ids, self.logprobs, self.tail, self.entropy):
            del rows[length:]
        self.rejected = [item for item in self.rejected if item.position < length]
