"""What the page shows, and its two buttons. Reads the bus and the store in a thread, at most every two seconds and only while
somebody looks.
"""

import asyncio
import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from specl.daemons.gateway.errors import ApiError, api_error_of
from specl.shared.errors import SpecLoraError, StoreError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Reply
from specl.shared.paths import Paths
from specl.shared.settings.schema import Settings
from specl.shared.status import state_of, system_status
from specl.shared.store import Store

LOOK_S = 2.0
COSTLY_S = 60.0  # the costliest tokens are a sum over every disagreement there is
HEALTH_S = 1.0  # monitors ask often, and several at once
COMMENT_S = 15.0  # between signs of life, so that a broken connection is noticed
POINTS, ANSWERS, TOKENS, HISTORY = 400, 10, 12, 20

SPEED = """SELECT created_at AS at, round(nullif(tokens_per_second, 0), 2) AS speed,
           round(acceptance_rate, 4) AS acceptance, adapter_id AS adapter FROM generations ORDER BY n DESC LIMIT :n"""
LAST = """SELECT id, created, substr(json_extract(messages, '$[#-1].content'), 1, 300) AS asked, substr(prompt, 1, 300) AS prompt,
          substr(output, 1, 600) AS output, output_count AS tokens, round(nullif(tokens_per_second, 0), 2) AS speed,
          round(ttft_ms, 1) AS ttft_ms, round(acceptance_rate, 4) AS acceptance, rounds, drafted, accepted,
          adapter_id AS adapter, finish_reason FROM generations ORDER BY n DESC LIMIT :n"""
COSTLY = "SELECT draft_text, target_text, times, draft_confidence, target_confidence FROM costliest_tokens LIMIT :n"
MARKS = (
    "SELECT created_at AS at, event, adapter_id AS adapter, note AS reason FROM activations ORDER BY n DESC LIMIT :n"
)
PAST = """SELECT created, verdict, adapter_id AS adapter, examples, steps, heldout_before, heldout_after, reason
          FROM adapter_history LIMIT :n"""


def _full(whose: str, most: int, setting: str) -> ApiError:
    return ApiError(429, f"{most} pages are open{whose} already (gateway.{setting})", code="busy")


class Dashboard:
    """One view for every browser that looks."""

    def __init__(self, paths: Paths, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._paths, self._settings, self._stopping = paths, settings, stopping
        self._lock = asyncio.Lock()
        self._seen: dict[str, Any] = {}
        self._seen_at = self._costly_at = float("-inf")
        self._costly: list[dict[str, Any]] = []
        self._health_lock = asyncio.Lock()
        self._health, self._health_at = "stopped", float("-inf")
        self._watching: Counter[str] = Counter()

    async def _look(self) -> dict[str, Any]:
        async with self._lock:
            if time.monotonic() - self._seen_at >= LOOK_S * 0.9:
                self._seen = await asyncio.to_thread(self._read)
                self._seen_at = time.monotonic()
        return self._seen

    def _read(self) -> dict[str, Any]:
        with Client(self._paths, self._settings) as client:
            found: dict[str, Any] = {"status": asdict(system_status(client))}
        names = ("points", "answers", "costly", "marks", "history")
        try:
            store = Store(self._paths.store, read_only=True)
        except StoreError:
            return found | {name: [] for name in names}
        try:
            if time.monotonic() - self._costly_at >= COSTLY_S:
                self._costly, self._costly_at = store.sql(COSTLY, n=TOKENS), time.monotonic()
            return found | {
                "points": store.sql(SPEED, n=POINTS)[::-1],
                "answers": store.sql(LAST, n=ANSWERS),
                "costly": self._costly,
                "marks": store.sql(MARKS, n=HISTORY)[::-1],
                "history": store.sql(PAST, n=HISTORY),
            }
        except (StoreError, sqlite3.Error) as error:
            found["status"]["problems"].append(str(error))
            return found | {name: [] for name in names}
        finally:
            store.close()

    async def inference_state(self) -> str:
        """One of status' states, from the daemon alone: a monitor must not cost what the page does."""

        def ask() -> str:
            with Client(self._paths, self._settings) as client:
                return state_of(client, "inference")

        async with self._health_lock:
            if time.monotonic() - self._health_at >= HEALTH_S:
                self._health = await asyncio.to_thread(ask)
                self._health_at = time.monotonic()
        return self._health

    async def state(self, request: Request) -> Response:
        """GET /api/state: everything once."""
        return JSONResponse(await self._look())

    async def events(self, request: Request) -> Response:
        """GET /api/events: everything again whenever it has changed, as server-sent events."""
        address, limits = request.client.host if request.client else "", self._settings.gateway
        if self._watching.total() >= limits.max_event_streams:
            raise _full("", limits.max_event_streams, "max_event_streams")
        if self._watching[address] >= limits.max_event_streams_per_address:
            raise _full(" from this address", limits.max_event_streams_per_address, "max_event_streams_per_address")
        pieces = self._seated(address)
        # begun here, so that it is counted before anybody else is let in, and ended however its client goes
        first = await anext(pieces, b"")

        async def stream() -> AsyncIterator[bytes]:
            async with aclosing(pieces):
                yield first
                async for piece in pieces:
                    yield piece

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    async def _seated(self, address: str) -> AsyncIterator[bytes]:
        self._watching[address] += 1
        try:
            async with aclosing(self._events()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._watching[address] -= 1
            if not self._watching[address]:
                del self._watching[address]

    async def _events(self) -> AsyncIterator[bytes]:
        sent, sent_at = "", 0.0
        while not self._stopping():
            found = await self._look()
            text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
            if text != sent:
                sent, sent_at = text, time.monotonic()
                yield b"data: " + text.encode() + b"\n\n"
            elif time.monotonic() - sent_at > COMMENT_S:
                sent_at = time.monotonic()
                yield b": still here\n\n"
            end = time.monotonic() + LOOK_S
            while time.monotonic() < end and not self._stopping():
                await asyncio.sleep(0.1)

    async def train(self, request: Request) -> Response:
        """POST /api/train: a run now."""
        return await self._command(lambda client: client.train(True))

    async def roll_back(self, request: Request) -> Response:
        """POST /api/rollback: the adapter before."""
        return await self._command(lambda client: client.set_adapter("previous"))

    async def _command(self, wish: Callable[[Client], Reply]) -> Response:
        def run() -> Reply:
            with Client(self._paths, self._settings) as client:
                return wish(client)

        try:
            reply = await asyncio.to_thread(run)
        except SpecLoraError as error:
            return api_error_of(error).response()
        self._seen_at = float("-inf")
        return JSONResponse({"ok": reply.ok, "message": reply.message}, 200 if reply.ok else 409)
