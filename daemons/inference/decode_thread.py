"""The one MLX thread: loads and unloads the models, decodes requests round by round, switches
adapters between rounds.

It touches no socket and no database: work comes in through a queue of actions, messages go out
through `emit`, and records through the recorder. The requests themselves are the scheduler's.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.daemons.inference.admission import context_limit
from specl.daemons.inference.answer_messages import done_message, generation_record
from specl.daemons.inference.job import RunningJob
from specl.daemons.inference.outgoing import Emit
from specl.daemons.inference.recorder import Recorder
from specl.daemons.inference.scheduler import Scheduler
from specl.daemons.inference.swap import AdapterSwap
from specl.shared.answer_stats import AnswerStats
from specl.shared.engine.answer_history import AnswerHistory, PastAnswer
from specl.shared.engine.core import EngineCore
from specl.shared.engine.statistics import answer_stats
from specl.shared.errors import SpecLoraError
from specl.shared.loading.costs import load_or_calibrate
from specl.shared.loading.engine import load_engine
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.messages import Activation, AdapterReady, Ask, Envelope, Failed, Purge, Reply, SetAdapter
from specl.shared.models import blas
from specl.shared.models.free_memory import free_memory
from specl.shared.paths import Paths
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.runtime import log
from specl.shared.settings.schema import Settings

IDLE_TICK_S = 5.0  # how often CURRENT is read when nobody announces anything
EXPIRE_S = 600.0  # how often past answers are checked for their age
STOP_TIMEOUT_S = 1.5
RECENT_ANSWERS = 50
_log = log.get("decode_thread")


@dataclass(frozen=True, slots=True)
class RecentAnswer:
    """One answer for the averages of `status`: tokens of the model drafter, and the speed."""

    drafted: int
    accepted: int
    tokens_per_second: float


class DecodeThread(threading.Thread):
    """`scheduler` is None until the models are loaded, and while they are unloaded for idleness
    (`unloaded`).

    `failure` is set when the thread cannot go on. `served` counts answers since the start.
    """

    def __init__(
        self, paths: Paths, settings: Settings, recorder: Recorder, emit: Emit, wake_loop: Callable[[], None]
    ) -> None:
        super().__init__(name="mlx", daemon=True)
        self.paths, self.settings, self.recorder = paths, settings, recorder
        self._emit, self._wake_loop = emit, wake_loop
        self.scheduler: Scheduler | None = None
        self.swap: AdapterSwap | None = None
        self.monitor = AdapterMonitor(paths.root / "watch.json")
        self.failure: BaseException | None = None
        self.unloaded = False
        self.context_length: int | None = None  # known since the first load
        self.served = 0
        self.recent: deque[RecentAnswer] = deque(maxlen=RECENT_ANSWERS)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._answer_files = AnswerFiles(paths.answers)
        self._history_purges = 0  # answers that finished before the latest purge are not added after it
        self._purged_files = 0  # which of these purges has removed the files, too
        self._expire_at = 0.0
        self._idle_since = self._current_read_at = time.monotonic()

    @property
    def engine(self) -> EngineCore | None:
        """The loaded engine; None where there is none."""
        scheduler = self.scheduler  # read once: the loop thread asks, too
        return scheduler.engine if scheduler is not None else None

    @property
    def starting(self) -> bool:
        """Whether the models are being loaded."""
        return self.scheduler is None and not self.unloaded

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        scheduler = self.scheduler
        return scheduler is not None and scheduler.busy

    # ------------------------------------------------------------------------------------- called from the loop thread
    def call(self, action: Callable[[], None]) -> None:
        """Run `action` on the MLX thread, between two rounds."""
        self._inbox.put(action)

    def submit(self, peer: bytes, ask: Ask) -> None:
        """Take a request; its deadline counts from now."""
        arrived = time.monotonic()
        self.call(lambda: self._add(peer, ask, arrived))

    def cancel(self, request_id: str, reason: str, peer: bytes | None = None) -> None:
        """Stop a request within a round; with a `peer`, only if it is that client's."""

        def cancel() -> None:
            if self.scheduler is not None:
                self.scheduler.cancel(request_id, reason, peer)

        self.call(cancel)

    def set_adapter(self, peer: bytes, request: SetAdapter) -> None:
        """Change the adapter for a user, and reply."""

        def change() -> None:
            try:
                _, swap = self._ensure_loaded()
            except SpecLoraError as error:
                self._emit(peer, Reply(False, str(error)))
            else:
                swap.request_switch(request.adapter, lambda reply: self._emit(peer, reply))

        self.call(change)

    def adapter_announced(self, announcement: AdapterReady) -> None:
        """Check CURRENT: the trainer has announced an adapter."""

        def announced() -> None:
            if self.swap is not None and not self.unloaded:  # else CURRENT is read when the models are loaded again
                self.swap.announced(announcement.id, announcement.path)

        self.call(announced)

    def purge(self, peer: bytes, purge: Purge, matches: Callable[[Envelope], bool]) -> None:
        """Forget cached prefixes and past answers, then have the recorder purge the disk and reply."""

        self._history_purges += 1  # from here on files are not read, see `_read_answers`
        number = self._history_purges

        def files_purged() -> None:
            self._purged_files = number

        def forget() -> None:
            if (engine := self.engine) is not None:
                engine.prefixes.purge()
                engine.answer_history.forget()

        def forget_all() -> None:
            forget()
            self.recorder.purge(peer, purge, matches, self._answer_files, files_purged)

        if self.scheduler is None:  # nothing is cached, and the inbox may wait for the models
            forget_all()
            self.call(forget)  # unless they were being loaded just now
        else:
            self.call(forget_all)

    def stop(self) -> None:
        """End after the present round; running answers are cancelled."""

        def end() -> None:
            self._stopping = True

        self.call(end)
        self.join(timeout=STOP_TIMEOUT_S)

    # ------------------------------------------------------------------------------------------------ the thread
    def run(self) -> None:
        """The body of the thread: load the models, then serve."""
        try:
            self.load()
            while not self._stopping:
                self.turn()
            if self.scheduler is not None:
                self.scheduler.stop()
        except BaseException as error:
            self.failure = error
        finally:
            self._wake_loop()

    def turn(self) -> None:
        """Run every queued action, one piece of a switch under way, then one round of every running
        request.
        """
        self._run_inbox(block=not self.busy and not self._switching)
        self._advance_switch()
        self._expire_answers()
        if self.scheduler is not None:
            self.scheduler.step(lambda: self._run_inbox(block=False))

    @property
    def _switching(self) -> bool:
        return self.swap is not None and self.swap.under_way

    @property
    def _tick_s(self) -> float:
        minutes = self.settings.memory.idle_unload_minutes
        return min(IDLE_TICK_S, 60 * minutes) if minutes else IDLE_TICK_S

    def _run_inbox(self, block: bool) -> None:
        try:
            action = self._inbox.get(timeout=self._tick_s) if block else self._inbox.get_nowait()
            while True:
                action()
                action = self._inbox.get_nowait()
        except queue.Empty:
            if block:
                self.unload_if_idle()

    def _advance_switch(self) -> None:
        """Advance a switch under way by one piece. Without one, read CURRENT now and then, because
        an announcement may have been lost.
        """
        if self.swap is None or self.unloaded:
            return
        if self.swap.under_way:
            self.swap.advance()
        elif time.monotonic() - self._current_read_at >= self._tick_s:
            self._current_read_at = time.monotonic()
            self.swap.check_current()

    def _expire_answers(self) -> None:
        """Remove past answers that are older than `records.retention_days`, whether models are
        loaded or not.
        """
        days, now = self.settings.records.retention_days, time.monotonic()
        if not days or now < self._expire_at:
            return
        self._expire_at = now + min(EXPIRE_S, 86400 * days / 10)  # monotonic: a clock that is set back delays nothing
        before = time.time() - 86400 * days
        if (engine := self.engine) is not None:
            engine.answer_history.expire(before)
        self.recorder.expire_answers(self._answer_files, before)

    # ------------------------------------------------------------------------------------------------ models
    def load(self) -> tuple[Scheduler, AdapterSwap]:
        """Load the models of the settings and the active adapter. Raises ModelError."""
        start = time.monotonic()
        blas.set_threads(self.settings.serving.threads)
        if not blas.BOUND.fast:
            _log.warning("blas.slow", bound=blas.BOUND.name, note=blas.BOUND.note, remedy=blas.REMEDY)
        engine = load_engine(
            self.settings,
            self.paths.models,
            lambda message: _log.info("models.loading", what=message),
            on_error=lambda error: _log.error("drafter.failed", reason=f"{type(error).__name__}: {error}"),
        )
        load_or_calibrate(engine, self.paths.costs)
        self._answer_files = AnswerFiles(self.paths.answers, engine.target.tokenizer_fingerprint)
        engine.answer_history = AnswerHistory(self._read_answers)
        swap = self._attach_swap(engine)
        scheduler = Scheduler(engine, self.settings, self._emit, self.monitor.must_draft, self._finished)
        self.context_length = context_limit(engine, self.settings)
        self.scheduler = scheduler
        self._idle_since = time.monotonic()
        _log.info(
            "models.loaded",
            target=engine.target.name,
            draft=engine.draft.name if engine.draft else None,
            adapter=engine.adapter_id or None,
            blas=blas.BOUND.name,
            seconds=round(time.monotonic() - start, 1),
        )
        self._wake_loop()
        return scheduler, swap

    def _attach_swap(self, engine: EngineCore) -> AdapterSwap:
        """Activate an adapter: after an unload the one before it, at start the one of the last process
        or the one that CURRENT names.
        """
        if self.swap is not None:
            self.swap.attach_engine(engine)
            return self.swap
        self.swap = swap = AdapterSwap(self.paths, engine, self._adapter_changed)
        drafted = self.monitor.load(engine.draft_fingerprint, engine.target.fingerprint)
        swap.start(drafted if drafted is None or drafted in ("", *swap.adapters.ids()) else "")
        self.monitor.resumed(engine.adapter_id)
        return swap

    def _ensure_loaded(self) -> tuple[Scheduler, AdapterSwap]:
        """Load the models if they were unloaded. Raises ModelError where that fails now: the next
        request tries again.
        """
        if self.scheduler is not None and self.swap is not None:
            return self.scheduler, self.swap
        self.unloaded = False  # `status` shows that they are loading
        try:
            return self.load()
        except SpecLoraError:
            self.unloaded = True
            raise

    def unload_if_idle(self) -> None:
        """Unload the models after `memory.idle_unload_minutes` without a request; the next request
        loads them again.
        """
        minutes = self.settings.memory.idle_unload_minutes
        if not minutes or self.unloaded or time.monotonic() - self._idle_since < 60 * minutes:
            return
        self.unloaded = True  # before the engine goes: `status` reads from another thread
        self.scheduler = None
        if self.swap is not None:
            self.swap.release_models()
        free_memory()
        _log.info("models.unloaded", idle_minutes=minutes)

    # ------------------------------------------------------------------------------------------------ answers
    def _add(self, peer: bytes, ask: Ask, arrived: float) -> None:
        self._idle_since = time.monotonic()
        try:
            scheduler, _ = self._ensure_loaded()
        except SpecLoraError as error:
            self._emit(peer, Failed(ask.request_id, FailureCode.REJECTED, str(error), error.hint))
        else:
            scheduler.add(peer, ask, arrived)

    def _finished(self, scheduler: Scheduler, running: RunningJob) -> None:
        """Record and answer, keep the caches for a next turn, and count the drafts of the adapter
        that drafted them.
        """
        engine, session = scheduler.engine, running.session
        stats = answer_stats(session, engine.costs, running.ttft_ms)
        self._record(running, engine, stats)
        self.served += 1
        self._idle_since = time.monotonic()
        self.recent.append(RecentAnswer(stats.model_drafted, stats.model_accepted, stats.tokens_per_second))
        scheduler.keep_caches(running)
        if running.first_adapter_id == running.adapter_id == engine.adapter_id:
            self._count_drafts(running)
        frequency = self.settings.memory.cache_clear_frequency
        if frequency and self.served % frequency == 0:
            engine.clear_caches()
        _log.info(
            "generation.finished",
            id=running.job.generation_id,
            tokens=len(session.output),
            rounds=stats.rounds,
            acceptance=stats.acceptance_rate,
            tokens_per_second=stats.tokens_per_second,
            adapter=running.adapter_id or None,
            reason=session.finish_reason,
        )

    def _record(self, running: RunningJob, engine: EngineCore, stats: AnswerStats) -> None:
        job, session = running.job, running.session
        generation, states = None, None
        if job.ask.record:
            generation = generation_record(running, engine, stats)
            if session.capture is not None and self.settings.records.hidden_spool_mb:
                states = session.all_states()
        add = self._answer_adder(job.ask.client_id, list(session.output))
        self.recorder.finish(job.peer, done_message(running, stats), generation, states, add)

    def _read_answers(self, client_id: str) -> list[PastAnswer]:
        """A client's answers on disk; none while a purge has yet to remove the files. Otherwise a
        request in between would bring purged answers back, and write them again.
        """
        return self._answer_files.read(client_id) if self._purged_files == self._history_purges else []

    def _answer_adder(self, client_id: str, tokens: list[int]) -> Callable[[], None]:
        """An action for the recorder, which knows whether the answer may be kept: later answers of
        the client draft from it.
        """
        purges = self._history_purges

        def add() -> None:
            engine = self.engine
            if client_id and engine is not None and purges == self._history_purges:
                engine.answer_history.add(client_id, tokens)
                self.recorder.write_answers(self._answer_files, client_id, engine.answer_history.answers(client_id))

        return lambda: self.call(add)

    # ------------------------------------------------------------------------------------------------ adapters
    def _count_drafts(self, running: RunningJob) -> None:
        """Count one more answer of the active adapter; it is rolled back when it has collapsed."""
        stats = running.session.stats
        if self.swap is not None and (reason := self.monitor.add(stats.tested_by_depth, stats.accepted_by_depth)):
            self.swap.roll_back(reason)

    def _adapter_changed(self, change: Activation) -> None:
        """Record a change or refusal of the active adapter; a collapse check may begin."""
        self.monitor.observe(change)
        self.recorder.record(change)
