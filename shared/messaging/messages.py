"""What travels between processes: frozen records and messages, their version and limits, msgpack in and out.

The only file that knows the byte format. A value that `decode` returns has exactly its declared fields and types, finite
numbers and bounded sizes; everything else raises WireError. Knows nothing of sockets, files or models.

Records are facts that are kept (`Generation`, `Activation`, `TrainingRun`, `Evaluation`, `Adapter`); each has an `id`
made by its producer, so that storing one twice is storing it once. Messages are everything else.
"""

import dataclasses
import hashlib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import msgpack

from specl.shared.errors import WireError

VERSION = 1
MAX_FRAME = 16 * 1024 * 1024
MAX_RECORD = MAX_FRAME - 65_536  # a record must fit into the batch that carries it
MAX_ITEMS = 262_144
MOST_ITEMS = 1_048_576  # in all lists and maps of a frame together: a byte of it may become 60 in memory
MOST_CONTAINERS = 131_072  # lists and maps; an empty one is a byte on the wire and 64 here
MAX_TEXT = 4 * 1024 * 1024
MAX_DEPTH = 12
FETCH_LIMIT = 256
FETCH_BYTES = 8 * 1024 * 1024

Json = dict[str, Any]  # plain scalars, lists and maps; depth and size are bounded like everything else


# ---------------------------------------------------------------------------------------------------- records
@dataclass(frozen=True, slots=True)
class Disagreement:
    """One rejected draft token: the first of its round that did not stand. `position` counts output tokens from 0."""

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
    """The target's law at each output position: `k` best ids and natural log-probabilities (temperature 1), and what
    the rest weighs. Arrays are little-endian: ids u32 [n, k], logprobs f16 [n, k], tail f16 [n] (mass outside the k),
    entropy f16 [n] (nats, the tail as one outcome: a lower bound).
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
    alone, null when it drafted fewer than 16 (DESIGN: two figures).
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
    stats: Json
    disagreements: list[Disagreement]
    top_k: TopK | None


@dataclass(frozen=True, slots=True)
class Activation:
    """Inference changed the adapter that drafts: `event` is activated, rejected, rolled_back or unloaded."""

    id: str
    created_at: float
    event: str
    adapter_id: str
    previous_id: str
    reason: str
    details: Json


SECOND_LOOK = "second look at "  # how the trigger of one begins


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One run of the trainer, written when it ends. `verdict` is promoted, rejected, no_verdict, failed, cancelled
    or no_data; of a second look at an adapter that was rolled back, reinstated or confirmed."""

    id: str
    created_at: float
    finished_at: float
    trigger: str
    verdict: str
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
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Generate. `messages` go through the chat template; `prompt` alone is sent as it is (no template).
    `client` says whose past answers may draft this one; nobody's where it is empty. `logprobs` asks for each token's
    log-probability and so many alternatives; None for neither.
    """

    request_id: str
    messages: list[Json]
    prompt: str
    max_tokens: int
    sampling: Sampling
    mode: str
    stop: list[str] = field(default_factory=list)
    conversation_id: str = ""
    record: bool = True
    num_draft_tokens: int | None = None
    ngram: bool | None = None
    deadline_s: float | None = None
    client: str = ""
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Alive:
    """A waiting client's heartbeat."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this request and free its place."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; `place` 0 is next."""

    request_id: str
    place: int


@dataclass(frozen=True, slots=True)
class Weighed:
    """A token as text and bytes (none where it is part of a character), and what the target gives it: a natural logarithm,
    at temperature 1.
    """

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLaw:
    """An emitted token and the target's likeliest ones in its place, best first."""

    chosen: Weighed
    top: list[Weighed]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is now certain, and the tokens it came from with their sources. `lengths` has the characters of `text` that
    each token made certain; what is left over came with the end. `laws`, where they were asked for, leave out a token that
    ends the answer.
    """

    request_id: str
    text: str
    tokens: list[int]
    sources: bytes
    lengths: list[int] = field(default_factory=list)
    laws: list[TokenLaw] = field(default_factory=list)


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
    stats: Json


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that cannot be answered. `code` is a word (busy, rejected, cancelled, deadline, internal, ...)."""

    request_id: str
    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Request, acknowledgement, replay and heartbeat in one: these ids are committed, give me the oldest others."""

    done: list[str]
    limit: int = FETCH_LIMIT


@dataclass(frozen=True, slots=True)
class Row:
    """One undelivered record: its kind and its encoded bytes, opened only by the collector."""

    id: str
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """The answer to Fetch; `left` counts what is still behind these rows."""

    rows: list[Row]
    left: int


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Ask any daemon how it is."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a daemon is, as its part of `specl-ctl status`."""

    role: str
    body: Json


@dataclass(frozen=True, slots=True)
class Train:
    """Ask the trainer for a run; `now` skips the trigger and the wait for idleness."""

    now: bool


@dataclass(frozen=True, slots=True)
class TryAdapter:
    """Ask the trainer to put an adapter made elsewhere through its gate. `folder` is the name of a staged copy inside the
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
    """Ask a daemon to forget. Any of: these generation ids, older than a time, text that contains a pattern."""

    ids: list[str]
    before: float | None
    pattern: str


@dataclass(frozen=True, slots=True)
class Import:
    """Ask the collector to store records made elsewhere; each `body` is an encoded record."""

    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a command."""

    ok: bool
    message: str
    details: Json = field(default_factory=dict)


# Published hints. Losing one costs a second of delay and nothing else.
@dataclass(frozen=True, slots=True)
class RecordReady:
    """An outbox has something."""

    id: str


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """A new adapter directory stands at `path`, inside the adapters folder."""

    id: str
    path: str


@dataclass(frozen=True, slots=True)
class Activity:
    """Inference is busy, or idle again."""

    busy: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training run is."""

    state: str
    step: int
    loss: float | None


RECORDS: tuple[type, ...] = (Generation, Activation, TrainingRun, Evaluation, Adapter)
MESSAGES: tuple[type, ...] = (
    Ask, Alive, Cancel, Queued, Delta, Done, Failed, Fetch, Batch, GetStatus, Status, Train, TryAdapter, SetAdapter, Purge, Import,
    Reply, RecordReady, AdapterReady, Activity, Progress,
)  # fmt: skip
_KINDS = {cls.__name__: cls for cls in (*RECORDS, *MESSAGES)}
Record = Generation | Activation | TrainingRun | Evaluation | Adapter


# ---------------------------------------------------------------------------------------------------- bytes
def kind_of(value: Any) -> str:
    """The name under which a record or message travels."""
    return type(value).__name__


def encode(value: Any) -> bytes:
    """Bytes of a record or message. Raises WireError where it breaks a limit, so that no peer has to."""
    if kind_of(value) not in _KINDS:
        raise WireError(f"{kind_of(value)} is no kind of record or message")
    try:
        data = msgpack.packb([VERSION, kind_of(value), _plain(value)], use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"{kind_of(value)} cannot be encoded: {error}") from error
    limit = MAX_RECORD if isinstance(value, RECORDS) else MAX_FRAME
    if len(data) > limit:
        raise WireError(f"{kind_of(value)} has {len(data)} bytes; the limit is {limit}")
    decode(data)  # an accepted record that its reader refuses would end in quarantine
    return data


def decode(data: bytes) -> Any:
    """The record or message in `data`. Raises WireError; the text never repeats what the bytes held."""
    if len(data) > MAX_FRAME:
        raise WireError(f"a frame of {len(data)} bytes; the limit is {MAX_FRAME}")
    tally = _Tally()
    try:
        outer = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=tally.take_map,
            list_hook=tally.take_list,
            ext_hook=_no_extension,
            max_array_len=min(MAX_ITEMS, len(data)),  # room is made for as many as a list says that it has
            max_map_len=min(MAX_ITEMS, len(data)),
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_FRAME,
        )
    except Exception as error:  # msgpack raises half a dozen unrelated types for hostile bytes; all mean the same
        raise WireError(f"not a message: {type(error).__name__}, {describe(data)}") from None
    if not (isinstance(outer, list) and len(outer) == 3):
        raise WireError(f"not a message: {describe(data)}")
    version, kind, body = outer
    if type(version) is not int or version != VERSION:
        raise WireError(f"message version unknown; this program speaks {VERSION}, {describe(data)}")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise WireError(f"message kind unknown, {describe(data)}")
    return _build(cls, body, cls.__name__)


def describe(data: bytes) -> str:
    """How rejected bytes are logged: by length and hash, never by content."""
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"


_SCALARS = {str, bytes, int, float, bool, type(None)}


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _hints(type(value))}
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _SCALARS else _plain(item) for item in value]
    return value


class _Tally:
    """Counts what a frame makes in memory while it is read. Raises ValueError for too much, and for a key that comes twice."""

    __slots__ = ("containers", "items")

    def __init__(self) -> None:
        self.containers = self.items = 0

    def take_map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("duplicate key")
        self._count(2 * len(pairs))
        return made

    def take_list(self, items: Any) -> Any:
        self._count(len(items))
        return items

    def _count(self, items: int) -> None:
        self.containers += 1
        self.items += items
        if self.containers > MOST_CONTAINERS or self.items > MOST_ITEMS:
            raise ValueError("too many items")


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("extension type")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, body: Any, where: str) -> Any:
    checks = _checks(cls, where)
    if not isinstance(body, dict) or body.keys() != checks.keys():
        raise WireError(f"{where}: wrong fields")
    return cls(**{name: check(body[name], place) for name, (check, place) in checks.items()})


@cache
def _checks(cls: type, where: str) -> dict[str, tuple[Callable[[Any, str], Any], str]]:
    """By field: what checks it, and how it is named in an error (never by anything that came in)."""
    return {name: (_checker(hint), f"{where}.{name}") for name, hint in _hints(cls).items()}


@cache
def _checker(hint: Any) -> Callable[[Any, str], Any]:
    """What gives a value back if it is what `hint` declares, and raises WireError if not; integers stand for floats."""
    if isinstance(hint, types.UnionType):
        check = _checker(next(arm for arm in hint.__args__ if arm is not type(None)))
        may_lack = type(None) in hint.__args__
        return lambda value, where: None if value is None and may_lack else check(value, where)
    if dataclasses.is_dataclass(hint):
        return lambda value, where: _build(hint, value, where)
    if typing.get_origin(hint) is list:
        return partial(_check_list, *typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return _check_map
    return partial(_check_scalar, hint)


def _check_list(item: Any, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{where}: not a list")
    check = _checker(item)
    return [check(v, where) for v in value]


def _check_map(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise WireError(f"{where}: not a map")
    return _json(value, where, 0)


def _check_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise WireError(f"{where}: not {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise WireError(f"{where}: not finite")
    if hint is int and not -(2**63) <= value < 2**63:  # msgpack knows larger ones, SQLite does not
        raise WireError(f"{where}: out of range")
    return value


def _json(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise WireError(f"{where}: nested too deep")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise WireError(f"{where}: a key that is not text")
        return {key: _json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, where, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{where}: not finite")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise WireError(f"{where}: {type(value).__name__} is not plain data")
