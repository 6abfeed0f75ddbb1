"""Which requests are let in, by Host and Origin, bearer token, size and rate. Plain ASGI, so that streams pass through
untouched. Knows no route but the public ones.

DNS rebinding makes a browser send a foreign name as Host to our address: only IP addresses, localhost and the names in
gateway.hosts are answered. A page of another site can make a browser post to us, but cannot hide its origin.
"""

import asyncio
import hmac
import ipaddress
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specl.daemons.gateway.errors import ApiError
from specl.shared.settings.schema import Gateway

OPEN_PATHS = ("/", "/health", "/app.js", "/style.css", "/favicon.svg")  # the page itself holds nothing
MOST_ADDRESSES = 4096
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def host_name(host: str) -> str:
    """The name in a Host header, without its port; empty for nonsense."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether it is an IP address: no resolver can be made to lie about one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_site(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _cross_site_error(origin: str | None) -> ApiError:
    detail = f": {origin[:80]!r} is not in gateway.origins" if origin else ""
    return ApiError(403, f"requests from other sites are refused{detail}", code="origin")


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks, before a listed origin's request, whether it may send that."""
    allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
    if requested := headers.get("access-control-request-headers"):  # `*` would not cover Authorization
        allowed["Access-Control-Allow-Headers"] = requested
    if headers.get("access-control-request-private-network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)


def _check_token(headers: Headers, token: str) -> None:
    scheme, _, presented = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(presented.strip().encode(), token.encode()):
        raise ApiError(401, "a bearer token is needed (gateway.token)", code="invalid_api_key")


class RateLimit:
    """A token bucket for each address, `per_minute` tokens; 0: no limit. `now` in seconds."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Addresses that have a bucket."""
        return len(self._buckets)

    def allows(self, address: str, now: float) -> bool:
        """Take a token of the address's bucket; False where none is left."""
        if not self._per_minute:
            return True
        left, since = self._buckets.pop(address, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        self._buckets[address] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return left >= 1


class AccessControl:
    """ASGI middleware in front of every route."""

    def __init__(self, app: ASGIApp, settings: Gateway, token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = {"localhost", *(name.lower() for name in settings.hosts)}
        self._origins = set(settings.origins)
        self._max_body_bytes = settings.max_body_kb << 10
        self._body_timeout_s = settings.request_timeout_s
        self._rate = RateLimit(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on with a bounded body; add security headers to the response."""
        if scope["type"] != "http":
            return

        headers = Headers(scope=scope)
        security_headers = HEADERS + self._cors(headers)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                added = (pair for pair in security_headers if pair[0] not in present)
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            self._check_site(scope, headers)
            if scope["method"] == "OPTIONS" and headers.get("origin") in self._origins:
                await _preflight(headers)(scope, receive, send_with_headers)
                return
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, self._bounded(receive), send_with_headers)

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What tells a browser that a page of a listed origin may read the answer."""
        origin = headers.get("origin")
        allowed = [(b"access-control-allow-origin", origin.encode("latin-1"))] if origin in self._origins else []
        return [*allowed, (b"vary", b"Origin")] if self._origins else []

    def _check_site(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host_name(host)
        # a browser always sends a Host, and HTTP/1.1 needs one: what comes without is a probe in HTTP/1.0
        if "host" in headers and not (is_address(name) or name in self._hosts):
            raise ApiError(403, f"the host name {name[:80]!r} is not in gateway.hosts", code="host")
        origin = headers.get("origin")
        if origin in self._origins:
            return
        if origin is not None and scope["method"] not in ("GET", "HEAD") and not _same_site(origin, host):
            raise _cross_site_error(origin)
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and scope["path"] != "/":
            raise _cross_site_error(origin)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            _check_token(headers, self._token)
        if scope["method"] == "POST":
            self._check_body(headers)
            client = scope.get("client")
            if not self._rate.allows(client[0] if client else "", time.monotonic()):
                raise ApiError(429, "too many requests a minute (gateway.requests_per_minute)", code="rate_limit")

    def _check_body(self, headers: Headers) -> None:
        # a form of another site cannot send this type without asking first, and asking is answered with no
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: `Content-Type: application/json`", code="content_type")
        if int(headers.get("content-length", "0")) > self._max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body_bytes >> 10} KB (gateway.max_body_kb)", code="too_large"
        )

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` with a limit of size and time: a body in chunks says neither its length nor when it ends."""
        size, complete, deadline = 0, False, time.monotonic() + self._body_timeout_s

        async def counted() -> Message:
            nonlocal size, complete
            if complete:  # the next message is the client leaving, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                late = f"the body did not come within {self._body_timeout_s:g} s (gateway.request_timeout_s)"
                raise ApiError(408, late, code="timeout") from None
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted
