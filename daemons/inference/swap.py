"""Makes the adapter that CURRENT names the active one: read CURRENT, verify, fuse, report. Start-up,
an announcement and a slow tick all do this.

Runs on the MLX thread, between rounds. A switch that takes longer than a round is done in pieces,
one between two rounds, while the old adapter goes on drafting. A refused adapter is not tried again
while its files are the same; the old one stays active, whatever is wrong with the new one. CURRENT
is moved here for a user's command and for a rollback.
"""

import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from specl.daemons.inference.swap_decision import Activate, RollBack, decide
from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter_steps
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected, disk_failed
from specl.shared.messaging.codes import ActivationEvent, ActivationReason
from specl.shared.messaging.messages import Activation, Json, Reply
from specl.shared.paths import Paths
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint
from specl.shared.runtime.incremental import Steps, Stopwatch, T, run_all

MAX_REJECTED = 32  # refusals that `status` shows
_log = log.get("adapter")
Stamp = tuple[tuple[str, int, int, int], ...]
Activated = Callable[[Activation], None]


class AdapterSwap:
    """`activated` is called with every change and refusal.

    `previous` is the adapter to which a rollback or a user returns; `rejected` has the reason by id.
    """

    def __init__(self, paths: Paths, engine: EngineCore, activated: Activated) -> None:
        self.adapters = Adapters(paths.adapters)
        self.engine: EngineCore | None = engine  # None while the models are unloaded
        self._activated = activated
        self.previous = ""
        self._adapter_before_restart: str | None = None
        self._loaded_adapter: LoadedAdapter | None = None
        self._adapter_before_switch = ""
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

    def _queue(self, pieces: Steps[T], then: Callable[[T], None] = lambda result: None) -> None:
        self._tasks.append((pieces, then))

    # ------------------------------------------------------------------------------------------------ CURRENT
    @property
    def active(self) -> str:
        """The active adapter; while models are unloaded, the one that will be active. Empty for none."""
        engine = self.engine  # read once: `status` calls this from another thread
        if engine is not None:
            return engine.adapter_id
        return self._loaded_adapter.id if self._loaded_adapter is not None else ""

    def release_models(self) -> None:
        """The models are unloaded. The adapter stays in memory, a few MB: it will be active again
        whatever happens to its files.
        """
        self.engine = None

    def attach_engine(self, engine: EngineCore) -> None:
        """The models are loaded again: use the same adapter as before, then check CURRENT."""
        engine.use_adapter(self._loaded_adapter)
        self.engine = engine
        self.follow_current()

    def announced(self, id: str, path: str) -> None:
        """An announcement: refused where it points anywhere but into the adapters folder, else a
        reason to check CURRENT.
        """
        try:
            self.adapters.confine(Path(path))
        except AdapterRejected as error:
            self._refused[id] = None  # says nothing of the one that CURRENT may name
            self._refuse(id, str(error))
            return
        self.check_current()

    def start(self, adapter_before_restart: str | None) -> None:
        """Check CURRENT for the first time. `adapter_before_restart` was active when the last daemon
        ended (None: not known). Activating it is a restart; any other was promoted since.
        """
        self._adapter_before_restart = adapter_before_restart
        self.follow_current()
        self._adapter_before_restart = None

    def follow_current(self) -> None:
        """Activate the adapter that CURRENT names, if another one is active; at once."""
        self.check_current()
        self.finish()

    def check_current(self) -> None:
        """`follow_current` in pieces."""
        self._queue(self._follow_steps())

    def _follow_steps(self) -> Steps[None]:
        try:
            current = self.adapters.named()
        except AdapterRejected as error:
            self._refuse("CURRENT", str(error))
            return
        self.rejected.pop("CURRENT", None)
        marks = self.adapters.rolled_back()
        match decide(current, self._loaded_engine.adapter_id, self.adapters.resolve("previous"), marks):
            case RollBack() as rollback:
                self._adapter_before_restart = None  # an activation from here on is no restart
                yield from self._follow_rollback(rollback)
            case Activate(id):
                yield from self._follow_activation(id)

    def _follow_rollback(self, rollback: RollBack) -> Steps[None]:
        adapter, replacement, reason = rollback.adapter, rollback.replacement, rollback.reason
        yield from self._replace_rolled_back(adapter, replacement, reason or "")
        if reason is not None:
            self._report(ActivationEvent.ROLLED_BACK, adapter, replacement, ActivationReason.REEVALUATION, reason)

    def _follow_activation(self, id: str) -> Steps[None]:
        if id in self.rejected and id not in self._refused and self._is_reinstated(id):
            self._forget_refusal(id)  # it had been rolled back in this process, with a disk that kept CURRENT
        if self._worth_trying(id):
            yield from self._activate(id, self._reason_for(id))

    @property
    def _loaded_engine(self) -> EngineCore:
        """The engine. Raises RuntimeError while the models are unloaded: nobody may call for a
        switch then.
        """
        if self.engine is None:
            raise RuntimeError("an adapter cannot be switched while the models are unloaded")
        return self.engine

    def _reason_for(self, current: str) -> ActivationReason:
        """Why CURRENT names it."""
        if current == self._adapter_before_restart:
            return ActivationReason.RESTART
        return ActivationReason.REINSTATED if self._is_reinstated(current) else ActivationReason.ANNOUNCED

    def _is_reinstated(self, id: str) -> bool:
        mark = self.adapters.marks.all().get(id)
        return mark is not None and mark.state in (MarkState.REINSTATING, MarkState.REINSTATED)

    def _worth_trying(self, id: str) -> bool:
        """False where the adapter was refused, unless its files have changed since or the disk was to
        blame.
        """
        return id not in self.rejected or (id in self._refused and self._refused[id] != self._stamp(id))

    def _forget_refusal(self, id: str) -> None:
        self.rejected.pop(id, None)
        self._refused.pop(id, None)

    def _stamp(self, id: str) -> Stamp:
        """Names, sizes, times and inodes of an adapter's files: they differ when a file was changed."""
        try:
            files = [(path.name, path.lstat()) for path in sorted((self.adapters.folder / id).iterdir())]
        except OSError:
            return ()
        return tuple((name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in files)

    def _activate(self, id: str, reason: ActivationReason, note: str = "") -> Steps[str]:
        """Switch to `id` (empty: none). Returns why it was refused; empty where it is active now."""
        stopwatch, stamp = Stopwatch(), self._stamp(id) if id else ()
        try:
            yield from stopwatch.over(self._switch(id))
        except AdapterRejected as error:
            self._refused[id] = None if disk_failed(error) else stamp
            self._refuse(id, str(error))
            return str(error)
        self._forget_refusal(id)
        replaced, self._adapter_before_switch = self._adapter_before_switch, ""
        pause_ms = round(1000 * stopwatch.longest_s, 1)
        if reason == ActivationReason.RESTART:
            self.previous = replaced = self.adapters.resolve("previous")
        else:
            self.previous = replaced
            with suppress(OSError):  # a full disk: this process remembers it
                self.adapters.set_previous(replaced)
        failpoint("swap.after_activate")
        _log.info(
            "adapter.fused" if id else "adapter.unloaded",
            adapter=id or None,
            previous=replaced or None,
            form=self._loaded_engine.adapter_form,
            pause_ms=pause_ms,
            ms=round(1000 * stopwatch.total_s, 1),
        )
        event = ActivationEvent.ACTIVATED if id else ActivationEvent.UNLOADED
        details = {"form": self._loaded_engine.adapter_form, "pause_ms": pause_ms}
        self._report(event, id, replaced, reason, note or reason.replace("_", " "), details)
        return ""

    def _switch(self, id: str) -> Steps[None]:
        """Load and use `id`. Raises AdapterRejected for whatever is wrong with it; the adapter before
        it is then active again.
        """
        adapter = (yield from self._load(id)) if id else None
        failpoint("swap.before_activate")
        self._adapter_before_switch = self._loaded_engine.adapter_id or self._adapter_before_restart or ""
        try:
            yield from self._loaded_engine.switch_adapter(adapter)
        except MemoryError:
            raise
        except Exception as error:
            self._loaded_engine.use_adapter(self._loaded_adapter)
            raise self._unforeseen(id, error) from error
        self._loaded_adapter = adapter

    def _load(self, id: str) -> Steps[LoadedAdapter]:
        try:
            adapter, _ = yield from load_adapter_steps(self.adapters, self.adapters.folder / id, self._loaded_engine)
            return adapter
        except (AdapterRejected, MemoryError):
            raise
        except Exception as error:  # catch-all: a file that no check foresaw must not end the daemon
            raise self._unforeseen(id, error) from error

    def _unforeseen(self, id: str, error: Exception) -> AdapterRejected:
        if not isinstance(error, OSError):  # its message is enough, and the adapter is tried again soon
            _log.exception("adapter.load_failed", adapter=id)
        reason = (str(error).splitlines() or [""])[0]
        return AdapterRejected(f"adapter {id}: it could not be loaded ({type(error).__name__}: {reason})")

    # ------------------------------------------------------------------------------------------------ rollbacks
    def roll_back(self, reason: str) -> None:
        """The active adapter has collapsed: mark it, so that it is not tried again, and activate the
        previous one.
        """
        id = self._loaded_engine.adapter_id
        self.finish()
        if self._loaded_engine.adapter_id != id:  # another one was on its way and has taken its place
            return
        replacement = self.previous if self.previous not in self.adapters.rolled_back() else ""
        try:
            self.adapters.marks.set(id, MarkState.ROLLBACK_PENDING, reason)
        except OSError as error:
            _log.error("rollback.not_written", adapter=id, reason=str(error))
        run_all(self._replace_rolled_back(id, replacement, reason))
        self._report(ActivationEvent.ROLLED_BACK, id, self.active, ActivationReason.LIVE_ACCEPTANCE, reason)

    def _replace_rolled_back(self, id: str, replacement: str, reason: str) -> Steps[None]:
        """Activate `replacement` in place of `id`, which is rolled back. Where the replacement cannot be
        used, no adapter is active.
        """
        note = f"adapter {id} was rolled back"
        if replacement != self.active and (yield from self._activate(replacement, ActivationReason.ROLLBACK, note)):
            replacement = ""
            yield from self._activate(replacement, ActivationReason.ROLLBACK, note)
        try:
            self.adapters.set_current(replacement)
        except OSError as error:  # the next check tries again
            self._refused.pop(id, None)
            self.rejected[id] = reason  # CURRENT still names it: do not activate it again in this process
            _log.error("rollback.not_written", adapter=id, reason=str(error))
        self.previous = ""  # not the adapter that was just rolled back
        with suppress(OSError):
            self.adapters.set_previous("")
        _log.warning("adapter.rolled_back", adapter=id, to=replacement or None, reason=reason)

    def _refuse(self, id: str, reason: str) -> None:
        """Report once why `id` is refused; the active adapter stays."""
        if self.rejected.get(id) == reason:
            return
        while len(self.rejected) >= MAX_REJECTED:
            self._forget_refusal(next(iter(self.rejected)))
        self.rejected[id] = reason
        _log.error("adapter.rejected", adapter=id, reason=reason)
        active = self._loaded_engine.adapter_id
        self._report(ActivationEvent.REJECTED, id, active, ActivationReason.VERIFICATION, reason)

    def _report(
        self,
        event: ActivationEvent,
        id: str,
        previous: str,
        reason: ActivationReason,
        note: str,
        details: Json | None = None,
    ) -> None:
        self._activated(Activation(uuid.uuid4().hex, time.time(), event, id, previous, reason, note, details or {}))

    # ------------------------------------------------------------------------------------------------ a user's choice
    def switch(self, name: str) -> Reply:
        """Switch to an id, an alias, `previous`, or empty for none; now. CURRENT moves only if the
        adapter is usable.
        """
        replies: list[Reply] = []
        self.request_switch(name, replies.append)
        self.finish()
        return replies[0]

    def request_switch(self, name: str, answer: Callable[[Reply], None]) -> None:
        """`switch` in pieces."""
        self._queue(self._switch_by_hand(name), answer)

    def _switch_by_hand(self, name: str) -> Steps[Reply]:
        id = name
        if name == "previous":
            id = self.previous or self.adapters.resolve("previous") or self._parent()
        elif name:
            id = self.adapters.resolve(name)
            if not id:
                return Reply(False, f"there is no adapter {name!r}")
        self._forget_refusal(id)
        reason = ActivationReason.ROLLED_BACK_BY_HAND if name == "previous" else ActivationReason.BY_HAND
        if id in self.adapters.rolled_back() or self._is_reinstated(id):
            reason = ActivationReason.BY_HAND_AGAIN
        if id:  # what a user chose is not judged again
            with suppress(OSError):
                self.adapters.marks.set(id, MarkState.KEPT, "a user activated it")
        if id != self._loaded_engine.adapter_id and (problem := (yield from self._activate(id, reason))):
            return Reply(False, problem)
        try:
            self.adapters.set_current(id)
        except OSError as error:
            return Reply(False, f"active until the next restart only, CURRENT could not be written: {error}")
        return Reply(True, f"drafting with adapter {id}" if id else "drafting without an adapter", adapter_id=id)

    def _parent(self) -> str:
        """The active adapter's parent, where it is still there."""
        try:
            parent = self.adapters.manifest(self.active).parent_id if self.active else ""
        except AdapterRejected:
            return ""
        return self.adapters.resolve(parent) if parent else ""
