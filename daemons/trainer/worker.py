"""The trainer's one MLX thread: loads the models when first needed, does one job after another, and
says how each ended.

It decides nothing about what is done next (schedule.py), and touches no socket and no outbox but
for scores.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from specl.daemons.trainer.adapter_evaluation import evaluate_adapter
from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.jobs import (
    Ending,
    EvaluateAdapterJob,
    Job,
    JobEnded,
    Outcome,
    PrepareRegressionJob,
    ReevaluateJob,
    ScoreJob,
    Stop,
    TrainJob,
)
from specl.daemons.trainer.record_queue import RecordQueue
from specl.daemons.trainer.records import scored
from specl.daemons.trainer.reevaluation import Reevaluation
from specl.daemons.trainer.run_context import RunContext
from specl.daemons.trainer.scoring import learner_of, load_active_adapter
from specl.daemons.trainer.throttle import Abandoned, Superseded, Throttle
from specl.daemons.trainer.training_loop import RunProgress
from specl.daemons.trainer.training_run import AdapterTraining
from specl.shared.adapters.registry import Adapters
from specl.shared.engine.core import EngineCore
from specl.shared.errors import Interrupted, SpecLoraError
from specl.shared.learning.learner import agreement
from specl.shared.loading.engine import load_engine
from specl.shared.models import blas
from specl.shared.models.free_memory import free_memory
from specl.shared.paths import DISK_REFUSES, Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

SCORE_BATCH = 64
_log = log.get("trainer")


class TrainingWorker(threading.Thread):
    """`ended` is called on this thread after each job; `progress` may be read from any thread.

    `failure` is set, and `wake_loop` called, when the thread cannot go on.
    """

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        throttle: Throttle,
        records: RecordQueue,
        ended: Callable[[JobEnded], None],
        wake_loop: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="mlx", daemon=True)
        self._wake_loop = wake_loop
        self.failure: BaseException | None = None
        self._paths, self._settings, self._throttle, self._records = paths, settings, throttle, records
        self._ended = ended
        self._adapters = Adapters(paths.adapters)
        self._jobs: queue.SimpleQueue[Job | Stop] = queue.SimpleQueue()
        self._engine: EngineCore | None = None
        self.progress = RunProgress()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Stop the thread after the present piece of work."""
        self._throttle.stop()
        self._jobs.put(Stop())
        self.join(timeout=1.5)

    def run(self) -> None:
        """Do the jobs of the queue, one after another."""
        try:
            while not isinstance(job := self._jobs.get(), Stop):
                ended = self.do(job)
                self.progress.state = "idle"
                self._ended(ended)
        except BaseException as error:  # SystemExit out of a custom loss, a panic of native code
            self.failure = error
            self._wake_loop()

    def do(self, job: Job) -> JobEnded:
        """Do one job on the calling thread. An Exception in it does not end the daemon."""
        try:
            return self._do(job)
        except Abandoned:
            _log.info("training.abandoned")
            return JobEnded(job, Ending.ABANDONED)
        except Superseded as error:
            _log.info("training.superseded", reason=str(error))
            return JobEnded(job, Ending.SUPERSEDED, str(error))
        except Interrupted:
            _log.info("training.interrupted")
            return JobEnded(job, Ending.INTERRUPTED)
        except SpecLoraError as error:
            _log.error("training.failed", error=str(error))
            return JobEnded(job, Ending.FAILED, str(error))
        except OSError as error:
            if error.errno in (None, *DISK_REFUSES):
                _log.error("training.disk_refused", error=str(error))
                return JobEnded(job, Ending.DISK_FULL, str(error))
            return self._bug(job, error)
        except Exception as error:  # the process edge of this thread: one failed run must not end the daemon
            return self._bug(job, error)

    def _bug(self, job: Job, error: Exception) -> JobEnded:
        _log.exception("training.failed")
        return JobEnded(job, Ending.FAILED, f"{type(error).__name__}: {error}")

    def _do(self, job: Job) -> JobEnded:
        match job:
            case ScoreJob():
                return JobEnded(job, Ending.DONE, more=self._score())
            case PrepareRegressionJob():
                return JobEnded(job, Ending.DONE, more=self._prepare())
            case _:
                return JobEnded(job, Ending.DONE, outcome=self.run_of(job))

    # ------------------------------------------------------------------------------------------------ models and texts
    def _loaded(self) -> EngineCore:
        if self._engine is None:
            state, self.progress.state = self.progress.state, "loading"
            blas.set_threads(self._settings.training.threads)
            engine = load_engine(self._settings, self._paths.models, training=True)
            learner_of(engine)
            self._engine, self.progress.state = engine, state
        return self._engine

    @contextmanager
    def _data_loader(self) -> Iterator[DataLoader]:
        store = Store(self._paths.store, read_only=True)
        try:
            spool = HiddenSpool(self._paths.hidden, self._settings.records.hidden_spool_mb << 20)
            yield DataLoader(store, self._loaded(), self._settings, spool, self._throttle.wait_for_turn)
        finally:
            store.close()

    def _context(self, data_loader: DataLoader) -> RunContext:
        pause = self._throttle.wait_for_turn
        return RunContext(
            data_loader.engine, data_loader, self._adapters, self._paths, self._settings, self.progress, pause
        )

    # ------------------------------------------------------------------------------------------------ the jobs
    def run_of(self, job: TrainJob | EvaluateAdapterJob | ReevaluateJob) -> Outcome:
        """The run of a job: training, or the evaluation of an adapter that exists already."""
        self._throttle.wait_for_turn()
        self.progress.clear()
        try:
            with self._data_loader() as data_loader:
                context = self._context(data_loader)
                match job:
                    case EvaluateAdapterJob():
                        return evaluate_adapter(context, job)
                    case ReevaluateJob():
                        return Reevaluation(context, job).run()
                    case _:
                        return AdapterTraining(context, job).run()
        finally:
            free_memory()  # a run takes many times what scoring does

    def _prepare(self) -> bool:
        """Make the regression slice and one part of the texts to replay, ahead of a run. Returns
        whether parts are left.
        """
        self.progress.state = "preparing"
        with self._data_loader() as data_loader:
            self._context(data_loader).regression_slice()
            more = data_loader.capture_replay(self._paths.training, self.progress.set_step)
        self.progress.clear()
        return more

    def _score(self) -> bool:
        """Score generations that were answered without drafting, by teacher-forced agreement:
        without a score they never count as failures. Returns whether any could be scored; those of
        another target cannot.
        """
        self._throttle.wait_for_turn()
        self.progress.state = "scoring"
        with self._data_loader() as data_loader:
            engine = self._loaded()
            adapter = load_active_adapter(self._adapters, engine)
            engine.use_adapter(adapter)
            learner = learner_of(engine)
            rows = data_loader.store.unscored(SCORE_BATCH, engine.target.fingerprint)
            for row in rows:
                self._throttle.wait_for_turn()
                score = agreement(learner, [data_loader.example(row)])
                self._records.add(scored(row.id, adapter.id if adapter else "", score))
        return bool(rows)
