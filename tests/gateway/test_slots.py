"""gateway.max_streams under a burst, and what gives a slot back: the app in this process, inference played by a test."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from specl.daemons.gateway.app import Completions, api_error_response
from specl.daemons.gateway.errors import ApiError
from specl.daemons.gateway.metrics import Metrics
from specl.shared.errors import DaemonUnreachable
from specl.shared.messaging.messages import Delta, PrefillProgress, Queued
from specl.shared.settings.schema import Gateway, Settings

SCOPE = {
    "type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http",
    "headers": [(b"content-type", b"application/json")], "server": ("localhost", 1), "client": ("127.0.0.1", 1),
    "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.4"},
}  # fmt: skip


class Inference:
    """Answers once it is told to: one piece, then the end of the daemon."""

    def __init__(self):
        self.go, self.closed = asyncio.Event(), 0

    async def pieces(self, ask, on_progress):
        try:
            on_progress(Queued(ask.request_id, 0))
            on_progress(PrefillProgress(ask.request_id, 2048, 6000))
            await self.go.wait()
            yield [Delta(ask.request_id, "text", [1], b"\0", [4])]
            raise DaemonUnreachable("gone")
        finally:
            self.closed += 1


class Server:
    """Completions behind one route; `ask` is a client."""

    def __init__(self, slots):
        self.inference = Inference()
        self.completions = Completions(Settings(gateway=Gateway(max_streams=slots)), self.inference, Metrics())
        routes = [Route("/", self.completions.chat, methods=["POST"])]
        self._app = Starlette(routes=routes, exception_handlers={ApiError: api_error_response})

    async def ask(self, stream=False, leaves=False, broken=False, said=None):
        """The status of one answer, whose messages go into `said`; the client `leaves` at once, or its connection is `broken` when the answer comes."""
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        said = [] if said is None else said
        came = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            if came:
                return came.pop()
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if broken:
                raise OSError("broken pipe")
            said.append(message)

        await self._app(dict(SCOPE), receive, send)
        return said[0]["status"]


def test_burst_gets_as_many_slots_as_exist():
    async def burst():
        server = Server(3)
        asked = [asyncio.create_task(server.ask()) for _ in range(8)]
        await asyncio.sleep(0.1)
        refused = [task.result() for task in asked if task.done()]
        server.inference.go.set()
        return refused, sorted(await asyncio.gather(*asked)), server.completions.active

    assert asyncio.run(burst()) == ([429] * 5, [*[429] * 5, *[503] * 3], 0)


@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_before_any_piece_frees_its_slot(stream):
    async def come_and_go():
        server = Server(1)
        codes = [await server.ask(stream, leaves=True) for _ in range(3)]
        return codes, server.completions.active, server.inference.closed

    assert asyncio.run(come_and_go()) == ([499] * 3, 0, 3)


def test_headers_and_progress_come_before_the_first_token(monkeypatch):
    monkeypatch.setattr("specl.daemons.gateway.app.HEADERS_S", 0.01)
    monkeypatch.setattr("specl.daemons.gateway.app.COMMENT_S", 0.01)

    async def slow():
        server, said = Server(1), []
        asked = asyncio.create_task(server.ask(stream=True, said=said))
        while b"".join(message.get("body", b"") for message in said).count(b": prefill 2048/6000\n\n") < 3:
            await asyncio.sleep(0.01)
        server.inference.go.set()
        return await asked, b"".join(message.get("body", b"") for message in said), server.completions.active

    status, body, active = asyncio.run(asyncio.wait_for(slow(), 10))
    assert (status, active) == (200, 0) and b'"content":"text"' in body and body.endswith(b"data: [DONE]\n\n")


def test_client_gone_amid_the_comments_frees_its_slot(monkeypatch):
    monkeypatch.setattr("specl.daemons.gateway.app.HEADERS_S", 0.01)

    async def broken():
        server = Server(1)
        with pytest.raises(BaseException):  # noqa: B017 - whatever the server makes of a broken pipe
            await server.ask(stream=True, broken=True)
        return server.completions.active, server.inference.closed

    assert asyncio.run(asyncio.wait_for(broken(), 10)) == (0, 1)


def test_failed_stream_frees_its_slot():
    async def broken():
        server = Server(1)
        server.inference.go.set()
        with pytest.raises(BaseException):  # noqa: B017 - whatever the server makes of a broken pipe
            await server.ask(stream=True, broken=True)
        return (
            server.completions.active,
            server.inference.closed,
            await server.ask(stream=True),
            server.completions.active,
        )

    assert asyncio.run(broken()) == (0, 1, 200, 0)
