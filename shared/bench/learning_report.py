"""What a stream says of learning: rows in, figures with intervals out. Pure; knows no model, no clock, no file.

On and off answer the same prompts, so rows are paired by number and resampled together: 95% percentile bootstrap, 2,000
resamples over requests. Speeds are pooled: all tokens over all seconds. Two ratios are told. `speed` is what a user sees,
the trainer's share of the machine included. `speed_to_plain` first divides each side by the plain decoding measured along
the way (the median of the nearest few), which takes out how busy the machine was, and the trainer with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specl.shared.bench.stream import Pass, StreamRow

RESAMPLES = 2000
CONFIDENCE = 0.95
NEAREST = 5  # plain measurements whose median stands beside a row
ROLLING = 12  # requests behind a point of a curve
LEAST = 2  # pairs below which nothing is said

Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of `n` requests with its interval; None where nothing can be said."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def estimate(statistic: Statistic, count: int, seed: int = 0) -> Estimate:
    """`statistic` of all rows (it takes their indices), and where it lies when rows are drawn again."""
    if count < LEAST:
        return Estimate(None, None, None, count)
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    value = statistic(np.arange(count))
    drawn = [one for one in drawn if np.isfinite(one)]
    if not np.isfinite(value) or not drawn:
        return Estimate(None, None, None, count)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Estimate(float(value), float(low), float(high), count)


def quotient(top: np.ndarray, bottom: np.ndarray) -> float:
    """Sum over sum, of the rows that have both; NaN where the bottom is empty."""
    known = np.isfinite(top) & np.isfinite(bottom)
    return over(float(top[known].sum()), float(bottom[known].sum()))


def over(top: float, bottom: float) -> float:
    """A ratio; NaN where there is none."""
    return top / bottom if bottom else float("nan")


# ------------------------------------------------------------------------------------------------ one side
class Side:
    """Rows as arrays. `units` are decoding times in plain tokens: seconds times the plain speed beside them."""

    def __init__(self, rows: Sequence[StreamRow]) -> None:
        self.rows = list(rows)
        column = lambda values: np.array(list(values), float)  # noqa: E731
        self.tokens = column(len(row.output) for row in rows)
        self.seconds = column(row.seconds for row in rows)
        self.rounds = column(row.rounds for row in rows)
        self.drafted = column(row.drafted for row in rows)
        self.accepted = column(row.accepted for row in rows)
        self.hits = column(np.nan if row.hits is None else row.hits for row in rows)
        self.positions = column(np.nan if row.positions is None else row.positions for row in rows)
        self.units = self.seconds * beside(rows)

    def speed(self, picks: np.ndarray) -> float:
        """Tokens a second."""
        return quotient(self.tokens[picks], self.seconds[picks])

    def to_plain(self, picks: np.ndarray) -> float:
        """Speed as a multiple of plain decoding's."""
        return quotient(self.tokens[picks], self.units[picks])

    def acceptance(self, picks: np.ndarray) -> float:
        """Of what the model drafter drafted."""
        return quotient(self.accepted[picks], self.drafted[picks])

    def agreement(self, picks: np.ndarray) -> float:
        """Of all output positions."""
        return quotient(self.hits[picks], self.positions[picks])

    def a_round(self, picks: np.ndarray) -> float:
        """Tokens a round: the mean accepted length, the target's own token included."""
        return quotient(self.tokens[picks], self.rounds[picks])

    def figures(self) -> dict[str, float | None]:
        """Of all rows."""
        if not self.rows:
            return {}
        every = np.arange(len(self.rows))
        values = {
            "tokens_per_second": self.speed(every),
            "speed_to_plain": self.to_plain(every),
            "acceptance": self.acceptance(every),
            "agreement": self.agreement(every),
            "tokens_a_round": self.a_round(every),
        }
        return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def beside(rows: Sequence[StreamRow]) -> np.ndarray:
    """For each row the plain speed at its time: the median of the NEAREST measurements; NaN where there is none."""
    known = [(row.n, row.plain) for row in rows if row.plain]
    found = []
    for row in rows:
        nearest = sorted(known, key=lambda pair: abs(pair[0] - row.n))[:NEAREST]
        found.append(float(np.median([speed for _, speed in nearest])) if nearest else float("nan"))
    return np.array(found, float)


# ------------------------------------------------------------------------------------------------ two sides
def compare(first: Side, second: Side) -> dict[str, Estimate]:
    """`first` against `second`, row by row the same prompts: ratios of speed, differences of acceptance and agreement.

    Raises ValueError where the prompts are not the same.
    """
    if [row.prompt for row in first.rows] != [row.prompt for row in second.rows]:
        raise ValueError("the two sides did not answer the same prompts")
    count = len(first.rows)
    scored = np.flatnonzero(np.isfinite(first.hits) & np.isfinite(second.hits))  # a gap on one side is left out on both
    agree = lambda picks: first.agreement(scored[picks]) - second.agreement(scored[picks])  # noqa: E731
    return {
        "speed": estimate(lambda picks: over(first.speed(picks), second.speed(picks)), count),
        "speed_to_plain": estimate(lambda picks: over(first.to_plain(picks), second.to_plain(picks)), count),
        "acceptance": estimate(lambda picks: first.acceptance(picks) - second.acceptance(picks), count),
        "agreement": estimate(agree, len(scored)),
    }


def windows(count: int, shift_at: int | None = None) -> dict[str, range]:
    """The parts of a stream of `count` requests that are reported; the second half begins where the kind changes."""
    half = count // 2 if shift_at is None else min(shift_at, count)
    return {
        "whole": range(count),
        "first half": range(half),
        "second half": range(half, count),
        "last quarter": range(count - count // 4, count),
    }


def report(on: Pass, off: Pass | None, shift_at: int | None = None) -> dict[str, Any]:
    """By window of what `on` answered: both sides' figures and their comparison, over the requests that both answered."""
    found: dict[str, Any] = {"windows": {}, "words": words(on, off) if off else None}
    ons, offs = by_number(on), by_number(off) if off else {}
    for name, numbers in windows(len(on.rows), shift_at).items():
        here = [n for n in numbers if n in ons]
        row: dict[str, Any] = {"requests": [numbers.start, numbers.stop], "on": Side([ons[n] for n in here]).figures()}
        if off is not None:
            both = [n for n in here if n in offs]
            sides = Side([ons[n] for n in both]), Side([offs[n] for n in both])
            row["off"] = sides[1].figures()
            row["pairs"] = len(both)
            row["on_against_off"] = {key: asdict(value) for key, value in compare(*sides).items()}
        found["windows"][name] = row
    found["adapters"] = adapters(on)
    found["training"] = [asdict(event) for event in on.events]
    return found


def by_number(part: Pass) -> dict[int, StreamRow]:
    """Rows by their place in the stream."""
    return {row.n: row for row in part.rows}


def words(on: Pass, off: Pass) -> dict[str, int]:
    """Whether the same words came out; greedy texts may part where floating point flips a tie."""
    ons, offs = by_number(on), by_number(off)
    both = ons.keys() & offs.keys()
    return {"compared": len(both), "different": sum(ons[n].output != offs[n].output for n in both)}


def adapters(part: Pass) -> list[dict[str, Any]]:
    """Which adapter drafted from which request on, in order; a rollback is one more entry."""
    found: list[dict[str, Any]] = []
    for row in part.rows:
        if not found or found[-1]["adapter"] != row.adapter_id:
            found.append({"adapter": row.adapter_id, "from_request": row.n, "at_s": row.at_s, "requests": 0})
        found[-1]["requests"] += 1
    return found


def gain(
    fixed: tuple[Sequence[StreamRow], Sequence[StreamRow]], auto: tuple[Sequence[StreamRow], Sequence[StreamRow]]
) -> dict[str, Any]:
    """Before and after one training run on unseen prompts: each pair is (before, after). Acceptance and agreement are of the
    fixed length, speeds of the automatic one.
    """
    before, after = Side(fixed[0]), Side(fixed[1])
    slow, fast = Side(auto[0]), Side(auto[1])
    found = compare(after, before), compare(fast, slow)
    return {
        "prompts": len(before.rows),
        "before": {"fixed": before.figures(), "auto": slow.figures()},
        "after": {"fixed": after.figures(), "auto": fast.figures()},
        "agreement_gain": asdict(found[0]["agreement"]),
        "acceptance_gain": asdict(found[0]["acceptance"]),
        "speed_ratio": asdict(found[1]["speed"]),
        "speed_ratio_to_plain": asdict(found[1]["speed_to_plain"]),
        "words": words(Pass(list(auto[0])), Pass(list(auto[1]))),
    }


# ------------------------------------------------------------------------------------------------ curves
def curve(rows: Sequence[StreamRow], figure: Callable[[Side, np.ndarray], float]) -> tuple[list[float], list[float]]:
    """Minutes and the pooled figure of the last ROLLING requests; a change of adapter does not reset it."""
    side = Side(rows)
    values = [figure(side, np.arange(max(0, i - ROLLING + 1), i + 1)) for i in range(len(rows))]
    return [row.at_s / 60 for row in rows], values
