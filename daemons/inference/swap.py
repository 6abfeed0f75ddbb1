"""Which adapter drafts. Start-up, announcement and a slow tick all do the same: look at CURRENT, verify, fuse, say so.

Runs on the MLX thread, between rounds; what takes longer than a round is done in pieces, one between two rounds, while the
old adapter goes on drafting. A refused adapter is not tried again while its files are the same; the old one
keeps serving, whatever is wrong with the new one. CURRENT is moved from here by a user's command and by a rollback.
"""

import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from specl.shared.adapters.registry import REINSTATED, REINSTATING, Adapters
from specl.shared.adapters.tensors import load_adapter_steps
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected, disk_failed
from specl.shared.messaging.codes import ActivationEvent, ActivationReason
from specl.shared.messaging.messages import Activation, Json, Reply
from specl.shared.paths import Paths
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint
from specl.shared.runtime.incremental import Steps, Stopwatch, T, run_all

REMEMBERED = 32  # refusals that `status` shows
_log = log.get("adapter")
Stamp = tuple[tuple[str, int, int, int], ...]
Activated = Callable[[Activation], None]


class AdapterSwap:
    """`activated` hears of every change and refusal."""

    def __init__(self, paths: Paths, engine: EngineCore, activated: Activated) -> None:
        self.adapters = Adapters(paths.adapters)
        self.engine: EngineCore | None = engine  # None while the models are let go
        self._activated = activated
        self.previous = ""
        self._drafted_before: str | None = None
        self._in_use: LoadedAdapter | None = None
        self._before_switch = ""
        self.rejected: dict[str, str] = {}
        self._refused: dict[str, Stamp | None] = {}  # their files as they were; None where the disk was to blame
        self._tasks: deque[tuple[Steps[Any], Callable[[Any], None]]] = deque()

    # ------------------------------------------------------------------------------------------------ in pieces
    @property
    def under_way(self) -> bool:
        """Whether a switch waits for its next piece."""
        return bool(self._tasks)

    def advance(self) -> None:
        """One piece of the oldest switch."""
        pieces, then = self._tasks[0]
        try:
            next(pieces)
        except StopIteration as end:
            self._tasks.popleft()
            then(end.value)

    def finish(self) -> None:
        """All that is under way, now."""
        while self._tasks:
            self.advance()

    def _do(self, pieces: Steps[T], then: Callable[[T], None] = lambda result: None) -> None:
        self._tasks.append((pieces, then))

    # ------------------------------------------------------------------------------------------------ reasons to look
    @property
    def active(self) -> str:
        """The adapter that drafts, or that will when the models are back; empty for none."""
        engine = self.engine  # once: `status` reads this from another thread
        if engine is not None:
            return engine.adapter_id
        return self._in_use.id if self._in_use is not None else ""

    def let_go(self) -> None:
        """The models go. The adapter stays, a few MB: it drafts again whatever happens to its files."""
        self.engine = None

    def come_back(self, engine: EngineCore) -> None:
        """The models are here again: draft with what drafted before, then look at CURRENT."""
        engine.use_adapter(self._in_use)
        self.engine = engine
        self.follow_current()

    def hear(self, id: str, path: str) -> None:
        """An announcement: refused where it points anywhere but into the adapters folder, else a reason to look, in pieces."""
        try:
            self.adapters.confine(Path(path))
        except AdapterRejected as error:
            self._refused[id] = None  # says nothing of the one that CURRENT may name
            self._refuse(id, str(error))
            return
        self.look()

    def start(self, drafted_before: str | None) -> None:
        """Look at CURRENT for the first time. `drafted_before` drafted when the last daemon ended (None: nobody knows):
        going on with it is a restart; another one was promoted meanwhile.
        """
        self._drafted_before = drafted_before
        self.follow_current()
        self._drafted_before = None

    def follow_current(self) -> None:
        """Draft with what CURRENT names, if that is not what drafts already; now."""
        self.look()
        self.finish()

    def look(self) -> None:
        """`follow_current` in pieces."""
        self._do(self._following())

    def _following(self) -> Steps[None]:
        try:
            wanted = self.adapters.named()
        except AdapterRejected as error:
            self._refuse("CURRENT", str(error))
            return
        self.rejected.pop("CURRENT", None)
        if wanted and wanted in self.adapters.rolled_back():  # killed between the mark and CURRENT
            yield from self._leave(wanted)
            return
        if wanted in self.rejected and wanted not in self._refused and self._reinstated(wanted):
            self._forgive(wanted)  # it had been rolled back here, with a disk that kept CURRENT
        if wanted != self.engine.adapter_id and self._worth_trying(wanted):
            yield from self._use(wanted, self._why(wanted))

    def _why(self, wanted: str) -> ActivationReason:
        """Why CURRENT names it."""
        if wanted == self._drafted_before:
            return ActivationReason.RESTART
        return ActivationReason.REINSTATED if self._reinstated(wanted) else ActivationReason.ANNOUNCED

    def _reinstated(self, id: str) -> bool:
        return self.adapters.second_looks().get(id) in (REINSTATING, REINSTATED)

    def _worth_trying(self, id: str) -> bool:
        """Not where it was refused, unless its files have changed or the disk was to blame; nor where it disappointed."""
        return id not in self.rejected or (id in self._refused and self._refused[id] != self._stamp(id))

    def _forgive(self, id: str) -> None:
        self.rejected.pop(id, None)
        self._refused.pop(id, None)

    def _stamp(self, id: str) -> Stamp:
        """What would tell that an adapter's files are others than before."""
        try:
            files = [(path.name, path.lstat()) for path in sorted((self.adapters.folder / id).iterdir())]
        except OSError:
            return ()
        return tuple((name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in files)

    def _use(self, id: str, reason: ActivationReason, note: str = "") -> Steps[str]:
        """Switch to `id` (empty: none). Why not, or empty."""
        watch, stamp = Stopwatch(), self._stamp(id) if id else ()
        try:
            yield from watch.over(self._switch(id))
        except AdapterRejected as error:
            self._refused[id] = None if disk_failed(error) else stamp
            self._refuse(id, str(error))
            return str(error)
        self._forgive(id)
        before, self._before_switch = self._before_switch, ""
        pause_ms = round(1000 * watch.longest_s, 1)
        if reason == ActivationReason.RESTART:
            self.previous = before = self.adapters.resolve("previous")
        else:
            self.previous = before
            with suppress(OSError):  # a full disk: this process remembers it
                self.adapters.set_previous(before)
        failpoint("swap.after_activate")
        _log.info(
            "adapter.fused" if id else "adapter.unloaded",
            adapter=id or None,
            previous=before or None,
            form=self.engine.adapter_form,
            pause_ms=pause_ms,
            ms=round(1000 * watch.total_s, 1),
        )
        event = ActivationEvent.ACTIVATED if id else ActivationEvent.UNLOADED
        details = {"form": self.engine.adapter_form, "pause_ms": pause_ms}
        self._tell(event, id, before, reason, note or reason.replace("_", " "), details)
        return ""

    def _switch(self, id: str) -> Steps[None]:
        """Load and use `id`. Raises AdapterRejected for whatever is wrong with it, after what drafted before drafts again."""
        adapter = (yield from self._load(id)) if id else None
        failpoint("swap.before_activate")
        self._before_switch = self.engine.adapter_id or self._drafted_before or ""
        try:
            yield from self.engine.switch_adapter(adapter)
        except MemoryError:
            raise
        except Exception as error:
            self.engine.use_adapter(self._in_use)
            raise self._unforeseen(id, error) from error
        self._in_use = adapter

    def _load(self, id: str) -> Steps[LoadedAdapter]:
        try:
            adapter, _ = yield from load_adapter_steps(self.adapters, self.adapters.folder / id, self.engine)
            return adapter
        except (AdapterRejected, MemoryError):
            raise
        except Exception as error:  # the last belt: a file that no check foresaw must not end the daemon
            raise self._unforeseen(id, error) from error

    def _unforeseen(self, id: str, error: Exception) -> AdapterRejected:
        if not isinstance(error, OSError):  # that says all, and is tried again soon
            _log.exception("adapter.load_failed", adapter=id)
        reason = (str(error).splitlines() or [""])[0]
        return AdapterRejected(f"adapter {id}: it could not be loaded ({type(error).__name__}: {reason})")

    def roll_back(self, reason: str) -> None:
        """The active adapter disappointed: mark it, so that it is not tried again, and draft with the one before."""
        id = self.engine.adapter_id
        self.finish()
        if self.engine.adapter_id != id:  # another one was on its way and has taken its place
            return
        back = self.previous if self.previous not in self.adapters.rolled_back() else ""
        try:
            self.adapters.mark_rolled_back(id, reason)
        except OSError as error:
            _log.error("rollback.not_written", adapter=id, reason=str(error))
        if back and run_all(self._use(back, ActivationReason.ROLLBACK, f"adapter {id} was rolled back")):
            back = ""
        if not back:
            run_all(self._use("", ActivationReason.ROLLBACK, f"adapter {id} was rolled back"))
        try:
            self.adapters.set_current(back)
        except OSError as error:
            self._refused.pop(id, None)
            self.rejected[id] = reason  # CURRENT still names it; not again in this process at least
            _log.error("rollback.not_written", adapter=id, reason=str(error))
        self.previous = ""  # not the one that has just gone
        with suppress(OSError):
            self.adapters.set_previous("")
        _log.warning("adapter.rolled_back", adapter=id, to=back or None, reason=reason)
        self._tell(ActivationEvent.ROLLED_BACK, id, back, ActivationReason.LIVE_ACCEPTANCE, reason)

    def _leave(self, id: str) -> Steps[None]:
        """CURRENT names an adapter that was rolled back: go to the one before it, or to none."""
        self._drafted_before = None  # there is no way back to that
        back = self.adapters.resolve("previous")
        gone = self.adapters.rolled_back()
        back = "" if back in gone else back
        if back != self.engine.adapter_id and (
            yield from self._use(back, ActivationReason.ROLLBACK, f"adapter {id} was rolled back")
        ):
            back = ""
        with suppress(OSError):  # a full disk: the next tick tries again
            self.adapters.set_current(back)

    def _refuse(self, id: str, reason: str) -> None:
        """Say once why `id` does not draft; what drafts goes on."""
        if self.rejected.get(id) == reason:
            return
        while len(self.rejected) >= REMEMBERED:
            self._forgive(next(iter(self.rejected)))
        self.rejected[id] = reason
        _log.error("adapter.rejected", adapter=id, reason=reason)
        active = self.engine.adapter_id
        self._tell(ActivationEvent.REJECTED, id, active, ActivationReason.VERIFICATION, reason)

    def _tell(
        self,
        event: ActivationEvent,
        id: str,
        previous: str,
        reason: ActivationReason,
        note: str,
        details: Json | None = None,
    ) -> None:
        self._activated(Activation(uuid.uuid4().hex, time.time(), event, id, previous, reason, note, details or {}))

    def by_hand(self, wish: str) -> Reply:
        """A user's choice: an id, an alias, `previous`, or empty for none. CURRENT moves only if the adapter is usable."""
        replies: list[Reply] = []
        self.wished(wish, replies.append)
        self.finish()
        return replies[0]

    def wished(self, wish: str, answer: Callable[[Reply], None]) -> None:
        """`by_hand` in pieces."""
        self._do(self._by_hand(wish), answer)

    def _by_hand(self, wish: str) -> Steps[Reply]:
        id = wish
        if wish == "previous":
            id = self.previous or self.adapters.resolve("previous") or self._parent()
        elif wish:
            id = self.adapters.resolve(wish)
            if not id:
                return Reply(False, f"there is no adapter {wish!r}")
        self._forgive(id)
        how = ActivationReason.ROLLED_BACK_BY_HAND if wish == "previous" else ActivationReason.BY_HAND
        if id in self.adapters.rolled_back() or self._reinstated(id):
            how = ActivationReason.BY_HAND_AGAIN
            with suppress(OSError):
                self.adapters.mark_rolled_back(id, "")
        if id != self.engine.adapter_id and (problem := (yield from self._use(id, how))):
            return Reply(False, problem)
        try:
            self.adapters.set_current(id)
        except OSError as error:
            return Reply(False, f"active until the next restart only, CURRENT could not be written: {error}")
        return Reply(True, f"drafting with adapter {id}" if id else "drafting without an adapter", adapter_id=id)

    def _parent(self) -> str:
        """The active adapter's parent, where it is still there."""
        try:
            parent = self.adapters.manifest(self.engine.adapter_id).parent_id if self.engine.adapter_id else ""
        except AdapterRejected:
            return ""
        return self.adapters.resolve(parent) if parent else ""
