"""What the trainer does next: `next_job`, a pure function of what it sees, and `Schedule`, the
state between two jobs.

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
    Kind,
    Outcome,
    PrepareRegressionJob,
    ReevaluateJob,
    ScoreJob,
    TrainJob,
)
from specl.shared.messaging.codes import RunTrigger, RunVerdict

RETRY_S, MAX_RETRY_S = 300.0, 4 * 3600.0  # after work that failed: twice as long each time in a row
REEVALUATION_RETRY_S = 20.0  # the first of them
MORE_DATA_S = 60.0  # after a run that had too little: more may have come
DISK_RETRY_S = 15.0  # after one that found no room
TOO_LITTLE = (RunVerdict.NO_DATA, RunVerdict.NO_VERDICT)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the trainer sees at one moment."""

    repeat: TrainJob | None = None  # a run that could not be finished
    undelivered: bool = False  # records have not reached the store: their work would only be done again
    enabled: bool = True
    pending_failures: int = 0
    min_failures: int = 1
    unscored: bool = False  # generations were answered without drafting
    reevaluation: str = ""  # the adapter that is due
    answers_ready: bool = False  # enough of them for it
    rollback_is_recent: bool = False  # a run would go on from what may not be in force for long
    reason_to_wait: str = ""  # the machine's
    quiet: bool = False
    unprepared: bool = False  # the regression slice or texts to replay are missing
    not_before: Mapping[Kind, float] = field(default_factory=dict)

    @property
    def wants_training(self) -> bool:
        """Whether there is reason for a run."""
        return self.repeat is not None or (self.enabled and self.pending_failures >= self.min_failures)

    @property
    def waits_for_answers(self) -> bool:
        """Whether a run is put off until the adapter before it can be reevaluated."""
        return self.wants_training and self.rollback_is_recent and not self.answers_ready

    def may_try(self, kind: Kind, now: float) -> bool:
        """Whether the last failure of this kind is long enough ago."""
        return now >= self.not_before.get(kind, 0.0)


def next_job(seen: Seen, now: float) -> Job | None:
    """The job to begin, in this order: a reevaluation, a run, scores, preparation. None where
    nothing is to be done.

    What users ask for is begun before all of these.
    """
    insists = seen.repeat is not None and seen.repeat.trigger == RunTrigger.BY_HAND_NOW
    if seen.undelivered or (seen.reason_to_wait and not insists):
        return None
    if seen.reevaluation and seen.answers_ready and seen.may_try(Kind.REEVALUATE, now):
        return ReevaluateJob(seen.reevaluation)
    if seen.wants_training and seen.may_try(Kind.TRAIN, now) and (insists or not seen.waits_for_answers):
        return seen.repeat or TrainJob(RunTrigger.FAILURES, f"{seen.pending_failures} failures")
    if seen.unscored and seen.may_try(Kind.SCORE, now):
        return ScoreJob()  # it waits for a quiet moment itself: looking every few seconds would miss most of them
    if seen.enabled and seen.pending_failures and seen.quiet and seen.unprepared:
        return PrepareRegressionJob()
    return None


@dataclass(slots=True)
class Schedule:
    """Jobs that users asked for, the one under way, and what the last ones left: retry times,
    troubles, a run to repeat.
    """

    requested: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    repeat: TrainJob | None = None
    unprepared: bool = True
    not_before: dict[Kind, float] = field(default_factory=dict)
    troubles: dict[Kind, str] = field(
        default_factory=dict
    )  # by kind: a score that succeeds says nothing of a failed run
    retry_s: dict[Kind, float] = field(default_factory=dict)
    too_little: RunVerdict | None = None  # what the last run was short of

    @property
    def run_is_queued(self) -> bool:
        """Whether a run that somebody asked for waits behind other work."""
        return any(job.kind == Kind.TRAIN for job in self.requested)

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
        """What follows from how a job ended."""
        job, kind = ended.job, ended.job.kind
        self.running = None
        if ended.ending == Ending.DONE:
            self.troubles.pop(kind, None)
            self._done(ended, now)
        elif ended.ending == Ending.FAILED:
            self.troubles[kind] = ended.problem
            self._failed(kind, now)
        elif ended.ending == Ending.DISK_FULL:
            retry = f"the disk refuses, the {kind} is tried again every {DISK_RETRY_S:.0f} s"
            self.troubles[kind] = f"{retry}: {ended.problem}"
            self.not_before[kind] = now + DISK_RETRY_S
        if ended.ending in (Ending.DISK_FULL, Ending.SUPERSEDED) and isinstance(job, TrainJob):
            self.repeat = job

    def _done(self, ended: JobEnded, now: float) -> None:
        verdict = ended.outcome.verdict if ended.outcome is not None else None
        match ended.job:
            case TrainJob() if verdict == RunVerdict.FAILED:
                self._failed(Kind.TRAIN, now)
            case TrainJob() if verdict in TOO_LITTLE:
                self.not_before[Kind.TRAIN] = now + MORE_DATA_S
            case TrainJob():
                self.forget(Kind.TRAIN)
            case ReevaluateJob() if verdict == RunVerdict.NO_VERDICT:
                self._failed(Kind.REEVALUATE, now)
            case ReevaluateJob():
                self.forget(Kind.REEVALUATE)
            case ScoreJob() if not ended.more:  # what is left was written by another target
                self.not_before[Kind.SCORE] = now + RETRY_S
            case PrepareRegressionJob():
                self.unprepared = ended.more

    def forget(self, kind: Kind) -> None:
        """Work of this kind has succeeded or is no longer due: failures before it say nothing."""
        for values in (self.troubles, self.retry_s, self.not_before):
            values.pop(kind, None)

    def _failed(self, kind: Kind, now: float) -> None:
        seconds = self.retry_s.get(kind, REEVALUATION_RETRY_S if kind == Kind.REEVALUATE else RETRY_S)
        self.retry_s[kind] = min(2 * seconds, MAX_RETRY_S)
        self.not_before[kind] = now + seconds

    def is_news(self, job: Job, outcome: Outcome) -> bool:
        """Whether the store is to have this outcome. A run that waits for the same as the last one
        is recorded once, not every minute, unless a user asked for it; a reevaluation without a
        verdict is tried again.
        """
        if isinstance(job, EvaluateAdapterJob):
            return True
        if isinstance(job, ReevaluateJob):
            return outcome.verdict != RunVerdict.NO_VERDICT
        before, self.too_little = self.too_little, outcome.verdict if outcome.verdict in TOO_LITTLE else None
        automatic = isinstance(job, TrainJob) and job.trigger == RunTrigger.FAILURES
        return not automatic or self.too_little is None or self.too_little != before
