"""Whether a promoted adapter keeps its promise on live traffic. Pure counts; knows no request, file or clock.

During a watch the model drafter's acceptance and the promise are compared. Acceptance moves with k (deeper drafts stand
less often), so drafts are counted by depth and each depth is compared with what the adapter before did there. Where the
drafter is parked too often to tell, nothing is claimed: the probes that `keeps_drafting` forces fill the count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

ENOUGH_TOKENS = 200  # model-drafted tokens that end a watch
EVERY = 8  # one round in so many keeps k >= 1 while a watch is on
MOST_REQUESTS = 20  # after so many it is judged by whatever was drafted
LEAST_TOKENS = 40  # fewer say nothing before that, and never end a watch in the adapter's favour
SIGMAS = 2.0  # a shortfall must be this many standard errors beyond `SLACK`
SLACK = 0.02  # of acceptance: the baseline is measured too


@dataclass(slots=True)
class Depths:
    """Drafts tested and accepted, by depth."""

    tested: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    def add(self, tested: list[int], accepted: list[int]) -> None:
        """Count one request."""
        for own, new in ((self.tested, tested), (self.accepted, accepted)):
            own.extend([0.0] * (len(new) - len(own)))
            for depth, value in enumerate(new):
                own[depth] += value

    @classmethod
    def promised(cls, shares: Sequence[float], positions: float) -> "Depths":
        """Shares by depth that somebody measured on `positions` tokens; a depth is tested where all before it stood."""
        made, left = cls(), float(positions)
        for share in shares:
            made.tested.append(left)
            made.accepted.append(left * share)
            left *= share
        return made

    def lower(self, other: "Depths") -> "Depths":
        """At each depth whichever of the two has the smaller share; the one that was tested there where only one was."""
        made = Depths()
        for depth in range(max(len(self.tested), len(other.tested))):
            found = [
                (side.accepted[depth] / side.tested[depth], side.tested[depth], side.accepted[depth])
                for side in (self, other)
                if depth < len(side.tested) and side.tested[depth]
            ]
            _, tested, accepted = min(found, default=(0.0, 0.0, 0.0))
            made.tested.append(tested)
            made.accepted.append(accepted)
        return made

    def faded(self, most: float) -> "Depths":
        """The same shares, remembered as at most `most` tested tokens."""
        scale = min(1.0, most / max(sum(self.tested), 1.0))
        return Depths([v * scale for v in self.tested], [v * scale for v in self.accepted])


@dataclass(slots=True)
class Watch:
    """One adapter under observation. `baseline` is what the adapter before it did on live traffic and on the gate's newest held-out
    generations, whichever is less.
    """

    adapter_id: str
    previous_id: str
    baseline: Depths
    seen: Depths = field(default_factory=Depths)
    requests: int = 0
    rounds: int = 0

    @property
    def drafted(self) -> int:
        """Model-drafted tokens that were tested so far."""
        return int(sum(self.seen.tested))

    @property
    def over(self) -> bool:
        """Whether enough was seen."""
        late = self.requests >= MOST_REQUESTS and self.drafted >= LEAST_TOKENS
        return late or self.drafted >= ENOUGH_TOKENS

    def forces(self) -> bool:
        """Whether this round must draft at least one token; call once a round."""
        self.rounds += 1
        return self.drafted < ENOUGH_TOKENS and self.rounds % EVERY == 0

    def add(self, tested: list[int], accepted: list[int]) -> None:
        """Count a finished request that this adapter drafted for."""
        self.requests += 1
        self.seen.add(tested, accepted)

    def shortfall(self) -> tuple[float, float, float]:
        """Acceptance seen, acceptance that the baseline would have had at the same depths, and the standard error of the
        difference. Zeros where the two share no depth.
        """
        tested = accepted = expected = variance = 0.0
        pairs = zip(self.seen.tested, self.seen.accepted, self.baseline.tested, self.baseline.accepted, strict=False)
        for n, hits, base_n, base_hits in pairs:
            if n == 0 or base_n == 0:
                continue
            p, q = base_hits / base_n, hits / n
            tested, accepted, expected = tested + n, accepted + hits, expected + n * p
            # of a share that may be 0 or 1 in few drafts: Agresti's two of each keep it from being certain
            spread = lambda share, count: (share * count + 1) * ((1 - share) * count + 1) / (count + 2) ** 2  # noqa: E731
            variance += n * spread(q, n) + n * n * spread(p, base_n) / base_n
        if tested == 0:
            return 0.0, 0.0, 0.0
        return accepted / tested, expected / tested, math.sqrt(variance) / tested

    def disappointment(self) -> str:
        """Why the adapter should go, in a sentence with its numbers; empty while it may stay."""
        if self.drafted < LEAST_TOKENS and self.requests < MOST_REQUESTS:
            return ""
        seen, expected, error = self.shortfall()
        if seen + SLACK + SIGMAS * error >= expected:
            return ""
        return (
            f"live acceptance {seen:.3f} of {self.drafted} model-drafted tokens in {self.requests} requests; "
            f"the adapter before it would have had {expected:.3f}"
        )
