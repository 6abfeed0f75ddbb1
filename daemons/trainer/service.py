"""The trainer daemon: watches the store for its trigger, runs training on one MLX thread, answers and announces.

The loop thread owns the sockets and the outbox; the MLX thread (worker.py) owns the models.
"""

import queue
import time
import uuid
from collections.abc import Callable
from typing import Any

from specl.daemons.trainer import reevaluation
from specl.daemons.trainer.adapter_evaluation import AdapterEvaluation
from specl.daemons.trainer.jobs import BY_HAND, NOW, RUN, Job, kind_of_work
from specl.daemons.trainer.power_policy import PowerPolicy
from specl.daemons.trainer.record_queue import RecordQueue
from specl.daemons.trainer.records import adapter_record
from specl.daemons.trainer.reevaluation import Reevaluation
from specl.daemons.trainer.throttle import Throttle
from specl.daemons.trainer.worker import Worker
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected, OutboxFull, StoreError
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState, RunVerdict
from specl.shared.messaging.daemon_status import EvaluationStatus, TrainerStatus, TrainingProgress
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Activity,
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
from specl.shared.runtime.power import Power
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

TICK_S = 0.5
LOOK_S = 5.0  # between looks at the store
TRIALS_TOLD = 8  # imports whose verdicts `status` still has
_log = log.get("trainer")


class Trainer:
    """The daemon's state; `run` is its loop."""

    def __init__(
        self, paths: Paths, settings: Settings, server: Server, machine: Callable[[], Power] = power.read
    ) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self.outbox = Outbox(paths.outbox("trainer"), settings.records.outbox_limit_mb << 20)
        self.facts = RecordQueue(self.outbox, lambda id: self._out.put(RecordReady(id)))
        self.adapters = Adapters(paths.adapters)
        self.power_policy = PowerPolicy(settings.training, machine)
        self.throttle = Throttle(settings.training.idle_seconds, objection=lambda: self.power_policy.objection)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.worker = Worker(paths, settings, self.facts, self.throttle, self.power_policy, self._out.put, server.wake)
        self.started = time.monotonic()
        self.pending = 0
        self._wants = False  # there is reason for a run
        self._put_off_for = ""  # the adapter that a run waits for a second look at
        self._store_trouble = ""
        server.subscribe(Addresses(paths, settings.bus).publish("inference"), self._published)

    # ------------------------------------------------------------------------------------------------ loop thread
    def run(self, stop: StopFlag) -> None:
        """Serve until stopped."""
        self.adapters.sweep()
        self._tell_of_adapters()
        self.worker.start()
        next_look = 0.0
        while not stop:
            self.server.poll(TICK_S, self._request)
            while not self._out.empty():
                self.server.publish(self._out.get())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                self._look()
        self.worker.end()
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
            self.throttle.heard(message.busy)

    def _look(self) -> None:
        """Count pending failures; start a run when there are enough, score parked generations when it is quiet."""
        self.power_policy.look()
        self.facts.offer()
        try:
            store = Store(self.paths.store, read_only=True)
        except StoreError:
            return  # the collector has not made it yet
        try:
            self.pending = store.pending_failures()
            unscored = bool(store.unscored(1))
            doubted = reevaluation.due(self.adapters) if self.settings.training.enabled else None
            answers_to_look_at = doubted is not None and reevaluation.ready(doubted, store)
            self._store_trouble = ""
        except StoreError as error:
            self._store_trouble = str(error)
            return
        finally:
            store.close()
        if self.worker.running.is_set() or not self.worker.jobs.empty() or self.facts.undelivered:
            return  # work whose outcome the store does not know yet would only be done again
        enough = self.settings.training.enabled and self.pending >= self.settings.training.min_failure_cases
        self._wants = bool(enough or self.worker.again)
        if self.power_policy.objection and self.worker.again != NOW:
            return
        if doubted is None:
            self.worker.no_look_due()
        # a run would go on from what may not be in force for long
        put_off = doubted is not None and not answers_to_look_at and reevaluation.worth_waiting(self.adapters)
        self._put_off_for = doubted.id if put_off and self._wants else ""
        if doubted is not None and answers_to_look_at and time.monotonic() >= self.worker.no_look_before:
            self.worker.put(Reevaluation(doubted.id))
        elif self._wants and (not put_off or self.worker.again == NOW) and time.monotonic() >= self.worker.not_before:
            self.worker.put(self.worker.again or f"{self.pending} failures")
            self.worker.again = ""
        elif unscored and time.monotonic() >= self.worker.no_score_before:
            self.worker.put("score")  # it waits for a quiet moment itself: a look every 5 s would miss most of them
        elif not self.worker.slice_made and self.pending and self.settings.training.enabled and self.throttle.quiet:
            self.worker.slice_made = True  # tried once; a run makes what is still missing
            self.worker.put("regression")

    def _request(self, peer: bytes, message: Any) -> None:
        match message:
            case GetStatus():
                self.server.send(peer, self._status())
            case Fetch():
                self.server.send(peer, self.outbox.answer(message))
            case Train():
                self.server.send(peer, self._train(message))
            case EvaluateAdapter():
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
        objection = self.power_policy.objection
        if self.worker.running.is_set() and kind_of_work(self.worker.job) == RUN and not self.throttle.abandoning:
            if message.now and objection:
                return self._insist_on(self.worker.job, objection)
            return Reply(False, f"a run is under way ({self.worker.live.state}, step {self.worker.live.step})")
        if self.worker.run_waits.is_set():
            return Reply(False, "a run waits already: it starts as soon as inference is idle")
        if not message.now and self.pending < self.settings.training.min_failure_cases:
            return Reply(
                False,
                f"{self.pending} of {self.settings.training.min_failure_cases} failures are there; --now trains on what there is",
            )
        self.worker.put(NOW if message.now else BY_HAND)
        starts = "the run starts as soon as inference is idle"
        if objection:
            waits = f"training waits: {objection} (--now trains all the same)"
            starts += f"; {objection}, trains all the same" if message.now else f"; {waits}"
        return Reply(True, starts)

    def _insist_on(self, job: Job, objection: str) -> Reply:
        """The run under way is wanted in spite of what held it up."""
        self.power_policy.insist(job)
        if not self.worker.running.is_set():  # it has just ended
            self.power_policy.relent(job)
        return Reply(
            True,
            f"{objection}; the run under way goes on all the same ({self.worker.live.state}, step {self.worker.live.step})",
        )

    def _try(self, wish: EvaluateAdapter) -> Reply:
        """Queue a staged adapter for the gate."""
        try:
            self.adapters.staged(wish.folder)
        except AdapterRejected as error:
            return Reply(False, str(error))
        trial = AdapterEvaluation(uuid.uuid4().hex, wish.folder, wish.name[:200])
        while len(self.worker.trials) >= TRIALS_TOLD:
            self.worker.trials.pop(next(iter(self.worker.trials)))
        self.worker.trials[trial.run_id] = {"verdict": "", "reason": "", "adapter_id": ""}
        self.worker.put(trial)
        return Reply(True, "it is judged as soon as inference is idle", run_id=trial.run_id)

    def _purge(self, wish: Purge) -> Reply:
        """Forget generations: what was found out about them, the run that learns from them and its checkpoint."""
        try:
            ids = self.outbox.matching(lambda row: purge_matches(wish, row))
            self.outbox.purge(ids)
            ids += self.facts.purge(lambda row: purge_matches(wish, row))
        except OutboxFull as error:
            return Reply(False, str(error))
        abandoned = ""
        if wish.ids:
            if self.worker.running.is_set():
                self.throttle.abandon()
                abandoned = "; the run under way is abandoned"
            else:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, f"the trainer's outbox and checkpoint forgot them{abandoned}", ids=ids)

    def _waits_for(self) -> str:
        """Why no run goes on; empty where one does, or none is wanted."""
        if self.power_policy.objection and (self.worker.running.is_set() or self._wants):
            return self.power_policy.objection
        return f"for answers to look at adapter {self._put_off_for} again" if self._put_off_for else ""

    def _status(self) -> TrainerStatus:
        return TrainerStatus(
            state=DaemonState.BUSY if self.worker.running.is_set() else DaemonState.READY,
            uptime_s=round(time.monotonic() - self.started, 1),
            training=TrainingProgress(
                state=self.worker.live.state,
                waits=self._waits_for(),
                step=self.worker.live.step,
                total=self.worker.live.total,
                loss=self.worker.live.loss,
                abandoning=self.throttle.abandoning,
            ),
            evaluations={id: _evaluation(outcome) for id, outcome in list(self.worker.trials.items())},
            pending=self.pending,
            trigger=self.settings.training.min_failure_cases,
            enabled=self.settings.training.enabled,
            outbox=self.facts.status(),
            trouble="; ".join(filter(None, [self._store_trouble, *self.worker.troubles.values()])),
            malformed=self.server.malformed,
        )


def _evaluation(outcome: dict[str, str]) -> EvaluationStatus:
    verdict = RunVerdict(outcome["verdict"]) if outcome["verdict"] else None
    return EvaluationStatus(verdict, outcome["reason"], outcome["adapter_id"])
