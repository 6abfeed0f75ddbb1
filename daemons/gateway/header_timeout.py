"""How long a connection may take to send the headers of a request: uvicorn's HTTP protocol with the one timer that it lacks.

Without the timer a client that sends a byte now and then holds a connection forever, before the application hears of it.
AccessControl limits the time for a body, where the response can still have a status. Reaches into uvicorn's h11 protocol,
so pyproject.toml names the oldest uvicorn that it was tested with.
"""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class HeaderTimeoutProtocol(H11Protocol):
    """H11Protocol with a timer that runs while headers are due."""

    header_timeout_s: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        """Headers are due from now on."""
        super().connection_made(transport)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request; only complete headers stop the timer."""
        super().data_received(data)
        self._set_timer()

    def on_response_complete(self) -> None:
        """The next request, or the rest of this one's body, is due from now on."""
        super().on_response_complete()
        self._set_timer()

    def _set_timer(self) -> None:
        no_request = self.conn.their_state is h11.IDLE
        unread_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (no_request or unread_body) or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def with_header_timeout(seconds: float) -> type[HeaderTimeoutProtocol]:
    """A protocol class that closes a connection whose next request has not sent its headers within `seconds`."""
    return type("HeaderTimeoutProtocol", (HeaderTimeoutProtocol,), {"header_timeout_s": seconds})
