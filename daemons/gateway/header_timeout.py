"""How long a connection may take to say what it wants. uvicorn's own HTTP, with the one timer that it lacks.

Without it a client that sends a byte now and then holds a connection for ever, before the application hears of it. The time for
a body is the guard's: there the answer still has a status.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def with_header_timeout(seconds: float) -> type[H11Protocol]:
    """The protocol class that closes a connection whose next request has not begun and told its headers within `seconds`."""

    class Impatient(H11Protocol):
        """See the module."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            """Headers are due from now on."""
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """Nothing is due any more."""
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """More of a request; only whole headers stop the clock."""
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            """The next request, or the rest of this one's body, is due from now on."""
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            unasked = self.conn.their_state is h11.IDLE
            left_over = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
            if not (unasked or left_over) or self.transport.is_closing():
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient
