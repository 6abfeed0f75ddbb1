"""How long a connection may keep the server waiting: uvicorn's HTTP protocol with the two timers that it lacks.

Without them a client that sends a byte now and then, or reads nothing of its answer, holds a connection and its slot
forever. AccessControl limits the time for a body, where the response can still have a status. Reaches into uvicorn's h11
protocol, so pyproject.toml names the oldest uvicorn that it was tested with.
"""

import asyncio
from collections.abc import Callable
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """H11Protocol with a timer that runs while headers are due, and one while what was sent is not read."""

    headers_s: ClassVar[float]
    send_s: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        """Headers are due from now on."""
        super().connection_made(transport)
        self._header_timer = _Timer(self.loop, self.headers_s, transport.close)
        # closing would wait until the client has read the rest
        self._send_timer = _Timer(self.loop, self.send_s, transport.abort)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._header_timer.stop()
        self._send_timer.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request; only complete headers stop the timer."""
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        """The next request, or the rest of this one's body, is due from now on."""
        super().on_response_complete()
        self._watch_headers()

    def pause_writing(self) -> None:
        """The buffers are full: whatever is sent next waits for the client to read."""
        super().pause_writing()
        self._send_timer.start()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._send_timer.stop()

    def _watch_headers(self) -> None:
        no_request = self.conn.their_state is h11.IDLE
        unread_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (no_request or unread_body) or self.transport.is_closing():
            self._header_timer.stop()
        else:
            self._header_timer.start()


class _Timer:
    """Calls `expired` once, `seconds` after `start`, unless stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, expired: Callable[[], None]) -> None:
        self._loop, self._seconds, self._expired = loop, seconds, expired
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it; one that runs runs on."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._expired)

    def stop(self) -> None:
        """Forget it."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def with_timeouts(headers_s: float, send_s: float) -> type[TimedProtocol]:
    """A protocol class that closes a connection whose next request has not sent its headers within `headers_s`, or whose
    client has not made room for more within `send_s`.
    """
    return type("TimedProtocol", (TimedProtocol,), {"headers_s": headers_s, "send_s": send_s})
