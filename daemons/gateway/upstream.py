"""Inference as an asyncio program sees it: `AnswerStream` over an AsyncConnection. Knows nothing of HTTP."""

import time
from collections.abc import AsyncGenerator, Callable

from specl.shared.errors import START_HINT, DaemonUnreachable
from specl.shared.messaging.answer_stream import AnswerStream
from specl.shared.messaging.client import send_request
from specl.shared.messaging.connections import AsyncConnection
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Ask, Delta, Done, PrefillProgress, Queued
from specl.shared.paths import Paths
from specl.shared.runtime.locks import is_locked

OnProgress = Callable[[Queued | PrefillProgress], None]


class Upstream:
    """The inference daemon of one run directory; it may come and go."""

    def __init__(self, paths: Paths, addresses: Addresses) -> None:
        self._paths, self._addresses = paths, addresses

    def may_live(self) -> bool:
        """False where inference's lock says that no process holds it."""
        run = self._paths.run
        return not (run / "inference.lock").exists() or is_locked(run, "inference")

    async def pieces(self, ask: Ask, on_progress: OnProgress) -> AsyncGenerator[list[Delta | Done], None]:
        """What has come since the last time, at least one piece; the very last is Done. Closing it early cancels the request.
        `on_progress` hears how far the request is before its first piece.

        Raises DaemonUnreachable, RequestRejected, SpecLoraError.
        """
        if not self.may_live():
            raise DaemonUnreachable("the inference daemon does not run", START_HINT)
        connection = AsyncConnection(self._addresses.answer("inference"), "inference")
        stream = AnswerStream(ask, time.monotonic(), self.may_live)
        try:
            while not stream.ended:
                for message in stream.outgoing():
                    send_request(connection, message)
                messages = await connection.receive(stream.wait_s)
                pieces: list[Delta | Done] = []
                for piece in stream.feed(messages, time.monotonic()):
                    if isinstance(piece, (Queued, PrefillProgress)):
                        on_progress(piece)
                    else:
                        pieces.append(piece)
                if pieces:
                    yield pieces
        finally:
            for message in stream.leave():
                connection.send(message)
            connection.close()
        if stream.error is not None:
            raise stream.error
