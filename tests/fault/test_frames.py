"""Hostile frames on every socket (F10): nothing ends, nothing grows, everything is counted, the next good request is answered."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
import zmq

from specl.shared.errors import DaemonUnreachable, RequestRejected
from specl.shared.messaging.codec import VERSION, decode, encode
from specl.shared.messaging.daemon_status import CollectorStatus
from specl.shared.messaging.messages import (
    Ask,
    Envelope,
    Fetch,
    GetStatus,
    Purge,
    RecordBatch,
    RecordReady,
    Reply,
)
from specl.shared.paths import ROLES
from specl.shared.sampling_params import SamplingParams
from tests.harness.figures import process_figures
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until

slow = pytest.mark.slow
GOOD = [
    encode(GetStatus()),
    encode(Fetch(["a"], 3)),
    encode(Ask("r", [{"role": "user", "content": "x"}], "", 4, SamplingParams(), "detailed")),
    encode(Purge([], None, "")),
    encode(RecordBatch([Envelope("a", "Generation", b"x")], 0)),
    encode(RecordReady("a")),
    encode(CollectorStatus("ready", 1.0, 1, "", 0, {}, None)),
    encode(Reply(True, "yes")),
]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def hostile(rng: random.Random) -> bytes:
    """A frame that no decoder should like."""
    good = rng.choice(GOOD)
    body: Any = {"request_id": "x"}
    return rng.choice(
        [
            lambda: rng.randbytes(rng.randrange(0, 400)),
            lambda: good[: rng.randrange(len(good))],
            lambda: good + b"\0",
            lambda: nested(1000),
            lambda: nested(100_000),
            lambda: msgpack.packb([VERSION, "Cancel", {}])[:-1] + nested(900),
            lambda: b"\xdd\xff\xff\xff\xff" + b"\xc0" * 10,  # an array of four thousand million
            lambda: b"\xc6\xff\xff\xff\xff" + b"x" * 10,
            lambda: b"\xdf\xff\xff\xff\xff",
            lambda: b"\x93\x02\xa6Cancel\x82\xaarequest_id\xa1x\xaarequest_id\xa1y",  # a key twice
            lambda: msgpack.packb([VERSION, "Ask", body | {"max_tokens": float("nan")}]),
            lambda: msgpack.packb([99, "Cancel", body]),
            lambda: msgpack.packb([True, "Cancel", body]),
            lambda: msgpack.packb([VERSION, "Nothing", body]),
            lambda: msgpack.packb([VERSION, "Cancel", body | {"more": 1}]),
            lambda: msgpack.packb([VERSION, "Cancel", {"request_id": 5}]),
            lambda: msgpack.packb([VERSION, "Fetch", {"done": [], "limit": 2**63}]),
            lambda: msgpack.packb([VERSION, "Fetch", {"done": ["x", 1], "limit": 1}]),
            lambda: msgpack.packb(msgpack.ExtType(5, b"x")),
            lambda: msgpack.packb(
                [
                    VERSION,
                    "Reply",
                    {"ok": True, "message": msgpack.ExtType(1, b""), "ids": [], "run_id": "", "adapter_id": ""},
                ]
            ),
        ]
    )()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=slow)])
def test_f10_hostile_requests_are_counted_and_dropped(instance, figures, context, role, count):
    daemon = instance.start(role)
    instance.ready(role)
    for _ in range(20):
        instance.status(role)
    before, _ = process_figures(daemon.pid)
    socket = context.socket(zmq.DEALER)
    socket.connect(instance.paths.socket(role))
    rng, sent = random.Random(1), 0
    for n in range(count):
        frame = hostile(rng)
        socket.send_multipart([frame, b"", frame] if n % 97 == 0 else [frame])
        sent += 1
        if n % 50 == 0:
            time.sleep(0.005)
    body = wait_until(lambda: (b := instance.status(role)) and b["malformed"] == sent and b, 60, f"{sent} are counted")
    after, _ = process_figures(daemon.pid)
    oversized = context.socket(zmq.DEALER)
    oversized.connect(instance.paths.socket(role))
    oversized.send(b"x" * (20 << 20))  # cut off by libzmq, with its connection
    time.sleep(0.5)
    assert instance.status(role)["state"] in ("ready", "starting", "busy")
    if role == "inference":
        assert instance.ask("a good one").tokens == 8
    largest, _ = process_figures(daemon.pid)
    figures(F10_socket=role, frames=sent, counted=body["malformed"], grew_MiB=max(after, largest) - before)
    assert daemon.code is None
    assert after - before < 32 and largest - before < 32


@pytest.mark.parametrize(
    "role, source",
    [("inference", "trainer"), ("collector", "inference"), ("collector", "trainer"), ("trainer", "inference")],
)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=slow)])
def test_f10_hostile_publications_and_answers(instance, figures, context, role, source, count):
    """The other sockets connect outwards: whoever stands at the other end sends rubbish."""
    publisher, answerer = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    for socket in (publisher, answerer):
        socket.setsockopt(zmq.SNDHWM, 0)  # every frame is to arrive
    publisher.bind(instance.paths.socket(f"{source}-pub"))
    answerer.bind(instance.paths.socket(source))
    daemon = instance.start(role)
    instance.ready(role)
    assert publisher.poll(5000), "it subscribes"
    before, _ = process_figures(daemon.pid)
    rng, answered = random.Random(2), 0
    for n in range(count):
        publisher.send(hostile(rng))
        if n % 50 == 0:
            time.sleep(0.005)
    if role == "collector":
        while answered < count and answerer.poll(10_000):
            while answerer.poll(0):  # a line that stayed silent may have been made anew: answer the latest
                peer, data = answerer.recv_multipart()
            if isinstance(decode(data), Fetch):
                while answered < count:
                    answerer.send_multipart([peer, hostile(rng)])
                    answered += 1
    sent = count + answered
    body = wait_until(lambda: (b := instance.status(role)) and b["malformed"] >= sent and b, 60, f"{sent} are counted")
    after, _ = process_figures(daemon.pid)
    publisher.send(b"x" * (20 << 20))
    _, known = publisher.send(b"x" * (70 << 20)), instance.status(role)["malformed"]  # cut off, with the connection

    def heard_again():
        publisher.send(b"no message")
        return instance.status(role).get("malformed", 0) > known + 1  # the frame of 20 MiB may be one of them

    wait_until(heard_again, 15, "the subscription hears again")
    if role == "collector":
        while answerer.poll(0):
            answerer.recv_multipart()
        for size in (20 << 20, 70 << 20):  # refused; cut off, with the connection
            answerer.send_multipart([peer, b"x" * size])
            assert answerer.poll(30_000), "the collector goes on asking"
            peer, _ = answerer.recv_multipart()
            while answerer.poll(0):
                peer, _ = answerer.recv_multipart()
    at_last, _ = process_figures(daemon.pid)  # a frame of 20 MiB was there in one piece
    figures(
        F10_outward=role,
        source=source,
        publications=count,
        answers=answered,
        counted=body["malformed"],
        grew_MiB=after - before,
        with_20_MiB_frame=at_last - before,
    )
    assert instance.ready(role) and daemon.code is None and after - before < 32 and at_last - before < 64


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=slow)])
def test_f10_hostile_subscribers(instance, figures, context, role, count):
    """A publishing socket reads subscriptions and nothing else; whoever listens well still hears."""
    daemon = instance.start(role)
    instance.ready(role)
    before, _ = process_figures(daemon.pid)
    rng, listener, rude = random.Random(4), context.socket(zmq.SUB), context.socket(zmq.XSUB)
    listener.setsockopt(zmq.SUBSCRIBE, b"")
    for socket in (listener, rude):
        socket.connect(instance.paths.socket(f"{role}-pub"))
    for n in range(count):
        rude.send(hostile(rng))
        if n % 50 == 0:
            time.sleep(0.005)
    rude.send(b"x" * (20 << 20))
    assert instance.ready(role) and daemon.code is None
    if role == "inference":
        assert instance.ask("a good one").tokens == 8
        assert listener.poll(5000), "its publications go on"
    after, _ = process_figures(daemon.pid)
    figures(F10_publisher=role, frames=count, grew_MiB=after - before)
    assert after - before < 32


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=slow)])
def test_f10_a_client_survives_hostile_answers(instance, figures, context, count):
    """The command line's and the Python client's end of the line."""
    answerer = context.socket(zmq.ROUTER)
    answerer.bind(instance.paths.socket("inference"))
    stop, rng = threading.Event(), random.Random(5)

    def answer():
        while not stop.is_set():
            if answerer.poll(50):
                peer, _ = answerer.recv_multipart()
                answerer.send_multipart([peer, hostile(rng)])

    thread = threading.Thread(target=answer)
    thread.start()
    refused = 0
    try:
        for _ in range(count):
            client = instance.client()
            try:
                client.ask("hello")
            except DaemonUnreachable:
                refused += 1
            finally:
                client.close()
    finally:
        stop.set()
        thread.join()
    figures(F10_client_answers=count, refused=refused)
    assert refused == count


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.mark.parametrize("seconds", [3, pytest.param(180, marks=slow)])
def test_f10_fuzzer_finds_no_way_past_the_decoder(figures, seconds):
    """Keeps every input that reached a new line of wire.py and changes those further; only WireError may come out.

    fuzz_decoder.py does the same with atheris, faster and into msgpack, where that is installed.
    """
    import sys

    from specl.shared.errors import WireError
    from specl.shared.messaging import codec

    rng = random.Random(int(os.environ.get("SPECL_TEST_SEED", "3")))
    corpus, seen, tried, accepted = [*GOOD, b"", nested(20)], set(), 0, 0
    edges: set[tuple[int, int]] = set()
    last = [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != codec.__file__:
            return None
        if event == "line":
            edges.add((last[0], frame.f_lineno))
            last[0] = frame.f_lineno
        return trace

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng, corpus)
        edges.clear()
        sys.settrace(trace)
        try:
            value = decode(data)
            sys.settrace(None)
            accepted += 1
            decode(encode(value))
        except WireError:
            pass
        finally:
            sys.settrace(None)
        tried += 1
        if not edges <= seen:
            seen |= edges
            corpus.append(data)
    figures(F10_fuzzed=tried, corpus=len(corpus), edges=len(seen), accepted=accepted, escaped=0)
    assert len(seen) > 60


def mutate(rng: random.Random, corpus: list[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[place % len(data)] = rng.randrange(256)
            case 1:
                data[place:place] = rng.randbytes(rng.randrange(1, 6))
            case 2:
                del data[place : place + rng.randrange(1, 6)]
            case 3:
                other = rng.choice(corpus)
                data[place:] = other[rng.randrange(len(other) + 1) :]
            case _ if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data[:4096])


def how_it_ended(deltas):
    """Of one streamed answer."""
    try:
        return "done" if list(deltas) else "nothing"
    except RequestRejected as error:
        return "busy" if "wait already" in str(error) else str(error)


def test_a_client_has_its_limits(instance, context):
    instance.set(SETTINGS.replace("serving: {", "serving: {client_queue_limit: 2, max_prompt_kb: 4, "))
    instance.start("inference", SPECL_TEST_TOKEN_MS="20")
    instance.ready("inference")
    socket = context.socket(zmq.DEALER)
    socket.connect(instance.paths.socket("inference"))
    for n in range(5):
        socket.send(encode(Ask(f"r{n}", [{"role": "user", "content": "x"}], "", 8, SamplingParams(), "detailed")))
    refused = {}
    while len(refused) < 3 and socket.poll(3000):
        message = decode(socket.recv())
        if type(message).__name__ == "Failed":
            refused[message.request_id] = message
    assert sorted(refused) == ["r2", "r3", "r4"] and all(f.code == "busy" for f in refused.values())
    assert instance.ask("another client").tokens == 8
    with instance.client() as crowd:  # one program, a connection for each request
        streams = [crowd.deltas(crowd.request("x", max_tokens=8, client_id="crowd")) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(how_it_ended, streams))
    assert sorted(ends) == ["busy", "busy", "done", "done"]
    socket.send(
        encode(
            Ask(
                "long",
                [{"role": "user", "content": [{"type": "text", "text": "y" * 5000}]}],
                "",
                8,
                SamplingParams(),
                "fast",
            )
        )
    )
    while (message := decode(socket.recv())) and getattr(message, "request_id", "") != "long":
        pass
    assert message.code == "context_length_exceeded" and "max_prompt_kb" in message.message
