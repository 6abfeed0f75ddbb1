"""The one MLX thread: loads the models when first needed, does what it is given, one job after another, and says how it went.

It touches no socket: what there is to announce goes out through `announce`, records through `facts`.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from specl.daemons.trainer.adapter_evaluation import AdapterEvaluation, AdapterEvaluationJob
from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.jobs import BY_HAND, IMPORT, LOOK, NOW, RUN, STOP, Job, kind_of_work, trigger_of
from specl.daemons.trainer.power_policy import PowerPolicy
from specl.daemons.trainer.record_queue import RecordQueue
from specl.daemons.trainer.records import scored
from specl.daemons.trainer.reevaluation import Reevaluation, ReevaluationJob
from specl.daemons.trainer.regression import RegressionSlice
from specl.daemons.trainer.throttle import Abandoned, Superseded, Throttle
from specl.daemons.trainer.training_loop import Live
from specl.daemons.trainer.training_run import Outcome, TrainingJob, in_force
from specl.shared.adapters.registry import Adapters
from specl.shared.engine.core import EngineCore
from specl.shared.errors import Interrupted, SpecLoraError
from specl.shared.learning.learner import Learner, agreement
from specl.shared.loading.engine import load_engine
from specl.shared.messaging.messages import AdapterReady
from specl.shared.models import blas
from specl.shared.models.free_memory import free_memory
from specl.shared.paths import DISK_REFUSES, Paths
from specl.shared.retention import checkpoints
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

RETRY_S, LONGEST_RETRY_S = 300.0, 4 * 3600.0  # after work that failed: twice as long each time in a row
WANTING_S = 60.0  # after a run that had too little: more may have come
FIRST_RETRY_S = {LOOK: 20.0}
DISK_RETRY_S = 15.0  # after one that found no room
SCORE_BATCH = 64
_log = log.get("trainer")


class Worker(threading.Thread):
    """What it is doing and when it would do more is for the loop thread to read; it alone decides what goes into `jobs`.

    `announce` and `wake` are called from this thread.
    """

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        facts: RecordQueue,
        throttle: Throttle,
        power_policy: PowerPolicy,
        announce: Callable[[Any], None],
        wake: Callable[[], None],
    ) -> None:
        super().__init__(name="mlx", daemon=True)
        self.paths, self.settings, self.facts, self.throttle, self.power_policy = (
            paths,
            settings,
            facts,
            throttle,
            power_policy,
        )
        self._announce, self._wake = announce, wake
        self.adapters = Adapters(paths.adapters)
        self.live = Live()
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.job: Job = ""
        self.running = threading.Event()
        self.run_waits = threading.Event()  # one is in the queue, behind other work
        self.not_before = self.no_score_before = self.no_look_before = 0.0
        self.again = self._wanting = ""  # a run to be repeated; what the last one was short of
        self.troubles: dict[str, str] = {}  # by kind of work: a score that succeeds says nothing of a run that failed
        self.trials: dict[str, dict[str, str]] = {}  # how the last imports went, by run id
        self.slice_made = False
        self._retry_s: dict[str, float] = {}  # by kind of work
        self._engine: EngineCore | None = None

    def put(self, job: Job) -> None:
        """Queue work. What somebody waits for does not wait for the machine, nor does what is asked for in spite of it."""
        if isinstance(job, AdapterEvaluation) or (job == NOW and self.power_policy.objects):
            self.power_policy.insist(job)
        if kind_of_work(job) == RUN:
            self.run_waits.set()
        self.jobs.put(job)

    def no_look_due(self) -> None:
        """What the last second look failed for is past."""
        self.troubles.pop(LOOK, None)
        self._retry_s.pop(LOOK, None)
        self.no_look_before = 0.0

    def end(self) -> None:
        """After the present piece of work."""
        self.throttle.stop()
        self.jobs.put(STOP)
        self.join(timeout=1.5)

    # ------------------------------------------------------------------------------------------------ the thread
    def run(self) -> None:
        """One job after another."""
        while (job := self.jobs.get()) != STOP:
            self.job = job
            self.running.set()
            if kind_of_work(job) == RUN:
                self.run_waits.clear()
            try:
                other = {"score": self._score, "regression": self._regression}.get(job)
                other() if other is not None else self._one_run(job)
                self.troubles.pop(kind_of_work(job), None)
            except Abandoned:
                checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
                _log.info("training.abandoned")
            except Superseded as error:
                if kind_of_work(job) == RUN:
                    self.again = job
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
                if isinstance(job, AdapterEvaluation):
                    self._end_of(job)
                self.running.clear()
                self.throttle.abandoned()  # in this order: whoever is told to end from now on has ended
                self.power_policy.relent(job)

    def _end_of(self, trial: AdapterEvaluation) -> None:
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
            if kind == RUN:
                self.again = job
            _log.error("training.disk_refuses", error=str(error))
            return
        self.troubles[kind] = f"{type(error).__name__}: {error}"
        self._hold_off(job)
        _log.exception("training.failed")

    def _hold_off(self, job: Job, seconds: float | None = None) -> None:
        """What failed is not tried again at once; the other kind of work may go on. Without `seconds`: as it failed before."""
        if isinstance(job, AdapterEvaluation):
            return
        if seconds is None:
            kind = kind_of_work(job)
            seconds = self._retry_s.get(kind, FIRST_RETRY_S.get(kind, RETRY_S))
            self._retry_s[kind] = min(2 * seconds, LONGEST_RETRY_S)
        if isinstance(job, Reevaluation):
            self.no_look_before = time.monotonic() + seconds
        elif job == "score":
            self.no_score_before = time.monotonic() + seconds
        else:
            self.not_before = time.monotonic() + seconds

    def _loaded(self) -> EngineCore:
        if self._engine is None:
            wanted_for, self.live.state = self.live.state, "loading"
            blas.set_threads(self.settings.training.threads)
            self._engine = load_engine(self.settings, self.paths.models, training=True)
            if self._engine.draft is None:
                self._engine = None
                raise SpecLoraError("there is no draft model to train", "set models.draft.name")
            self.live.state = wanted_for
        return self._engine

    def _gatherer(self, store: Store) -> DataLoader:
        spool = HiddenSpool(self.paths.hidden, self.settings.records.hidden_spool_mb << 20)
        return DataLoader(store, self._loaded(), self.settings, spool, lambda: self.throttle.wait_for_turn())

    def _one_run(self, what: Job) -> None:
        """Train, or try what is there already."""
        self.throttle.wait_for_turn()
        store = Store(self.paths.store, read_only=True)
        self.live.step, self.live.total, self.live.loss = 0, 0, None
        try:
            parts = (
                self._loaded(), self._gatherer(store), self.adapters, self.paths, self.settings, self.live,
                self.throttle.wait_for_turn,
            )  # fmt: skip
            match what:
                case AdapterEvaluation():
                    self._tried(what, AdapterEvaluationJob(what, *parts).run())
                case Reevaluation():
                    self._looked(what, ReevaluationJob(what, *parts).run())
                case _:
                    self._trained(what, TrainingJob(*parts, trigger_of(what), what).run())
        finally:
            store.close()
            free_memory()  # a run takes many times what scoring does

    def _trained(self, what: str, outcome: Outcome) -> None:
        """When to try again, and what the store is told: waiting for the same once, not every minute."""
        waits = outcome.verdict in ("no_data", "no_verdict")
        if waits or outcome.verdict == "failed":
            self._hold_off(what, WANTING_S if waits else None)
        else:
            self._retry_s.pop(RUN, None)
        known, self._wanting = self._wanting, outcome.verdict if waits else ""
        if what in (NOW, BY_HAND) or not waits or outcome.verdict != known:
            self._record(outcome)
        _log.info("training.done", verdict=outcome.verdict, reason=outcome.reason, adapter=outcome.adapter_id or None)

    def _tried(self, trial: AdapterEvaluation, outcome: Outcome) -> None:
        """Somebody waits for it."""
        self.trials[trial.run_id] = {
            "verdict": outcome.verdict, "reason": outcome.reason, "adapter_id": outcome.adapter_id,
        }  # fmt: skip
        self._record(outcome)
        _log.info("import.done", verdict=outcome.verdict, reason=outcome.reason, adapter=outcome.adapter_id or None)

    def _looked(self, look: Reevaluation, outcome: Outcome) -> None:
        """Tell of a second look that decided something."""
        if outcome.verdict == "no_verdict":
            self._hold_off(look)
        else:
            self._record(outcome)
        _log.info("second_look.done", adapter=look.adapter, verdict=outcome.verdict, reason=outcome.reason)

    def _record(self, outcome: Outcome) -> None:
        for record in outcome.records:
            self.facts.add(record)
        if outcome.path is not None:
            failpoint("adapter.before_publish")
            self._announce(AdapterReady(outcome.adapter_id, str(outcome.path)))
            self.adapters.prune(keep=())
        self._wake()

    def _regression(self) -> None:
        """Make the regression slice and a part of the texts to replay while nobody waits, so that a run need not."""
        self.live.state = "preparing"
        count = self.settings.training.regression_prompts
        RegressionSlice(self.paths.regression, self._loaded(), count, self.throttle.wait_for_turn).examples()
        store = Store(self.paths.store, read_only=True)
        try:
            more = self._gatherer(store).capture_replay(self.paths.training, self.live.tell)
        finally:
            store.close()
        self.live.tell(0, 0)
        self.slice_made = not more  # the next part in the next quiet moment, unless a run comes first

    def _score(self) -> None:
        """Teacher-forced agreement of generations that were parked: without it they would never count as failures."""
        self.throttle.wait_for_turn()
        store = Store(self.paths.store, read_only=True)
        self.live.state = "scoring"
        try:
            engine, data_loader = self._loaded(), self._gatherer(store)
            adapter = in_force(self.adapters, engine)
            engine.use_adapter(adapter)
            rows = store.unscored(SCORE_BATCH, engine.target.fingerprint)
            for row in rows:
                self.throttle.wait_for_turn()
                score = agreement(Learner(engine.draft), [data_loader.example(row)])
                self.facts.add(scored(row.id, adapter.id if adapter else "", score))
            if not rows:  # what is left was written by another target
                self.no_score_before = time.monotonic() + RETRY_S
        finally:
            store.close()
            self._wake()
