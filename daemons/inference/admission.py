"""Turns a client's request into a job: its tokens, the cache tokens that it reserves, and the
engine's options.

Holds no state. Settings fill in what a request leaves open, here and nowhere else. The engine
checks the options' values when the job starts.
"""

from typing import Any

from specl.daemons.inference.job import Job
from specl.shared.conversations import strings
from specl.shared.engine.core import EngineCore
from specl.shared.engine.request_options import RequestOptions
from specl.shared.errors import ContextExceeded, RequestRejected, SpecLoraError
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.messages import Ask
from specl.shared.settings.schema import Settings

MODES = ("detailed", "fast")
MAX_NUM_DRAFT_TOKENS = 16
CHECKED_CHARACTERS = 4  # for each token that fits; a longer text is counted in pieces first
PIECE = 4096  # characters
LOST_AT_CUT = 16  # tokens that a cut between pieces may add


def admit(peer: bytes, ask: Ask, arrived: float, engine: EngineCore, settings: Settings) -> Job:
    """The job of a request. Raises RequestRejected for a prompt that is empty or too long, and for
    an unknown mode.
    """
    _check_options(ask)
    limit = context_limit(engine, settings)
    _refuse_by_length(ask, engine, limit)
    text, prompt = _encode(ask, engine)
    if not prompt:
        raise RequestRejected("the prompt is empty")
    if len(prompt) >= limit:
        what = "memory.max_kv_cache_tokens is" if limit < engine.target.context_length else "the model's context holds"
        raise ContextExceeded(f"the prompt has {len(prompt)} tokens; {what} {limit}: the maximum context length")
    reserved = min(len(prompt) + ask.max_tokens, limit)  # an answer ends where its cache would outgrow the budget
    return Job(peer, ask, arrived, text, prompt, _options(ask, reserved - len(prompt), settings), reserved)


def context_limit(engine: EngineCore, settings: Settings) -> int:
    """Tokens that a prompt and its answer may have together."""
    return min(engine.target.context_length, settings.memory.max_kv_cache_tokens)


def failure_code(error: SpecLoraError) -> FailureCode:
    """The code that tells a client why its request is refused."""
    return FailureCode.CONTEXT_LENGTH if isinstance(error, ContextExceeded) else FailureCode.REJECTED


def _refuse_by_length(ask: Ask, engine: EngineCore, limit: int) -> None:
    """Raises ContextExceeded for a text that is far too long, after `limit` tokens of it: tokenising
    runs between the rounds of others, and a million digits would hold them all up.
    """
    texts = [text for message in ask.messages for text in strings(message.get("content"))] or [ask.prompt]
    if sum(map(len, texts)) <= CHECKED_CHARACTERS * limit:
        return
    count = 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            count += max(0, len(engine.encode(text[start : start + PIECE])) - LOST_AT_CUT)
            if count >= limit:
                raise ContextExceeded(
                    f"the prompt has more than {count} tokens; at most {limit} fit: the maximum context length"
                )


def _check_options(ask: Ask) -> None:
    """Check the options that the engine does not know, or for which it allows a wider range."""
    if ask.max_tokens < 1:  # the budget may lower it, so the engine does not see the client's number
        raise RequestRejected(f"max_tokens must be at least 1, not {ask.max_tokens}")
    if ask.mode not in MODES:
        raise RequestRejected(f"mode must be detailed or fast, not {ask.mode!r}")
    drafts = ask.num_draft_tokens
    if drafts is not None and not 0 <= drafts <= MAX_NUM_DRAFT_TOKENS:
        raise RequestRejected(f"num_draft_tokens must lie between 0 and {MAX_NUM_DRAFT_TOKENS}, not {drafts}")


def _encode(ask: Ask, engine: EngineCore) -> tuple[str, list[int]]:
    if not ask.messages:
        return ask.prompt, engine.encode(ask.prompt, special=True)
    if not any(_has_text(message) for message in ask.messages):
        raise RequestRejected("the prompt is empty")
    return engine.encode_chat(ask.messages, reuse_tokens=ask.sampling.seed is None, owner=ask.client_id)


def _has_text(message: dict[str, Any]) -> bool:
    """Whether any message has text, whatever its role: a system message alone is a prompt as well."""
    return bool(str(message.get("content") or "").strip())


def _options(ask: Ask, max_tokens: int, settings: Settings) -> RequestOptions:
    num_draft_tokens = ask.num_draft_tokens
    if num_draft_tokens is None and settings.speculative.num_draft_tokens != "auto":
        num_draft_tokens = settings.speculative.num_draft_tokens
    keeps_details = ask.mode == "detailed" and ask.record and settings.records.keep == "content"
    return RequestOptions(
        sampling=ask.sampling,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft_tokens,
        ngram=settings.speculative.ngram if ask.ngram is None else ask.ngram,
        client_id=ask.client_id if ask.record else "",
        cache_owner=ask.client_id,
        logprobs=ask.logprobs,
        capture_k=settings.training.loss.top_k_logits if keeps_details else 0,
    )
