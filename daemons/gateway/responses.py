"""Answers in OpenAI's shapes, with our statistics in `speclora`. Pure: messages in, JSON out."""

import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from specl.daemons.gateway.errors import ApiError, ascii_json
from specl.shared.messaging.messages import Delta, Done, PositionLogprobs, PrefillProgress, Queued, TokenLogprob

REASONS = {"stop": "stop", "length": "length"}
END = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def finish_reason(done: Done) -> str:
    """OpenAI's word for it; an answer that a deadline cut short is one that ran out of length."""
    return REASONS.get(done.finish_reason, "length")


def usage(done: Done) -> dict[str, Any]:
    """Tokens in and out."""
    prompt = done.stats.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": done.tokens,
        "total_tokens": prompt + done.tokens,
        "prompt_tokens_details": {"cached_tokens": done.stats.reused_prompt_tokens},
    }


def statistics(done: Done) -> dict[str, Any]:
    """What the `speclora` field holds."""
    return {
        "generation_id": done.generation_id,
        "adapter_id": done.adapter_id,
        "recorded": done.recorded,
        "record_note": done.record_note,
        "finish_reason": done.finish_reason,
        **asdict(done.stats),
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw) or None}


def chat_logprobs(logprobs: Sequence[PositionLogprobs]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = [
        _token(position.chosen) | {"top_logprobs": [_token(token) for token in position.top]} for position in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Sequence[PositionLogprobs], start: int) -> dict[str, Any]:
    """`logprobs` of a plain completion whose text so far has `start` characters."""
    offsets = itertools.accumulate((len(position.chosen.text) for position in logprobs), initial=start)
    return {
        "tokens": [position.chosen.text for position in logprobs],
        "token_logprobs": [position.chosen.logprob for position in logprobs],
        # of tokens with one text the likeliest counts
        "top_logprobs": [{token.text: token.logprob for token in reversed(position.top)} for position in logprobs],
        "text_offset": list(offsets)[: len(logprobs)],
    }


class ResponseBuilder:
    """One answer's envelope: chat or plain completion, whole or in chunks."""

    def __init__(self, request_id: str, model: str, chat: bool, with_logprobs: bool = False) -> None:
        self._chat, self._model, self._created = chat, model, int(time.time())
        self._with_logprobs, self._offset = with_logprobs, 0
        self._first = True
        self._around_text: tuple[bytes, bytes] | None = None  # a chunk's bytes before and behind its text
        self._id = ("chatcmpl-" if chat else "cmpl-") + request_id

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _logprobs_of(self, logprobs: Sequence[PositionLogprobs]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        if self._chat:
            return chat_logprobs(logprobs)
        start, self._offset = self._offset, self._offset + sum(len(position.chosen.text) for position in logprobs)
        return text_logprobs(logprobs, start)

    def whole(self, done: Done, logprobs: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": self._logprobs_of(logprobs),
            "finish_reason": finish_reason(done),
        }
        if self._chat:
            choice["message"] = {"role": "assistant", "content": done.text, "refusal": None}
        else:
            choice["text"] = done.text
        kind = "chat.completion" if self._chat else "text_completion"
        return self._envelope(kind, [choice]) | {"usage": usage(done), "speclora": statistics(done)}

    def events(self, pieces: Sequence[Delta | Done], wants_usage: bool) -> bytes:
        """The events for `pieces`, which came together: one chunk for all their text, and the end of the stream after Done."""
        deltas = [piece for piece in pieces if isinstance(piece, Delta)]
        text, logprobs = (
            "".join(piece.text for piece in deltas),
            [position for piece in deltas for position in piece.logprobs],
        )
        chunks = self._piece(text, logprobs) if text or logprobs else b""
        if isinstance(done := pieces[-1], Done):
            chunks += b"".join(event(chunk) for chunk in self._last(done, wants_usage)) + END
        return chunks

    def _piece(self, text: str, logprobs: Sequence[PositionLogprobs]) -> bytes:
        if self._first or self._with_logprobs:
            return event(self._chunk(text, logprobs=logprobs))
        if self._around_text is None:  # from the second chunk on only the text changes
            mark = uuid.uuid4().hex
            before, _, after = event(self._chunk(mark)).partition(json.dumps(mark).encode())
            self._around_text = before, after
        before, after = self._around_text
        return before + json.dumps(text, ensure_ascii=False).encode() + after

    def _chunk(self, text: str, reason: str | None = None, logprobs: Sequence[PositionLogprobs] = ()) -> dict[str, Any]:
        """One piece of a stream; the last has the reason."""
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None if reason else self._logprobs_of(logprobs),
            "finish_reason": reason,
        }
        if self._chat:
            content = {} if reason else {"content": text}
            choice["delta"] = ({"role": "assistant"} if self._first else {}) | content
        else:
            choice["text"] = text
        self._first = False
        return self._envelope("chat.completion.chunk" if self._chat else "text_completion", [choice])

    def _last(self, done: Done, wants_usage: bool) -> list[dict[str, Any]]:
        """The chunks that end a stream: the reason with our statistics, then the usage where it was asked for."""
        ending = self._chunk("", finish_reason(done)) | {"speclora": statistics(done)}
        if not wants_usage:
            return [ending]
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return [ending | {"usage": None}, self._envelope(kind, []) | {"usage": usage(done)}]


class ProgressComments:
    """What a stream says before its first token, in comment lines that clients skip and proxies take for life."""

    def __init__(self) -> None:
        self._text = "waiting"

    def note(self, progress: Queued | PrefillProgress) -> None:
        """Take the latest progress."""
        if isinstance(progress, Queued):
            self._text = f"queued, {progress.position} in front"
        else:
            self._text = f"prefill {progress.read}/{progress.total}"

    def comment(self) -> bytes:
        """The latest progress as a comment."""
        return f": {self._text}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """A failure in the middle of a stream, when the status has long been sent."""
    return b"data: " + ascii_json(error.body()) + b"\n\n"
