"""The trainer daemon: looks at the store, gives its MLX thread one job at a time, answers requests
and announces adapters.

The loop thread owns the sockets, the outbox and the schedule; the MLX thread (worker.py)
owns the models.
"""

import queue
import shutil
import time
from collections.abc import Callable
from typing import Any

from specl.daemons.trainer import reevaluation
from specl.daemons.trainer.jobs import Ending, EvaluateAdapterJob, Job, JobEnded, JobKind, Outcome, TrainJob
from specl.daemons.trainer.power_policy import PowerPolicy
from specl.daemons.trainer.record_queue import RecordQueue
from specl.daemons.trainer.records import adapter_record
from specl.daemons.trainer.schedule import Schedule, TrainerInputs, next_job
from specl.daemons.trainer.throttle import Throttle
from specl.daemons.trainer.train_request import TrainAction, TrainState, decide_train
from specl.daemons.trainer.worker import TrainingWorker
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected, OutboxFull, StoreError
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState, RunTrigger, RunVerdict
from specl.shared.messaging.daemon_status import EvaluationStatus, TrainerStatus, TrainingProgress
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Activity,
    AdapterReady,
    EvaluateAdapter,
    Fetch,
    GetStatus,
    Purge,
    RecordReady,
    Reply,
    Train,
)
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.retention import checkpoints
from specl.shared.retention.purge_matching import purge_matches
from specl.shared.runtime import log, power
from specl.shared.runtime.failpoints import failpoint
from specl.shared.runtime.power import Power
from specl.shared.runtime.signals import StopFlag
from specl.shared.runtime.thread_failure import raise_failure
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

TICK_S = 0.5
STORE_CHECK_S = 5.0  # between two reads of the store
MAX_EVALUATIONS = 8  # imports whose verdicts `status` remembers
_log = log.get("trainer")


class Trainer:
    """The daemon's state; `run` is its loop. `machine` reads its power."""

    def __init__(
        self, paths: Paths, settings: Settings, server: Server, machine: Callable[[], Power] = power.read
    ) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self.outbox = Outbox(paths.outbox("trainer"), settings.records.outbox_limit_mb << 20)
        self.records = RecordQueue(self.outbox, lambda id: self._out.put(RecordReady(id)))
        self.adapters = Adapters(paths.adapters)
        self.power_policy = PowerPolicy(settings.training, machine)
        self.throttle = Throttle(
            settings.training.idle_seconds, reason_to_wait=lambda: self.power_policy.reason_to_wait
        )
        self.schedule = Schedule()
        self.evaluations: dict[str, EvaluationStatus] = {}  # the last imports, by run id
        self.worker = TrainingWorker(paths, settings, self.throttle, self.records, self.job_ended, server.wake)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[JobEnded] = queue.SimpleQueue()
        self._started_at = time.monotonic()
        self._inputs = TrainerInputs()
        self._store_problem = ""
        server.subscribe(Addresses(paths, settings.bus).publish("inference"), self._published)

    # ------------------------------------------------------------------------------------------------ the loop
    def run(self, stop: StopFlag) -> None:
        """Serve until stopped. Raises what ended the MLX thread, so that the supervisor starts the daemon again."""
        self.adapters.sweep()
        self._record_adapters()
        self.worker.start()
        next_check = 0.0
        while not stop:
            self.server.poll(TICK_S, self._request)
            while not self._out.empty():
                self.server.publish(self._out.get())
            self.take_results()
            if failure := self.worker.failure:
                raise_failure(failure)
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + STORE_CHECK_S
                self.check()
        self.worker.stop()
        self.take_results()
        self.outbox.close()

    def _record_adapters(self) -> None:
        """Record all adapters again, because a trainer that was killed right after publishing could
        not. The store ignores records that it has (idempotent).
        """
        for id in self.adapters.ids():
            try:
                self.records.add(adapter_record(self.adapters, self.adapters.manifest(id)))
            except AdapterRejected as error:
                _log.warning("adapter.unreadable", adapter=id, reason=str(error))

    def _published(self, message: Any) -> None:
        if isinstance(message, Activity):
            self.throttle.set_busy(message.busy)

    def check(self) -> None:
        """Read the inputs of the schedule, and begin the next job if none is under way."""
        self.power_policy.check()
        self.records.offer()
        try:
            self._inputs = self._read_inputs()
            self._store_problem = ""
        except StoreError as error:
            self._store_problem = str(error)
            return
        if self.schedule.running is None:
            self._begin(next_job(self._inputs, time.monotonic()))

    def _read_inputs(self) -> TrainerInputs:
        """The inputs of `next_job`. Raises StoreError."""
        training, schedule = self.settings.training, self.schedule
        adapter = reevaluation.due(self.adapters)
        if adapter is None:
            schedule.forget(JobKind.REEVALUATE)
        try:
            store = Store(self.paths.store, read_only=True)
        except StoreError:
            return TrainerInputs()  # the collector has not made it yet
        try:
            return TrainerInputs(
                repeat=schedule.repeat,
                undelivered=self.records.undelivered > 0,
                enabled=training.enabled,
                pending_failures=store.pending_failures(),
                min_failures=training.min_failure_cases,
                unscored=bool(store.unscored(1)),
                reevaluation=adapter.id if adapter is not None else "",
                answers_ready=adapter is not None and reevaluation.answers_ready(adapter, store),
                rollback_is_recent=adapter is not None and reevaluation.rollback_is_recent(self.adapters, adapter),
                reason_to_wait=self.power_policy.reason_to_wait,
                quiet=self.throttle.quiet,
                unprepared=schedule.unprepared,
                not_before=dict(schedule.not_before),
            )
        finally:
            store.close()

    # ------------------------------------------------------------------------------------------------ jobs
    def _begin(self, job: Job | None) -> None:
        if job is not None:
            self.schedule.started(job)
            self.worker.submit(job)

    def _request_job(self, job: Job, override: bool) -> None:
        """Do what a user asked for as soon as the thread is free; with `override`, whatever the
        machine says.
        """
        if override:
            self.power_policy.override(job)
        self.schedule.requested.append(job)
        if self.schedule.running is None:
            self._begin(self.schedule.requested[0])

    def job_ended(self, ended: JobEnded) -> None:
        """On the MLX thread: hand over to the loop."""
        self._ended.put(ended)
        self.server.wake()

    def take_results(self) -> None:
        """Handle the jobs that have ended, then begin the next one that a user asked for."""
        while not self._ended.empty():
            ended = self._ended.get()
            if ended.outcome is not None:
                self._take_outcome(ended.job, ended.outcome)
            if isinstance(ended.job, EvaluateAdapterJob):
                self._end_evaluation(ended.job, ended)
            if ended.ending == Ending.ABANDONED or self.throttle.abandoning:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
            self.throttle.clear_abandon()
            self.power_policy.end_override(ended.job)
            self.schedule.ended(ended, time.monotonic())
            if self.schedule.requested:
                self._begin(self.schedule.requested[0])

    def _take_outcome(self, job: Job, outcome: Outcome) -> None:
        """Record and announce an outcome."""
        if self.schedule.is_news(job, outcome):
            for record in outcome.records:
                self.records.add(record)
        if outcome.path is not None:
            failpoint("adapter.before_publish")
            self.server.publish(AdapterReady(outcome.path.name, str(outcome.path)))
            self.adapters.prune(keep=())
        adapter = outcome.adapter_id or None
        _log.info("run.ended", kind=job.kind, verdict=outcome.verdict, reason=outcome.reason, adapter=adapter)

    def _end_evaluation(self, job: EvaluateAdapterJob, ended: JobEnded) -> None:
        """Remove the staged copy and store the verdict, which a client waits for."""
        shutil.rmtree(self.adapters.folder / job.folder, ignore_errors=True)
        if ended.outcome is not None:
            result = EvaluationStatus(ended.outcome.verdict, ended.outcome.reason, ended.outcome.adapter_id)
        else:
            reason = ended.problem or "it was interrupted before a verdict"
            result = EvaluationStatus(RunVerdict.FAILED, reason, "")
        if job.run_id in self.evaluations:
            self.evaluations[job.run_id] = result

    # ------------------------------------------------------------------------------------------------ requests
    def _request(self, peer: bytes, message: Any) -> None:
        match message:
            case GetStatus():
                self.server.send(peer, self._status())
            case Fetch():
                self.server.send(peer, self.outbox.answer(message))
            case Train():
                self.server.send(peer, self.train(message))
            case EvaluateAdapter():
                self.server.send(peer, self.evaluate(message))
            case Purge():
                self.server.send(peer, self.purge(message))
            case _:
                self.server.send(peer, Reply(False, "the trainer does not know this request"))

    def train(self, message: Train) -> Reply:
        """Queue a run that a user asks for, or let the run under way go on whatever the machine's
        state.
        """
        self.records.offer()
        decision = decide_train(self._train_state(), message.now)
        if decision.action == TrainAction.OVERRIDE_RUNNING and self.schedule.running is not None:
            self.power_policy.override(self.schedule.running)
        elif decision.action == TrainAction.QUEUE_RUN:
            trigger = RunTrigger.BY_HAND_NOW if message.now else RunTrigger.BY_HAND
            job = TrainJob(trigger, "by hand, now" if message.now else "by hand")
            self._request_job(job, override=message.now and bool(self.power_policy.reason_to_wait))
        return Reply(decision.action != TrainAction.REFUSE, decision.text)

    def _train_state(self) -> TrainState:
        return TrainState(
            keeps_texts=self.settings.records.keep != "statistics",
            record_problem=self.records.problem if self.records.waiting else None,
            is_running=isinstance(self.schedule.running, TrainJob) and not self.throttle.abandoning,
            has_begun=self.worker.progress.state != "idle",
            progress=self._progress,
            is_queued=self.schedule.run_is_queued,
            reason_to_wait=self.power_policy.reason_to_wait,
            pending_failures=self._inputs.pending_failures,
            min_failures=self.settings.training.min_failure_cases,
        )

    @property
    def _progress(self) -> str:
        return f"{self.worker.progress.state}, step {self.worker.progress.step}"

    def evaluate(self, message: EvaluateAdapter) -> Reply:
        """Queue a staged adapter to be judged."""
        try:
            self.adapters.staged(message.folder)
        except AdapterRejected as error:
            return Reply(False, str(error))
        job = EvaluateAdapterJob(message.folder, message.name[:200])
        while len(self.evaluations) >= MAX_EVALUATIONS:
            self.evaluations.pop(next(iter(self.evaluations)))
        self.evaluations[job.run_id] = EvaluationStatus(None, "", "")
        self._request_job(job, override=True)  # a user waits for the verdict
        return Reply(True, "it is judged as soon as inference is idle", run_id=job.run_id)

    def purge(self, purge: Purge) -> Reply:
        """Forget generations: records about them, the run that learns from them and its checkpoint."""
        try:
            ids = self.outbox.matching(lambda row: purge_matches(purge, row))
            self.outbox.purge(ids)
            ids += self.records.purge(lambda row: purge_matches(purge, row))
        except OutboxFull as error:
            return Reply(False, str(error))
        abandoned = ""
        if purge.ids:
            if self.schedule.running is not None:
                self.throttle.abandon()
                abandoned = "; the run under way is abandoned"
            else:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, f"the trainer's outbox and checkpoint forgot them{abandoned}", ids=ids)

    # ------------------------------------------------------------------------------------------------ status
    def _waits_for(self) -> str:
        """Why no run goes on; empty where one does, or none is wanted."""
        running, reason = self.schedule.running is not None, self.power_policy.reason_to_wait
        if reason and (running or self._inputs.wants_training):
            return reason
        if self._inputs.waits_for_answers and not running:
            return f"for answers to re-evaluate adapter {self._inputs.reevaluation} with"
        return ""

    def _status(self) -> TrainerStatus:
        progress, running = self.worker.progress, self.schedule.running is not None
        return TrainerStatus(
            state=DaemonState.BUSY if running else DaemonState.READY,
            uptime_s=round(time.monotonic() - self._started_at, 1),
            training=TrainingProgress(
                state=progress.state,
                waits=self._waits_for(),
                step=progress.step,
                total=progress.total,
                loss=progress.loss,
                abandoning=self.throttle.abandoning,
            ),
            evaluations=dict(self.evaluations),
            pending=self._inputs.pending_failures,
            trigger=self.settings.training.min_failure_cases,
            enabled=self.settings.training.enabled,
            outbox=self.records.status(),
            trouble="; ".join(filter(None, [self._store_problem, *self.schedule.problems.values()])),
            malformed=self.server.malformed,
        )
