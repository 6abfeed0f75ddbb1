"""What drafting costs on this machine, and how many tokens it pays to draft.

Seconds, measured once a (models, machine, versions) and kept in var/costs: one target step by its width, one draft by its
depth. With acceptance estimates by depth they give the expected tokens a second of each k; the best k is taken, 0 included
(DISCO, arXiv 2405.04304, and SpecDec++, 2405.19715, choose by estimates too; the measured cost makes it a rate).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

PROBE_EVERY = 8  # parked rounds before the first probe; one that fails doubles the pause, one that stands quarters it
PROBE_AT_LEAST, PROBE_AT_MOST = 4, 384  # a probe costs one to three steps: the draft reads all it has missed
EXPLORE_EVERY = 16  # refusals by confidence before one is drafted all the same, so that a bad start is unlearned
PACE_MEMORY, PACE_LEAST = 64, 8  # rounds that are remembered, and that must have been seen of each kind
BUCKETS = 10  # of confidence
# acceptance at confidence 0 and 1 before anything is known, as measured with the shipped draft on held-out prompts. A token that
# was drawn is accepted by how far the two laws overlap, so a flat law's stands more often than the argmax of one
GREEDY_PRIOR, SAMPLED_PRIOR = (0.1, 1.0), (0.25, 0.8)
ENTER_GAIN = 1.04  # drafting must promise this much over plain before it starts again
STAY_GAIN = 1.0  # and this much to go on
MEMORY = 48.0  # tested tokens a depth remembers
PRIOR = 6.0  # and what the prior counts for


@dataclass(frozen=True, slots=True)
class Costs:
    """verify[w]: seconds of a target step of w rows; draft[k]: seconds of k drafted tokens; ngram: seconds of a look-up.

    `others` counts rows of other requests in the same step: they pay for the step, and get a token each out of it.
    """

    verify: dict[int, float]
    draft: dict[int, float]
    ngram: float = 2e-4
    others: int = 0

    def beside(self, others: int) -> "Costs":
        """The same machine as seen by a request whose steps hold so many rows of others."""
        return self if others == self.others else replace(self, others=others)

    def verify_s(self, rows: int) -> float:
        """Interpolated between measured widths; beyond the widest, along the last slope."""
        return _interpolate(self.verify, rows + self.others)

    def next_row_s(self, rows: int) -> float:
        """What one more row costs a target step of `rows` rows; never below 0, whatever noise was measured."""
        return max(0.0, self.verify_s(rows + 1) - self.verify_s(rows))

    def next_draft_s(self, k: int) -> float:
        """What one more token costs a draft of k >= 1."""
        return max(0.0, self.draft_s(k + 1) - self.draft_s(k))

    def draft_s(self, k: int) -> float:
        """Interpolated between measured depths; nothing for nothing."""
        return _interpolate(self.draft, k) if k and self.draft else 0.0

    def rate(
        self, k: int, acceptance: "AcceptanceEstimate", draft_s: float | None = None, surcharge: float = 1.0
    ) -> float:
        """Expected tokens a second when drafting k; a round with a draft takes `surcharge` times what the costs say."""
        cost = (self.verify_s(k + 1) + (self.draft_s(k) if draft_s is None else draft_s)) * (surcharge if k else 1.0)
        return (self.others + acceptance.expected_tokens(k)) / cost

    def best_k(
        self, acceptance: "AcceptanceEstimate", most: int, draft_s: float | None = None, surcharge: float = 1.0
    ) -> tuple[int, float]:
        """The k in 0..most with the highest expected rate, and that rate."""
        rates = [self.rate(k, acceptance, draft_s if k else None, surcharge) for k in range(most + 1)]
        best = int(np.argmax(rates))
        return best, rates[best]


def _interpolate(table: dict[int, float], at: int) -> float:
    places = sorted(table)
    if at > places[-1] and len(places) > 1:
        a, b = places[-2:]
        return table[b] + (at - b) * max(0.0, table[b] - table[a]) / (b - a)
    return float(np.interp(at, places, [table[p] for p in places]))


class AcceptanceEstimate:
    """Share of drafts accepted at each depth, given that all before were; recent rounds weigh most.

    Also by the draft's confidence (its law's largest probability), which tells more than depth where it is known. For n-gram
    drafts "depth" counts how long the match already is: a draft that stands makes the match one longer.
    """

    def __init__(
        self, depths: int = 16, prior: float | np.ndarray = 0.5, by_confidence: tuple[float, float] = GREEDY_PRIOR
    ) -> None:
        self.tested = np.full(depths, PRIOR)
        self.accepted = np.full(depths, PRIOR * np.asarray(prior))
        self.pause, self.since_probe = PROBE_EVERY, 0  # of parked rounds, whichever requests they belong to
        self.confidence_tested = np.full(BUCKETS, PRIOR)
        least, most = by_confidence
        self.confidence_accepted = PRIOR * (least + (most - least) * (np.arange(BUCKETS) + 0.5) / BUCKETS)

    def copy(self) -> "AcceptanceEstimate":
        """An independent one with the same memory, but open to change (a new request starts from the common history)."""
        other = AcceptanceEstimate(len(self.tested))
        keep = np.minimum(1.0, 2 * PRIOR / self.tested)
        other.tested, other.accepted = self.tested * keep, self.accepted * keep
        other.confidence_tested, other.confidence_accepted = (
            self.confidence_tested.copy(),
            self.confidence_accepted.copy(),
        )
        return other

    def update(self, drafted: int, accepted: int, start: int = 0) -> None:
        """A round in which `accepted` of `drafted` stood; `start` is the first draft's depth."""
        for i in range(min(drafted, accepted + 1)):
            depth = min(start + i, len(self.tested) - 1)
            _count(self.tested, self.accepted, depth, float(i < accepted))

    def update_confidence(self, confidences: Sequence[float], drafted: int, accepted: int) -> None:
        """The same round by confidence. A last law that nothing was drafted from counts at its depth as what it promised,
        so that depths are not judged by the confident drafts alone.
        """
        for i in range(min(drafted, accepted + 1)):
            _count(self.confidence_tested, self.confidence_accepted, _bucket(confidences[i]), float(i < accepted))
        if accepted == drafted < min(len(confidences), len(self.tested)):
            _count(self.tested, self.accepted, drafted, self.at_confidence(confidences[drafted]))

    def at(self, depth: int) -> float:
        """Estimated acceptance at a depth counted from 0."""
        depth = min(depth, len(self.tested) - 1)
        return float(self.accepted[depth] / self.tested[depth])

    def at_confidence(self, confidence: float) -> float:
        """Estimated acceptance of a draft whose law has this largest probability."""
        bucket = _bucket(confidence)
        return float(self.confidence_accepted[bucket] / self.confidence_tested[bucket])

    def shifted(self, start: int) -> "AcceptanceEstimate":
        """A view from depth `start` on; beyond the last depth nothing changes any more."""
        other = AcceptanceEstimate(len(self.tested))
        places = np.minimum(np.arange(len(self.tested)) + start, len(self.tested) - 1)
        other.tested, other.accepted = self.tested[places], self.accepted[places]
        return other

    def expected_tokens(self, k: int) -> float:
        """1 + sum over depths of the chance that all drafts up to there stand."""
        return 1.0 + float(np.cumprod(self.accepted[:k] / self.tested[:k]).sum()) if k else 1.0


class Pace:
    """What rounds with a model draft and without really took, against what the costs say: sampled rows have a law each, and a busy
    machine makes some work dearer than other. Past rounds only, so nothing that was drawn decides about its own round.
    """

    def __init__(self) -> None:
        self._seen, self._ratio = {True: 0, False: 0}, {True: 1.0, False: 1.0}

    def took(self, drafted: bool, seconds: float, promised: float) -> None:
        """A round. What the processor did meanwhile for others counts three times the promise at most."""
        self._seen[drafted] += 1
        weight = max(1 / self._seen[drafted], 1 / PACE_MEMORY)
        self._ratio[drafted] += weight * (min(seconds / promised, 3.0) - self._ratio[drafted])

    @property
    def surcharge(self) -> float:
        """How much dearer a round with a draft is than the costs say, against one without; 1 until both are known."""
        if min(self._seen.values()) < PACE_LEAST:
            return 1.0
        return float(np.clip(self._ratio[True] / self._ratio[False], 0.8, 2.0))


@dataclass(slots=True)
class Known:
    """What is known of the drafts that requests of one kind (greedy, or sampled) have met, and of how long rounds take."""

    model: AcceptanceEstimate
    ngram: AcceptanceEstimate
    pace: Pace = field(default_factory=Pace)


def _count(tested: np.ndarray, accepted: np.ndarray, place: int, outcome: float) -> None:
    decay = min(1.0, MEMORY / (tested[place] + 1))
    tested[place] = tested[place] * decay + 1
    accepted[place] = accepted[place] * decay + outcome


def _bucket(confidence: float) -> int:
    return min(int(confidence * BUCKETS), BUCKETS - 1)


class DraftStopPolicy:
    """Decides, while a draft grows, whether the next token pays for itself: its chance to stand against the seconds it takes.

    It sees laws, never what was drawn from them: a stop that looked at the drawn token would bend the output's law.
    Lengthening is worth it while chance / seconds beats the rate that the round reaches anyway (Dinkelbach's rule for ratios).
    """

    def __init__(
        self, costs: Costs, estimate: AcceptanceEstimate, rate: float, explore: bool, surcharge: float = 1.0
    ) -> None:
        self.costs, self.estimate, self.explore = costs, estimate, explore
        self.price = rate * surcharge  # of a second by the costs, in tokens
        self.chance = 1.0  # that all drafts so far stand
        self.confidences: list[float] = []
        self.refused = False

    def include(self, confidence: float) -> bool:
        """Whether a token drawn from a law with this largest probability is worth its row."""
        self.confidences.append(confidence)
        self.chance *= self.estimate.at_confidence(confidence)
        worth = self.chance >= self.price * self.costs.next_row_s(len(self.confidences))
        self.refused = not worth
        return worth or self.explore

    def more(self) -> bool:
        """Whether to look for another token at all."""
        depth = len(self.confidences)
        cost = self.costs.next_row_s(depth + 1) + self.costs.next_draft_s(depth)
        return self.chance * self.estimate.at(depth) >= self.price * cost


class DraftLengthPolicy:
    """k for each round of one request. `fixed` overrules everything; otherwise rates decide, with hysteresis and probes."""

    def __init__(
        self,
        costs: Costs | None,
        most: int,
        fixed: int | None,
        estimate: AcceptanceEstimate,
        pace: Pace | None = None,
    ) -> None:
        self.costs, self.most, self.fixed, self.estimate = costs, most, fixed, estimate
        self.pace = pace or Pace()
        self.parked_rounds = 0
        self.parked_reason = ""
        self._refusals = 0
        self._rate = 0.0

    def beside(self, others: int) -> None:
        """The next step holds so many rows of other requests."""
        if self.costs is not None:
            self.costs = self.costs.beside(others)

    def choose(self) -> int:
        """How many tokens the model drafter should guess now."""
        if self.fixed is not None:
            return self.fixed
        if self.costs is None:
            return min(4, self.most)
        best, self._rate = self.costs.best_k(self.estimate, self.most, surcharge=self.pace.surcharge)
        plain = self.costs.rate(0, self.estimate)
        if best and self._rate >= (ENTER_GAIN if self.parked_rounds else STAY_GAIN) * plain:
            self.parked_rounds, self.parked_reason = 0, ""
            return best
        self.parked_rounds += 1
        self.parked_reason = (
            f"drafting promises {self._rate / plain:.2f}x of plain decoding at acceptance {self.estimate.at(0):.2f}"
        )
        self.estimate.since_probe += 1
        return 1 if self.estimate.since_probe >= self.estimate.pause else 0

    def stopper(self) -> DraftStopPolicy | None:
        """What may end this round's draft early, or lengthen it up to `most`; None where k is exact (fixed, or a probe)."""
        if self.fixed is not None or self.costs is None or self.parked_rounds:
            return None
        return DraftStopPolicy(
            self.costs, self.estimate, self._rate, self._refusals >= EXPLORE_EVERY, surcharge=self.pace.surcharge
        )

    def took(self, rows: int, drafted: int, seconds: float) -> None:
        """A round alone in its step: verified rows, tokens that the model drafter computed for it."""
        if self.costs is not None and not self.costs.others:
            self.pace.took(drafted > 0, seconds, self.costs.verify_s(rows) + self.costs.draft_s(drafted))

    def learn(self, stopper: DraftStopPolicy | None, drafted: int, accepted: int) -> None:
        """What became of a round's model drafts."""
        self.estimate.update(drafted, accepted)
        if self.parked_rounds and self.fixed is None:
            pause = self.estimate.pause // 4 if accepted else self.estimate.pause * 2
            self.estimate.pause, self.estimate.since_probe = min(max(pause, PROBE_AT_LEAST), PROBE_AT_MOST), 0
        if stopper is not None:
            self.estimate.update_confidence(stopper.confidences, drafted, accepted)
            self._refusals = 0 if stopper.explore else self._refusals + stopper.refused
