"""What the trainer does next: `next_job`, a pure function of its inputs, and `Schedule`, the state
between two jobs.

The schedule belongs to the loop thread, and no other thread reads it. It knows nothing of models,
stores and sockets; time is an argument.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from specl.daemons.trainer.jobs import (
    Ending,
    EvaluateAdapterJob,
    Job,
    JobEnded,
    JobKind,
    Outcome,
    PrepareRegressionJob,
    ReevaluateJob,
    ScoreJob,
    TrainJob,
)
from specl.shared.messaging.codes import RunTrigger, RunVerdict

RETRY_S, MAX_RETRY_S = 300.0, 4 * 3600.0  # pause after a failed job; it doubles with each failure in a row
REEVALUATION_RETRY_S = 20.0  # the first such pause of a reevaluation
MORE_DATA_S = 60.0  # pause after a run that had too little data; more may have come by then
DISK_RETRY_S = 15.0  # pause after a job that found no room on the disk
TOO_LITTLE = (RunVerdict.NO_DATA, RunVerdict.NO_VERDICT)


@dataclass(frozen=True, slots=True)
class TrainerInputs:
    """What `next_job` depends on, as it was at one moment."""

    repeat: TrainJob | None = None  # a run that could not be finished
    undelivered: bool = False  # some records have not reached the store; their work would be done twice
    enabled: bool = True  # the setting `training.enabled`
    pending_failures: int = 0
    min_failures: int = 1
    unscored: bool = False  # there are generations that were answered without drafting
    reevaluation: str = ""  # id of the adapter that is due for a reevaluation
    answers_ready: bool = False  # there are enough answers for that reevaluation
    rollback_is_recent: bool = False  # the active adapter may change soon, and a run would start from it
    reason_to_wait: str = ""  # why the machine should not be loaded now
    quiet: bool = False  # inference has been idle for long enough
    unprepared: bool = False  # the regression slice or texts to replay are missing
    not_before: Mapping[JobKind, float] = field(default_factory=dict)

    @property
    def wants_training(self) -> bool:
        """Whether there is reason for a run."""
        return self.repeat is not None or (self.enabled and self.pending_failures >= self.min_failures)

    @property
    def waits_for_answers(self) -> bool:
        """Whether a run is put off until the adapter before it can be reevaluated."""
        return self.wants_training and self.rollback_is_recent and not self.answers_ready

    def may_try(self, kind: JobKind, now: float) -> bool:
        """Whether the last failure of this kind is long enough ago."""
        return now >= self.not_before.get(kind, 0.0)


def next_job(inputs: TrainerInputs, now: float) -> Job | None:
    """The job to begin, in this order: a reevaluation, a run, scores, preparation. None where
    nothing is to be done.

    What users ask for is begun before all of these.
    """
    is_forced = inputs.repeat is not None and inputs.repeat.trigger == RunTrigger.BY_HAND_NOW
    if inputs.undelivered or (inputs.reason_to_wait and not is_forced):
        return None
    if inputs.reevaluation and inputs.answers_ready and inputs.may_try(JobKind.REEVALUATE, now):
        return ReevaluateJob(inputs.reevaluation)
    if inputs.wants_training and inputs.may_try(JobKind.TRAIN, now) and (is_forced or not inputs.waits_for_answers):
        return inputs.repeat or TrainJob(RunTrigger.FAILURES, f"{inputs.pending_failures} failures")
    if inputs.unscored and inputs.may_try(JobKind.SCORE, now):
        return ScoreJob()  # it waits for a quiet moment itself: looking every few seconds would miss most of them
    if inputs.enabled and inputs.pending_failures and inputs.quiet and inputs.unprepared:
        return PrepareRegressionJob()
    return None


@dataclass(slots=True)
class Schedule:
    """The jobs that users asked for, the job under way, and what earlier jobs left behind: retry
    times, problems, a run to repeat.
    """

    requested: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    repeat: TrainJob | None = None
    unprepared: bool = True
    not_before: dict[JobKind, float] = field(default_factory=dict)
    problems: dict[JobKind, str] = field(
        default_factory=dict
    )  # by kind: a score that succeeds does not mend a failed run
    retry_s: dict[JobKind, float] = field(default_factory=dict)
    too_little: RunVerdict | None = None  # what the last run was short of

    @property
    def run_is_queued(self) -> bool:
        """Whether a run that a user asked for waits behind other work."""
        return any(job.kind == JobKind.TRAIN for job in self.requested)

    def started(self, job: Job) -> None:
        """`job` is under way."""
        self.running = job
        if self.requested and job is self.requested[0]:
            self.requested.popleft()
        if isinstance(job, TrainJob):
            self.repeat = None
        if isinstance(job, PrepareRegressionJob):
            self.unprepared = False  # tried once; a run makes what is still missing

    def ended(self, ended: JobEnded, now: float) -> None:
        """Update the schedule after a job has ended."""
        job, kind = ended.job, ended.job.kind
        self.running = None
        if ended.ending == Ending.DONE:
            self.problems.pop(kind, None)
            self._done(ended, now)
        elif ended.ending == Ending.FAILED:
            self.problems[kind] = ended.problem
            self._failed(kind, now)
        elif ended.ending == Ending.DISK_FULL:
            retry = f"the disk refuses, the {kind} is tried again every {DISK_RETRY_S:.0f} s"
            self.problems[kind] = f"{retry}: {ended.problem}"
            self.not_before[kind] = now + DISK_RETRY_S
        if ended.ending in (Ending.DISK_FULL, Ending.SUPERSEDED) and isinstance(job, TrainJob):
            self.repeat = job

    def _done(self, ended: JobEnded, now: float) -> None:
        verdict = ended.outcome.verdict if ended.outcome is not None else None
        match ended.job:
            case TrainJob() if verdict == RunVerdict.FAILED:
                self._failed(JobKind.TRAIN, now)
            case TrainJob() if verdict in TOO_LITTLE:
                self.not_before[JobKind.TRAIN] = now + MORE_DATA_S
            case TrainJob():
                self.forget(JobKind.TRAIN)
            case ReevaluateJob() if verdict == RunVerdict.NO_VERDICT:
                self._failed(JobKind.REEVALUATE, now)
            case ReevaluateJob():
                self.forget(JobKind.REEVALUATE)
            case ScoreJob() if not ended.more:  # what is left was written by another target
                self.not_before[JobKind.SCORE] = now + RETRY_S
            case PrepareRegressionJob():
                self.unprepared = ended.more

    def forget(self, kind: JobKind) -> None:
        """Forget earlier failures of this kind: it has succeeded, or is no longer due."""
        for values in (self.problems, self.retry_s, self.not_before):
            values.pop(kind, None)

    def _failed(self, kind: JobKind, now: float) -> None:
        seconds = self.retry_s.get(kind, REEVALUATION_RETRY_S if kind == JobKind.REEVALUATE else RETRY_S)
        self.retry_s[kind] = min(2 * seconds, MAX_RETRY_S)
        self.not_before[kind] = now + seconds

    def is_news(self, job: Job, outcome: Outcome) -> bool:
        """Whether to record this outcome in the store. An automatic run that lacks the same data as the
        one before is recorded once, not every minute. A reevaluation without a verdict is not
        recorded, because it is tried again.
        """
        if isinstance(job, EvaluateAdapterJob):
            return True
        if isinstance(job, ReevaluateJob):
            return outcome.verdict != RunVerdict.NO_VERDICT
        before, self.too_little = self.too_little, outcome.verdict if outcome.verdict in TOO_LITTLE else None
        automatic = isinstance(job, TrainJob) and job.trigger == RunTrigger.FAILURES
        return not automatic or self.too_little is None or self.too_little != before
