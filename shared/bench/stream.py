"""Requests through running daemons, one after another, one row each, and waiting for what follows
from them. Knows a Client only.

`demo` and `bench learning` share it. Answers are greedy, so that the text is the same whichever
adapter drafts. The plain speed beside a row is that of the same prompt answered once more without a
draft: what the machine could do at that moment.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from specl.shared.errors import SpecLoraError
from specl.shared.learning.examples import is_held_out
from specl.shared.messaging.client import Client
from specl.shared.messaging.daemon_status import LastRun
from specl.shared.prompts import reserved
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.settings.schema import Settings
from specl.shared.status import system_status

FIXED_K = 4  # acceptance as a result is reported at this length
STORED_S = 30.0
ADAPTER_S = 30.0
FAILURES_S, SCORED_S = 45.0, 8.0
SAY_EVERY_S = 15.0
SETTLE_S = 15.0  # a run that was asked for has begun by then, and an older problem is no longer reported


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One request to send."""

    n: int
    kind: str
    prompt: str


@dataclass(slots=True)
class StreamRow:
    """One answered request. `at_s` is when it was sent, seconds since its stream began; `plain` is
    the tokens a second without a draft beside it; `hits` of `positions` output tokens were the
    draft's first choice, teacher-forced (filled in later).
    """

    n: int
    kind: str
    prompt: str
    at_s: float
    output: list[int]
    adapter_id: str
    tokens_per_second: float
    ttft_ms: float
    rounds: int
    drafted: int
    accepted: int
    acceptance_by_depth: list[float]
    tokens_by_source: dict[str, int]
    k_histogram: dict[str, int]
    parked_reason: str
    plain: float | None = None
    hits: float | None = None
    positions: int | None = None

    @property
    def seconds(self) -> float:
        """Spent decoding the answer."""
        return len(self.output) / self.tokens_per_second if self.tokens_per_second else 0.0


@dataclass(slots=True)
class TrainingEvent:
    """A training run that ended while a stream ran, after the request number `n`."""

    n: int
    at_s: float
    verdict: str
    reason: str
    adapter_id: str


@dataclass(slots=True)
class StreamPass:
    """One pass over a stream: what was measured so far, also where it was cut short."""

    rows: list[StreamRow] = field(default_factory=list)
    events: list[TrainingEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StreamSchedule:
    """How a stream is sent: seconds between requests, most tokens of an answer, every how many
    requests plain decoding is measured beside one, after how many minutes no more is sent (None:
    never).
    """

    gap_s: float = 1.0
    tokens: int = 64
    plain_every: int = 4
    minutes: float | None = None


def stream_items(kinds: Sequence[str], total: int, shift: bool = False, split: str = "live") -> list[StreamItem]:
    """A stream of `total` prompts: the kinds in turn, or with `shift` the first kind and from
    half-way on the others.
    """
    rest = list(kinds[1:]) if shift else list(kinds)
    half = total // 2 if shift else 0
    order = [kinds[0] if n < half else rest[(n - half) % len(rest)] for n in range(total)]
    prompts = {kind: iter(reserved.prompts(kind, order.count(kind), split=split)) for kind in dict.fromkeys(order)}
    return [StreamItem(n, kind, next(prompts[kind])) for n, kind in enumerate(order)]


def conversation(n: int, share: float) -> str:
    """The conversation id of the n-th request, equal in every pass. Ids are chosen so that the hash
    which holds out a `share` of conversations holds out evenly spread ones, also of a short stream.
    """
    holds_out = int((n + 1) * share) > int(n * share)
    ids = (f"stream-{n:05}-{attempt}" for attempt in count())
    return next(id for id in ids if is_held_out(id, share) == holds_out)


def scaled_settings(
    settings: Settings, requests: int, share: float, minutes: float, gap_s: float, learning: bool, ngram: bool
) -> Settings:
    """Settings for a short stream: a run of at most `minutes` starts at `requests`
    failures, works in gaps of `gap_s`, and needs no more held-out generations than that many requests
    bring (some repeat each other). The judge is unchanged.
    """
    held_out = int(requests * share)
    change = {
        "enabled": learning,
        "min_failure_cases": requests,
        "heldout_share": share,
        "min_heldout_generations": max(2, min(settings.training.min_heldout_generations, held_out * 4 // 5)),
        "max_minutes": minutes,
        "idle_seconds": min(settings.training.idle_seconds, gap_s / 4),
        "on_battery": True,  # somebody is watching
        "when_hot": True,
    }
    training = settings.training.model_copy(update=change)
    speculative = settings.speculative.model_copy(update={"ngram": ngram})
    return settings.model_copy(update={"training": training, "speculative": speculative})


# ------------------------------------------------------------------------------------------------ asking
def ask(client: Client, item: StreamItem, tokens: int, at_s: float = 0.0, **options: Any) -> StreamRow:
    """One greedy answer; `options` as in Client.request."""
    request = client.request(item.prompt, temperature=0.0, max_tokens=tokens, **options)
    output = [token for delta in client.deltas(request) for token in delta.tokens]
    done = client.last
    if done is None:
        raise SpecLoraError("the answer ended without its statistics")
    stats = done.stats
    return StreamRow(
        n=item.n,
        kind=item.kind,
        prompt=item.prompt,
        at_s=round(at_s, 2),
        output=output,
        adapter_id=done.adapter_id,
        tokens_per_second=stats.tokens_per_second,
        ttft_ms=stats.ttft_ms,
        rounds=stats.rounds,
        drafted=stats.model_drafted,
        accepted=stats.model_accepted,
        acceptance_by_depth=stats.acceptance_by_depth,
        tokens_by_source=stats.tokens_by_source,
        k_histogram=stats.k_histogram,
        parked_reason=stats.parked_reason,
    )


def plain_speed(client: Client, item: StreamItem, tokens: int) -> float:
    """Tokens a second of the same answer without any draft; not recorded."""
    return ask(client, item, tokens, num_draft_tokens=0, ngram=False, record=False).tokens_per_second


def send_stream(
    client: Client,
    items: Sequence[StreamItem],
    schedule: StreamSchedule,
    result: StreamPass,
    report: OnProgress = ignore_progress,
) -> None:
    """Send every item, filling `result` as it goes."""
    start, last_run, share = time.monotonic(), _last_run(client), client.settings.training.heldout_share
    limit_s = math.inf if schedule.minutes is None else 60 * schedule.minutes
    meter = ProgressMeter("requests", len(items), report)
    for item in items:
        if item.n:
            time.sleep(schedule.gap_s)
        at_s = time.monotonic() - start
        if at_s > limit_s:
            return
        row = ask(client, item, schedule.tokens, at_s, conversation_id=conversation(item.n, share))
        result.rows.append(row)
        if item.n % schedule.plain_every == 0:
            row.plain = plain_speed(client, item, schedule.tokens)
        now = time.monotonic() - start
        run = _last_run(client)
        if run is not None and run != last_run:  # None: the collector is late for once, which is no new run
            result.events.append(TrainingEvent(item.n, round(now, 2), run.verdict, run.reason, run.adapter_id))
            last_run = run
        note = f"{row.kind}, adapter {row.adapter_id or 'none'}, {row.tokens_per_second:.1f} tok/s"
        meter.advance(note=note, at_most_s=limit_s - now)


def _last_run(client: Client) -> LastRun | None:
    return system_status(client).training.last_verdict


# ------------------------------------------------------------------------------------------------ waiting
def wait_stored(client: Client, least: int) -> None:
    """Wait until `least` generations are in the store. Raises SpecLoraError after STORED_S."""
    end = time.monotonic() + STORED_S
    while system_status(client).store.generations < least:
        if time.monotonic() > end:
            raise SpecLoraError(f"the records did not reach the store within {STORED_S:.0f} s")
        time.sleep(0.3)


def count_failures(client: Client) -> int:
    """The number of failures once it has been the same for SCORED_S: the trainer scores later what
    inference did not draft.
    """
    end, seen, since = time.monotonic() + FAILURES_S, -1, time.monotonic()
    while time.monotonic() < end:
        status = system_status(client)
        failures = status.failures.total
        if failures != seen:
            seen, since = failures, time.monotonic()
        if failures and time.monotonic() - since > SCORED_S and status.training.state == "idle":
            break
        time.sleep(0.5)
    return max(seen, 0)


def run_training(client: Client, say: Callable[[str], object], timeout_s: float) -> LastRun:
    """Have the trainer do its first run, wait for it, and return how it ended. Raises SpecLoraError
    where it does not end.
    """
    reply = client.train(now=True)
    if not reply.ok:
        raise SpecLoraError(reply.message)
    began, said_at = time.monotonic(), 0.0
    while time.monotonic() < began + timeout_s:
        status = system_status(client)
        training = status.training
        if training.last_verdict:
            return training.last_verdict
        trainer = client.status().trainer
        if trainer and trainer.trouble and training.state == "idle" and time.monotonic() > began + SETTLE_S:
            raise SpecLoraError(f"training: {trainer.trouble}")
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            loss = f", loss {training.loss:.3f}" if training.loss is not None else ""
            say(f"  {training.state} {training.step}/{training.total}{loss}")
        time.sleep(0.5)
    raise SpecLoraError("the training run did not end in time")


def wait_adapter(client: Client, adapter_id: str) -> None:
    """Wait until inference drafts with the adapter. Raises SpecLoraError after ADAPTER_S."""
    end = time.monotonic() + ADAPTER_S
    while system_status(client).adapter.active != adapter_id:
        if time.monotonic() > end:
            raise SpecLoraError(
                "inference did not take the adapter", "look for `adapter.rejected` in the logs (--keep)"
            )
        time.sleep(0.2)
