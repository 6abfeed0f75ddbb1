"""Acceptance by depth as drafting meets it: how often the n-th drafted token stands, given that those before it stood.

Read off teacher-forced scores, without running target or draft token by token: where all shallower guesses were the text's own
tokens, the draft saw just what teacher forcing shows it. Arrays in, rates out; knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ByDepth:
    """`acceptance`: of the tokens that were drafted because all before them stood. `agreement`: at every place, whatever the
    draft itself would have said before it. One rate a depth, no further than anything got.
    """

    acceptance: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Places:
    """One depth of a batch, [rows, places] each: `score` is how likely the draft's guess for this place would stand, `stands`
    how likely it would and be the text's own token. Greedy text: both 1 or 0. NaN where nothing is judged.

    Sampled text: the sum of min(p, q), and min(1, q/p) of the token that was drawn. Over draws from p the mean of the second
    is the first, so it is what a place weighs among those where the next token would have been drafted.
    """

    score: np.ndarray
    stands: np.ndarray


class DepthCounts:
    """Drafts from every place of every text, one batch after another."""

    def __init__(self, depths: int) -> None:
        self._stood, self._tried, self._hit, self._judged = (np.zeros(depths) for _ in range(4))

    def add(self, depths: Sequence[Places]) -> None:
        """Count a batch; one `Places` a depth."""
        alive = np.where(np.isnan(depths[0].score), 0.0, 1.0)  # drafts that begin at each place
        for depth, places in enumerate(depths):
            judged = ~np.isnan(places.score)
            self._judged[depth] += judged.sum()
            self._hit[depth] += places.score[judged].sum()
            # a draft that begins at place p guesses place p + depth at this depth
            alive = alive[:, : alive.shape[1] - 1] if depth else alive
            alive = np.where(judged[:, depth:], alive, 0.0)
            self._tried[depth] += alive.sum()
            self._stood[depth] += (alive * np.nan_to_num(places.score[:, depth:])).sum()
            alive = alive * np.nan_to_num(places.stands[:, depth:])

    def rates(self) -> ByDepth:
        """What was counted. A depth that no draft got to has no rate."""
        return ByDepth(_rates(self._stood, self._tried), _rates(self._hit, self._judged))


def _rates(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, ...]:
    return tuple(float(part / whole) for part, whole in zip(parts, wholes, strict=True) if whole > 0)
