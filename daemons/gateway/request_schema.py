"""OpenAI's request fields as a request of ours. What cannot be honoured is refused by name, never ignored. Knows no bus."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specl.daemons.gateway.errors import ApiError
from specl.daemons.gateway.neutral_values import refuse_unsupported
from specl.shared.conversations import MessageError, asks_for_nothing, read_messages
from specl.shared.messaging.messages import Ask
from specl.shared.sampling_params import SEED_LIMIT, merge_sampling
from specl.shared.settings.schema import Settings

MOST_STOPS = 16
MOST_LOGPROBS = 20
OFF = -1  # of top_k and of limits, in the dialects of vLLM, llama.cpp and LM Studio
ALIASES = ("speclora", "default")
COMMON = {
    "model", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens", "top_k", "min_p", "speclora", "store",
    "logprobs",
}  # fmt: skip
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
TEXT = COMMON | {"prompt"}
SPECLORA_OPTIONS = {"mode": str, "record": bool, "num_draft_tokens": int, "ngram": bool, "conversation_id": str}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What is sent to inference, and how the answer is wanted: streamed, and with a chunk for the usage."""

    ask: Ask
    stream: bool
    include_usage: bool


def _bad(name: str, text: str) -> ApiError:
    return ApiError(400, f"`{name}` {text}", name, "invalid_value")


def _number(body: dict[str, Any], name: str, low: float, high: float, above: bool = False) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _bad(name, "must be a number")
    if not low <= value <= high or (above and value == low):
        raise _bad(name, f"must lie {'above' if above else 'between'} {low:g} {'up to' if above else 'and'} {high:g}")
    return float(value)


def _whole(body: dict[str, Any], name: str, low: int, high: int, default: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(name, f"must be a whole number from {low} to {high}")
    return value


def _limit(body: dict[str, Any], name: str) -> int | None:
    """A number of tokens; None where none is named, as by null or -1."""
    value = body.get(name)
    return None if value == OFF and not isinstance(value, bool) else _whole(body, name, 1, 1_000_000, None)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _bad(name, "must be true or false")
    return value


def _stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [] if stop in (None, "") else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise _bad("stop", "must be a text or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise _bad("stop", f"may hold up to {MOST_STOPS} texts")
    return stops


def served_names(settings: Settings) -> tuple[str, ...]:
    """The names that `model` may have: the target's first."""
    name = settings.models.target.name
    return tuple(dict.fromkeys((Path(name).name if name.startswith(("/", "~", ".")) else name, name, *ALIASES)))


def _check_model(body: dict[str, Any], settings: Settings) -> None:
    model, names = body.get("model"), served_names(settings)
    if model is not None and model not in names:
        raise ApiError(
            404, f"the model {model!r} is not served here; {names[0]!r} is (or `speclora`)", "model", "model_not_found"
        )


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return read_messages(body.get("messages"))
    except MessageError as error:
        raise ApiError(400, f"`{error.field}`{error.text}", error.field, error.code) from error


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _bad("prompt", "must be one text (lists of texts or tokens are not supported)")
    return prompt


def _speclora_options(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("speclora") or {}
    if not isinstance(options, dict):
        raise _bad("speclora", "must be an object")
    for name, value in options.items():
        if name not in SPECLORA_OPTIONS:
            raise _bad(f"speclora.{name}", f"is not known; known are {', '.join(SPECLORA_OPTIONS)}")
        if type(value) is not SPECLORA_OPTIONS[name]:
            raise _bad(f"speclora.{name}", f"must be a {SPECLORA_OPTIONS[name].__name__}")
    return ({"record": False} if body.get("store") is not None and not _flag(body, "store") else {}) | options


def _usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _bad("stream_options", "must be an object")
    for name, value in options.items():
        if name != "include_usage" and not asks_for_nothing(value):
            raise ApiError(400, f"`stream_options.{name}` is not supported", "stream_options", "unsupported_parameter")
    include = _flag(options, "include_usage")
    if include and not stream:
        raise _bad("stream_options", "is only for `stream: true`")
    return include


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    """How many alternatives of each token are wanted; None for no log-probabilities at all."""
    if not chat:
        return None if body.get("logprobs") is False else _whole(body, "logprobs", 0, MOST_LOGPROBS, None)
    requested = _flag(body, "logprobs")
    count = _whole(body, "top_logprobs", 0, MOST_LOGPROBS, 0)
    if count and not requested:
        raise _bad("top_logprobs", "needs `logprobs: true`")
    return count if requested else None


def _client(body: dict[str, Any], address: str) -> str:
    """Whose past answers and cached prefixes may serve this request: the end user that it names, or
    nobody's. A name is anybody's word, so the same name from another address is another client.
    """
    name = body.get("safety_identifier") or body.get("user")
    return f"gateway {address} {name}" if isinstance(name, str) and name else ""


def parse_request(body: Any, settings: Settings, chat: bool, address: str = "") -> CompletionRequest:
    """The request in a body of JSON that came from `address`. Raises ApiError that names the field."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_body")
    refuse_unsupported(body, CHAT if chat else TEXT)
    _check_model(body, settings)
    defaults, stream = settings.speculative, _flag(body, "stream")
    top_k = _whole(body, "top_k", OFF, 1_000_000, None)
    requested = {
        "temperature": _number(body, "temperature", 0, 2),
        "top_p": _number(body, "top_p", 0, 1, above=True),
        "top_k": 0 if top_k == OFF else top_k,
        "min_p": _number(body, "min_p", 0, 1),
        "seed": _whole(body, "seed", -SEED_LIMIT, SEED_LIMIT - 1, None),
    }
    limit = _limit(body, "max_tokens")
    if chat:
        limit = _limit(body, "max_completion_tokens") or limit
    speclora_options = {"mode": defaults.mode} | _speclora_options(body)
    ask = Ask(
        request_id=uuid.uuid4().hex,
        messages=_messages(body) if chat else [],
        prompt="" if chat else _prompt(body),
        max_tokens=limit or defaults.max_tokens,
        sampling=merge_sampling(defaults, requested),
        stop=_stops(body),
        client_id=_client(body, address),
        logprobs=_logprobs(body, chat),
        **speclora_options,
    )
    return CompletionRequest(ask, stream, _usage(body, stream))
