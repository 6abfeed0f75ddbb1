"""The one MLX thread: loads the models, serves requests round by round, swaps adapters between rounds.

It touches no socket and no database: requests come in through a queue, everything it has to say goes out through `emit`
and the recorder. Every turn has one round of each request, so that none starves; where that is cheaper, in one step.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from specl.daemons.inference.adapter_monitor import AdapterMonitor, held_out_before
from specl.daemons.inference.admission import prepare, to_options
from specl.daemons.inference.job import Job, to_done, to_generation, token_laws
from specl.daemons.inference.recorder import Recorder
from specl.daemons.inference.swap import AdapterSwap
from specl.shared.engine.answer_history import AnswerHistory
from specl.shared.engine.core import EngineCore
from specl.shared.engine.decode import Session, decode_rounds
from specl.shared.engine.statistics import acceptance_rate
from specl.shared.engine.text import TextStream
from specl.shared.errors import SpecLoraError
from specl.shared.loading.costs import load_or_calibrate
from specl.shared.loading.engine import load_engine
from specl.shared.messaging.codes import ActivationEvent, ActivationReason, FailureCode
from specl.shared.messaging.messages import Activation, AdapterReady, Delta, Failed, Queued, Reply, SetAdapter
from specl.shared.models import blas
from specl.shared.models.free_memory import free_memory
from specl.shared.paths import Paths
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.runtime import log
from specl.shared.settings.schema import Settings

WATCHED = (
    ActivationReason.ANNOUNCED,
    ActivationReason.BY_HAND,
)  # reasons to use an adapter that say nothing of its worth on live traffic
IDLE_TICK_S = 5.0  # how often CURRENT is looked at when nobody announces anything
EXPIRE_S = 600.0  # how often past answers are asked for their age
_log = log.get("worker")
Emit = Callable[[bytes, Any], None]


class Worker(threading.Thread):
    """`emit(peer, message)` may be called from this thread at any time. `failure` is set when the thread cannot go on."""

    def __init__(
        self, paths: Paths, settings: Settings, recorder: Recorder, emit: Emit, wake: Callable[[], None]
    ) -> None:
        super().__init__(name="mlx", daemon=True)
        self.paths, self.settings, self.recorder, self.emit, self._wake_loop = paths, settings, recorder, emit, wake
        self.engine: EngineCore | None = None
        self.swap: AdapterSwap | None = None
        self.failure: BaseException | None = None
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.served = 0
        self.recent: deque[tuple[int, int, float]] = deque(maxlen=50)
        self.monitor = AdapterMonitor(paths.root / "watch.json")
        self._answer_files = AnswerFiles(paths.answers)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._expire_at = 0.0
        self.unloaded = False  # let go for idleness; the next request brings them back
        self._idle_since = self._looked_at = time.monotonic()

    # ------------------------------------------------------------------------------------- called from the loop thread
    def call(self, action: Callable[[], None]) -> None:
        """Run `action` on the MLX thread, between two rounds."""
        self._inbox.put(action)

    def submit(self, job: Job) -> None:
        """Take a request."""
        self.call(lambda: self._enqueue(job))

    def cancel(self, request_id: str, reason: str, peer: bytes | None = None) -> None:
        """Stop a request within a round; only its own client may."""
        self.call(lambda: self._cancel(request_id, reason, peer))

    def set_adapter(self, peer: bytes, wish: SetAdapter) -> None:
        """Change the adapter by hand and answer."""

        def change() -> None:
            try:
                self._ensure_loaded()
            except SpecLoraError as error:
                self.emit(peer, Reply(False, str(error)))
            else:
                self.swap.wished(wish.adapter, lambda reply: self.emit(peer, reply))

        self.call(change)

    def announced(self, news: AdapterReady) -> None:
        """CURRENT may have moved."""

        def hear() -> None:
            if not self.unloaded:  # else CURRENT is looked at when the models come back
                self.swap.hear(news.id, news.path)

        self.call(hear)

    def stop(self) -> None:
        """End after the present round; running answers are cancelled."""

        def end() -> None:
            self._stopping = True

        self.call(end)
        self.join(timeout=1.5)

    @property
    def busy(self) -> bool:
        """Whether any request is here."""
        return bool(self.active or self.waiting)

    # ------------------------------------------------------------------------------------------------ the thread
    def run(self) -> None:
        """Load, then serve."""
        try:
            self._load()
            while not self._stopping:
                self._turn()
            for job in [*self.active, *self.waiting]:
                self.emit(job.peer, Failed(job.ask.request_id, FailureCode.STOPPED, "the inference daemon is stopping"))
        except BaseException as error:
            self.failure = error
        finally:
            self._wake_loop()

    def _load(self) -> None:
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
        engine.past = AnswerHistory(self._answer_files.read)
        if self.swap is None:
            self.swap = AdapterSwap(self.paths, engine, self._activated)
            drafted = self.monitor.load(engine.draft_fingerprint, engine.target.fingerprint)
            self.swap.start(drafted if drafted is None or drafted in ("", *self.swap.adapters.ids()) else "")
            self.monitor.settle(engine.adapter_id)
        else:
            self.swap.come_back(engine)
        self.engine = engine
        self._idle_since = time.monotonic()
        _log.info(
            "models.ready",
            target=engine.target.name,
            draft=engine.draft.name if engine.draft else None,
            adapter=engine.adapter_id or None,
            blas=blas.BOUND.name,
            seconds=round(time.monotonic() - start, 1),
        )
        self._wake_loop()

    def _ensure_loaded(self) -> None:
        """The models, if they were let go. Raises ModelError where they cannot be had now: the next request tries again."""
        if not self.unloaded:
            return
        self.unloaded = False  # `status` says that they load
        try:
            self._load()
        except SpecLoraError:
            self.unloaded = True
            raise

    def _unload_if_idle(self) -> None:
        minutes = self.settings.memory.idle_unload_minutes
        if not minutes or self.unloaded or time.monotonic() - self._idle_since < 60 * minutes:
            return
        self.unloaded = True  # before the engine goes: `status` looks from another thread
        self.engine = None
        self.swap.let_go()
        free_memory()
        _log.info("models.unloaded", idle_minutes=minutes)

    def _turn(self) -> None:
        """Everything that waits in the inbox, a piece of a switch under way, then one round of every active request."""
        self._run_inbox(block=not self.busy and not self.swap.under_way)
        self._advance_switch()
        self._forget_old_answers()
        self._drop_expired()
        self._admit()
        for job in list(self.active):
            if job not in self.active:  # cancelled while another one's prompt was read
                continue
            if self._expired(job):
                self._finish(job, "deadline")
            elif not job.prefilled:
                job.prefilled = job.session.prefill()
                self._run_inbox(block=False)
        # those who were cancelled meanwhile are no longer here; who just read its prompt starts with the others
        jobs = [job for job in self.active if job.prefilled]
        before = [len(job.session.output) for job in jobs]
        for job in jobs:
            if self.monitor.forces():  # parked or not: the chooser drafts one token when a probe is due
                job.session.chooser.estimate.since_probe = job.session.chooser.estimate.pause
        decode_rounds([job.session for job in jobs])
        for job, length in zip(jobs, before, strict=True):
            self._tell(job, length)

    def _run_inbox(self, block: bool) -> None:
        try:
            action = self._inbox.get(timeout=self._tick_s) if block else self._inbox.get_nowait()
            while True:
                action()
                action = self._inbox.get_nowait()
        except queue.Empty:
            if block:
                self._unload_if_idle()

    def _advance_switch(self) -> None:
        """A piece of a switch under way; else, now and then, a look at CURRENT: an announcement may have been lost."""
        if self.swap.under_way:
            self.swap.advance()
        elif not self.unloaded and time.monotonic() - self._looked_at >= self._tick_s:
            self._looked_at = time.monotonic()
            self.swap.look()

    def _forget_old_answers(self) -> None:
        """What `records.retention_days` says of records holds for the answers that draft, too; whether models are here or not."""
        days, now = self.settings.records.retention_days, time.time()
        if not days or now < self._expire_at:
            return
        self._expire_at = now + min(EXPIRE_S, 86400 * days / 10)
        before = now - 86400 * days
        if self.engine is not None:
            self.engine.past.expire(before)
        self.recorder.expire_answers(self._answer_files, before)

    @property
    def _tick_s(self) -> float:
        minutes = self.settings.memory.idle_unload_minutes
        return min(IDLE_TICK_S, 60 * minutes) if minutes else IDLE_TICK_S

    # ------------------------------------------------------------------------------------------------ requests
    def _enqueue(self, job: Job) -> None:
        self._idle_since = time.monotonic()
        try:
            self._ensure_loaded()
            prepare(job, self.engine, self.settings.memory.max_kv_cache_tokens)
        except SpecLoraError as error:
            self.emit(job.peer, Failed(job.ask.request_id, FailureCode.REJECTED, str(error), error.hint))
            return
        self.waiting.append(job)
        if self.active:
            self._tell_places()

    def _drop_expired(self) -> None:
        """Who still waits when its deadline passes is told so, and not started."""
        for job in [job for job in self.waiting if self._expired(job)]:
            self.waiting.remove(job)
            self.emit(job.peer, Failed(job.ask.request_id, FailureCode.DEADLINE, "ended before the first token"))
            self._tell_places()

    def _tell_places(self) -> None:
        for place, job in enumerate(self.waiting):
            self.emit(job.peer, Queued(job.ask.request_id, place))

    def _admit(self) -> None:
        """Start waiting requests, first come first served, as far as slots and cache tokens reach."""
        budget = self.settings.memory.max_kv_cache_tokens
        started = False
        while self.waiting and len(self.active) < self.settings.serving.max_active:
            job = self.waiting[0]
            reserved = sum(other.reserved for other in self.active)
            if self.active and reserved + job.reserved > budget:
                break
            self.waiting.popleft()
            if self._start(job):  # first: what it goes on from is in the prefix cache no more, and does not count twice
                started = True
                self.engine.prefixes.shrink(min(budget, reserved + job.reserved))
        if started and self.waiting:
            self._tell_places()

    def _start(self, job: Job) -> bool:
        try:
            job.session = self.engine.session(job.prompt, to_options(job, self.settings))
        except SpecLoraError as error:
            self.emit(job.peer, Failed(job.ask.request_id, FailureCode.REJECTED, str(error), error.hint))
            return False
        job.text = TextStream(self.engine.target.tokenizer, tuple(job.ask.stop))
        job.adapter_id = job.began_with = self.engine.adapter_id
        self.active.append(job)
        return True

    def _expired(self, job: Job) -> bool:
        deadline = job.ask.deadline_s
        return deadline is not None and time.monotonic() - job.arrived > deadline

    def _tell(self, job: Job, before: int) -> None:
        """Send on what a round has added to the first `before` tokens."""
        session = job.session
        emitted = session.output[before:]
        if job.first_token_at is None:
            job.first_token_at = time.monotonic()
        job.adapter_id = self.engine.adapter_id
        pieces: list[str] = []
        stops = self.engine.target.stop_tokens
        for place, token in enumerate(emitted):
            if token in stops:
                break
            pieces.append(job.text.add(token))
            if job.text.stopped:
                session.cut(before + place + 1, "stop")
                break
        lengths = [len(piece) for piece in pieces]
        if session.finish_reason:
            pieces.append(job.text.finish())
        kept = session.output[before:]
        if kept:
            sources = bytes(session.sources[before:])
            logprobs = token_laws(self.engine.target, kept, session.told[before:])
            self.emit(job.peer, Delta(job.ask.request_id, "".join(pieces), kept, sources, lengths, logprobs))
        if session.finish_reason:
            self._finish(job, "")

    def _cancel(self, request_id: str, reason: str, peer: bytes | None) -> None:
        for job in [*self.active, *self.waiting]:
            if job.ask.request_id == request_id and peer in (None, job.peer):
                if job in self.waiting:
                    self.waiting.remove(job)
                    self.emit(job.peer, Failed(request_id, FailureCode.CANCELLED, reason))
                    self._tell_places()
                else:
                    self._finish(job, "cancelled")
                return

    def _finish(self, job: Job, ended_by: str) -> None:
        """Record, answer, keep the caches for a next turn."""
        self.active.remove(job)
        session = job.session
        if ended_by:
            session.finish_reason = ended_by
            job.text.finish()
        if not session.output:
            self._keep(job, whole=False)
            self.emit(
                job.peer,
                Failed(job.ask.request_id, FailureCode(ended_by or "internal"), "ended before the first token"),
            )
            return
        done = to_done(job, self.engine)
        record = to_generation(job, self.engine) if job.ask.record else None
        wanted = record is not None and session.capture is not None and self.settings.records.hidden_spool_mb
        self.recorder.finish(job.peer, done, record, session.all_states() if wanted else None)
        self.served += 1
        self._idle_since = time.monotonic()
        self.recent.append(
            (session.tally.drafted["model"], session.tally.accepted["model"], done.stats.tokens_per_second)
        )
        self._keep(job, whole=record is not None and self.recorder.keeps_whole(record))
        if job.began_with == job.adapter_id == self.engine.adapter_id:
            self._watch(session)
        frequency = self.settings.memory.cache_clear_frequency
        if frequency and self.served % frequency == 0:
            self.engine.clear_caches()
        _log.info(
            "generation.done",
            id=job.generation_id,
            tokens=len(session.output),
            rounds=session.tally.rounds,
            acceptance=acceptance_rate(session.tally),
            tokens_per_second=done.stats.tokens_per_second,
            adapter=job.adapter_id or None,
            reason=session.finish_reason,
        )

    def _keep(self, job: Job, whole: bool) -> None:
        """Caches for a next turn, and the answer for drafting where its record keeps it whole: that goes to the disk, too.

        Nothing at all outlives a request that is not to be kept.
        """
        session, client_id = job.session, job.ask.client_id
        reserved = sum(other.reserved for other in self.active)
        if not job.ask.record:
            self.engine.return_to_prefix_cache(session, reserved)
            return
        if client_id and whole:
            self.engine.past.add(client_id, session.output)
            answers = self.engine.past.answers(client_id)  # of now: the recorder may come late
            self.recorder.write_answers(self._answer_files, client_id, answers)
        said = job.prompt_text + job.text.text if session.output else ""
        self.engine.save_to_prefix_cache(session, job.adapter_id, said, reserved)

    def _watch(self, session: Session) -> None:
        """One more answer of the active adapter; it goes when it disappoints."""
        tally = session.tally
        if why := self.monitor.saw(tally.tested_by_depth, tally.accepted_by_depth):
            self.swap.roll_back(why)

    def _look_out(self, adapter_id: str, previous_id: str, reason: ActivationReason) -> None:
        """An adapter that came from the gate or by hand is watched; one that somebody insists on, returns to, or that a second
        look has reinstated, is not.
        """
        watched = adapter_id if reason in WATCHED else ""
        if reason != ActivationReason.RESTART:
            self.monitor.changed(adapter_id, watched, previous_id, held_out_before(self.swap.adapters, adapter_id))
        if reason == ActivationReason.REINSTATED:
            self.monitor.reinstated(adapter_id)

    def _activated(self, change: Activation) -> None:
        """An adapter came, went or was refused: a fact for the store, and maybe the start of a watch."""
        if change.event in (ActivationEvent.ACTIVATED, ActivationEvent.UNLOADED):
            self._look_out(change.adapter_id, change.previous_id, change.reason)
        self.recorder.fact(change)
