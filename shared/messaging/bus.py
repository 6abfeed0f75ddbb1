"""ZeroMQ: publish, subscribe, ask and answer, wake-ups. The only file that imports zmq; knows no meaning of a message.

A publication is a hint and may be lost; an answer to a vanished client is dropped. Malformed frames are counted, logged by
length and hash, and dropped, never fatal; one far beyond the size limit is cut off by libzmq with its connection, and the
line is made anew. An ipc path can be stolen by a second bind, so callers lock before they bind. Where there are keys, both
sides must show theirs.
"""

import os
import stat
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from specl.shared.errors import ConfigError, DaemonUnreachable, SpecLoraError, WireError
from specl.shared.messaging.codec import MAX_FRAME, decode, describe, encode
from specl.shared.messaging.endpoints import Endpoint, Keys
from specl.shared.paths import DISK_REFUSES
from specl.shared.runtime import log

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

SEND_QUEUE = 1000
LINGER_MS = 200  # for answers on their way when a daemon stops
LOST_S = 1.0  # without a connection, before a line is made anew
_READABLE = int(zmq.POLLIN)
ANSWER_QUEUE = 64  # frames one peer may have waiting at a daemon: with MAX_FRAME, the bound on its memory
_log = log.get("bus")


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    return socket


def new_keys() -> Keys:
    """A fresh pair for the daemons and one for their clients."""
    (server_public, server_secret), (client_public, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    return Keys(*(key.decode() for key in (server_public, client_public, client_secret, server_secret)))


class _OnlyOurs:
    """Lets in whoever shows the one client key."""

    def __init__(self, keys: Keys) -> None:
        self._allowed = keys.client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """What the authenticator asks."""
        return key == self._allowed


def _bind(socket: zmq.Socket, endpoint: Endpoint) -> None:
    if endpoint.keys is not None:
        if not endpoint.keys.server_secret:
            raise ConfigError(
                "there is no server key here: this machine can connect, not serve", "`specl-ctl keys make`"
            )
        socket.curve_server = True
        socket.curve_publickey = endpoint.keys.server_public.encode()
        socket.curve_secretkey = endpoint.keys.server_secret.encode()
    path = Path(endpoint.address.removeprefix("ipc://"))
    with suppress(FileNotFoundError):
        if endpoint.address.startswith("ipc://") and not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is in the way of a socket", "remove it, or set SPECL_VAR to another folder")
    previous = os.umask(0o077)
    try:
        socket.bind(endpoint.address)
    except zmq.ZMQError as error:
        kind = SpecLoraError if error.errno in DISK_REFUSES else ConfigError
        raise kind(f"cannot bind {endpoint.address}: {error}") from error
    finally:
        os.umask(previous)


def _connect(socket: zmq.Socket, endpoint: Endpoint) -> None:
    # a frame that is too long ends a connection, so `decode` may refuse a few as well
    socket.setsockopt(zmq.MAXMSGSIZE, 4 * MAX_FRAME)
    if endpoint.keys is not None:
        socket.curve_serverkey = endpoint.keys.server_public.encode()
        socket.curve_publickey = endpoint.keys.client_public.encode()
        socket.curve_secretkey = endpoint.keys.client_secret.encode()
    socket.connect(endpoint.address)


class _Line:
    """A socket of a server that connects outwards; `take` gets the bytes of each message.

    libzmq comes back to a peer that was away, and never to one that sent a frame beyond the limit. It does not say which it
    was, so whatever has been without a connection for a while is made anew.
    """

    def __init__(self, make: Callable[[], zmq.Socket], take: Callable[[bytes], None]) -> None:
        self._make, self.take = make, take
        self._open()

    def _open(self) -> None:
        self.socket = self._make()
        self._events = self.socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._lost_at: float | None = None

    def mend(self, now: float) -> None:
        """Make it anew where it is due."""
        from zmq.utils.monitor import recv_monitor_message  # asyncio comes with it; only daemons have lines

        while self._events.poll(0):
            lost = recv_monitor_message(self._events)["event"] == zmq.EVENT_DISCONNECTED
            self._lost_at = now if lost else None
        if self._lost_at is not None and now - self._lost_at >= LOST_S:
            self.close()
            self._open()

    def close(self) -> None:
        """Close both sockets."""
        self.socket.disable_monitor()
        self._events.close(linger=0)
        self.socket.close(linger=0)


class Server:
    """A daemon's two sockets: it answers on one and publishes on the other. One thread owns it; any thread may `wake`."""

    def __init__(self, answer: Endpoint, publish: Endpoint) -> None:
        self._context = zmq.Context()
        self._authenticator = self._authenticate(answer.keys) if answer.keys is not None else None
        self._router = _socket(self._context, zmq.ROUTER)
        self._router.setsockopt(zmq.RCVHWM, ANSWER_QUEUE)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._publisher = _socket(self._context, zmq.PUB)
        _bind(self._router, answer)
        _bind(self._publisher, publish)
        self._waker, self._waked = self._wake_pair()
        self._lines: list[_Line] = []
        self._mended_at = 0.0
        self.malformed = 0

    def _authenticate(self, keys: Keys) -> "ThreadAuthenticator":
        from zmq.auth.thread import ThreadAuthenticator  # asyncio comes with it; only keys need it

        # CURVE alone lets in whoever knows the server's public key; this asks for the client's too
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve_callback("*", _OnlyOurs(keys))
        return authenticator

    def _wake_pair(self) -> tuple[int, int]:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        return write, read

    def wake(self) -> None:
        """Make `poll` return soon. The only method that any thread may call."""
        with suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def subscribe(self, endpoint: Endpoint, handle: Callable[[Any], None]) -> None:
        """Hear what another daemon publishes; it may come and go."""

        def make() -> zmq.Socket:
            socket = _socket(self._context, zmq.SUB)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            _connect(socket, endpoint)
            return socket

        self._lines.append(_Line(make, lambda data: handle(decode(data))))

    def requester(self, endpoint: Endpoint, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """A function that sends to another daemon; answers arrive at `handle` while polling."""

        def make() -> zmq.Socket:
            socket = _socket(self._context, zmq.DEALER)
            # without a peer nothing may queue: a request that waits for a dead daemon would arrive stale
            socket.setsockopt(zmq.IMMEDIATE, 1)
            _connect(socket, endpoint)
            return socket

        line = _Line(make, lambda data: handle(decode(data)))
        self._lines.append(line)

        def send(message: Any) -> None:
            with suppress(zmq.Again):
                line.socket.send(encode(message), zmq.NOBLOCK)

        return send

    def poll(self, timeout_s: float, handle: Callable[[bytes, Any], None]) -> None:
        """Wait up to `timeout_s`, then hand every waiting request to `handle(peer, message)` and every publication and
        answer to its own function.
        """
        poller = zmq.Poller()
        poller.register(self._waked, zmq.POLLIN)
        self._mend()
        lines = {line.socket: line for line in self._lines}
        for socket in (self._router, *lines):
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(int(max(0.0, timeout_s) * 1000)))
        if self._waked in ready:
            with suppress(BlockingIOError):
                os.read(self._waked, 65536)
        for socket in ready:
            if socket is self._router:
                self._drain(socket, lambda frames: handle(frames[0], decode(frames[-1])), framed=True)
            elif socket in lines:
                self._drain(socket, lambda frames, line=lines[socket]: line.take(frames[-1]))

    def _mend(self) -> None:
        now = time.monotonic()
        if now - self._mended_at >= LOST_S / 2:
            self._mended_at = now
            for line in self._lines:
                line.mend(now)

    def _drain(self, socket: zmq.Socket, take: Callable[[list[bytes]], None], framed: bool = False) -> None:
        # bounded, so that one flood cannot starve the other sockets
        for _ in range(SEND_QUEUE):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != (2 if framed else 1):
                self._malformed(f"{len(frames)} frames")
                continue
            try:
                take(frames)
            except WireError as error:
                self._malformed(str(error))

    def _malformed(self, why: str) -> None:
        self.malformed += 1
        if self.malformed & (self.malformed - 1) == 0:  # 1st, 2nd, 4th, 8th ...: a flood must not fill the log
            _log.warning("bus.malformed", why=why, count=self.malformed)

    def send(self, peer: bytes, message: Any) -> bool:
        """Answer a client. False where it is gone or does not read, or where the answer breaks a limit (it may quote what the
        client wrote).
        """
        try:
            self._router.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except WireError as error:
            _log.error("bus.unsendable", why=str(error))
            return False
        except zmq.ZMQError:
            return False
        return True

    def publish(self, message: Any) -> None:
        """Tell whoever listens."""
        try:
            self._publisher.send(encode(message), zmq.NOBLOCK)
        except WireError as error:
            _log.error("bus.unsendable", why=str(error))
        except zmq.Again:
            pass

    def close(self) -> None:
        """Close every socket; who reads gets what was sent, within a fifth of a second."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=LINGER_MS)
        os.close(self._waker)
        os.close(self._waked)


class Connection:
    """A client's side: one daemon, a deadline on everything."""

    def __init__(self, endpoint: Endpoint, what: str, start_hint: str = "start it with `honcho start`") -> None:
        self._context = zmq.Context.instance()
        self._socket = _socket(self._context, zmq.DEALER)
        _connect(self._socket, endpoint)
        self._what, self._hint = what, start_hint

    def send(self, message: Any) -> None:
        """Send; never blocks, and says nothing to a connection that was closed meanwhile."""
        with suppress(zmq.ZMQError):
            self._socket.send(encode(message), zmq.NOBLOCK)

    def receive_all(self, timeout_s: float) -> list[Any]:
        """The messages that are there, at least one; none after `timeout_s`. Raises SpecLoraError once it is closed."""
        if self._socket.closed:
            raise SpecLoraError(f"the connection to the {self._what} daemon was closed here")
        messages: list[Any] = []
        while self._socket.poll(0 if messages else int(timeout_s * 1000)):
            messages.append(_decoded(self._socket.recv(), self._what))
        return messages

    def receive(self, timeout_s: float) -> Any:
        """The next message. Raises DaemonUnreachable after `timeout_s`, SpecLoraError once it is closed."""
        if self._socket.closed:
            raise SpecLoraError(f"the connection to the {self._what} daemon was closed here")
        if not self._socket.poll(int(timeout_s * 1000)):
            raise DaemonUnreachable(f"the {self._what} daemon does not answer", self._hint)
        return _decoded(self._socket.recv(), self._what)

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

    def __init__(self, endpoint: Endpoint, what: str) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._socket = _socket(zmq.Context.instance(), zmq.DEALER)
        _connect(self._socket, endpoint)
        self._what = what
        self._came: deque[bytes] = deque()
        self._wanted: Any = None
        self._deadline, self._alarm = 0.0, None
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._take)

    def send(self, message: Any) -> None:
        """Hand over to the I/O thread; never waits."""
        with suppress(zmq.ZMQError):
            self._socket.send(encode(message), zmq.NOBLOCK)
        # the descriptor tells only of changes, and sending may have swallowed one
        self._loop.call_soon(self._take)

    def _take(self) -> None:
        """Everything that is there."""
        if self._socket.closed:
            return
        while self._socket.getsockopt(zmq.EVENTS) & _READABLE:  # cheaper than to be told no by an exception
            self._came.append(self._socket.recv(zmq.NOBLOCK))
        if self._came and self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _ring(self) -> None:
        """One timer for many waits: a wait that ended well only moves the deadline."""
        self._alarm = None
        if self._wanted is None or self._wanted.done():
            return
        if self._loop.time() < self._deadline:
            self._set_alarm()
        else:
            self._wanted.set_result(None)

    def _set_alarm(self) -> None:
        self._stop_alarm()
        self._alarm = self._loop.call_at(self._deadline, self._ring)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def receive(self, timeout_s: float) -> list[Any]:
        """The messages that are there, at least one; none after `timeout_s`. Raises DaemonUnreachable for another version's."""
        if not self._came:
            self._wanted, self._deadline = self._loop.create_future(), self._loop.time() + timeout_s
            if self._alarm is None or self._alarm.when() > self._deadline:
                self._set_alarm()
            await self._wanted
        frames = [self._came.popleft() for _ in range(len(self._came))]
        return [_decoded(data, self._what) for data in frames]

    def close(self) -> None:
        """Close; what was sent last, a cancellation, still has a moment to leave."""
        self._stop_alarm()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=LINGER_MS)


def _decoded(data: bytes, what: str) -> Any:
    try:
        return decode(data)
    except WireError as error:
        raise DaemonUnreachable(
            f"the {what} daemon speaks another version ({describe(data)})", "restart the daemons"
        ) from error


def gather(questions: dict[str, tuple[Endpoint, Any]], timeout_s: float) -> dict[str, Any]:
    """Ask several endpoints at once: {name: (endpoint, message)} -> {name: answer}, without those that stayed silent."""
    context = zmq.Context.instance()
    poller = zmq.Poller()
    sockets: dict[zmq.Socket, str] = {}
    for name, (endpoint, message) in questions.items():
        socket = _socket(context, zmq.DEALER)
        _connect(socket, endpoint)
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
