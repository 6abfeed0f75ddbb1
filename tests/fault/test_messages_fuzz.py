"""Messages of the right form with senseless contents (F10): every kind, drawn from its declared types, at every socket.

Frames that no decoder likes are in test_frames; these pass it, so whatever breaks is the daemon's own logic.
"""

import dataclasses
import random
import time
import types
import typing
from typing import Any

import pytest
import zmq

from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode, encode
from specl.shared.messaging.messages import (
    MESSAGES,
    RECORDS,
    Ask,
    Envelope,
    Fetch,
    GetStatus,
    Heartbeat,
    Purge,
    RecordBatch,
    Reply,
    SetAdapter,
)
from specl.shared.paths import ROLES
from specl.shared.sampling_params import SamplingParams
from tests.harness.figures import process_figures
from tests.harness.waiting import wait_until

slow = pytest.mark.slow
TEXTS = (
    "",
    "x",
    "\0",
    "../../etc/passwd",
    "/",
    "000001",
    "latest",
    "detailed",
    "fast",
    "🙂" * 9,
    "y" * 5000,
    "%",
    "{{x}}",
    "role",
)
INTS = (0, 1, -1, 2, 16, 17, 2**31, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 5e-324, 1e308, -1e308, 1.8e9, -62135596801.0, 253402300800.0)


def drawn(rng: random.Random, hint: Any, depth: int = 0) -> Any:
    """A value of the declared type, at the edges of what that type allows."""
    if isinstance(hint, types.UnionType):
        return None if rng.random() < 0.3 else drawn(rng, hint.__args__[0], depth)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: drawn(rng, kind, depth + 1) for name, kind in hints.items()})
    if typing.get_origin(hint) is list:
        return [drawn(rng, typing.get_args(hint)[0], depth + 1) for _ in range(rng.choice((0, 0, 1, 2, 5)))]
    if typing.get_origin(hint) is dict:
        keys = rng.sample(
            ("role", "content", "type", "text", "temperature", "tokens_by_source", "", "x"), rng.randrange(4)
        )
        return {key: plain(rng, depth + 1) for key in keys}
    if hint is str:
        return rng.choice(TEXTS)
    if hint is int:
        return rng.choice(INTS)
    if hint is float:
        return rng.choice(FLOATS)
    return rng.randbytes(rng.choice((0, 1, 3, 4, 64))) if hint is bytes else rng.random() < 0.5


def plain(rng: random.Random, depth: int) -> Any:
    """Plain data, as a JSON field carries it."""
    if depth < 6 and rng.random() < 0.3:
        return [plain(rng, depth + 1) for _ in range(rng.randrange(3))]
    if depth < 6 and rng.random() < 0.3:
        return drawn(rng, dict[str, Any], depth + 1)
    return rng.choice((None, True, *TEXTS, *INTS, *FLOATS))


def senseless(rng: random.Random, kinds: tuple[type, ...]) -> bytes:
    """A frame that decodes. An Ask is often nearly right: most of its checks come one after the other."""
    while True:
        kind = rng.choice(kinds)
        message = drawn(rng, kind)
        if kind is Ask and rng.random() < 0.7:
            mode, tokens = rng.choice(("detailed", "fast")), rng.choice((1, 3, 2**40))
            sampling = rng.choice(
                (message.sampling, SamplingParams(), SamplingParams(0.7, 0.9, 5, 0.1, rng.choice(INTS)))
            )
            message = dataclasses.replace(
                message, request_id=str(rng.random()), mode=mode, max_tokens=tokens, num_draft_tokens=None,
                sampling=sampling, deadline_s=0.2,
            )  # fmt: skip
        if kind is RecordBatch:  # a body that is a record, or nearly
            rows = [Envelope(rng.choice(TEXTS), rng.choice(("Generation", "x")), record_bytes(rng)) for _ in range(2)]
            message = dataclasses.replace(message, rows=rows)
        try:
            return encode(message)
        except WireError:
            continue


def record_bytes(rng: random.Random) -> bytes:
    while True:
        try:
            return encode(drawn(rng, rng.choice(RECORDS)))
        except WireError:
            continue


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=slow)])
def test_f10_senseless_requests_end_no_daemon(instance, figures, context, role, count):
    daemon = instance.start(role)
    instance.ready(role)
    before, _ = process_figures(daemon.pid)
    rng, replies = random.Random(7), 0
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDTIMEO, 120_000)  # of one that is gone the queue fills up
    socket.connect(instance.paths.socket(role))
    for n in range(count):
        try:
            socket.send(senseless(rng, MESSAGES))
        except zmq.Again:
            break
        while socket.poll(0 if n % 16 else 2):
            decode(socket.recv())
            replies += 1
    last = context.socket(zmq.DEALER)
    last.connect(instance.paths.socket(role))
    last.send(encode(GetStatus()))
    assert last.poll(60_000), instance.output(role)[-3000:]
    assert daemon.code is None, instance.output(role)[-3000:]
    if role == "inference":
        assert wait_until(lambda: instance.status(role)["queue"] == {"depth": 0, "in_flight": 0}, 30, "it is through")
        assert instance.ask("a good one").tokens == 8
    grew = process_figures(daemon.pid)[0] - before
    figures(F10_senseless=role, messages=count, replies=replies, grew_MiB=grew)
    assert instance.status(role)["malformed"] == 0 and replies > count / 100
    assert grew < 96, "the first answer or run brings MLX's own memory"


@pytest.mark.parametrize(
    "role, source",
    [("inference", "trainer"), ("collector", "inference"), ("collector", "trainer"), ("trainer", "inference")],
)
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=slow)])
def test_f10_senseless_news_and_batches_end_no_daemon(instance, figures, context, role, source, count):
    publisher, answerer = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    publisher.setsockopt(zmq.XPUB_NODROP, 1)
    publisher.bind(instance.paths.socket(f"{source}-pub"))
    answerer.bind(instance.paths.socket(source))
    daemon = instance.start(role)
    instance.ready(role)
    assert publisher.poll(5000), "it subscribes"
    before, _ = process_figures(daemon.pid)
    rng, batches = random.Random(8), 0
    for _ in range(count):
        publisher.send(senseless(rng, MESSAGES))
    while role == "collector" and batches < min(count, 500) and answerer.poll(10_000):
        peer, data = answerer.recv_multipart()
        if isinstance(decode(data), Fetch):
            # what is no batch is waited out: two seconds
            answerer.send_multipart([peer, senseless(rng, (RecordBatch,) if batches % 50 else (Reply,))])
            batches += 1
    assert instance.ready(role)["malformed"] == 0
    assert daemon.code is None, instance.output(role)[-3000:]
    grew = process_figures(daemon.pid)[0] - before
    figures(F10_senseless_outward=role, source=source, publications=count, batches=batches, grew_MiB=grew)
    assert grew < 96


def test_f10_oversized_answer_ends_nothing(instance, context):
    """What is refused is quoted, and quoting makes it up to six times as long."""
    long = "\0" * 3_000_000
    daemons = [instance.start(role) for role in ROLES]
    for role, daemon in zip(ROLES, daemons, strict=True):
        instance.ready(role)
        socket = context.socket(zmq.DEALER)
        socket.connect(instance.paths.socket(role))
        for message in (
            SetAdapter(long), Ask("r", [], "x", 4, SamplingParams(), long), Ask(long, [], "x", 0, SamplingParams(), "fast"), Heartbeat(long),
            Purge([long], None, ""), Purge([], None, long),
        ):  # fmt: skip
            socket.send(encode(message))
        socket.send(encode(GetStatus()))
        wait_until(lambda r=role: instance.status(r), 30, "it answers")
        time.sleep(0.5)
        assert instance.ready(role) and daemon.code is None, instance.output(role)[-3000:]
    assert instance.ask("a good one").tokens == 8
