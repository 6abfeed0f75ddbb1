"""Messages and records of a running or finished request: the engine's values in the wire's types.
Holds no state.

The statistics of an answer are computed once, by the caller, and stand in both its `Done`
and its record.
"""

from collections.abc import Sequence

import numpy as np

from specl.daemons.inference.job import RunningJob
from specl.shared.answer_stats import AnswerStats
from specl.shared.conversations import conversation_of
from specl.shared.engine.capture import Capture, TokenLogprobs
from specl.shared.engine.core import EngineCore
from specl.shared.engine.text_output import INCOMPLETE
from specl.shared.messaging.messages import Disagreement, Done, Generation, PositionLogprobs, TokenLogprob, TopK
from specl.shared.models.language_model import LanguageModel

CONTEXT_TOKENS = 16  # recorded before a disagreement
CANCELLED = "cancelled"


def done_message(running: RunningJob, stats: AnswerStats) -> Done:
    """The last message of an answer; the recorder fills in whether it was recorded."""
    return Done(
        request_id=running.job.request_id,
        generation_id=running.job.generation_id,
        text=running.text.text,
        tokens=len(running.session.output),
        finish_reason=running.session.finish_reason or CANCELLED,
        adapter_id=running.adapter_id,
        recorded=False,
        record_note="",
        stats=stats,
    )


def generation_record(running: RunningJob, engine: EngineCore, stats: AnswerStats) -> Generation:
    """The record of a finished or cancelled answer."""
    job, session, ask = running.job, running.session, running.job.ask
    return Generation(
        id=job.generation_id,
        conversation_id=ask.conversation_id or conversation_of(ask.messages, ask.prompt),
        created_at=job.created_at,
        mode=ask.mode,
        messages=ask.messages,
        prompt=job.prompt_text,
        prompt_tokens=_token_bytes(job.prompt),
        output=running.text.text,
        output_tokens=_token_bytes(session.output),
        finish_reason=session.finish_reason or CANCELLED,
        sampling={name: getattr(ask.sampling, name) for name in ask.sampling.__slots__},
        drafted=stats.drafted,
        accepted=stats.accepted,
        model_drafted=stats.model_drafted,
        model_accepted=stats.model_accepted,
        rounds=stats.rounds,
        acceptance_rate=stats.acceptance_rate,
        tokens_per_second=stats.tokens_per_second,
        ttft_ms=stats.ttft_ms,
        target_model=engine.target.name,
        draft_model=engine.draft.name if engine.draft is not None else "",
        target_fingerprint=engine.target.fingerprint,
        draft_fingerprint=engine.draft_fingerprint,
        adapter_id=running.adapter_id,
        sources=bytes(session.sources),
        stats=stats,
        disagreements=_disagreements(running, engine.target) if session.capture is not None else [],
        top_k=_top_k(session.capture) if session.capture is not None else None,
    )


def _token_bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, "<u4").tobytes()


def _disagreements(running: RunningJob, target: LanguageModel) -> list[Disagreement]:
    decode = target.tokenizer.decode
    text = [*running.job.prompt, *running.session.output]
    start = len(running.job.prompt)
    capture = running.session.capture
    return [
        Disagreement(
            position=draft.position,
            draft_token=draft.draft_token,
            target_token=draft.target_token,
            draft_text=decode([draft.draft_token]),
            target_text=decode([draft.target_token]),
            draft_confidence=round(draft.draft_confidence, 6),
            target_confidence=round(draft.target_confidence, 6),
            drafter=draft.drafter,
            depth=draft.depth,
            context_tokens=text[max(0, start + draft.position - CONTEXT_TOKENS) : start + draft.position],
        )
        for draft in (capture.rejected if capture is not None else [])
    ]


def _top_k(capture: Capture) -> TopK | None:
    if not capture.ids:
        return None
    return TopK(
        k=len(capture.ids[0]),
        ids=np.stack(capture.ids).astype("<u4").tobytes(),
        logprobs=np.stack(capture.logprobs).astype("<f2").tobytes(),
        tail=np.array(capture.tail, "<f2").tobytes(),
        entropy=np.array(capture.entropy, "<f2").tobytes(),
    )


def position_logprobs(
    target: LanguageModel, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[PositionLogprobs]:
    """The log-probabilities of emitted tokens as a client sees them; a token that ends the answer
    is left out.

    `logprobs` has one entry a token, or none where the client did not ask for them.
    """

    def token_logprob(token: int, logprob: float) -> TokenLogprob:
        text = target.tokenizer.decode([token])
        return TokenLogprob(text, b"" if INCOMPLETE in text else text.encode(), round(logprob, 6))

    return [
        PositionLogprobs(
            token_logprob(token, row.logprob),
            [token_logprob(*alternative) for alternative in zip(row.ids, row.logprobs, strict=True)],
        )
        for token, row in zip(tokens, logprobs, strict=False)
        if token not in target.stop_tokens
    ]
