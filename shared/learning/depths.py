"""Acceptance by depth as drafting meets it: how often the n-th drafted token is accepted, given
that those before it were.

Computed from teacher-forced scores, without running target or draft token by token: where all
shallower guesses were the text's own tokens, the draft saw what teacher forcing shows it. Arrays
in, rates out; knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DepthRates:
    """One rate for each depth that any draft reached. `acceptance`: of tokens drafted after
    accepted ones. `agreement`: at every position, whatever the draft itself would have guessed
    before it.
    """

    acceptance: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DepthScores:
    """Scores of one depth of a batch, [rows, positions]; NaN where nothing is scored. `accepted` is
    the probability that the draft's guess for this position is accepted, `matches` that it is and
    equals the text's token. Greedy text: both 1 or 0.

    Sampled text: the sum of min(p, q), and min(1, q/p) of the token that was drawn. Over draws from
    p the mean of the second is the first, so the second is a position's weight among those where
    the next token would have been drafted.
    """

    accepted: np.ndarray
    matches: np.ndarray


class DepthCounts:
    """Counts drafts from every position of every text, one batch after another."""

    def __init__(self, depths: int) -> None:
        self._accepted, self._tried, self._agreed, self._scored = (np.zeros(depths) for _ in range(4))

    def add(self, depths: Sequence[DepthScores]) -> None:
        """Count a batch; one DepthScores for each depth."""
        alive = np.where(np.isnan(depths[0].accepted), 0.0, 1.0)  # weight of the drafts that begin at each position
        for depth, scores in enumerate(depths):
            scored = ~np.isnan(scores.accepted)
            self._scored[depth] += scored.sum()
            self._agreed[depth] += scores.accepted[scored].sum()
            # a draft that begins at position p guesses position p + depth at this depth
            alive = alive[:, : alive.shape[1] - 1] if depth else alive
            alive = np.where(scored[:, depth:], alive, 0.0)
            self._tried[depth] += alive.sum()
            self._accepted[depth] += (alive * np.nan_to_num(scores.accepted[:, depth:])).sum()
            alive = alive * np.nan_to_num(scores.matches[:, depth:])

    def rates(self) -> DepthRates:
        """The rates so far. A depth that no draft reached has none."""
        return DepthRates(_rates(self._accepted, self._tried), _rates(self._agreed, self._scored))


def _rates(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, ...]:
    return tuple(float(part / whole) for part, whole in zip(parts, wholes, strict=True) if whole > 0)
