"""What a stream shows about learning: rows in, figures with intervals out. Pure; knows no model, no
clock, no file.

With learning on and off the same prompts are answered, so rows are paired by number and resampled
together: 95% percentile bootstrap, 2,000 resamples over requests. Speeds are pooled: all tokens
over all seconds. Two ratios are reported. `speed` is what a user sees, the trainer's share of the
machine included. `speed_to_plain` first divides each side by the plain decoding measured beside it
(the median of the nearest few), which removes how busy the machine was, and the trainer with it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specl.shared.bench.stream import StreamPass, StreamRow

RESAMPLES = 2000
CONFIDENCE = 0.95
NEAREST = 5  # plain measurements whose median stands beside a row
ROLLING = 12  # requests behind a point of a curve
LEAST = 2  # pairs below which nothing is estimated

Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of `n` requests with its interval; None where it cannot be estimated."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def estimate(statistic: Statistic, count: int, seed: int = 0) -> Estimate:
    """`statistic` of all rows (it takes their indices), with its bootstrap interval."""
    if count < LEAST:
        return Estimate(None, None, None, count)
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    value = statistic(np.arange(count))
    drawn = [value for value in drawn if np.isfinite(value)]
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


def _column(values: Iterable[float]) -> np.ndarray:
    return np.array(list(values), float)


# ------------------------------------------------------------------------------------------------ one side
class StreamFigures:
    """Figures of rows, which are kept as arrays. `units` are decoding times in plain tokens:
    seconds times the plain speed beside.
    """

    def __init__(self, rows: Sequence[StreamRow]) -> None:
        self.rows = list(rows)
        self.tokens = _column(len(row.output) for row in rows)
        self.seconds = _column(row.seconds for row in rows)
        self.rounds = _column(row.rounds for row in rows)
        self.drafted = _column(row.drafted for row in rows)
        self.accepted = _column(row.accepted for row in rows)
        self.hits = _column(np.nan if row.hits is None else row.hits for row in rows)
        self.positions = _column(np.nan if row.positions is None else row.positions for row in rows)
        self.units = self.seconds * plain_beside(rows)

    def speed(self, picks: np.ndarray) -> float:
        """Tokens a second."""
        return quotient(self.tokens[picks], self.seconds[picks])

    def to_plain(self, picks: np.ndarray) -> float:
        """Speed as a multiple of plain decoding's."""
        return quotient(self.tokens[picks], self.units[picks])

    def acceptance(self, picks: np.ndarray) -> float:
        """Accepted of what the model drafter drafted."""
        return quotient(self.accepted[picks], self.drafted[picks])

    def agreement(self, picks: np.ndarray) -> float:
        """Share of all output positions where the draft's first choice was the text's token."""
        return quotient(self.hits[picks], self.positions[picks])

    def tokens_a_round(self, picks: np.ndarray) -> float:
        """Tokens a round: the mean accepted length, the target's own token included."""
        return quotient(self.tokens[picks], self.rounds[picks])

    def figures(self) -> dict[str, float | None]:
        """The figures of all rows, for a report."""
        if not self.rows:
            return {}
        all_rows = np.arange(len(self.rows))
        values = {
            "tokens_per_second": self.speed(all_rows),
            "speed_to_plain": self.to_plain(all_rows),
            "acceptance": self.acceptance(all_rows),
            "agreement": self.agreement(all_rows),
            "tokens_a_round": self.tokens_a_round(all_rows),
        }
        return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def plain_beside(rows: Sequence[StreamRow]) -> np.ndarray:
    """For each row the plain speed at its time: the median of the NEAREST measurements; NaN where
    there is none.
    """
    known = [(row.n, row.plain) for row in rows if row.plain]
    result = []
    for row in rows:
        nearest = sorted(known, key=lambda pair: abs(pair[0] - row.n))[:NEAREST]
        result.append(float(np.median([speed for _, speed in nearest])) if nearest else float("nan"))
    return np.array(result, float)


# ------------------------------------------------------------------------------------------------ two sides
def compare(first: StreamFigures, second: StreamFigures) -> dict[str, Estimate]:
    """`first` against `second`, row by row the same prompts: ratios of speed, differences of
    acceptance and agreement.

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
    """The parts of a stream of `count` requests that are reported; the second half begins where the
    kind changes.
    """
    half = count // 2 if shift_at is None else min(shift_at, count)
    return {
        "whole": range(count),
        "first half": range(half),
        "second half": range(half, count),
        "last quarter": range(count - count // 4, count),
    }


def report(on: StreamPass, off: StreamPass | None, shift_at: int | None = None) -> dict[str, Any]:
    """For each window of requests: the figures with learning on and off, and their comparison over
    the requests that both answered.
    """
    result: dict[str, Any] = {"windows": {}, "words": words(on, off) if off else None}
    ons, offs = by_number(on), by_number(off) if off else {}
    for name, numbers in windows(len(on.rows), shift_at).items():
        answered = [n for n in numbers if n in ons]
        row: dict[str, Any] = {
            "requests": [numbers.start, numbers.stop],
            "on": StreamFigures([ons[n] for n in answered]).figures(),
        }
        if off is not None:
            both = [n for n in answered if n in offs]
            sides = StreamFigures([ons[n] for n in both]), StreamFigures([offs[n] for n in both])
            row["off"] = sides[1].figures()
            row["pairs"] = len(both)
            row["on_against_off"] = {key: asdict(value) for key, value in compare(*sides).items()}
        result["windows"][name] = row
    result["adapters"] = adapters(on)
    result["training"] = [asdict(event) for event in on.events]
    return result


def by_number(part: StreamPass) -> dict[int, StreamRow]:
    """Rows by their number in the stream."""
    return {row.n: row for row in part.rows}


def words(on: StreamPass, off: StreamPass) -> dict[str, int]:
    """How many texts were compared and differ; greedy texts may differ where floating point decides
    a tie.
    """
    ons, offs = by_number(on), by_number(off)
    both = ons.keys() & offs.keys()
    return {"compared": len(both), "different": sum(ons[n].output != offs[n].output for n in both)}


def adapters(part: StreamPass) -> list[dict[str, Any]]:
    """Which adapter drafted from which request on, in order; a rollback is one more entry."""
    result: list[dict[str, Any]] = []
    for row in part.rows:
        if not result or result[-1]["adapter"] != row.adapter_id:
            result.append({"adapter": row.adapter_id, "from_request": row.n, "at_s": row.at_s, "requests": 0})
        result[-1]["requests"] += 1
    return result


def gain(
    fixed: tuple[Sequence[StreamRow], Sequence[StreamRow]], auto: tuple[Sequence[StreamRow], Sequence[StreamRow]]
) -> dict[str, Any]:
    """Before and after one training run on unseen prompts: each pair is (before, after). Acceptance
    and agreement are of the fixed length, speeds of the automatic one.
    """
    before, after = StreamFigures(fixed[0]), StreamFigures(fixed[1])
    slow, fast = StreamFigures(auto[0]), StreamFigures(auto[1])
    result = compare(after, before), compare(fast, slow)
    return {
        "prompts": len(before.rows),
        "before": {"fixed": before.figures(), "auto": slow.figures()},
        "after": {"fixed": after.figures(), "auto": fast.figures()},
        "agreement_gain": asdict(result[0]["agreement"]),
        "acceptance_gain": asdict(result[0]["acceptance"]),
        "speed_ratio": asdict(result[1]["speed"]),
        "speed_ratio_to_plain": asdict(result[1]["speed_to_plain"]),
        "words": words(StreamPass(list(auto[0])), StreamPass(list(auto[1]))),
    }


# ------------------------------------------------------------------------------------------------ curves
def curve(
    rows: Sequence[StreamRow], figure: Callable[[StreamFigures, np.ndarray], float]
) -> tuple[list[float], list[float]]:
    """Minutes and the pooled figure of the last ROLLING requests; a change of adapter does not
    reset it.
    """
    side = StreamFigures(rows)
    values = [figure(side, np.arange(max(0, i - ROLLING + 1), i + 1)) for i in range(len(rows))]
    return [row.at_s / 60 for row in rows], values
