"""What a round tells, kept for training: the target's top-k at every emitted position, and the disagreements.

Only rows up to and including the first rejection: what follows is conditioned on a wrong prefix and is kept nowhere. All
rows of a round are read at once.
"""

from dataclasses import dataclass, field

import numpy as np

from specl.shared.engine.law import log_sum_exp, top_indices


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
        for row, total in zip(logits, log_sum_exp(logits), strict=True):
            ids = top_indices(row, self.k)
            logprobs = (row[ids] - total).astype(np.float32)
            p = np.exp(logprobs, dtype=np.float64)
            tail = max(0.0, 1.0 - float(p.sum()))
            self.ids.append(ids.astype(np.uint32))
            self.logprobs.append(logprobs)
            self.tail.append(tail)
            self.entropy.append(float(-(p * logprobs).sum() - (tail * np.log(tail) if tail > 0 else 0.0)))

    def confidence(self, row: int, token: int) -> float:
        """The target's probability of a token at an output position, 0 where it is outside the top k."""
        hit = np.flatnonzero(self.ids[row] == token)
        return float(np.exp(self.logprobs[row][hit[0]])) if len(hit) else 0.0

    def cut(self, length: int) -> None:
        """Forget positions from `length` on (the answer ended inside a round)."""
        for rows in (self.ids, self.logprobs, self.tail, self.entropy):
            del rows[length:]
        self.rejected = [item for item in self.rejected if item.position < length]
