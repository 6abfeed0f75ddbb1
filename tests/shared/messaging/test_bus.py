"""Lines that connect outwards come back by themselves: after a peer's restart, and after a frame that libzmq gives up over."""

import time

import pytest
import zmq

from specl.daemons.gateway.service import listen
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging import bus, sockets
from specl.shared.messaging.codec import decode, encode
from specl.shared.messaging.endpoints import Endpoint
from specl.shared.messaging.messages import Fetch, RecordReady, Reply
from specl.shared.messaging.sockets import bind, connect, new_keys

LIMIT = 1000  # so that 4 * LIMIT stands for 64 MiB
LONG = b"x" * (5 * LIMIT)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def peer(tmp_path, context):
    """Bind a socket of some kind where the server under test connects to."""

    def bind(kind):
        socket = context.socket(kind)
        socket.bind(f"ipc://{tmp_path}/peer")
        return socket

    return bind


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_FRAME", LIMIT)
    server = bus.Server(Endpoint(f"ipc://{tmp_path}/answer"), Endpoint(f"ipc://{tmp_path}/publish"))
    yield server
    server.close()


@pytest.fixture
def there(tmp_path):
    return Endpoint(f"ipc://{tmp_path}/peer")


def until(server, condition, act=lambda: None, timeout_s=10.0):
    """Poll as a daemon does, and `act` each time, until `condition`; whether it came true."""
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        act()
        server.poll(0.05, lambda peer, message: None)
    return condition()


def test_subscription_recovers_after_an_oversized_frame(server, peer, there):
    heard, publisher = [], peer(zmq.PUB)
    server.subscribe(there, heard.append)
    assert until(server, lambda: heard, lambda: publisher.send(encode(RecordReady("before"))))
    publisher.send(LONG)
    assert until(server, lambda: RecordReady("after") in heard, lambda: publisher.send(encode(RecordReady("after"))))


def test_request_is_answered_after_an_oversized_answer(server, peer, there):
    heard, answerer = [], peer(zmq.ROUTER)
    ask = server.requester(there, heard.append)
    answers = [LONG, encode(Reply(True, "after"))]

    def turn():
        ask(Fetch([], 1))
        while answerer.poll(0):
            name, data = answerer.recv_multipart()
            assert isinstance(decode(data), Fetch)
            answerer.send_multipart([name, answers.pop(0) if len(answers) > 1 else answers[0]])

    assert until(server, lambda: heard, turn)
    assert all(reply == Reply(True, "after") for reply in heard)


def test_a_subscription_hears_a_publisher_that_came_back(server, peer, there):
    heard, publisher = [], peer(zmq.PUB)
    server.subscribe(there, heard.append)
    assert until(server, lambda: heard, lambda: publisher.send(encode(RecordReady("before"))))
    publisher.close(linger=0)
    assert not until(server, lambda: RecordReady("after") in heard, timeout_s=1.5)  # longer than a line is waited for
    publisher = peer(zmq.PUB)
    assert until(server, lambda: RecordReady("after") in heard, lambda: publisher.send(encode(RecordReady("after"))))


def test_abusive_peer_is_not_redialled_at_once(server, peer, there, monkeypatch):
    opened = []
    monkeypatch.setattr(bus, "connect", lambda socket, endpoint: (opened.append(socket), connect(socket, endpoint)))
    publisher = peer(zmq.PUB)
    server.subscribe(there, lambda message: None)
    monkeypatch.setattr(bus, "LOST_S", 60.0)
    for _ in range(40):
        publisher.send(LONG)
        server.poll(0.05, lambda peer, message: None)
    assert len(opened) == len(server.outgoing) == 1


def test_address_may_come_with_the_network():
    keys = new_keys()
    with zmq.Context() as context, pytest.raises(SpecLoraError) as caught:
        bind(context.socket(zmq.ROUTER), Endpoint("tcp://192.0.2.1:5570", keys))
    assert not isinstance(caught.value, ConfigError)
    with pytest.raises(SpecLoraError) as caught:
        listen("192.0.2.1", 0)
    assert not isinstance(caught.value, ConfigError)
