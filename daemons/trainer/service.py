"""The trainer daemon: watches the store for its trigger, runs training on one MLX thread, answers and announces.

The loop thread owns the sockets and the outbox; the MLX thread owns the models, loaded when first needed.
"""

import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from specl.daemons.trainer import second_look
from specl.daemons.trainer.consent import Consent
from specl.daemons.trainer.course import Live
from specl.daemons.trainer.data import Gatherer
from specl.daemons.trainer.facts import Facts
from specl.daemons.trainer.politeness import Abandoned, Overtaken, Turnstile
from specl.daemons.trainer.records import adapter_record, scored
from specl.daemons.trainer.regression import RegressionSlice
from specl.daemons.trainer.run import Outcome, TrainingJob, in_force
from specl.daemons.trainer.second_look import LookJob, SecondLook
from specl.daemons.trainer.trial import Trial, TrialJob
from specl.daemons.trainer.work import BY_HAND, IMPORT, NOW, RUN, Job, kind_of_work
from specl.shared import checkpoints, log, power
from specl.shared.access import Addresses
from specl.shared.adapters import Adapters
from specl.shared.bus import Server
from specl.shared.config import Settings
from specl.shared.crash import crash_point
from specl.shared.engine.engine import Engine
from specl.shared.errors import AdapterRejected, Interrupted, OutboxFull, SpecLoraError, StoreError
from specl.shared.hidden import HiddenSpool
from specl.shared.learning.learner import Learner, agreement
from specl.shared.models import blas
from specl.shared.models.pair import load_pair
from specl.shared.models.release import give_back
from specl.shared.outbox import Outbox
from specl.shared.paths import DISK_REFUSES, Paths
from specl.shared.power import Power
from specl.shared.privacy import is_meant
from specl.shared.process import StopFlag
from specl.shared.store import Store
from specl.shared.wire import (
    Activity,
    AdapterReady,
    Batch,
    Fetch,
    GetStatus,
    Purge,
    RecordReady,
    Reply,
    Status,
    Train,
    TryAdapter,
)

TICK_S = 0.5
LOOK_S = 5.0  # between looks at the store
RETRY_S, LONGEST_RETRY_S = 300.0, 4 * 3600.0  # after work that failed: twice as long each time in a row
WANTING_S = 60.0  # after a run that had too little: more may have come
DISK_RETRY_S = 15.0  # after one that found no room
SCORE_BATCH = 64
TRIALS_TOLD = 8  # imports whose verdicts `status` still has
_log = log.get("trainer")


class Trainer:
    """The daemon's state; `run` is its loop."""

    def __init__(
        self, paths: Paths, settings: Settings, server: Server, machine: Callable[[], Power] = power.read
    ) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self.outbox = Outbox(paths.outbox("trainer"), settings.records.outbox_limit_mb << 20)
        self.facts = Facts(self.outbox, lambda id: self._out.put(RecordReady(id)))
        self.adapters = Adapters(paths.adapters)
        self.consent = Consent(settings.training, machine)
        self.turnstile = Turnstile(settings.training.idle_seconds, objection=lambda: self.consent.objection)
        self.live = Live()
        self.started = time.monotonic()
        self.pending = 0
        self.troubles: dict[str, str] = {}  # by kind of work: a score that succeeds says nothing of a run that failed
        self._work: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running = threading.Event()
        self._run_waits = threading.Event()  # one is in the queue, behind other work
        self._not_before = self._no_score_before = self._no_look_before = 0.0
        self._job: Job = ""
        self._again = self._wanting = ""  # a run to be repeated; what the last one was short of
        self._retry_s = RETRY_S
        self._wants = False  # there is reason for a run
        self.trials: dict[str, dict[str, str]] = {}  # how the last imports went, by run id
        self._slice_made = False
        self._engine: Engine | None = None
        server.subscribe(Addresses(paths, settings.bus).publish("inference"), self._published)

    # ------------------------------------------------------------------------------------------------ loop thread
    def run(self, stop: StopFlag) -> None:
        """Serve until stopped."""
        self.adapters.sweep()
        self._tell_of_adapters()
        thread = threading.Thread(target=self._mlx_thread, name="mlx", daemon=True)
        thread.start()
        next_look = 0.0
        while not stop:
            self.server.poll(TICK_S, self._request)
            while not self._out.empty():
                self.server.publish(self._out.get())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                self._look()
        self.turnstile.stop()
        self._work.put("stop")
        thread.join(timeout=1.5)
        self.outbox.close()

    def _tell_of_adapters(self) -> None:
        """Record adapters again: a trainer that was killed right after publishing had no time to, and twice is once."""
        for id in self.adapters.ids():
            try:
                self.facts.add(adapter_record(self.adapters, self.adapters.manifest(id)))
            except AdapterRejected as error:
                _log.warning("adapter.unreadable", adapter=id, reason=str(error))

    def _published(self, message: Any) -> None:
        if isinstance(message, Activity):
            self.turnstile.heard(message.busy)

    def _look(self) -> None:
        """Count pending failures; start a run when there are enough, score parked generations when it is quiet."""
        self.consent.look()
        self.facts.offer()
        try:
            store = Store(self.paths.store, read_only=True)
        except StoreError:
            return  # the collector has not made it yet
        try:
            self.pending = store.pending_failures()
            unscored = bool(store.unscored(1))
            doubted = second_look.due(self.adapters)
            answers_to_look_at = doubted is not None and second_look.ready(doubted, store)
            self.troubles.pop("store", None)
        except StoreError as error:
            self.troubles["store"] = str(error)
            return
        finally:
            store.close()
        if self._running.is_set() or not self._work.empty() or self.facts.undelivered:
            return  # work whose outcome the store does not know yet would only be done again
        enough = self.settings.training.enabled and self.pending >= self.settings.training.min_failure_cases
        self._wants = bool(enough or self._again)
        if self.consent.objection and self._again != NOW:
            return
        if doubted is not None and answers_to_look_at and time.monotonic() >= self._no_look_before:
            self._work.put(SecondLook(doubted.id))
        elif doubted is not None and not answers_to_look_at and second_look.worth_waiting(self.adapters):
            return  # a run would go on from what may not be in force for long
        elif self._wants and time.monotonic() >= self._not_before:
            self._put(self._again or f"{self.pending} failures")
            self._again = ""
        elif unscored and time.monotonic() >= self._no_score_before:
            self._work.put("score")  # it waits for a quiet moment itself: a look every 5 s would miss most of them
        elif not self._slice_made and self.pending and self.settings.training.enabled and self.turnstile.quiet:
            self._slice_made = True  # tried once; a run makes what is still missing
            self._work.put("regression")

    def _request(self, peer: bytes, message: Any) -> None:
        match message:
            case GetStatus():
                self.server.send(peer, Status("trainer", self._status()))
            case Fetch():
                self.server.send(peer, self._fetch(message))
            case Train():
                self.server.send(peer, self._train(message))
            case TryAdapter():
                self.server.send(peer, self._try(message))
            case Purge():
                self.server.send(peer, self._purge(message))
            case _:
                self.server.send(peer, Reply(False, "the trainer does not know this request"))

    def _train(self, message: Train) -> Reply:
        if self.settings.records.keep == "statistics":
            return Reply(False, "records.keep is statistics: no text is kept, so there is nothing to learn from")
        self.facts.offer()
        if self.facts.waiting:
            return Reply(False, f"its outcome could not be recorded: {self.facts.trouble}")
        objection = self.consent.objection
        if self._running.is_set() and kind_of_work(self._job) == RUN and not self.turnstile.abandoning:
            if message.now and objection:
                return self._insist_on(self._job, objection)
            return Reply(False, f"a run is under way ({self.live.state}, step {self.live.step})")
        if self._run_waits.is_set():
            return Reply(False, "a run waits already: it starts as soon as inference is idle")
        if not message.now and self.pending < self.settings.training.min_failure_cases:
            return Reply(
                False,
                f"{self.pending} of {self.settings.training.min_failure_cases} failures are there; --now trains on what there is",
            )
        self._put(NOW if message.now else BY_HAND)
        starts = "the run starts as soon as inference is idle"
        if objection:
            waits = f"training waits: {objection} (--now trains all the same)"
            starts += f"; {objection}, trains all the same" if message.now else f"; {waits}"
        return Reply(True, starts)

    def _put(self, job: Job) -> None:
        """Queue work. What somebody waits for does not wait for the machine, nor does what is asked for in spite of it."""
        if isinstance(job, Trial) or (job == NOW and self.consent.objects):
            self.consent.insist(job)
        if kind_of_work(job) == RUN:
            self._run_waits.set()
        self._work.put(job)

    def _insist_on(self, job: Job, objection: str) -> Reply:
        """The run under way is wanted in spite of what held it up."""
        self.consent.insist(job)
        if not self._running.is_set():  # it has just ended
            self.consent.relent(job)
        return Reply(
            True, f"{objection}; the run under way goes on all the same ({self.live.state}, step {self.live.step})"
        )

    def _try(self, wish: TryAdapter) -> Reply:
        """Queue a staged adapter for the gate."""
        try:
            self.adapters.staged(wish.folder)
        except AdapterRejected as error:
            return Reply(False, str(error))
        trial = Trial(uuid.uuid4().hex, wish.folder, wish.name[:200])
        while len(self.trials) >= TRIALS_TOLD:
            self.trials.pop(next(iter(self.trials)))
        self.trials[trial.run_id] = {"verdict": "", "reason": "", "adapter_id": ""}
        self._put(trial)
        return Reply(True, "it is judged as soon as inference is idle", {"run": trial.run_id})

    def _fetch(self, fetch: Fetch) -> Batch:
        try:
            self.outbox.discard(fetch.done)
            rows = self.outbox.oldest(fetch.limit)
        except OutboxFull:  # `status` says it; they are offered again once the disk lets go of them
            return Batch([], self.outbox.pending)
        return Batch(rows, self.outbox.pending - len(rows))

    def _purge(self, wish: Purge) -> Reply:
        """Forget generations: what was found out about them, the run that learns from them and its checkpoint."""
        try:
            ids = self.outbox.matching(lambda row: is_meant(wish, row))
            self.outbox.purge(ids)
            ids += self.facts.purge(lambda row: is_meant(wish, row))
        except OutboxFull as error:
            return Reply(False, str(error))
        abandoned = ""
        if wish.ids:
            if self._running.is_set():
                self.turnstile.abandon()
                abandoned = "; the run under way is abandoned"
            else:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, f"the trainer's outbox and checkpoint forgot them{abandoned}", {"ids": ids})

    def _status(self) -> dict[str, Any]:
        return {
            "state": "busy" if self._running.is_set() else "ready",
            "uptime_s": round(time.monotonic() - self.started, 1),
            "training": {
                "state": self.live.state,
                "waits": self.consent.objection if self._running.is_set() or self._wants else "",
                "step": self.live.step,
                "total": self.live.total,
                "loss": self.live.loss,
                "abandoning": self.turnstile.abandoning,
            },
            "trials": {id: dict(verdict) for id, verdict in list(self.trials.items())},
            "pending": self.pending,
            "trigger": self.settings.training.min_failure_cases,
            "enabled": self.settings.training.enabled,
            "outbox": self.facts.status(),
            "trouble": "; ".join(list(self.troubles.values())),
            "malformed": self.server.malformed,
        }

    # ------------------------------------------------------------------------------------------------ MLX thread
    def _mlx_thread(self) -> None:
        while (job := self._work.get()) != "stop":
            self._job = job
            self._running.set()
            if kind_of_work(job) == RUN:
                self._run_waits.clear()
            try:
                other = {"score": self._score, "regression": self._regression}.get(job)
                other() if other is not None else self._one_run(job)
                self.troubles.pop(kind_of_work(job), None)
            except Abandoned:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
                _log.info("training.abandoned")
            except Overtaken as error:
                self._again = job if isinstance(job, str) else ""
                _log.info("training.overtaken", reason=str(error))
            except Interrupted:
                _log.info("training.interrupted")
            except SpecLoraError as error:
                self.troubles[kind_of_work(job)] = str(error)
                self._hold_off(job)
                _log.error("training.failed", error=str(error))
            except Exception as error:  # the process edge of this thread: one failed run must not end the daemon
                self._failed(job, error)
            finally:
                self.live.state = "idle"
                if isinstance(job, Trial):
                    self._end_of(job)
                self._running.clear()
                self.turnstile.abandoned()  # in this order: whoever is told to end from now on has ended
                self.consent.relent(job)

    def _end_of(self, trial: Trial) -> None:
        """The staged copy has served; whoever waits for a verdict gets one."""
        shutil.rmtree(self.adapters.folder / trial.folder, ignore_errors=True)
        told = self.trials.get(trial.run_id)
        if told is not None and not told["verdict"]:
            told |= {"verdict": "failed", "reason": self.troubles.get(IMPORT) or "it was interrupted before a verdict"}

    def _failed(self, job: Job, error: Exception) -> None:
        """Say what went wrong. A run that found no room on the disk waits for some, and goes on from its checkpoint."""
        kind = kind_of_work(job)
        if isinstance(error, OSError) and error.errno in (None, *DISK_REFUSES):
            self.troubles[kind] = f"the disk refuses, the {kind} is tried again every {DISK_RETRY_S:.0f} s: {error}"
            self._hold_off(job, DISK_RETRY_S)
            self._again = job if kind == RUN else ""
            _log.error("training.disk_refuses", error=str(error))
            return
        self.troubles[kind] = f"{type(error).__name__}: {error}"
        self._hold_off(job)
        _log.exception("training.failed")

    def _hold_off(self, job: Job, seconds: float | None = None) -> None:
        """What failed is not tried again at once; the other kind of work may go on. Without `seconds`: as it failed before."""
        if isinstance(job, Trial):
            return
        if seconds is None:
            seconds, self._retry_s = self._retry_s, min(2 * self._retry_s, LONGEST_RETRY_S)
        if isinstance(job, SecondLook):
            self._no_look_before = time.monotonic() + seconds
        elif job == "score":
            self._no_score_before = time.monotonic() + seconds
        else:
            self._not_before = time.monotonic() + seconds

    def _loaded(self) -> Engine:
        if self._engine is None:
            wanted_for, self.live.state = self.live.state, "loading"
            blas.set_threads(self.settings.training.threads)
            self._engine = load_pair(self.settings, self.paths.models, training=True)
            if self._engine.draft is None:
                self._engine = None
                raise SpecLoraError("there is no draft model to train", "set models.draft.name")
            self.live.state = wanted_for
        return self._engine

    def _gatherer(self, store: Store) -> Gatherer:
        spool = HiddenSpool(self.paths.hidden, self.settings.records.hidden_spool_mb << 20)
        return Gatherer(store, self._loaded(), self.settings, spool, lambda: self.turnstile.pass_through())

    def _one_run(self, what: Job) -> None:
        """Train, or try what is there already."""
        self.turnstile.pass_through()
        store = Store(self.paths.store, read_only=True)
        self.live.step, self.live.total, self.live.loss = 0, 0, None
        try:
            parts = (
                self._loaded(), self._gatherer(store), self.adapters, self.paths, self.settings, self.live,
                self.turnstile.pass_through,
            )  # fmt: skip
            match what:
                case Trial():
                    outcome = TrialJob(what, *parts).run()
                case SecondLook():
                    outcome = LookJob(what, *parts).run()
                case _:
                    outcome = TrainingJob(*parts, what).run()
        finally:
            store.close()
            give_back()  # a run takes many times what scoring does
        if isinstance(what, SecondLook):
            self._looked(what, outcome)
            return
        if isinstance(what, Trial):
            self.trials[what.run_id] = {
                "verdict": outcome.verdict, "reason": outcome.reason, "adapter_id": outcome.adapter_id,
            }  # fmt: skip
        elif outcome.verdict in ("no_data", "no_verdict", "failed"):
            self._hold_off(what, None if outcome.verdict == "failed" else WANTING_S)
        else:
            self._retry_s = RETRY_S
        again = outcome.verdict == self._wanting and outcome.verdict != ""
        self._wanting = outcome.verdict if outcome.verdict in ("no_data", "no_verdict") else ""
        if (
            isinstance(what, Trial) or what in (NOW, BY_HAND) or not again
        ):  # waiting for the same is told of once, not every minute
            self._record(outcome)
        _log.info("training.done", verdict=outcome.verdict, reason=outcome.reason, adapter=outcome.adapter_id or None)

    def _looked(self, look: SecondLook, outcome: Outcome) -> None:
        """Tell of a second look that decided something."""
        if outcome.verdict == "no_verdict":
            self._hold_off(look, WANTING_S)
        else:
            self._record(outcome)
        _log.info("second_look.done", adapter=look.adapter, verdict=outcome.verdict, reason=outcome.reason)

    def _record(self, outcome: Outcome) -> None:
        for record in outcome.records:
            self.facts.add(record)
        if outcome.path is not None:
            crash_point("adapter.before_publish")
            self._out.put(AdapterReady(outcome.adapter_id, str(outcome.path)))
            self.adapters.prune(keep=())
        self.server.wake()

    def _regression(self) -> None:
        """Make the regression slice and a part of the texts to replay while nobody waits, so that a run need not."""
        self.live.state = "preparing"
        count = self.settings.training.regression_prompts
        RegressionSlice(self.paths.regression, self._loaded(), count, self.turnstile.pass_through).examples()
        store = Store(self.paths.store, read_only=True)
        try:
            more = self._gatherer(store).capture_replay(self.paths.training, self.live.tell)
        finally:
            store.close()
        self.live.tell(0, 0)
        self._slice_made = not more  # the next part in the next quiet moment, unless a run comes first

    def _score(self) -> None:
        """Teacher-forced agreement of generations that were parked: without it they would never count as failures."""
        self.turnstile.pass_through()
        store = Store(self.paths.store, read_only=True)
        self.live.state = "scoring"
        try:
            engine, gatherer = self._loaded(), self._gatherer(store)
            adapter = in_force(self.adapters, engine)
            engine.use_adapter(adapter)
            rows = store.unscored(SCORE_BATCH, engine.target.fingerprint)
            for row in rows:
                self.turnstile.pass_through()
                score = agreement(Learner(engine.draft), [gatherer.example(row)])
                self.facts.add(scored(row.values["id"], adapter.id if adapter else "", score))
            if not rows:  # what is left was written by another target
                self._no_score_before = time.monotonic() + RETRY_S
        finally:
            store.close()
            self.server.wake()
