"""Token lists without a model: repeats, copies, and whether two greedy texts are equal. Pure.

Small models loop, and a loop is easy to draft: outputs that repeat themselves are reported apart
from the others. Two greedy texts may differ where the target's two best logits are equal up to
rounding. That is a tie; checking then continues from the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SPAN = 8  # tokens of the n-grams that repeats and copies are counted by
LOOPING = 0.2  # share of repeated 8-grams above which an output is reported apart
TIE_FP32 = 1e-3  # logit gap below which rounding decides
TIE_HALF = 2e-2

Resume = Callable[[list[int], int], list[int] | None]


@dataclass(frozen=True, slots=True)
class TopTwo:
    """The target's best and second-best token at a position, and by how much the first wins
    (logits).
    """

    first: int
    second: int
    gap: float


@dataclass(frozen=True, slots=True)
class Tie:
    """A position where rounding decided. `position` counts output tokens from 0."""

    position: int
    expected: int
    got: int
    gap: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`verdict`: equal, tie (equal but for ties), different (at `position`), unchecked (after a tie
    that the arm could not resume from).
    """

    verdict: str
    ties: list[Tie] = field(default_factory=list)
    position: int | None = None


def repeated_share(tokens: Sequence[int], span: int = SPAN) -> float:
    """Share of `span`-grams that occur earlier in the same list; 0 for a list shorter than one."""
    grams = [tuple(tokens[i : i + span]) for i in range(len(tokens) - span + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied_share(prompt: Sequence[int], output: Sequence[int], span: int = SPAN) -> float:
    """Share of the output's tokens that lie inside a `span`-gram of the prompt."""
    known = {tuple(prompt[i : i + span]) for i in range(len(prompt) - span + 1)}
    covered = [False] * len(output)
    for i in range(len(output) - span + 1):
        if tuple(output[i : i + span]) in known:
            covered[i : i + span] = [True] * span
    return sum(covered) / len(covered) if covered else 0.0


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index where two lists differ (the shorter's end where one begins the other); None
    for equal ones.
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def compare(
    expected: Sequence[int], got: Sequence[int], top_two: Callable[[int], TopTwo], resume: Resume, tolerance: float
) -> Comparison:
    """Whether `got` is the greedy text `expected`, but for ties.

    `top_two(i)` looks at the target after the first i expected tokens; `resume(start, count)` lets
    the arm under test write at most `count` tokens after `start`, or returns None where it cannot.
    """
    ties: list[Tie] = []
    got = list(got)
    while (position := first_difference(expected, got)) is not None:
        if position >= min(len(expected), len(got)):
            return Comparison("different", ties, position)
        best = top_two(position)
        if best.gap >= tolerance or {expected[position], got[position]} != {best.first, best.second}:
            return Comparison("different", ties, position)
        ties.append(Tie(position, expected[position], got[position], best.gap))
        start, left = list(expected[: position + 1]), len(expected) - position - 1
        rest = resume(start, left) if left else []
        if rest is None:
            return Comparison("unchecked", ties, position)
        got = start + rest
    return Comparison("tie" if ties else "equal", ties)
