"""What the page shows, and its two buttons. Reads the bus and the store in a thread, at most every two seconds and only while
a page is open.
"""

import asyncio
import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from specl.daemons.gateway.errors import ApiError, api_error_of
from specl.shared.errors import SpecLoraError, StoreError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Reply
from specl.shared.paths import Paths
from specl.shared.settings.schema import Settings
from specl.shared.status import state_and_context, system_status
from specl.shared.store import Store

REFRESH_S = 2.0
COSTLY_S = 60.0  # the costliest tokens are a sum over every disagreement there is
FORGET_S = 60.0  # what nobody looks at any more is not kept in memory
HEALTH_S = 1.0  # health checks come often, and several at once
KEEPALIVE_S = 15.0  # between comments on a quiet stream, so that a broken connection is noticed
POINTS, ANSWERS, TOKENS, HISTORY = 400, 10, 12, 20

SPEED = """SELECT created_at AS at, round(nullif(tokens_per_second, 0), 2) AS speed,
           round(acceptance_rate, 4) AS acceptance, adapter_id AS adapter FROM generations ORDER BY n DESC LIMIT :n"""
LAST = """SELECT id, created, substr(json_extract(messages, '$[#-1].content'), 1, 300) AS asked, substr(prompt, 1, 300) AS prompt,
          substr(output, 1, 600) AS output, output_count AS tokens, round(nullif(tokens_per_second, 0), 2) AS speed,
          round(ttft_ms, 1) AS ttft_ms, round(acceptance_rate, 4) AS acceptance, rounds, drafted, accepted,
          adapter_id AS adapter, finish_reason FROM generations ORDER BY n DESC LIMIT :n"""
COSTLY = "SELECT draft_text, target_text, times, draft_confidence, target_confidence FROM costliest_tokens LIMIT :n"
NEWEST = "SELECT count(*) AS count, coalesce(max(n), 0) AS n, (SELECT id FROM generations WHERE n = :n) AS id FROM generations"
MARKS = (
    "SELECT created_at AS at, event, adapter_id AS adapter, note AS reason FROM activations ORDER BY n DESC LIMIT :n"
)
PAST = """SELECT created, verdict, adapter_id AS adapter, examples, steps, heldout_before, heldout_after, reason
          FROM adapter_history LIMIT :n"""


@dataclass(frozen=True, slots=True)
class _Extent:
    """How many generations the store has, and the last number and its id."""

    count: int
    last: int
    id: str

    @classmethod
    def of(cls, store: Store) -> "_Extent":
        (row,) = store.sql(NEWEST, n=0)
        (newest,) = store.sql(NEWEST, n=row["n"])
        return cls(newest["count"], newest["n"], newest["id"] or "")

    def has_lost_some(self, store: Store) -> bool:
        """Whether any of those generations is gone. New ones get higher numbers, or those of the last where they have gone."""
        (row,) = store.sql(NEWEST, n=self.last)
        return (row["id"] or "") != self.id or row["n"] - self.last != row["count"] - self.count


def _too_many_pages(whose: str, limit: int, setting: str) -> ApiError:
    return ApiError(429, f"{limit} pages are open{whose} already (gateway.{setting})", code="busy")


class Dashboard:
    """One state for all open pages, read again every REFRESH_S while any is open."""

    def __init__(self, paths: Paths, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._paths, self._settings, self._stopping = paths, settings, stopping
        self._lock = asyncio.Lock()
        self._state: dict[str, Any] = {}
        self._read_at = self._costly_at = float("-inf")
        self._costly: list[dict[str, Any]] = []
        self._extent = _Extent(0, 0, "")
        self._forgetting: asyncio.TimerHandle | None = None
        self._health_lock = asyncio.Lock()
        self._health, self._health_at = "stopped", float("-inf")
        self._context_length: int | None = None
        self._pages: Counter[str] = Counter()

    async def _fresh_state(self) -> dict[str, Any]:
        async with self._lock:
            is_fresh = time.monotonic() - self._read_at < REFRESH_S * 0.9
            if not is_fresh or await asyncio.to_thread(self._is_purged):
                self._state = await asyncio.to_thread(self._read)
                self._read_at = time.monotonic()
            if self._forgetting is not None:
                self._forgetting.cancel()
            self._forgetting = asyncio.get_running_loop().call_later(FORGET_S, self._forget)
            return self._state

    def _forget(self) -> None:
        self._state, self._costly = {}, []
        self._read_at = self._costly_at = float("-inf")

    def _is_purged(self) -> bool:
        """Whether generations that the state was made of may be gone."""
        try:
            store = Store(self._paths.store, read_only=True)
        except StoreError:
            return True
        try:
            return self._extent.has_lost_some(store)
        except (StoreError, sqlite3.Error):
            return True
        finally:
            store.close()

    def _read(self) -> dict[str, Any]:
        with Client(self._paths, self._settings) as client:
            state: dict[str, Any] = {"status": asdict(system_status(client))}
        names = ("points", "answers", "costly", "marks", "history")
        try:
            store = Store(self._paths.store, read_only=True)
        except StoreError:
            return state | {name: [] for name in names}
        try:
            if time.monotonic() - self._costly_at >= COSTLY_S or self._extent.has_lost_some(store):
                self._costly, self._costly_at = [], float("-inf")
            self._extent = _Extent.of(store)  # before anything is read: what goes meanwhile is noticed next time
            if not self._costly:
                self._costly, self._costly_at = store.sql(COSTLY, n=TOKENS), time.monotonic()
            return state | {
                "points": store.sql(SPEED, n=POINTS)[::-1],
                "answers": store.sql(LAST, n=ANSWERS),
                "costly": self._costly,
                "marks": store.sql(MARKS, n=HISTORY)[::-1],
                "history": store.sql(PAST, n=HISTORY),
            }
        except (StoreError, sqlite3.Error) as error:
            state["status"]["problems"].append(str(error))
            return state | {name: [] for name in names}
        finally:
            store.close()

    async def inference_state(self) -> str:
        """The inference daemon's state, asked of that daemon alone: a health check must not cost what the page does."""
        await self._ask_inference()
        return self._health

    async def context_length(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None as long as inference has not said it."""
        await self._ask_inference()
        return self._context_length

    async def _ask_inference(self) -> None:
        def ask() -> tuple[str, int | None]:
            with Client(self._paths, self._settings) as client:
                return state_and_context(client)

        async with self._health_lock:
            if time.monotonic() - self._health_at >= HEALTH_S:
                self._health, length = await asyncio.to_thread(ask)
                self._context_length = length or self._context_length
                self._health_at = time.monotonic()

    async def state(self, request: Request) -> Response:
        """GET /api/state: the whole state once."""
        return JSONResponse(await self._fresh_state())

    async def events(self, request: Request) -> Response:
        """GET /api/events: the whole state whenever it has changed, as server-sent events."""
        address, limits = request.client.host if request.client else "", self._settings.gateway
        if self._pages.total() >= limits.max_event_streams:
            raise _too_many_pages("", limits.max_event_streams, "max_event_streams")
        if self._pages[address] >= limits.max_event_streams_per_address:
            raise _too_many_pages(
                " from this address", limits.max_event_streams_per_address, "max_event_streams_per_address"
            )
        pieces = self._counted_events(address)
        # begun here, so that the page is counted before another request is let in, and uncounted however its client goes
        first = await anext(pieces, b"")

        async def stream() -> AsyncIterator[bytes]:
            async with aclosing(pieces):
                yield first
                async for piece in pieces:
                    yield piece

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    async def _counted_events(self, address: str) -> AsyncGenerator[bytes, None]:
        self._pages[address] += 1
        try:
            async with aclosing(self._events()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._pages[address] -= 1
            if not self._pages[address]:
                del self._pages[address]

    async def _events(self) -> AsyncGenerator[bytes, None]:
        sent, sent_at = "", 0.0
        while not self._stopping():
            text = json.dumps(await self._fresh_state(), ensure_ascii=False, separators=(",", ":"))
            if text != sent:
                sent, sent_at = text, time.monotonic()
                yield b"data: " + text.encode() + b"\n\n"
            elif time.monotonic() - sent_at > KEEPALIVE_S:
                sent_at = time.monotonic()
                yield b": keep-alive\n\n"
            end = time.monotonic() + REFRESH_S
            while time.monotonic() < end and not self._stopping():
                await asyncio.sleep(0.1)

    async def train(self, request: Request) -> Response:
        """POST /api/train: start a training run now."""
        return await self._command(lambda client: client.train(True))

    async def roll_back(self, request: Request) -> Response:
        """POST /api/rollback: draft with the previous adapter."""
        return await self._command(lambda client: client.set_adapter("previous"))

    async def _command(self, command: Callable[[Client], Reply]) -> Response:
        def run() -> Reply:
            with Client(self._paths, self._settings) as client:
                return command(client)

        try:
            reply = await asyncio.to_thread(run)
        except SpecLoraError as error:
            return api_error_of(error).response()
        self._read_at = float("-inf")
        return JSONResponse({"ok": reply.ok, "message": reply.message}, 200 if reply.ok else 409)
