"""What drafting costs on this machine, and how many tokens it pays to draft.

Seconds, measured once a (models, machine, versions) and kept in var/costs: one target step by its width, one draft by its
depth. With acceptance estimates by depth they give the expected tokens a second of each k; the best k is taken, 0 included
(DISCO, arXiv 2405.04304, and SpecDec++, 2405.19715, choose by estimates too; the measured cost makes it a rate).
"""

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
PROBE_EVERY = 24  # parked rounds between probes
ENTER_GAIN = 1.03  # drafting must promise this much over plain before it starts again
MEMORY = 48.0  # tested tokens a depth remembers
PRIOR = 4.0  # and what the prior counts for


@dataclass(frozen=True, slots=True)
class Costs:
    """verify[w]: seconds of a target step of w rows; draft[k]: seconds of k drafted tokens; ngram: seconds of a look-up."""

    verify: dict[int, float]
    draft: dict[int, float]
    ngram: float = 2e-4

    def verify_s(self, rows: int) -> float:
        """Interpolated between measured widths."""
        return _interpolate(self.verify, rows)

    def draft_s(self, k: int) -> float:
        """Interpolated between measured depths; nothing for nothing."""
        return _interpolate(self.draft, k) if k and self.draft else 0.0

    def rate(self, k: int, acceptance: "AcceptanceEstimate", draft_s: float | None = None) -> float:
        """Expected tokens a second when drafting k."""
        cost = self.verify_s(k + 1) + (self.draft_s(k) if draft_s is None else draft_s)
        return acceptance.expected_tokens(k) / cost

    def best_k(self, acceptance: "AcceptanceEstimate", most: int, draft_s: float | None = None) -> tuple[int, float]:
        """The k in 0..most with the highest expected rate, and that rate."""
        rates = [self.rate(k, acceptance, draft_s if k else None) for k in range(most + 1)]
        best = int(np.argmax(rates))
        return best, rates[best]


def _interpolate(table: dict[int, float], at: int) -> float:
    places = sorted(table)
    return float(np.interp(at, places, [table[p] for p in places]))


class AcceptanceEstimate:
    """Share of drafts accepted at each depth, given that all before were; recent rounds weigh most."""

    def __init__(self, depths: int = 16, prior: float = 0.5) -> None:
        self.tested = np.full(depths, PRIOR)
        self.accepted = np.full(depths, PRIOR * prior)

    def copy(self) -> "AcceptanceEstimate":
        """An independent one with the same memory, but open to change (a new request starts from the common history)."""
        other = AcceptanceEstimate(len(self.tested))
        keep = np.minimum(1.0, 2 * PRIOR / self.tested)
        other.tested, other.accepted = self.tested * keep, self.accepted * keep
        return other

    def update(self, drafted: int, accepted: int) -> None:
        """A round in which `accepted` of `drafted` stood."""
        for depth in range(min(drafted, accepted + 1, len(self.tested))):
            decay = min(1.0, MEMORY / (self.tested[depth] + 1))
            self.tested[depth] = self.tested[depth] * decay + 1
            self.accepted[depth] = self.accepted[depth] * decay + (depth < accepted)

    def at(self, depth: int) -> float:
        """Estimated acceptance at a depth counted from 0."""
        return float(self.accepted[depth] / self.tested[depth])

    def expected_tokens(self, k: int) -> float:
        """1 + sum over depths of the chance that all drafts up to there stand."""
        return 1.0 + float(np.cumprod(self.accepted[:k] / self.tested[:k]).sum()) if k else 1.0


class KChooser:
    """k for each round of one request. `fixed` overrules everything; otherwise rates decide, with hysteresis and probes."""

    def __init__(self, costs: Costs | None, most: int, fixed: int | None, estimate: AcceptanceEstimate) -> None:
        self.costs, self.most, self.fixed, self.estimate = costs, most, fixed, estimate
        self.parked_rounds = 0
        self.parked_reason = ""

    def choose(self) -> int:
        """How many tokens the model drafter should guess now."""
        if self.fixed is not None:
            return self.fixed
        if self.costs is None:
            return min(4, self.most)
        best, rate = self.costs.best_k(self.estimate, self.most)
        plain = self.costs.rate(0, self.estimate)
        if best and (not self.parked_rounds or rate >= ENTER_GAIN * plain):
            self.parked_rounds, self.parked_reason = 0, ""
            return best
        self.parked_rounds += 1
        self.parked_reason = (
            f"drafting promises {rate / plain:.2f}x of plain decoding at acceptance {self.estimate.at(0):.2f}"
        )
        return 1 if self.parked_rounds % PROBE_EVERY == 0 else 0


class Measurable(Protocol):
    """What calibration runs."""

    def verify_once(self, rows: int) -> None:
        """One target step of `rows` rows on a warm cache, evaluated."""
        ...

    def draft_once(self, k: int) -> None:
        """One draft of k tokens, evaluated; does nothing where there is no model drafter."""
        ...


def _median_seconds(run: object, repeats: int) -> float:
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        samples.append(time.perf_counter() - start)
    return float(np.median(samples))


def calibrate(subject: Measurable, most: int, drafts: bool, repeats: int = 3) -> Costs:
    """Measure, a few seconds long. Widths beyond `most` + 1 are not needed and not measured."""
    widths = [w for w in WIDTHS if w <= most + 1] or [1]
    for rows in widths[:2]:
        subject.verify_once(rows)
    verify = {rows: _median_seconds(lambda r=rows: subject.verify_once(r), repeats) for rows in widths}
    draft = {}
    if drafts:
        subject.draft_once(2)
        draft = {
            k: _median_seconds(lambda n=k: subject.draft_once(n), repeats) for k in (1, 2, 4, 8) if k <= max(most, 2)
        }
    return Costs(verify, draft)


def cache_key(*names: str) -> str:
    """A name for models, machine and versions together."""
    parts = [*names, platform.machine(), platform.node(), str(os.cpu_count()), version("mlx"), version("mlx-lm")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def load_or_calibrate(folder: Path, key: str, subject: Measurable, most: int, drafts: bool) -> Costs:
    """Costs from `folder`, measured and kept there on first use. An unreadable file is measured anew."""
    path = folder / f"{key}.json"
    try:
        kept = json.loads(path.read_text())
        tables = [{int(k): float(v) for k, v in kept[name].items()} for name in ("verify", "draft")]
        if max(tables[0]) >= min(most + 1, WIDTHS[-1]) and bool(tables[1]) == drafts:
            return Costs(*tables)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    costs = calibrate(subject, most, drafts)
    scratch = path.with_suffix(".partial")
    with suppress(OSError):  # a full disk: measured again next time
        scratch.write_text(json.dumps(asdict(costs), indent=1))
        scratch.rename(path)
    return costs
