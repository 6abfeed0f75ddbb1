"""What the active adapter does on live traffic, and the watch over a promoted one. Lives on the MLX thread; rules in learning/watch.py.

The counts die with the process: after a restart the baseline is gathered again, and a watch that was on is over.
"""

from collections.abc import Sequence
from typing import Any

from specl.shared.learning.watch import Depths, Watch

REMEMBERED = 2000  # tested tokens of the active adapter; older ones fade
BASELINE = 600  # of those, what a watch compares with: recent enough to be the same kind of traffic


class Lookout:
    """Counts every answer of the active adapter."""

    def __init__(self) -> None:
        self.seen = Depths()
        self.watch: Watch | None = None
        self.last: dict[str, Any] = {}

    def changed(self, promoted: str, previous: str) -> None:
        """Another adapter drafts; `promoted` names it where the trainer announced it, else nothing is watched."""
        known = any(self.seen.tested)  # with nothing to compare with, nothing could be claimed
        self.watch = Watch(promoted, previous, self.seen.faded(BASELINE)) if promoted and known else None
        self.seen = Depths()

    def forces(self) -> bool:
        """Whether the next round must draft at least one token."""
        return self.watch is not None and self.watch.forces()

    def saw(self, tested: Sequence[int], accepted: Sequence[int]) -> str:
        """A finished answer's drafts by depth. Why the adapter should be rolled back; empty where it may stay."""
        tested, accepted = list(tested), list(accepted)
        self.seen = self.seen.faded(REMEMBERED)
        self.seen.add(tested, accepted)
        watch = self.watch
        if watch is None:
            return ""
        watch.add(tested, accepted)
        why = watch.disappointment()
        if why or watch.over:
            self.last = self._described(watch) | {"state": "rolled_back" if why else "kept"}
            self.watch = None
        return why

    def status(self) -> dict[str, Any]:
        """The watch that is on, or how the last one ended."""
        return self._described(self.watch) | {"state": "watching"} if self.watch is not None else self.last

    def _described(self, watch: Watch) -> dict[str, Any]:
        seen, expected, _ = watch.shortfall()
        return {
            "adapter": watch.adapter_id,
            "requests": watch.requests,
            "drafted": watch.drafted,
            "acceptance": round(seen, 4),
            "before": round(expected, 4),
        }
