"""The bus for an asyncio server: one request, its pieces as they come, and its end. `shared/messaging/client.py` does the same with
threads; eight streams are eight tasks here. Knows nothing of HTTP.
"""

import time
from collections.abc import AsyncIterator

from specl.shared.errors import DaemonUnreachable
from specl.shared.messaging.bus import AsyncConnection
from specl.shared.messaging.client import FIRST_ANSWER_S, HEARTBEAT_S, SILENCE_S, START, error_of, send_request
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Ask, Cancel, Delta, Done, Failed, GetStatus, Heartbeat
from specl.shared.paths import Paths
from specl.shared.runtime.locks import is_locked


class Upstream:
    """Inference, as seen from here; it may come and go."""

    def __init__(self, paths: Paths, addresses: Addresses) -> None:
        self._paths, self._addresses = paths, addresses

    def may_live(self) -> bool:
        """False where inference's lock says that no process holds it."""
        run = self._paths.run
        return not (run / "inference.lock").exists() or is_locked(run, "inference")

    async def pieces(self, ask: Ask) -> AsyncIterator[list[Delta | Done]]:
        """What has come since the last time, at least one piece; the very last is Done. Closing it early cancels the request.

        Raises DaemonUnreachable, RequestRejected, SpecLoraError.
        """
        if not self.may_live():
            raise DaemonUnreachable("the inference daemon does not run", START)
        connection = AsyncConnection(self._addresses.answer("inference"), "inference")
        finished = False
        try:
            send_request(connection, ask)
            connection.send(GetStatus())  # answered at once, even while models load: tells whether anyone is there
            async for messages in self._listen(connection, ask.request_id):
                finished = not isinstance(messages[-1], Delta)
                if isinstance(failed := messages[-1], Failed):
                    if messages[:-1]:
                        yield messages[:-1]
                    raise error_of(failed)
                yield messages
        finally:
            if not finished:
                connection.send(Cancel(ask.request_id))
            connection.close()

    async def _listen(self, connection: AsyncConnection, request_id: str) -> AsyncIterator[list[Delta | Done | Failed]]:
        """What is said about one request, with a heartbeat from our side, until its end."""
        first, heard_at, alive_at = True, time.monotonic(), time.monotonic()
        while True:
            messages = await connection.receive(FIRST_ANSWER_S if first else HEARTBEAT_S)
            now = time.monotonic()
            if not messages:
                if first or now - heard_at > SILENCE_S or not self.may_live():
                    raise DaemonUnreachable("the inference daemon does not answer", START)
                connection.send(GetStatus())
            else:
                heard_at = now
            first = False
            if now - alive_at >= HEARTBEAT_S:
                connection.send(Heartbeat(request_id))
                alive_at = now
            about = [m for m in messages if isinstance(m, (Delta, Done, Failed)) and m.request_id == request_id]
            if about:
                yield about
                if not isinstance(about[-1], Delta):
                    return
