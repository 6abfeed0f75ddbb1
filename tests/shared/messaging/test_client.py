"""One Client asked again and again, left half-way, shared by threads: real sockets, a real inference daemon, random models."""

from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest

from specl.shared.errors import DaemonUnreachable, RequestRejected, SpecLoraError
from specl.shared.messaging import answer_stream
from specl.shared.messaging import client as client_module
from specl.shared.messaging.messages import SetAdapter
from tests.harness.instance import Instance
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def instance(forkserver):
    with Instance(forkserver) as instance:
        instance.start("inference", SPECL_TEST_TOKEN_MS="15")
        instance.ready("inference")
        yield instance


@pytest.fixture
def client(instance):
    with instance.client() as made:
        yield made


def test_command_after_an_answer_gets_its_reply(client, monkeypatch):
    # heartbeats without a pause: each ask leaves answers to them on the way when it ends
    monkeypatch.setattr(answer_stream, "HEARTBEAT_S", 0.001)
    for _ in range(5):
        client.ask("hello", max_tokens=6)
        assert client.set_adapter("").ok


def test_command_after_an_abandoned_stream_gets_its_reply(client):
    pieces = client.stream("hello", max_tokens=60)
    next(pieces)
    assert client.command("inference", SetAdapter("")).ok  # while the stream goes on
    pieces.close()
    assert client.set_adapter("").ok
    assert client.ask("again", max_tokens=5).tokens <= 5


def test_leaving_a_stream_cancels_it(instance, client):
    for _ in client.stream("hello", max_tokens=200):
        break
    wait_until(lambda: instance.status("inference")["queue"]["in_flight"] == 0, 1.5, "the answer is given up")


def test_two_streams_of_one_client_do_not_mix(client):
    alone = [client.ask(f"question {n}", max_tokens=12).text for n in range(2)]
    first, second = (client.stream(f"question {n}", max_tokens=12) for n in range(2))
    in_turn = list(zip_longest(first, second, fillvalue=""))
    assert ["".join(pieces) for pieces in zip(*in_turn, strict=True)] == alone


def test_threads_may_share_a_client(client):
    alone = [client.ask(f"thread {n}", max_tokens=10).text for n in range(4)]

    def work(number):
        return [client.ask(f"thread {number}", max_tokens=10).text for _ in range(3) if client.set_adapter("").ok]

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(work, range(4))) == [[text] * 3 for text in alone]


def test_closing_the_client_ends_an_open_stream(instance):
    client = instance.client()
    pieces = client.stream("hello", max_tokens=200)
    next(pieces)
    client.close()
    with pytest.raises(SpecLoraError, match="closed here"):
        list(pieces)
    wait_until(lambda: instance.status("inference")["queue"]["in_flight"] == 0, 5, "the answer is given up")


def test_missing_daemons_are_reported(instance, tmp_path):
    from specl.shared.paths import Paths

    with client_module.Client(Paths(tmp_path, tmp_path).create(), instance.settings) as client:
        with pytest.raises(DaemonUnreachable, match="inference daemon does not answer"):
            client.ask("hello")
        with pytest.raises(DaemonUnreachable, match="trainer daemon does not answer"):
            client.train()


def test_one_stop_text_needs_no_list(client):
    text = client.ask("hello", max_tokens=30).text
    assert client.ask("hello", max_tokens=30, stop=text[4:6]).text == text[: text.index(text[4:6])]


def test_what_cannot_travel_is_a_rejected_request(client):
    with pytest.raises(RequestRejected, match="not Unicode"):
        client.ask("half a pair \ud800")
    with pytest.raises(RequestRejected, match="not Unicode"):
        client.set_adapter("\udcff")
    with pytest.raises(RequestRejected, match="cannot be encoded"):
        client.ask("hello", seed=2**70)
