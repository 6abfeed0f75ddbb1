"""The routes: what is answered at which path. Reads requests, asks inference, writes answers; refuses in OpenAI's words."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from specl.daemons.gateway.access_control import AccessControl
from specl.daemons.gateway.dashboard import Dashboard
from specl.daemons.gateway.errors import ApiError, api_error_of
from specl.daemons.gateway.metrics import Metrics
from specl.daemons.gateway.request_schema import Wish, parse_request, served_names
from specl.daemons.gateway.responses import END, ResponseBuilder, error_event
from specl.daemons.gateway.upstream import Upstream
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Delta, Done, PositionLogprobs
from specl.shared.paths import Paths
from specl.shared.settings.schema import Settings

EVENT_STREAM = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}}
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
Steps = AsyncIterator[list[Delta | Done]]  # what came at once; the very last is Done


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_body") from None


class Completions:
    """The two endpoints that generate."""

    def __init__(self, settings: Settings, upstream: Upstream, metrics: Metrics) -> None:
        self._settings, self._upstream, self._metrics = settings, upstream, metrics
        self._active = 0

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        wish = parse_request(await _json(request), self._settings, chat)
        wants_laws = wish.ask.logprobs is not None
        shape = ResponseBuilder(wish.ask.request_id, served_names(self._settings)[0], chat, wants_laws)
        try:
            async with AsyncExitStack() as held:  # a seat and the request upstream: given back however this ends
                self._take_seat()
                held.callback(self._leave_seat)
                pieces = self._pieces(wish)
                held.push_async_callback(pieces.aclose)
                # nothing is sent before the first piece: until then a failure still has a status of its own
                first = await _unless_gone(request, anext(pieces))
                if wish.stream:
                    return _Stream(self._stream(wish, shape, first, pieces), held.pop_all())
                done, logprobs = await _unless_gone(request, _last(first, pieces))
        except SpecLoraError as error:
            raise api_error_of(error) from error
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's word for it in our metrics
        return JSONResponse(shape.whole(done, logprobs))

    def _take_seat(self) -> None:
        """Counted at once: of a burst of requests, each must see those before it."""
        if self._active >= self._settings.gateway.max_streams:
            raise ApiError(429, f"{self._active} answers are being made (gateway.max_streams)", code="busy")
        self._active += 1
        self._metrics.active.set(self._active)

    def _leave_seat(self) -> None:
        self._active -= 1
        self._metrics.active.set(self._active)

    async def _pieces(self, wish: Wish) -> Steps:
        """The answer's pieces; closing it cancels."""
        ended = False
        try:
            async with aclosing(self._upstream.pieces(wish.ask)) as pieces:
                async for batch in pieces:
                    if isinstance(done := batch[-1], Done):
                        ended = True
                        self._metrics.answered(done)
                    yield batch
        except SpecLoraError:
            ended = True
            raise
        finally:
            if not ended:
                self._metrics.cancelled.inc()

    async def _stream(
        self, wish: Wish, shape: ResponseBuilder, batch: list[Delta | Done], pieces: Steps
    ) -> AsyncIterator[bytes]:
        try:
            while True:
                events = shape.events(batch, wish.usage)
                if events:
                    yield events
                if isinstance(batch[-1], Done):
                    break
                batch = await anext(pieces)
        except SpecLoraError as error:
            yield error_event(api_error_of(error)) + END


class _Stream(StreamingResponse):
    """Server-sent events; lets go of what it holds when it is over, begun or not."""

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack) -> None:
        super().__init__(events, **EVENT_STREAM)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or as much as somebody reads."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def _last(batch: list[Delta | Done], pieces: Steps) -> tuple[Done, list[PositionLogprobs]]:
    """The end of an answer, and the laws of all its tokens."""
    logprobs: list[PositionLogprobs] = []
    while True:
        logprobs += [law for piece in batch if isinstance(piece, Delta) for law in piece.logprobs]
        if isinstance(done := batch[-1], Done):
            return done, logprobs
        batch = await anext(pieces)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`; ClientDisconnect, and `work` cancelled, where the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(_as_coroutine(work)), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _as_coroutine(work: Any) -> Any:
    return await work


async def _refused(request: Request, error: Exception) -> Response:
    return error.response()


async def _left(request: Request, error: Exception) -> Response:
    """The client went while its body was read; nobody reads this."""
    return Response(status_code=499)


async def _broken(request: Request, error: Exception) -> Response:
    """A bug of ours: its traceback goes to the log, its shape is still one that clients read."""
    return ApiError(500, "an error inside the gateway; its log says more", code="internal").response()


async def _not_there(request: Request, error: HTTPException) -> Response:
    words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    return ApiError(error.status_code, words.get(error.status_code, error.detail)).response()


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = (files("specl.daemons.gateway") / "static" / name).read_bytes()

    def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _counted(app: ASGIApp, metrics: Metrics, paths: set[str]) -> ASGIApp:
    """Count the answers of known paths; unknown ones share a label, or anybody could make the labels grow."""

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await app(scope, receive, note)

    return counted


def make_app(paths: Paths, settings: Settings, token: str | None, stopping: Callable[[], bool]) -> ASGIApp:
    """The whole server as one ASGI application; `stopping` ends what would stream for ever."""
    metrics = Metrics()
    completions = Completions(settings, Upstream(paths, Addresses(paths, settings.bus)), metrics)
    board = Dashboard(paths, settings, stopping)
    name = served_names(settings)[0]

    async def models(request: Request) -> Response:
        served = {"id": name, "object": "model", "created": 0, "owned_by": "speclora"}
        wanted = request.path_params.get("model")
        if wanted is not None and wanted not in served_names(settings):
            raise ApiError(404, f"the model {wanted!r} is not served here; {name!r} is", "model", "model_not_found")
        return JSONResponse(served if wanted is not None else {"object": "list", "data": [served]})

    async def health(request: Request) -> Response:
        state = await board.inference_state()
        well = state in ("ready", "busy")
        return JSONResponse({"status": "ok" if well else "unavailable", "inference": state}, 200 if well else 503)

    async def exposition(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.text, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
        Route("/health", health),
        Route("/metrics", exposition),
        Route("/api/state", board.state),
        Route("/api/events", board.events),
        Route("/api/train", board.train, methods=["POST"]),
        Route("/api/rollback", board.roll_back, methods=["POST"]),
        *(Route(path, _static(*what)) for path, what in STATIC.items()),
    ]
    handlers = {ApiError: _refused, HTTPException: _not_there, ClientDisconnect: _left, Exception: _broken}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return _counted(AccessControl(app, settings.gateway, token), metrics, {route.path for route in routes})
