"""Where long work stands, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` (tokens, texts or steps), seconds left by the current pace, and a note."""

    stage: str
    done: int
    total: int
    left_s: float
    note: str = ""


Tell = Callable[[Progress], None]
