"""A connection whose client reads nothing: uvicorn with our protocol in this process, and a socket that is never read."""

import asyncio
import contextlib
import socket

import uvicorn

from specl.daemons.gateway.connection_timeouts import with_timeouts


class Endless:
    """An answer without end. `ended` is set when its task is over."""

    def __init__(self):
        self.ended = asyncio.Event()

    async def __call__(self, scope, receive, send):
        gone = asyncio.ensure_future(self._left(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        finally:
            gone.cancel()
            self.ended.set()

    async def _left(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass


def test_reader_that_never_reads_is_cut_off():
    async def ask():
        app = Endless()
        http = with_timeouts(headers_s=20, send_s=0.3)
        server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_config=None))
        server.capture_signals = contextlib.nullcontext
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            client.connect(listening.getsockname())
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            try:
                await asyncio.wait_for(app.ended.wait(), 20)
            finally:
                server.force_exit = server.should_exit = True
                client.close()
                await serving

    asyncio.run(ask())
