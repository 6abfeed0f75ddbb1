"""Runs the collapse check of a newly activated adapter and keeps it across restarts. Belongs to the
MLX thread; the rule is collapse.py.

The state is a small file that is written after each answer while a check is on. Losing it (power, a
full disk) costs the counts so far and nothing else: it is replaced whole, but not synced.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from specl.daemons.inference.collapse import CollapseCheck
from specl.shared.messaging.codes import ActivationEvent, ActivationReason, CollapseCheckState
from specl.shared.messaging.daemon_status import CollapseCheckStatus
from specl.shared.messaging.messages import Activation
from specl.shared.runtime.atomic_files import write_file

# after these activations the adapter is checked; after the others its worth is known, or a user insists
CHECKED = (ActivationReason.ANNOUNCED, ActivationReason.BY_HAND)


class AdapterMonitor:
    """`adapter` is the active adapter, `check` the check that is under way, `last` the result of the
    last one.

    `path` is the file that keeps them across a restart, None for no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._draft = self._target = ""  # fingerprints: counts of another pair say nothing
        self.adapter = ""
        self.check: CollapseCheck | None = None
        self.unfinished: CollapseCheck | None = None  # of an adapter that was replaced before its check ended
        self.last: CollapseCheckStatus | None = None

    def load(self, draft: str, target: str) -> str | None:
        """Go on with what the last process saved for this pair. Returns the adapter that was active in
        it, None if that is not known.

        A check that an earlier version saved (under `watch`) ends; the rest of its file is read.
        """
        self._draft, self._target = draft, target
        if self._path is None:
            return None
        try:
            saved = json.loads(self._path.read_bytes())
            if (saved["draft"], saved["target"]) != (draft, target):
                return None
            self.check, self.unfinished = _check(saved.get("check")), _check(saved.get("unfinished"))
            self.last = _check_status(saved.get("last"))
            self.adapter = str(saved["adapter"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return self.adapter

    def observe(self, change: Activation) -> None:
        """The active adapter has changed. One that the trainer has reinstated or that a user returns to
        is not checked.
        """
        if change.event in (ActivationEvent.ACTIVATED, ActivationEvent.UNLOADED):
            if change.reason != ActivationReason.RESTART:
                self.activated(change.adapter_id, checked=change.reason in CHECKED)
            if change.reason == ActivationReason.REINSTATED:
                self._decided(change.adapter_id, CollapseCheckState.REINSTATED)
        elif change.event == ActivationEvent.ROLLED_BACK:
            self._decided(change.adapter_id, CollapseCheckState.ROLLED_BACK)

    def activated(self, adapter: str, checked: bool) -> None:
        """`adapter` is active from now on; `checked`: its collapse check begins.

        An adapter that was replaced before its check ended goes on with it when it comes back.
        """
        self.unfinished, self.check = self.check or self.unfinished, None
        if adapter and checked:
            self.check = CollapseCheck(adapter)
        elif self.unfinished is not None and self.unfinished.adapter_id == adapter:
            self.check, self.unfinished = self.unfinished, None
        self.adapter = adapter
        self._save()

    def resumed(self, adapter: str) -> None:
        """The daemon is up and `adapter` is active: a saved check of another one ends."""
        if self.check is not None and self.check.adapter_id != adapter:
            self.check = None
        self.adapter = adapter
        self._save()

    def _decided(self, adapter: str, state: CollapseCheckState) -> None:
        """The trainer has decided about `adapter` since its check ended."""
        if self.last is not None and self.last.adapter == adapter:
            self.last = replace(self.last, state=state)
            self._save()

    def must_draft(self) -> bool:
        """Whether the next round must draft at least one token. Call once a round."""
        return self.check is not None and self.check.must_draft()

    def add(self, tested: Sequence[int], accepted: Sequence[int]) -> str:
        """Count a finished answer's drafts by depth. Why the adapter must be rolled back; empty
        where it need not.
        """
        check = self.check
        if check is None:
            return ""
        check.add(sum(tested[:1]), sum(accepted[:1]))
        reason = check.collapse()
        if reason or check.done:
            self.last = _status_of(check, CollapseCheckState.ROLLED_BACK if reason else CollapseCheckState.PASSED)
            self.check = None
        self._save()
        return reason

    def status(self) -> CollapseCheckStatus | None:
        """The check that is under way, or the result of the last one."""
        check = self.check  # read once: the MLX thread may end it meanwhile
        return _status_of(check, CollapseCheckState.WATCHING) if check is not None else self.last

    def _save(self) -> None:
        if self._path is None:
            return
        saved = {name: asdict(value) if value is not None else None for name, value in (
            ("check", self.check), ("unfinished", self.unfinished), ("last", self.last),
        )}  # fmt: skip
        document = {"draft": self._draft, "target": self._target, "adapter": self.adapter, **saved}
        with suppress(OSError):  # a full disk must not end an answer
            write_file(self._path, json.dumps(document), sync=False)


def _status_of(check: CollapseCheck, state: CollapseCheckState) -> CollapseCheckStatus:
    return CollapseCheckStatus(check.adapter_id, state, check.requests, check.tested, round(check.acceptance, 4))


def _check(saved: Mapping[str, Any] | None) -> CollapseCheck | None:
    if not saved:
        return None
    counts = {name: int(saved[name]) for name in ("tested", "accepted", "requests", "rounds")}
    return CollapseCheck(str(saved["adapter_id"]), **counts)


def _check_status(saved: Mapping[str, Any] | None) -> CollapseCheckStatus | None:
    if not saved:
        return None
    counts = (int(saved["requests"]), int(saved["drafted"]))
    return CollapseCheckStatus(
        str(saved["adapter"]), CollapseCheckState(saved["state"]), *counts, float(saved["acceptance"])
    )
