"""The figures of runs: rates, ratios to mlx-lm plain, acceptance by depth, hindsight, equality.
Pure; dicts only for JSON.

A ratio is taken prompt by prompt, between answers of one turn; outputs that loop or are too short
are counted separately.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from specl.shared.bench.arms import PLAIN
from specl.shared.bench.measure import ENOUGH_DRAFTED, ENOUGH_REJECTED, Run
from specl.shared.bench.text_equality import LOOPING

SHORT = 16  # an answer below this many tokens is too short to time
FIXED = "k="
AUTO = ("auto fast", "auto fast, no n-gram")
COPIED = {"copied >= 0.75": (0.75, 1.01), "copied 0.6 to 0.75": (0.6, 0.75), "copied < 0.6": (0.0, 0.6)}


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of tokens a second, arm against reference, over `n` prompts; None where there is nothing to
    compare.
    """

    median: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm on one group of prompts. `tokens_per_second` is all tokens over all seconds; times
    are medians.
    """

    arm: str
    tokens_per_second: float
    ttft_ms: float
    ratio: Ratio
    acceptance: float | None
    acceptance_by_depth: list[float]
    tokens_a_round: float | None
    drafting_rounds: float | None
    k_histogram: dict[int, int]


def ratio(pairs: Iterable[tuple[float, float]]) -> Ratio:
    """Ratios of (arm, reference) rates."""
    values = [a / b for a, b in pairs if a > 0 and b > 0]
    if not values:
        return Ratio(None, None, None, 0)
    return Ratio(median(values), min(values), max(values), len(values))


def key(run: Run) -> tuple[str, str, int]:
    """What tells turns apart: runs with the same key answered the same prompt in the same turn."""
    return run.set, run.prompt, run.iteration


def looping(runs: Sequence[Run]) -> set[tuple[str, str, int]]:
    """Turns in which any arm's output repeats itself."""
    return {key(run) for run in runs if run.repeated > LOOPING}


def short(runs: Sequence[Run]) -> set[tuple[str, str, int]]:
    """Turns in which any arm's output is too short to time."""
    return {key(run) for run in runs if len(run.result.tokens) < SHORT}


def arm_names(runs: Sequence[Run]) -> list[str]:
    """The names of the arms in a fixed order, the reference first."""
    names = sorted(
        {run.arm for run in runs}, key=lambda name: (not name.startswith("mlx"), not name.startswith(FIXED), name)
    )
    return [PLAIN, *(name for name in names if name != PLAIN)] if PLAIN in names else names


def rate(runs: Sequence[Run]) -> float:
    """All decoded tokens over all decoding seconds."""
    seconds = sum(run.result.decode_s for run in runs)
    return sum(len(run.result.tokens) - run.result.first for run in runs) / seconds if seconds else 0.0


def figures(runs: Sequence[Run]) -> list[ArmFigures]:
    """The figures of every arm on these runs."""
    reference = {key(run): run.result.tokens_per_second for run in runs if run.arm == PLAIN}
    return [_figures(name, [run for run in runs if run.arm == name], reference) for name in arm_names(runs)]


def _figures(name: str, runs: list[Run], reference: dict[tuple[str, str, int], float]) -> ArmFigures:
    results = [run.result for run in runs]
    drafted, accepted = sum(a.model_drafted for a in results), sum(a.model_accepted for a in results)
    rounds, tokens = sum(a.rounds for a in results), sum(len(a.tokens) for a in results)
    histogram: dict[int, int] = {}
    for result in results:
        for k, count in result.k_histogram.items():
            histogram[k] = histogram.get(k, 0) + count
    return ArmFigures(
        arm=name,
        tokens_per_second=rate(runs),
        ttft_ms=1000 * median(a.ttft_s for a in results),
        ratio=ratio((run.result.tokens_per_second, reference.get(key(run), 0.0)) for run in runs),
        acceptance=accepted / drafted if drafted else None,
        acceptance_by_depth=by_depth(runs),
        tokens_a_round=tokens / rounds if rounds else None,
        drafting_rounds=sum(a.drafting_rounds for a in results) / rounds if rounds else None,
        k_histogram=dict(sorted(histogram.items())),
    )


def by_depth(runs: Sequence[Run]) -> list[float]:
    """Acceptance of the model drafter at depth 1, 2, ..., given that all before were accepted."""
    depths = max((len(run.result.tested_by_depth) for run in runs), default=0)
    found = []
    for depth in range(depths):
        tested = sum(run.result.tested_by_depth[depth] for run in runs if run.result.tested_by_depth)
        if not tested:
            break
        found.append(sum(run.result.accepted_by_depth[depth] for run in runs if run.result.accepted_by_depth) / tested)
    return found


def hindsight(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Auto against the fixed k that turned out best, in each set and on all of them."""
    groups = {name: [run for run in runs if run.set == name] for name in dict.fromkeys(run.set for run in runs)}
    if len(groups) > 1:
        groups["all sets"] = list(runs)
    found = {}
    for name, group in groups.items():
        fixed = {arm: rate([r for r in group if r.arm == arm]) for arm in arm_names(group) if arm.startswith(FIXED)}
        if not fixed:
            continue
        best = max(fixed, key=lambda arm: fixed[arm])
        auto = {arm: rate([r for r in group if r.arm == arm]) for arm in AUTO}
        found[name] = {"best_fixed": best} | {arm: value / fixed[best] for arm, value in auto.items() if value}
    return found


def equality(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By arm: how many texts are equal, tied, different, unchecked; and whether enough was drafted
    and rejected to conclude.
    """
    found = {}
    for name in arm_names(runs):
        pairs = [(run, run.comparison) for run in runs if run.arm == name and run.comparison is not None]
        if not pairs:
            continue
        counts = {
            verdict: sum(comparison.verdict == verdict for _, comparison in pairs)
            for verdict in ("equal", "tie", "different", "unchecked")
        }
        drafted, rejected = sum(run.result.drafted for run, _ in pairs), sum(run.result.rejected for run, _ in pairs)
        conclusive = drafted >= ENOUGH_DRAFTED and rejected >= ENOUGH_REJECTED
        ties = [{"set": run.set, "prompt": run.prompt} | asdict(tie) for run, found in pairs for tie in found.ties]
        parted = [
            {"set": run.set, "prompt": run.prompt, "position": comparison.position}
            for run, comparison in pairs
            if comparison.verdict == "different"
        ]
        found[name] = counts | {
            "drafted": drafted,
            "rejected": rejected,
            "conclusive": conclusive,
            "ties": ties,
            "parted": parted,
        }
    return found


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that are reported together: each set, copying by the share copied, and separately what
    loops.
    """
    apart, brief = looping(runs), short(runs)
    headline = [run for run in runs if key(run) not in apart | brief]
    found = {name: [run for run in headline if run.set == name] for name in dict.fromkeys(run.set for run in runs)}
    copied = {key(run): run.copied for run in runs if run.arm == PLAIN and run.set == "copy"}
    for label, (low, high) in COPIED.items():
        found[label] = [run for run in headline if low <= copied.get(key(run), -1) < high]
    if len({run.set for run in headline}) > 1:
        found["all sets"] = headline
    found["apart: looping"] = [run for run in runs if key(run) in apart - brief]
    return {name: group for name, group in found.items() if group}


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything a reader may want to compute again."""
    apart = looping(runs) | short(runs)
    return {
        "groups": {name: [asdict(item) for item in figures(group)] for name, group in groups(runs).items()},
        "hindsight": hindsight([run for run in runs if key(run) not in apart]),
        "equality": equality(runs),
        "apart": {"looping": len(looping(runs)), "short": len(short(runs))},
        "runs": [_run_json(run) for run in runs],
    }


def _run_json(run: Run) -> dict[str, Any]:
    fields = {name: getattr(run, name) for name in ("set", "prompt", "iteration", "arm", "prompt_tokens")}
    fields |= {"repeated_share": round(run.repeated, 4), "copied_share": round(run.copied, 4)}
    fields |= asdict(run.result) | {"tokens": len(run.result.tokens), "tokens_per_second": run.result.tokens_per_second}
    return fields | {"comparison": asdict(run.comparison) if run.comparison else None}
