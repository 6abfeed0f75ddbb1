"""How far long work is, as a value that the work reports and a command shows. Knows neither
of the two.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` (tokens, texts, steps or answers), seconds left at the pace so far, and a
    note.
    """

    stage: str
    done: int
    total: int
    left_s: float
    note: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For work that nobody watches."""


class ProgressMeter:
    """Counts the work of one stage and reports it, with the seconds left at the pace since the
    meter was made.

    `done` is what earlier runs did already: it counts as done, but not towards the pace.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        report: OnProgress,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = done
        self._stage, self._total, self._report, self._clock = stage, total, report, clock
        self._start, self._worked = clock(), 0

    def skip(self, count: int) -> None:
        """`count` more were done by an earlier run."""
        self.done += count

    def advance(self, count: int = 1, note: str = "", at_most_s: float = math.inf) -> None:
        """`count` more are done. Report it; the work ends after `at_most_s` whatever is left of it."""
        self.done += count
        self._worked += count
        left = self._total - self.done
        left_s = (self._clock() - self._start) / self._worked * left if self._worked else math.inf
        self._report(Progress(self._stage, self.done, self._total, max(0.0, min(left_s, at_most_s)), note))
