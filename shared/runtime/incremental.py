"""Long work on a thread that must not be held up: a generator that yields between pieces and returns its result."""

import time
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def run_all(pieces: Steps[T]) -> T:
    """All that is left of it, now."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


class Stopwatch:
    """How long pieces took: all of them, and the longest."""

    def __init__(self) -> None:
        self.total_s = self.longest_s = 0.0

    def over(self, pieces: Steps[T]) -> Steps[T]:
        """The same pieces, timed."""
        while True:
            start = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
            finally:
                took = time.perf_counter() - start
                self.total_s, self.longest_s = self.total_s + took, max(self.longest_s, took)
            yield
