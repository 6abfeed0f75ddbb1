"""Counts of one request's rounds: tokens drafted, accepted and rejected, and seconds."""

from dataclasses import dataclass, field

SOURCES = {"target": 0, "model": 1, "ngram": 2}  # who proposed an output token, as a byte
MAX_DEPTH = 16  # drafted tokens of a round that are counted by depth
ENOUGH_DRAFTED = 16  # below this acceptance says too little and is None


@dataclass(slots=True)
class DecodingStats:
    """`drafted` and `accepted` by drafter; lists by depth start at the first drafted token and
    count the model drafter only.

    `drafted` counts every proposed token. Lists by depth and `rejected` count only tokens that the
    acceptance rule tested: not those behind a rejected token, nor behind the end of the answer.
    Otherwise short answers would lower the figures of a draft that is never wrong.
    """

    rounds: int = 0
    drafted: dict[str, int] = field(default_factory=lambda: {"model": 0, "ngram": 0})
    accepted: dict[str, int] = field(default_factory=lambda: {"model": 0, "ngram": 0})
    rejected: int = 0
    tested_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    accepted_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    k_histogram: dict[int, int] = field(default_factory=dict)  # rounds by draft length
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reused_tokens: int = 0  # of the prompt, from the prefix cache

    def add_round(self, drafter: str, drafted: int, tested: int, accepted: int) -> None:
        """One round: the acceptance rule could test the first `tested` of `drafted` tokens."""
        self.rounds += 1
        self.k_histogram[drafted] = self.k_histogram.get(drafted, 0) + 1
        if not drafted:
            return
        self.drafted[drafter] += drafted
        self.accepted[drafter] += accepted
        self.rejected += accepted < tested
        if drafter == "model":
            for depth in range(min(tested, accepted + 1)):
                self.tested_by_depth[depth] += 1
                self.accepted_by_depth[depth] += depth < accepted

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted by the model drafter alone; None below ENOUGH_DRAFTED."""
        drafted = self.drafted["model"]
        return self.accepted["model"] / drafted if drafted >= ENOUGH_DRAFTED else None
