"""How far a measurement is: what every bench tells while it runs. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far, and for how much longer (seconds; an estimate from the runs so far)."""

    done: int
    total: int
    left_s: float
    note: str
