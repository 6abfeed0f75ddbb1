"""What the trainer's MLX thread can be given to do, and how it says that it has ended. All are
frozen values.
"""

import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import Record


class Kind(StrEnum):
    """Kinds of work. Each has its own trouble and its own retry time; the values appear in
    sentences for people.
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
    kind = Kind.TRAIN


@dataclass(frozen=True, slots=True)
class EvaluateAdapterJob:
    """Judge an adapter made elsewhere, staged as `folder`. `name` is the user's word for it,
    `run_id` the id of its verdict.
    """

    folder: str
    name: str
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind = Kind.EVALUATE


@dataclass(frozen=True, slots=True)
class ReevaluateJob:
    """Compare a promoted adapter with its predecessor on answers since its promotion."""

    adapter_id: str
    kind = Kind.REEVALUATE


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score generations that were answered without drafting."""

    kind = Kind.SCORE


@dataclass(frozen=True, slots=True)
class PrepareRegressionJob:
    """Make the regression slice and a part of the texts to replay ahead of a run."""

    kind = Kind.PREPARE


@dataclass(frozen=True, slots=True)
class Stop:
    """The last one."""


Job = TrainJob | EvaluateAdapterJob | ReevaluateJob | ScoreJob | PrepareRegressionJob


class Ending(StrEnum):
    """How a job ended."""

    DONE = "done"
    SUPERSEDED = "superseded"  # the adapter that it went on from is no longer in force
    INTERRUPTED = "interrupted"  # the trainer is stopping
    ABANDONED = "abandoned"  # texts that it learned from are purged
    DISK_FULL = "disk_full"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict of a run, and the records that say so. `path` is the adapter to announce, where
    CURRENT has moved to one.
    """

    verdict: RunVerdict
    reason: str
    adapter_id: str = ""
    path: Path | None = None
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class JobEnded:
    """What the MLX thread tells of a job. `more`: work of this kind is left that can be done at
    once.
    """

    job: Job
    ending: Ending
    problem: str = ""
    outcome: Outcome | None = None
    more: bool = False
