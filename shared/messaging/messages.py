"""What travels between processes: frozen records and messages. `codec.py` turns them into bytes and back.

Records (`Generation`, `Activation`, `TrainingRun`, `Evaluation`, `Adapter`) are stored; each has an `id` made by its
producer, so that storing one twice is storing it once. Messages are everything else.
"""

from dataclasses import dataclass, field
from typing import Any

from specl.shared.answer_stats import AnswerStats
from specl.shared.messaging.codes import ActivationEvent, ActivationReason, FailureCode, RunTrigger, RunVerdict
from specl.shared.messaging.daemon_status import CollectorStatus, InferenceStatus, TrainerStatus
from specl.shared.sampling_params import SamplingParams

FETCH_LIMIT = 256
FETCH_BYTES = 8 * 1024 * 1024

Json = dict[str, Any]  # plain scalars, lists and maps; depth and size are bounded like everything else


# ---------------------------------------------------------------------------------------------------- records
@dataclass(frozen=True, slots=True)
class Disagreement:
    """The first rejected draft token of a round. `position` counts output tokens from 0."""

    position: int
    draft_token: int
    target_token: int
    draft_text: str
    target_text: str
    draft_confidence: float
    target_confidence: float
    drafter: str
    depth: int
    context_tokens: list[int]


@dataclass(frozen=True, slots=True)
class TopK:
    """The target's distribution at each of n output positions. Arrays are little-endian: `ids` u32 [n, k], the likeliest
    tokens; `logprobs` f16 [n, k], natural, at temperature 1; `tail` f16 [n], the probability of all other tokens;
    `entropy` f16 [n] in nats, with the tail as one outcome: a lower bound.
    """

    k: int
    ids: bytes
    logprobs: bytes
    tail: bytes
    entropy: bytes


@dataclass(frozen=True, slots=True)
class Generation:
    """One answered request. Token arrays are u32 little-endian; `sources` has one byte an output token: 0 the target
    itself, 1 the model drafter, 2 the n-gram drafter. `acceptance_rate` = accepted / drafted by the model drafter
    alone, null when it drafted fewer than 16. `stats` is None for a record that was imported.
    """

    id: str
    conversation_id: str
    created_at: float
    mode: str
    messages: list[Json]
    prompt: str
    prompt_tokens: bytes
    output: str
    output_tokens: bytes
    finish_reason: str
    sampling: Json
    drafted: int
    accepted: int
    model_drafted: int
    model_accepted: int
    rounds: int
    acceptance_rate: float | None
    tokens_per_second: float
    ttft_ms: float
    target_model: str
    draft_model: str
    target_fingerprint: str
    draft_fingerprint: str
    adapter_id: str
    sources: bytes
    stats: AnswerStats | None
    disagreements: list[Disagreement]
    top_k: TopK | None


@dataclass(frozen=True, slots=True)
class Activation:
    """The active adapter changed, or one was refused. `note` is the reason as a sentence for people."""

    id: str
    created_at: float
    event: ActivationEvent
    adapter_id: str
    previous_id: str
    reason: ActivationReason
    note: str
    details: Json


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One run of the trainer, written when it ends. `cause` is the trigger in words ("57 failures", "import their-adapter"),
    `reason` the verdict's sentence; both for people.
    """

    id: str
    created_at: float
    finished_at: float
    trigger: RunTrigger
    cause: str
    verdict: RunVerdict
    reason: str
    parent_id: str
    adapter_id: str
    examples: int
    steps: int
    tokens: int
    loss_first: float | None
    loss_last: float | None
    last_generation: str
    settings: Json


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Teacher-forced agreement of one draft state on one set. `subject` is heldout, regression or generation."""

    id: str
    created_at: float
    subject: str
    generation_id: str
    training_run_id: str
    adapter_id: str
    generations: int
    positions: int
    agreement: float
    by_depth: list[float]
    details: Json


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter, as its manifest says."""

    id: str
    created_at: float
    kind: str
    parent_id: str
    training_run_id: str
    path: str
    sha256: str
    base_fingerprint: str
    manifest: Json


# ---------------------------------------------------------------------------------------------------- messages
@dataclass(frozen=True, slots=True)
class Ask:
    """Generate. `messages` go through the chat template; `prompt` alone is sent as it is (no template).
    The past answers of `client_id` may draft this one; none where it is empty. `logprobs` asks for each token's
    log-probability and that many alternatives; None for neither.
    """

    request_id: str
    messages: list[Json]
    prompt: str
    max_tokens: int
    sampling: SamplingParams
    mode: str
    stop: list[str] = field(default_factory=list)
    conversation_id: str = ""
    record: bool = True
    num_draft_tokens: int | None = None
    ngram: bool | None = None
    deadline_s: float | None = None
    client_id: str = ""
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A waiting client's heartbeat."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits in the queue; `position` 0 is next."""

    request_id: str
    position: int


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`read` of the `total` tokens of the request's prompt are read; there is no token of the answer yet."""

    request_id: str
    read: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token as text and bytes (none where it is part of a character), and its natural log-probability under the target,
    at temperature 1.
    """

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """An emitted token and the target's likeliest tokens at its position, best first."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is now certain, and its tokens with their sources. `lengths[i]`: characters of `text` contributed by token i;
    any remainder was flushed at the end of the answer. `logprobs`, where they were asked for, leave out a token that ends
    the answer.
    """

    request_id: str
    text: str
    tokens: list[int]
    sources: bytes
    lengths: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete. `recorded` is true once the outbox has committed it; else `record_note` says why not."""

    request_id: str
    generation_id: str
    text: str
    tokens: int
    finish_reason: str
    adapter_id: str
    recorded: bool
    record_note: str
    stats: AnswerStats


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that has no answer. `message` is the reason as a sentence for people."""

    request_id: str
    code: FailureCode
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask a producer for its oldest records. `done`: ids that are committed, which it may delete. It is also the heartbeat."""

    done: list[str]
    limit: int = FETCH_LIMIT


@dataclass(frozen=True, slots=True)
class Envelope:
    """One undelivered record: its kind and its encoded bytes, opened only by the collector."""

    id: str
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """The answer to Fetch; `left` counts the records behind these rows."""

    rows: list[Envelope]
    left: int


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Ask any daemon how it is: it answers with its InferenceStatus, CollectorStatus or TrainerStatus at once."""


@dataclass(frozen=True, slots=True)
class Train:
    """Ask the trainer for a run; `now` skips the trigger and the wait for idleness."""

    now: bool


@dataclass(frozen=True, slots=True)
class EvaluateAdapter:
    """Ask the trainer to judge an adapter made elsewhere. `folder` is the name of a staged copy inside the
    adapters folder; `name` is what the user calls it.
    """

    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class SetAdapter:
    """Ask inference for another adapter: an id, `previous`, `best`, `latest`, or empty for none."""

    adapter: str


@dataclass(frozen=True, slots=True)
class Purge:
    """Ask a daemon to remove generations: by id, older than a time, or whose text contains a pattern."""

    ids: list[str]
    before: float | None
    pattern: str


@dataclass(frozen=True, slots=True)
class Import:
    """Ask the collector to store records made elsewhere; each `body` is an encoded record."""

    rows: list[Envelope]


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a command. `ids`: generations that a purge found; `run_id`: of an evaluation that was queued;
    `adapter_id`: the active adapter after SetAdapter.
    """

    ok: bool
    message: str
    ids: list[str] = field(default_factory=list)
    run_id: str = ""
    adapter_id: str = ""


# Published hints. A lost one costs a second of delay and nothing else.
@dataclass(frozen=True, slots=True)
class RecordReady:
    """An outbox has a new record."""

    id: str


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """A new adapter directory is at `path`, inside the adapters folder."""

    id: str
    path: str


@dataclass(frozen=True, slots=True)
class Activity:
    """Inference has become busy or idle."""

    busy: bool


RECORDS: tuple[type, ...] = (Generation, Activation, TrainingRun, Evaluation, Adapter)
MESSAGES: tuple[type, ...] = (
    Ask, Heartbeat, Cancel, Queued, PrefillProgress, Delta, Done, Failed, Fetch, RecordBatch, GetStatus,
    InferenceStatus, CollectorStatus, TrainerStatus, Train,
    EvaluateAdapter, SetAdapter, Purge, Import,
    Reply, RecordReady, AdapterReady, Activity,
)  # fmt: skip
Record = Generation | Activation | TrainingRun | Evaluation | Adapter
