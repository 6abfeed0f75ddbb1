"""What the active adapter does on live traffic, and the watch over a new one. Lives on the MLX thread; rules in learning/watch.py.

The counts are kept in a small file after every answer, so that a restart goes on with the baseline and with a watch that
was on. Losing the file (power, a full disk) costs the baseline and nothing else: it is replaced whole, but not synced.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected
from specl.shared.learning.live_check import Depths, Watch
from specl.shared.runtime.atomic_files import write_file

REMEMBERED = 2000  # tested tokens of the active adapter; older ones fade
KNOWN = 3  # adapters whose counts are kept, in case they come back
BASELINE = 600  # of those, what a watch compares with: recent enough to be the same kind of traffic


@dataclass(frozen=True, slots=True)
class Memory:
    """What the file holds. `draft` and `target` are fingerprints: counts of another pair say nothing."""

    draft: str
    target: str
    adapter: str
    seen: Depths
    watch: Watch | None
    last: dict[str, Any]
    broken_off: Watch | None = None
    known: dict[str, Depths] = field(default_factory=dict)


_MEMORY = TypeAdapter(Memory)


class AdapterMonitor:
    """Counts every answer of the active adapter; `path` is where they survive a restart, None for nowhere."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._pair = ("", "")
        self.adapter = ""
        self.seen = Depths()
        self.watch: Watch | None = None
        self.last: dict[str, Any] = {}
        self.broken_off: Watch | None = None  # of an adapter that was replaced before it had proved itself
        self.known: dict[str, Depths] = {}  # what the last few did: it counts again when one comes back

    def load(self, draft: str, target: str) -> str | None:
        """Go on with what the last process counted for this pair; the adapter that it drafted with, None if nobody knows."""
        self._pair = (draft, target)
        try:
            kept = _MEMORY.validate_json(self._path.read_bytes()) if self._path is not None else None
        except (OSError, ValueError):
            return None
        if kept is None or (kept.draft, kept.target) != self._pair:
            return None
        self.adapter, self.seen, self.watch, self.last = kept.adapter, kept.seen, kept.watch, kept.last
        self.broken_off, self.known = kept.broken_off, kept.known
        return kept.adapter

    def settle(self, adapter: str) -> None:
        """The daemon is up and `adapter` drafts: what was counted for another one is not its own."""
        if adapter != self.adapter:
            self.adapter, self.seen, self.watch = adapter, self.known.get(adapter, Depths()), None
        self._save()

    def changed(self, adapter: str, watched: str, previous: str, promised: Depths | None = None) -> None:
        """`adapter` drafts from now on. `watched` names it where it has to prove itself against what `previous` did: on live
        traffic or as the gate measured it (`promised`), whichever is less. With neither nothing is claimed.

        Neither is enough alone: what was drafted live may be long ago, of other work, and of confident moments only, while a
        parked draft is watched by drafts that are forced anywhere; the gate has seen what is answered now, but no drafting.

        One that has not proved itself is no measure for the next: that is held to what the first was held to. Where the
        first comes back, its watch goes on.
        """
        if self.watch is not None:
            baseline, self.broken_off = self.watch.baseline, self.watch
        else:
            baseline = self.seen.lower(promised or Depths())
            self._remember()
        self.watch, unfinished = None, self.broken_off
        if unfinished is not None and unfinished.adapter_id == adapter:
            self.watch, self.broken_off = unfinished, None
        if watched and any(baseline.tested):
            self.watch = Watch(watched, previous, baseline.faded(BASELINE))
        self.adapter, self.seen = adapter, self.known.get(adapter, Depths())
        self._save()

    def reinstated(self, adapter: str) -> None:
        """A second look has found that rolling `adapter` back was wrong; it drafts again."""
        if self.last.get("adapter") == adapter:
            self.last = self.last | {"state": "reinstated"}
            self._save()

    def _remember(self) -> None:
        """What the adapter that goes has done."""
        if any(self.seen.tested):
            self.known.pop(self.adapter, None)
            self.known[self.adapter] = self.seen.faded(BASELINE)
            self.known = dict(list(self.known.items())[-KNOWN:])

    def forces(self) -> bool:
        """Whether the next round must draft at least one token."""
        return self.watch is not None and self.watch.forces()

    def saw(self, tested: Sequence[int], accepted: Sequence[int]) -> str:
        """A finished answer's drafts by depth. Why the adapter should be rolled back; empty where it may stay."""
        tested, accepted = list(tested), list(accepted)
        self.seen = self.seen.faded(REMEMBERED)
        self.seen.add(tested, accepted)
        why = self._watched(tested, accepted)
        self._save()
        return why

    def _watched(self, tested: list[int], accepted: list[int]) -> str:
        watch = self.watch
        if watch is None:
            return ""
        watch.add(tested, accepted)
        why = watch.disappointment()
        if why or watch.over:
            self.last = self._described(watch) | {"state": "rolled_back" if why else "kept"}
            self.watch = None
        return why

    def _save(self) -> None:
        if self._path is None:
            return
        memory = Memory(*self._pair, self.adapter, self.seen, self.watch, self.last, self.broken_off, self.known)
        with suppress(OSError):  # a full disk must not end an answer
            write_file(self._path, json.dumps(asdict(memory)), sync=False)

    def status(self) -> dict[str, Any]:
        """The watch that is on, or how the last one ended."""
        watch = self.watch  # once: the MLX thread may end it meanwhile
        return self._described(watch) | {"state": "watching"} if watch is not None else self.last

    def _described(self, watch: Watch) -> dict[str, Any]:
        seen, expected, _ = watch.shortfall()
        return {
            "adapter": watch.adapter_id,
            "requests": watch.requests,
            "drafted": watch.drafted,
            "acceptance": round(seen, 4),
            "before": round(expected, 4),
        }


def held_out_before(adapters: Adapters, id: str) -> Depths | None:
    """What the gate measured of the draft before adapter `id`, depth by depth, the first on the newest texts where the manifest
    tells those apart; None where it does not say.
    """
    try:
        metrics = adapters.manifest(id).metrics if id else {}
    except AdapterRejected:
        return None
    shares, positions = metrics.get("heldout_before_by_depth"), metrics.get("heldout_positions")
    newest = metrics.get("heldout_before_newest")
    is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)  # noqa: E731
    if not (isinstance(shares, list) and shares and is_number(positions)):
        return None
    if not all(is_number(share) and 0 <= share <= 1 for share in shares) or positions <= 0:
        return None
    if (
        isinstance(newest, list)
        and len(newest) == 2
        and all(map(is_number, newest))
        and 0 <= newest[0] <= newest[1] > 0
    ):
        hits, positions = newest
        shares = [hits / positions, *shares[1:]]
    return Depths.promised(shares, positions)
