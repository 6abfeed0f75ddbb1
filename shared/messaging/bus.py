"""A daemon's side of the bus: publish, subscribe, ask and answer, wake-ups. Knows no meaning of a message."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode, encode
from specl.shared.messaging.endpoints import Endpoint, Keys
from specl.shared.messaging.sockets import (
    LINGER_MS,
    SEND_QUEUE,
    ClientKeyCheck,
    Context,
    Socket,
    bind,
    connect,
    new_socket,
)
from specl.shared.runtime import log

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

LOST_S = 1.0  # without a connection, before a socket is replaced
ANSWER_QUEUE = 64  # frames one peer may have waiting at a daemon: with MAX_FRAME, the bound on its memory
_log = log.get("bus")


def _take_last(take: Callable[[bytes], None], frames: list[bytes]) -> None:
    take(frames[-1])


class Reconnecting:
    """A socket of a server that connects to another daemon; `take` gets the bytes of each message.

    libzmq reconnects to a peer that was away, but never to one that sent a frame beyond the limit, and does not say which
    of the two it was. So a socket without a connection for LOST_S is replaced.
    """

    def __init__(self, open_socket: Callable[[], Socket], take: Callable[[bytes], None]) -> None:
        self._open_socket, self.take = open_socket, take
        self._open()

    def _open(self) -> None:
        self.socket = self._open_socket()
        self._events = self.socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._lost_at: float | None = None

    def reconnect_if_stale(self, now: float) -> None:
        """Replace the socket where it has been without a connection for too long."""
        from zmq.utils.monitor import recv_monitor_message  # imports asyncio, which no client needs

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
    """A daemon's two sockets: it answers on one and publishes on the other. One thread owns it; any thread may `wake`.

    A publication is a hint and may be lost; an answer to a client that is gone is dropped. Malformed frames are counted in
    `malformed`, logged by length and hash, and dropped.
    """

    def __init__(self, answer: Endpoint, publish: Endpoint) -> None:
        self._context: Context = zmq.Context()
        self._authenticator = self._authenticate(answer.keys) if answer.keys is not None else None
        self._router = new_socket(self._context, zmq.ROUTER)
        self._router.setsockopt(zmq.RCVHWM, ANSWER_QUEUE)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._publisher = new_socket(self._context, zmq.PUB)
        bind(self._router, answer)
        bind(self._publisher, publish)
        self._waker, self._waked = self._wake_pair()
        self.outgoing: list[Reconnecting] = []
        self._checked_at = 0.0
        self.malformed = 0

    def _authenticate(self, keys: Keys) -> "ThreadAuthenticator":
        from zmq.auth.thread import ThreadAuthenticator  # imports asyncio; only keys need it

        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve_callback("*", ClientKeyCheck(keys))
        return authenticator

    def _wake_pair(self) -> tuple[int, int]:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        return write, read

    def wake(self) -> None:
        """Make `poll` return soon. The only method that other threads may call."""
        with suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def subscribe(self, endpoint: Endpoint, handle: Callable[[Any], None]) -> None:
        """Call `handle` with what another daemon publishes while polling; that daemon may come and go."""

        def open_socket() -> Socket:
            socket = new_socket(self._context, zmq.SUB)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            connect(socket, endpoint)
            return socket

        self.outgoing.append(Reconnecting(open_socket, lambda data: handle(decode(data))))

    def requester(self, endpoint: Endpoint, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """A function that sends to another daemon; answers arrive at `handle` while polling."""

        def open_socket() -> Socket:
            socket = new_socket(self._context, zmq.DEALER)
            # without a peer nothing may queue: a request that waits for a dead daemon would arrive stale
            socket.setsockopt(zmq.IMMEDIATE, 1)
            connect(socket, endpoint)
            return socket

        connection = Reconnecting(open_socket, lambda data: handle(decode(data)))
        self.outgoing.append(connection)

        def send(message: Any) -> None:
            with suppress(zmq.Again):
                connection.socket.send(encode(message), zmq.NOBLOCK)

        return send

    def poll(self, timeout_s: float, handle: Callable[[bytes, Any], None]) -> None:
        """Wait up to `timeout_s`, then hand every waiting request to `handle(peer, message)` and every publication and
        answer to its own function.
        """
        poller = zmq.Poller()
        poller.register(self._waked, zmq.POLLIN)
        self._reconnect_stale()
        outgoing = {connection.socket: connection for connection in self.outgoing}
        for socket in (self._router, *outgoing):
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(int(max(0.0, timeout_s) * 1000)))
        if self._waked in ready:
            with suppress(BlockingIOError):
                os.read(self._waked, 65536)
        for socket in ready:
            if socket is self._router:
                self._drain(socket, lambda frames: handle(frames[0], decode(frames[-1])), framed=True)
            elif socket in outgoing:
                take = outgoing[socket].take
                self._drain(socket, partial(_take_last, take))

    def _reconnect_stale(self) -> None:
        now = time.monotonic()
        if now - self._checked_at >= LOST_S / 2:
            self._checked_at = now
            for connection in self.outgoing:
                connection.reconnect_if_stale(now)

    def _drain(self, socket: Socket, take: Callable[[list[bytes]], None], framed: bool = False) -> None:
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
        """Answer a client. False where it is gone or does not read, or where the answer breaks a limit (it may quote the
        client's text).
        """
        try:
            self._router.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except WireError as error:
            _log.error("bus.unsendable", why=str(error))
            return False
        except zmq.ZMQError:
            return False
        return True

    def is_connected(self, peer: bytes, probe: Any) -> bool:
        """Whether a client's connection lives, tried by sending `probe`; a client that does not read is connected, too."""
        try:
            self._router.send_multipart([peer, encode(probe)], zmq.NOBLOCK)
        except zmq.Again:
            return True
        except zmq.ZMQError:
            return False
        return True

    def publish(self, message: Any) -> None:
        """Send to every subscriber; one that does not read fast enough misses it."""
        try:
            self._publisher.send(encode(message), zmq.NOBLOCK)
        except WireError as error:
            _log.error("bus.unsendable", why=str(error))
        except zmq.Again:
            pass

    def close(self) -> None:
        """Close every socket; messages on their way have LINGER_MS."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=LINGER_MS)
        os.close(self._waker)
        os.close(self._waked)
