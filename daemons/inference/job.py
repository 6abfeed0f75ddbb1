"""A request from its arrival to its record: what it asked, its session, its text so far, and the facts made of it at the end.

Joins the engine's vocabulary to the wire's; nothing else does.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specl.shared.conversations import conversation_of
from specl.shared.engine.capture import TokenLogprobs
from specl.shared.engine.core import EngineCore
from specl.shared.engine.decode import Session
from specl.shared.engine.statistics import statistics
from specl.shared.engine.text import HOLD, TextStream
from specl.shared.messaging.messages import Ask, Disagreement, Done, Generation, PositionLogprobs, TokenLogprob, TopK
from specl.shared.models.language_model import LanguageModel

CONTEXT_TOKENS = 16  # before a disagreement


@dataclass(slots=True)
class Job:
    """One request inside the daemon."""

    peer: bytes
    ask: Ask
    arrived: float
    generation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_at: float = field(default_factory=time.time)
    prompt_text: str = ""
    prompt: list[int] = field(default_factory=list)
    session: Session | None = None
    text: TextStream | None = None
    first_token_at: float | None = None
    adapter_id: str = ""
    began_with: str = ""  # the adapter of its first round
    prefilled: bool = False
    cancelled: str = ""
    reserved: int = 0  # cache tokens it may come to need

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from arrival to the first token; 0 before it."""
        return 1000 * (self.first_token_at - self.arrived) if self.first_token_at else 0.0


def to_generation(job: Job, engine: EngineCore) -> Generation:
    """The record of a finished (or cancelled) answer."""
    session, ask = job.session, job.ask
    tally = session.tally
    stats = statistics(job.session, engine.costs, job.ttft_ms)
    sampling = {name: getattr(ask.sampling, name) for name in ask.sampling.__slots__}
    return Generation(
        id=job.generation_id,
        conversation_id=ask.conversation_id or conversation_of(ask.messages, ask.prompt),
        created_at=job.created_at,
        mode=ask.mode,
        messages=ask.messages,
        prompt=job.prompt_text,
        prompt_tokens=np.array(job.prompt, "<u4").tobytes(),
        output=job.text.text,
        output_tokens=np.array(session.output, "<u4").tobytes(),
        finish_reason=session.finish_reason or "cancelled",
        sampling=sampling,
        drafted=stats.drafted,
        accepted=stats.accepted,
        model_drafted=tally.drafted["model"],
        model_accepted=tally.accepted["model"],
        rounds=tally.rounds,
        acceptance_rate=stats.acceptance_rate,
        tokens_per_second=stats.tokens_per_second,
        ttft_ms=stats.ttft_ms,
        target_model=engine.target.name,
        draft_model=engine.draft.name if engine.draft is not None else "",
        target_fingerprint=engine.target.fingerprint,
        draft_fingerprint=engine.draft_fingerprint,
        adapter_id=job.adapter_id,
        sources=bytes(session.sources),
        stats=stats,
        disagreements=_disagreements(job, engine),
        top_k=_top_k(session),
    )


def _disagreements(job: Job, engine: EngineCore) -> list[Disagreement]:
    session = job.session
    if session.capture is None:
        return []
    decode = engine.target.tokenizer.decode
    start = session.prompt_length
    return [
        Disagreement(
            position=item.position,
            draft_token=item.draft_token,
            target_token=item.target_token,
            draft_text=decode([item.draft_token]),
            target_text=decode([item.target_token]),
            draft_confidence=round(item.draft_confidence, 6),
            target_confidence=round(item.target_confidence, 6),
            drafter=item.drafter,
            depth=item.depth,
            context_tokens=session.state.text[max(0, start + item.position - CONTEXT_TOKENS) : start + item.position],
        )
        for item in session.capture.rejected
    ]


def _top_k(session: Session) -> TopK | None:
    capture = session.capture
    if capture is None or not capture.ids:
        return None
    return TopK(
        k=len(capture.ids[0]),
        ids=np.stack(capture.ids).astype("<u4").tobytes(),
        logprobs=np.stack(capture.logprobs).astype("<f2").tobytes(),
        tail=np.array(capture.tail, "<f2").tobytes(),
        entropy=np.array(capture.entropy, "<f2").tobytes(),
    )


def to_done(job: Job, engine: EngineCore) -> Done:
    """The last message of an answer; the recorder fills in whether it was recorded."""
    session = job.session
    return Done(
        request_id=job.ask.request_id,
        generation_id=job.generation_id,
        text=job.text.text,
        tokens=len(session.output),
        finish_reason=session.finish_reason or "cancelled",
        adapter_id=job.adapter_id,
        recorded=False,
        record_note="",
        stats=statistics(job.session, engine.costs, job.ttft_ms),
    )


def token_laws(target: LanguageModel, tokens: Sequence[int], told: Sequence[TokenLogprobs]) -> list[PositionLogprobs]:
    """What a client sees of `told` (empty where nothing was asked for); a token that ends the answer is left out."""

    def weighed(token: int, logprob: float) -> TokenLogprob:
        text = target.tokenizer.decode([token])
        return TokenLogprob(text, b"" if HOLD in text else text.encode(), round(logprob, 6))

    return [
        PositionLogprobs(
            weighed(token, row.logprob), [weighed(*pair) for pair in zip(row.ids, row.logprobs, strict=True)]
        )
        for token, row in zip(tokens, told, strict=False)
        if token not in target.stop_tokens
    ]
