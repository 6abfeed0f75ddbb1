"""Errors in the shape that OpenAI's clients read: {"error": {message, type, param, code}}. Knows no route."""

import json
from typing import Any

from starlette.responses import JSONResponse

from specl.shared.errors import (
    ConfigError,
    ContextExceeded,
    DaemonUnreachable,
    RequestRejected,
    ServerBusy,
    SpecLoraError,
)

BUSY_S = "1"
DOWN_S = "5"


def ascii_json(body: dict[str, Any]) -> bytes:
    """JSON in ASCII: an error may quote half a surrogate, which UTF-8 does not have."""
    return json.dumps(body, separators=(",", ":")).encode("ascii")


class _AsciiResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return ascii_json(content)


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {429: {"Retry-After": BUSY_S}, 503: {"Retry-After": DOWN_S}, 401: {"WWW-Authenticate": "Bearer"}}
        return _AsciiResponse(self.body(), self.status, headers.get(self.status))


def api_error_of(error: SpecLoraError) -> ApiError:
    """An error of ours as a response to an HTTP client."""
    text = str(error) + (f" ({error.hint})" if error.hint else "")
    if isinstance(error, DaemonUnreachable):
        return ApiError(503, text, code="inference_unreachable")
    if isinstance(error, ServerBusy):
        return ApiError(429, text, code="busy")
    if isinstance(error, ContextExceeded):
        return ApiError(400, text, "messages", code="context_length_exceeded")
    if isinstance(error, RequestRejected):
        return ApiError(400, text, code="rejected")
    return ApiError(400 if isinstance(error, ConfigError) else 500, text)
