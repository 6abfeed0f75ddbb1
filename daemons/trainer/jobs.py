"""The jobs of the trainer's MLX thread, and the messages that say how each ended. All
are frozen values.
"""

import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import Record


class JobKind(StrEnum):
    """Kinds of jobs. Each has its own problem and its own retry time. The values appear in messages
    to users.
    """

    TRAIN = "run"
    EVALUATE = "import"
    REEVALUATE = "re-evaluation"
    SCORE = "score"
    PREPARE = "regression"


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Train an adapter. `cause` is the trigger in words."""

    trigger: RunTrigger
    cause: str
    kind = JobKind.TRAIN


@dataclass(frozen=True, slots=True)
class EvaluateAdapterJob:
    """Judge an adapter made elsewhere, staged as `folder`. `name` is the user's word for it,
    `run_id` the id of its verdict.
    """

    folder: str
    name: str
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind = JobKind.EVALUATE


@dataclass(frozen=True, slots=True)
class ReevaluateJob:
    """Compare a promoted adapter with its predecessor on answers since its promotion."""

    adapter_id: str
    kind = JobKind.REEVALUATE


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score generations that were answered without drafting."""

    kind = JobKind.SCORE


@dataclass(frozen=True, slots=True)
class PrepareRegressionJob:
    """Make the regression slice and a part of the texts to replay ahead of a run."""

    kind = JobKind.PREPARE


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the MLX thread. It is the last item in its queue."""


Job = TrainJob | EvaluateAdapterJob | ReevaluateJob | ScoreJob | PrepareRegressionJob


class Ending(StrEnum):
    """How a job ended."""

    DONE = "done"
    SUPERSEDED = "superseded"  # the adapter that it went on from is no longer active
    INTERRUPTED = "interrupted"  # the trainer is stopping
    ABANDONED = "abandoned"  # texts that it learned from are purged
    DISK_FULL = "disk_full"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict of a run with its records. `path` is the adapter to announce, where CURRENT has
    moved to one.
    """

    verdict: RunVerdict
    reason: str
    adapter_id: str = ""
    path: Path | None = None
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The report of the MLX thread that a job has ended. `more`: there is work of this kind left that
    can be done at once.
    """

    job: Job
    ending: Ending
    problem: str = ""
    outcome: Outcome | None = None
    more: bool = False
