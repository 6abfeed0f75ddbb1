"""What a round leaves for training: the target's top-k at every position, and rejected drafts.

Only rows up to and including the first rejection count: what follows them is conditioned on a wrong
prefix. All rows of a round are read at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specl.shared.engine.sampling import largest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What a client may see of one position: the log-probability of the output token, and the most
    likely tokens with theirs.
    """

    logprob: float
    ids: list[int]
    logprobs: list[float]


def token_logprobs(logits: np.ndarray, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of rows [n, vocabulary] that predicted `tokens` [n], with `count` alternatives each.

    Natural log-probabilities at temperature 1.
    """
    ids, values, totals = largest(logits, max(count, 1))
    chosen = logits[np.arange(len(tokens)), list(tokens)] - totals
    logprobs = (values - totals[:, None])[:, :count]
    rows = zip(chosen.tolist(), ids[:, :count].tolist(), logprobs.tolist(), strict=True)
    return [TokenLogprobs(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class RejectedDraft:
    """A round's first rejected draft. `position` counts output tokens from 0, `depth` drafts from
    1.
    """

    position: int
    draft_token: int
    target_token: int
    draft_confidence: float
    target_confidence: float
    drafter: str
    depth: int


@dataclass(slots=True)
class Capture:
    """Grows with the output: one row an output token.

    Arrays: ids [n, k], logprobs [n, k] (natural, temperature 1), tail mass [n], entropy [n] (nats;
    the tail counts as one outcome, so it is a lower bound).
    """

    k: int
    ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    rejected: list[RejectedDraft] = field(default_factory=list)

    def add_rows(self, logits: np.ndarray) -> None:
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

    def confidence(self, position: int, token: int) -> float:
        """The target's probability of a token at an output position; 0 outside the top k."""
        hits = np.flatnonzero(self.ids[position] == token)
        return float(np.exp(self.logprobs[position][hits[0]])) if len(hits) else 0.0

    def cut(self, length: int) -> None:
        """Drop positions from `length` on (the answer ended inside a round)."""
        del self.ids[length:], self.logprobs[length:], self.tail[length:], self.entropy[length:]
        self.rejected = [item for item in self.rejected if item.position < length]
