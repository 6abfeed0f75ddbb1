"""Hostile HTTP (F10): whatever arrives at the gateway is refused in OpenAI's shape, counted, and the next good one is answered."""

import http.client
import json
import random
import socket
from collections import Counter
from urllib.parse import urlsplit

import pytest

from tests.fault.test_frames import hostile
from tests.harness.figures import process_figures
from tests.harness.gateway import Gateway

slow = pytest.mark.slow
GOOD = {"model": "speclora", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
ODD = (
    None,
    True,
    -1,
    10**400,
    1e999,
    float("nan"),
    "",
    "x" * 3000,
    "\ud800",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    [None],
    2**63,
)


@pytest.fixture
def gateway(instance):
    instance.start("inference")
    instance.ready("inference")
    gateway = Gateway(instance, "gateway: {port: 0, requests_per_minute: 0}\n")
    try:
        gateway.url = urlsplit(gateway.ready())
        yield gateway
    finally:
        gateway.stop()


def body(rng):
    """A body that no chat endpoint should accept."""
    return rng.choice(
        [
            lambda: hostile(rng),
            lambda: json.dumps(GOOD).encode()[: rng.randrange(1, 60)],
            lambda: b"[" * rng.choice((10, 1000, 100_000)),
            lambda: b'{"a":' * 50_000,
            lambda: json.dumps(rng.choice(ODD)).encode(),
            lambda: json.dumps(
                GOOD | {rng.choice(("messages", "model", "stop", "stream")): rng.choice((0, [0], {"": 1}))}
            ).encode(),
            lambda: json.dumps(
                GOOD | {"temperature": rng.choice((-1, 3, 1e999, float("nan"), "hot", 10**400))}
            ).encode(),
            lambda: json.dumps(GOOD | {"max_tokens": rng.choice((0, -1, 10**400, 0.5, "4"))}).encode(),
            lambda: json.dumps(GOOD | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
            lambda: json.dumps(
                GOOD | {"messages": [{"role": rng.choice(("x", 5, None, [])), "content": rng.choice(ODD)}]}
            ).encode(),
            lambda: json.dumps(
                GOOD | {"speclora": {rng.choice(("record", "mode", "x")): rng.choice((0, [], "?" * 9))}}
            ).encode(),
            lambda: json.dumps(GOOD | {"speclora": {"num_draft_tokens": rng.choice((-1, 17, 2**70))}}).encode(),
            lambda: json.dumps(GOOD | {"unheard_of": 1}).encode(),
            lambda: b"\xff\xfe" + json.dumps(GOOD).encode("utf-16-le")[:-1],
        ]
    )()


def good(connection):
    connection.request("POST", "/v1/chat/completions", json.dumps(GOOD), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=slow)])
def test_f10_hostile_http(instance, figures, gateway, count):
    rng, statuses = random.Random(6), Counter()
    connection = http.client.HTTPConnection(gateway.url.hostname, gateway.url.port, timeout=30)
    assert good(connection)[0] == 200
    before, _ = process_figures(gateway.process.pid)
    for _ in range(count):
        path = rng.choice(("/v1/chat/completions", "/v1/completions", "/api/train/x", "/v1/models/..%2f..%2fetc"))
        connection.request("POST", path, body(rng), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        statuses[answer.status] += 1
        assert 400 <= answer.status < 500, (answer.status, said[:300])
        if path.startswith("/v1/c"):
            assert json.loads(said)["error"]["message"]
    raw = 0
    for _ in range(min(count // 10, 300)):  # not even HTTP
        with socket.create_connection((gateway.url.hostname, gateway.url.port), timeout=10) as plain:
            plain.sendall(rng.choice((rng.randbytes(300), b"GET / HTTP/9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
                                      b"GET /" + b"a" * 70_000, b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                                      b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")) + b"\r\n\r\n")  # fmt: skip
            raw += 1
    large = http.client.HTTPConnection(gateway.url.hostname, gateway.url.port, timeout=30)
    try:
        large.request("POST", "/v1/completions", b"x" * (20 << 20), {"Content-Type": "application/json"})
        statuses[large.getresponse().status] += 1
    except (BrokenPipeError, ConnectionResetError):
        statuses[413] += 1  # refused by its length before it was read
    connection.close()
    connection = http.client.HTTPConnection(gateway.url.hostname, gateway.url.port, timeout=30)
    assert good(connection)[0] == 200
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    counted = sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
        if "requests_total{" in line and ('code="4' in line or 'status="4' in line)
    )  # fmt: skip
    after, _ = process_figures(gateway.process.pid)
    figures(
        F10_http=count,
        refused=sum(statuses.values()),
        counted=int(counted),
        raw=raw,
        statuses=dict(statuses),
        grew_MiB=after - before,
    )
    assert counted >= count and gateway.process.poll() is None and after - before < 32
    assert "Traceback" not in instance.output("gateway")
    connection.close()
