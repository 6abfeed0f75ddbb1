"""The routes: which function answers at which path. Reads requests, asks inference, writes responses and errors in OpenAI's shapes."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from specl.daemons.gateway.access_control import AccessControl
from specl.daemons.gateway.dashboard import Dashboard
from specl.daemons.gateway.errors import ApiError, api_error_of
from specl.daemons.gateway.metrics import Metrics
from specl.daemons.gateway.request_schema import CompletionRequest, parse_request, served_names
from specl.daemons.gateway.responses import END, ProgressComments, ResponseBuilder, error_event
from specl.daemons.gateway.upstream import Upstream
from specl.daemons.gateway.url_paths import canonical_path
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import Delta, Done, PositionLogprobs
from specl.shared.paths import Paths
from specl.shared.settings.schema import Settings

EVENT_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
HEADERS_S = 0.8  # until a stream's headers go, with or without a token
COMMENT_S = 3.0  # between the comments of a stream before its first token
CLIENT_GONE = 499  # nobody reads it; nginx's code for it in our metrics
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
Batches = AsyncGenerator[list[Delta | Done], None]  # the pieces that came together; the very last piece is Done
T = TypeVar("T")


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_body") from None


class Completions:
    """The two endpoints that generate."""

    def __init__(self, settings: Settings, upstream: Upstream, metrics: Metrics) -> None:
        self._settings, self._upstream, self._metrics = settings, upstream, metrics
        self.active = 0  # answers under way

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        address = request.client.host if request.client else ""
        completion = parse_request(await _json(request), self._settings, chat, address)
        with_logprobs = completion.ask.logprobs is not None
        builder = ResponseBuilder(completion.ask.request_id, served_names(self._settings)[0], chat, with_logprobs)
        try:
            async with AsyncExitStack() as resources:  # a slot and the request upstream, given back however this ends
                self._take_slot()
                resources.callback(self._release_slot)
                progress = ProgressComments()
                batches = self._batches(completion, progress)
                resources.push_async_callback(batches.aclose)
                first = asyncio.ensure_future(_as_coroutine(anext(batches)))
                resources.push_async_callback(_cancel, first)
                if completion.stream:
                    # a failure that is known at once has a status of its own; then the headers must go
                    await _unless_gone(request, asyncio.wait({first}, timeout=HEADERS_S))
                    if first.done():
                        first.result()
                    events = self._events(completion, builder, first, batches, progress)
                    return _EventStream(events, resources.pop_all())
                done, logprobs = await _unless_gone(request, _collect(await _unless_gone(request, first), batches))
        except SpecLoraError as error:
            raise api_error_of(error) from error
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(builder.whole(done, logprobs))

    def _take_slot(self) -> None:
        """Count the answer, synchronously and before any await, so that concurrent requests cannot exceed the limit."""
        if self.active >= self._settings.gateway.max_streams:
            raise ApiError(429, f"{self.active} answers are being made (gateway.max_streams)", code="busy")
        self.active += 1
        self._metrics.active.set(self.active)

    def _release_slot(self) -> None:
        self.active -= 1
        self._metrics.active.set(self.active)

    async def _batches(self, completion: CompletionRequest, progress: ProgressComments) -> Batches:
        """The answer's pieces; closing it cancels."""
        ended = False
        try:
            async with aclosing(self._upstream.pieces(completion.ask, progress.note)) as batches:
                async for batch in batches:
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

    async def _events(
        self,
        completion: CompletionRequest,
        builder: ResponseBuilder,
        first: asyncio.Future[list[Delta | Done]],
        batches: Batches,
        progress: ProgressComments,
    ) -> AsyncIterator[bytes]:
        try:
            while not first.done():
                yield progress.comment()
                await asyncio.wait({first}, timeout=COMMENT_S)
            batch = first.result()
            while True:
                events = builder.events(batch, completion.include_usage)
                if events:
                    yield events
                if isinstance(batch[-1], Done):
                    break
                batch = await anext(batches)
        except SpecLoraError as error:
            yield error_event(api_error_of(error)) + END


class _EventStream(StreamingResponse):
    """Server-sent events. Releases `resources` when it is over, whether it was ever begun or not."""

    def __init__(self, events: AsyncIterator[bytes], resources: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or as many as the client reads."""
        async with self._resources:
            await super().__call__(scope, receive, send)


async def _collect(batch: list[Delta | Done], batches: Batches) -> tuple[Done, list[PositionLogprobs]]:
    """The end of an answer, and the log-probabilities of all its tokens."""
    logprobs: list[PositionLogprobs] = []
    while True:
        logprobs += [position for piece in batch if isinstance(piece, Delta) for position in piece.logprobs]
        if isinstance(done := batch[-1], Done):
            return done, logprobs
        batch = await anext(batches)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
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
            await _cancel(task)


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task before what it works on is closed."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def _as_coroutine(work: Awaitable[T]) -> T:
    return await work


# ------------------------------------------------------------------------------------------------ errors as responses
async def api_error_response(request: Request, error: Exception) -> Response:
    """The response to an ApiError."""
    return error.response() if isinstance(error, ApiError) else await _internal_error(request, error)


async def _client_gone(request: Request, error: Exception) -> Response:
    """The client went while its body was read; nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def _internal_error(request: Request, error: Exception) -> Response:
    """A bug of ours: its traceback goes to the log, its shape is still one that clients read."""
    return ApiError(500, "an error inside the gateway; its log says more", code="internal").response()


async def _no_route(request: Request, error: Exception) -> Response:
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
    texts = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    return ApiError(status, texts.get(status, detail)).response()


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = (files("specl.daemons.gateway") / "static" / name).read_bytes()

    def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _models_route(settings: Settings, dashboard: Dashboard) -> Callable[[Request], Awaitable[Response]]:
    names = served_names(settings)

    async def models(request: Request) -> Response:
        served = {"id": names[0], "object": "model", "created": 0, "owned_by": "speclora"}
        if length := await dashboard.context_length():  # by the names that OpenRouter, vLLM and llama.cpp give it
            served |= {"context_length": length, "max_model_len": length, "meta": {"n_ctx": length}}
        requested = request.path_params.get("model")
        if requested is None:
            return JSONResponse({"object": "list", "data": [served]})
        if requested not in names:
            raise ApiError(
                404, f"the model {requested!r} is not served here; {names[0]!r} is", "model", "model_not_found"
            )
        return JSONResponse(served)

    return models


def _counted(app: ASGIApp, metrics: Metrics, paths: set[str]) -> ASGIApp:
    """Count responses by path. Unknown paths share a label, or anybody could make the labels grow."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await app(scope, receive, note)

    return counted


def _with_canonical_path(app: ASGIApp) -> ASGIApp:
    """`app` behind one spelling of each path: access, routes and metrics see the same."""

    async def canonical(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": canonical_path(scope["path"])} if scope["type"] == "http" else scope, receive, send)

    return canonical


def make_app(paths: Paths, settings: Settings, token: str | None, stopping: Callable[[], bool]) -> ASGIApp:
    """The whole server as one ASGI application; `stopping` ends what would stream forever."""
    metrics = Metrics()
    completions = Completions(settings, Upstream(paths, Addresses(paths, settings.bus)), metrics)
    dashboard = Dashboard(paths, settings, stopping)
    models = _models_route(settings, dashboard)

    async def health(request: Request) -> Response:
        state = await dashboard.inference_state()
        healthy = state in (DaemonState.READY, DaemonState.BUSY)
        return JSONResponse({"status": "ok" if healthy else "unavailable", "inference": state}, 200 if healthy else 503)

    async def exposition(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.text, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
        Route("/health", health),
        Route("/metrics", exposition),
        Route("/api/state", dashboard.state),
        Route("/api/events", dashboard.events),
        Route("/api/train", dashboard.train, methods=["POST"]),
        Route("/api/rollback", dashboard.roll_back, methods=["POST"]),
        *(Route(path, _static(*what)) for path, what in STATIC.items()),
    ]
    handlers: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: api_error_response,
        HTTPException: _no_route,
        ClientDisconnect: _client_gone,
        Exception: _internal_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    guarded: ASGIApp = AccessControl(app, settings.gateway, token)
    if settings.gateway.trusted_proxies:
        guarded = ProxyHeadersMiddleware(guarded, settings.gateway.trusted_proxies)  # type: ignore[arg-type,assignment]  # uvicorn's types of ASGI
    return _with_canonical_path(_counted(guarded, metrics, {route.path for route in routes}))
