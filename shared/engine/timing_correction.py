"""Corrects measured costs by the time that rounds really take.

Sampled rows need a distribution each, and a busy machine slows some work more than other:
calibration sees neither. Only finished rounds count, so nothing that was drawn decides about its
own round.
"""

import numpy as np

MEMORY = 64  # rounds of each kind that are remembered
ENOUGH_ROUNDS = 8  # of each kind before anything is corrected
MAX_RATIO = 3.0  # of a single round: what the processor did meanwhile for others counts no more
SLOWDOWN_LIMITS = (0.8, 2.0)


class TimingCorrection:
    """Mean ratios of real to expected seconds: rounds with a model draft, and rounds without."""

    def __init__(self) -> None:
        self.rounds, self._ratio = {True: 0, False: 0}, {True: 1.0, False: 1.0}

    def add_round(self, drafted: bool, seconds: float, expected_s: float) -> None:
        """A finished round, with a model draft or without."""
        self.rounds[drafted] += 1
        weight = max(1 / self.rounds[drafted], 1 / MEMORY)
        self._ratio[drafted] += weight * (min(seconds / expected_s, MAX_RATIO) - self._ratio[drafted])

    @property
    def draft_slowdown(self) -> float:
        """How much longer than expected rounds with a draft take, relative to those without.

        1 until enough rounds of both kinds were seen.
        """
        if min(self.rounds.values()) < ENOUGH_ROUNDS:
            return 1.0
        return float(np.clip(self._ratio[True] / self._ratio[False], *SLOWDOWN_LIMITS))
