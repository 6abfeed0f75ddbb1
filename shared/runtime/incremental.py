"""Long work in steps, for a thread that must not be held up.

Such work is a generator (`Steps`) that yields between two steps and returns its result.
"""

import time
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def run_all(steps: Steps[T]) -> T:
    """Run all steps that are left and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Stopwatch:
    """Measures steps: the seconds of all of them, and of the longest."""

    def __init__(self) -> None:
        self.total_s = self.longest_s = 0.0

    def over(self, steps: Steps[T]) -> Steps[T]:
        """These steps, measured."""
        while True:
            start = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                seconds = time.perf_counter() - start
                self.total_s, self.longest_s = self.total_s + seconds, max(self.longest_s, seconds)
            yield
