"""What each daemon answers to GetStatus: one frozen type a daemon. `shared/status.py` makes one view of all of them."""

from dataclasses import dataclass, field

from specl.shared.messaging.codes import CollapseCheckState, DaemonState, RunVerdict


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Requests that wait (`depth`) and requests that are being answered."""

    depth: int = 0
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """Records on their way to the collector. `waiting`: refused by the outbox and kept in memory; `refused` counts refusals
    since the start, `trouble` is the last one's sentence while it lasts.
    """

    pending: int
    waiting: int
    refused: int
    trouble: str


@dataclass(frozen=True, slots=True)
class CollapseCheckStatus:
    """The collapse check of a newly activated adapter: `acceptance` is of `drafted` first drafted tokens, in `requests`."""

    adapter: str
    state: CollapseCheckState
    requests: int
    drafted: int
    acceptance: float


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """The active adapter, and the ones that verification refused, with the reason, by id."""

    active: str = ""
    previous: str = ""
    form: str = ""
    rejected: dict[str, str] = field(default_factory=dict)
    watch: CollapseCheckStatus | None = None


@dataclass(frozen=True, slots=True)
class ModelsStatus:
    """The pair that serves, by name. `loaded` is false before the first load and while idle models are unloaded.
    `context_length`: tokens that a prompt and its answer may have together; None before the first load.
    """

    target: str
    draft: str | None
    loaded: bool
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class BlasStatus:
    """The BLAS that matrix products on the CPU are bound to."""

    bound: str
    fast: bool


@dataclass(frozen=True, slots=True)
class InferenceStatus:
    """The inference daemon. Rolling figures are over the last 50 answers since its start."""

    state: DaemonState
    uptime_s: float
    queue: QueueStatus
    outbox: OutboxStatus
    served: int
    rolling_acceptance: float | None
    rolling_tokens_per_second: float | None
    adapter: AdapterStatus
    models: ModelsStatus
    blas: BlasStatus
    malformed: int  # frames that were dropped


@dataclass(frozen=True, slots=True)
class LastRun:
    """How the last training run or import ended."""

    created: str
    verdict: RunVerdict
    reason: str
    adapter_id: str
    parent_id: str
    examples: int
    steps: int
    loss_last: float | None


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """Counts and rates over the store. Rolling ones are over the last 50 generations."""

    generations: int = 0
    disagreements: int = 0
    failures: int = 0
    pending_failures: int = 0
    quarantined: int = 0
    lifetime_acceptance: float | None = None
    rolling_acceptance: float | None = None
    rolling_tokens_per_second: float | None = None
    by_adapter: dict[str, float | None] = field(default_factory=dict)  # acceptance; "none": without an adapter
    last_verdict: LastRun | None = None


@dataclass(frozen=True, slots=True)
class ProducerStatus:
    """A producer of records as the collector sees it: when it answered last, and how many records it still has."""

    heard_s_ago: float | None
    left: int


@dataclass(frozen=True, slots=True)
class CollectorStatus:
    """The collector. `summary` is None until the store could be read once."""

    state: DaemonState
    uptime_s: float
    stored: int
    trouble: str
    malformed: int
    producers: dict[str, ProducerStatus]
    summary: StoreSummary | None


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where the trainer is. `state` is for people (idle, loading, training, ...); `waits` says why no run goes on."""

    state: str
    waits: str
    step: int
    total: int
    loss: float | None
    abandoning: bool


@dataclass(frozen=True, slots=True)
class EvaluationStatus:
    """The judgement of an imported adapter; `verdict` is None until there is one."""

    verdict: RunVerdict | None
    reason: str
    adapter_id: str


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    """The trainer. `pending` failures of `trigger` start a run; `evaluations` are the last imports by run id."""

    state: DaemonState
    uptime_s: float
    training: TrainingProgress
    evaluations: dict[str, EvaluationStatus]
    pending: int
    trigger: int
    enabled: bool
    outbox: OutboxStatus
    trouble: str
    malformed: int


DaemonStatus = InferenceStatus | CollectorStatus | TrainerStatus
