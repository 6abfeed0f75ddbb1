"""A client's side of the bus: connections that block, one for asyncio, and one question to several daemons at once."""

import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import zmq

from specl.shared.errors import START_HINT, DaemonUnreachable, SpecLoraError, WireError
from specl.shared.messaging.codec import decode, describe, encode
from specl.shared.messaging.endpoints import Endpoint
from specl.shared.messaging.sockets import LINGER_MS, Socket, connect, new_socket, shared_context

if TYPE_CHECKING:
    pass

_READABLE = int(zmq.POLLIN)


class Connection:
    """A blocking client's connection to one daemon; every wait has a deadline. `role` names the daemon in errors."""

    def __init__(self, endpoint: Endpoint, role: str) -> None:
        self._socket = new_socket(shared_context(), zmq.DEALER)
        connect(self._socket, endpoint)
        self._role = role

    def send(self, message: Any) -> None:
        """Send; never blocks, and says nothing to a connection that was closed meanwhile."""
        with suppress(zmq.ZMQError):
            self._socket.send(encode(message), zmq.NOBLOCK)

    def receive_all(self, timeout_s: float) -> list[Any]:
        """The messages that are there, at least one; none after `timeout_s`. Raises SpecLoraError once it is closed."""
        if self._socket.closed:
            raise SpecLoraError(f"the connection to the {self._role} daemon was closed here")
        messages: list[Any] = []
        while self._socket.poll(0 if messages else int(timeout_s * 1000)):
            messages.append(_decoded(self._socket.recv(), self._role))
        return messages

    def receive(self, timeout_s: float) -> Any:
        """The next message. Raises DaemonUnreachable after `timeout_s`, SpecLoraError once it is closed."""
        if self._socket.closed:
            raise SpecLoraError(f"the connection to the {self._role} daemon was closed here")
        if not self._socket.poll(int(timeout_s * 1000)):
            raise DaemonUnreachable(f"the {self._role} daemon does not answer", START_HINT)
        return _decoded(self._socket.recv(), self._role)

    def request(self, message: Any, timeout_s: float) -> Any:
        """Send and wait for one answer."""
        self.send(message)
        return self.receive(timeout_s)

    def close(self) -> None:
        """Close; what was sent last, a cancellation, still has a moment to leave."""
        self._socket.close(linger=LINGER_MS)


class AsyncConnection:
    """A client's side for an asyncio program: one daemon, one task, a deadline on everything.

    A plain socket whose descriptor the loop watches: zmq.asyncio makes some futures and timers for each message, which cost more
    than all that the gateway does with one.
    """

    def __init__(self, endpoint: Endpoint, role: str) -> None:
        import asyncio  # a blocking client does without it

        self._loop = asyncio.get_running_loop()
        self._socket = new_socket(shared_context(), zmq.DEALER)
        connect(self._socket, endpoint)
        self._role = role
        self._received: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive_waiting)

    def send(self, message: Any) -> None:
        """Hand over to the I/O thread; never waits."""
        with suppress(zmq.ZMQError):
            self._socket.send(encode(message), zmq.NOBLOCK)
        # the descriptor tells only of changes, and sending may have swallowed one
        self._loop.call_soon(self._receive_waiting)

    def _receive_waiting(self) -> None:
        """Take every message that is there."""
        if self._socket.closed:
            return
        while int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:  # an exception for "nothing there" costs more
            self._received.append(self._socket.recv(zmq.NOBLOCK))
        if self._received and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _on_timer(self) -> None:
        """The deadline of a wait may have passed. One timer serves many waits: each only moves the deadline."""
        self._timer = None
        if self._waiting is None or self._waiting.done():
            return
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self._waiting.set_result(None)

    def _set_timer(self) -> None:
        self._stop_timer()
        self._timer = self._loop.call_at(self._deadline, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def receive(self, timeout_s: float) -> list[Any]:
        """The messages that are there, at least one; none after `timeout_s`. Raises DaemonUnreachable for another version's."""
        if not self._received:
            self._waiting, self._deadline = self._loop.create_future(), self._loop.time() + timeout_s
            if self._timer is None or self._timer.when() > self._deadline:
                self._set_timer()
            await self._waiting
        frames = [self._received.popleft() for _ in range(len(self._received))]
        return [_decoded(data, self._role) for data in frames]

    def close(self) -> None:
        """Close; what was sent last, a cancellation, still has a moment to leave."""
        self._stop_timer()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=LINGER_MS)


def _decoded(data: bytes, role: str) -> Any:
    try:
        return decode(data)
    except WireError as error:
        raise DaemonUnreachable(
            f"the {role} daemon speaks another version ({describe(data)})", "restart the daemons"
        ) from error


def gather(questions: dict[str, tuple[Endpoint, Any]], timeout_s: float) -> dict[str, Any]:
    """Ask several endpoints at once: {name: (endpoint, message)} -> {name: answer}, without those that did not answer in time."""
    context = shared_context()
    poller = zmq.Poller()
    sockets: dict[Socket, str] = {}
    for name, (endpoint, message) in questions.items():
        socket = new_socket(context, zmq.DEALER)
        connect(socket, endpoint)
        socket.send(encode(message))
        poller.register(socket, zmq.POLLIN)
        sockets[socket] = name
    answers: dict[str, Any] = {}
    end = time.monotonic() + timeout_s
    while len(answers) < len(questions) and (left := end - time.monotonic()) > 0:
        for socket, _ in poller.poll(int(left * 1000) + 1):
            with suppress(WireError):
                answers[sockets[socket]] = decode(socket.recv())
            poller.unregister(socket)
    for socket in sockets:
        socket.close(linger=0)
    return answers
