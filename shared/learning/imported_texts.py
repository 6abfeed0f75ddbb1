"""Texts written elsewhere as records: what the target says of each of their tokens, so that a draft
can learn from them.

Whatever wrote a text, the log-probabilities are the configured target's own. Knows tokens and
records, nothing of files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from specl.shared.conversations import conversation_of
from specl.shared.messaging.messages import Disagreement, Generation, TopK

if TYPE_CHECKING:
    from specl.shared.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class ImportedText:
    """A prompt and its answer, with what the file says of how they were drafted."""

    id: str
    prompt: str
    output: str
    acceptance_rate: float | None
    created_at: float
    disagreements: list[Disagreement]


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """The target's top-k at each token of an answer (token ids u32 [n]). `greedy`: it would have
    written exactly this.
    """

    prompt: str
    prompt_tokens: npt.NDArray[np.uint32]
    output_tokens: npt.NDArray[np.uint32]
    top_k: TopK
    greedy: bool
    target: str
    fingerprint: str


def text_logprobs(
    target: "LanguageModel", prompt: str, prompt_tokens: list[int], output: list[int], k: int
) -> TextLogprobs | None:
    """What the target says at each token of `output` after the prompt; None where they do not fit
    into its context.
    """
    from specl.shared.learning.recapture import recapture  # mlx: only where texts are scored

    if not output or len(prompt_tokens) + len(output) > target.context_length:
        return None
    _, ids, logprobs = recapture(target, np.array([*prompt_tokens, *output]), len(prompt_tokens), k)
    weights = np.exp(logprobs.astype(np.float64))
    tail = np.clip(1 - weights.sum(axis=1), 0, 1)
    entropy = -(weights * logprobs).sum(axis=1) - tail * np.log(np.maximum(tail, 1e-12))
    top = TopK(
        k=int(ids.shape[1]),
        ids=ids.astype("<u4").tobytes(),
        logprobs=logprobs.astype("<f2").tobytes(),
        tail=tail.astype("<f2").tobytes(),
        entropy=entropy.astype("<f2").tobytes(),
    )
    greedy = bool((ids[:, 0] == np.array(output)).all())
    return TextLogprobs(
        prompt, np.array(prompt_tokens, "<u4"), np.array(output, "<u4"), top, greedy, target.name, target.fingerprint
    )


def with_token_texts(text: ImportedText, scored: TextLogprobs, decode: Callable[[list[int]], str]) -> ImportedText:
    """The text with the spelling of its disagreeing tokens, where the file's ids are this
    tokenizer's.
    """
    output = scored.output_tokens.tolist()

    def spelled(line: Disagreement) -> Disagreement:
        if not 0 <= line.position < len(output) or output[line.position] != line.target_token:
            return line
        return replace(line, draft_text=decode([line.draft_token]), target_text=decode([line.target_token]))

    return replace(text, disagreements=[spelled(line) for line in text.disagreements])


def to_generation(text: ImportedText, scored: TextLogprobs | None) -> Generation:
    """The record of an imported text. Nothing is claimed of drafting: its counts are zero, its rate
    is the file's.
    """
    messages = [{"role": "user", "content": text.prompt}]
    return Generation(
        id=text.id,
        conversation_id=conversation_of(messages),
        created_at=text.created_at,
        mode="imported",
        messages=messages,
        prompt=scored.prompt if scored else text.prompt,
        prompt_tokens=scored.prompt_tokens.tobytes() if scored else b"",
        output=text.output,
        output_tokens=scored.output_tokens.tobytes() if scored else b"",
        finish_reason="imported",
        # temperature 0 says that each token is the target's first choice; other texts are judged by
        # the overlap of distributions
        sampling={"temperature": 0.0 if scored and scored.greedy else 1.0},
        drafted=0,
        accepted=0,
        model_drafted=0,
        model_accepted=0,
        rounds=0,
        acceptance_rate=text.acceptance_rate,
        tokens_per_second=0.0,
        ttft_ms=0.0,
        target_model=scored.target if scored else "imported",
        draft_model="imported",
        target_fingerprint=scored.fingerprint if scored else "",
        draft_fingerprint="",
        adapter_id="",
        sources=bytes(len(scored.output_tokens)) if scored else b"",
        stats=None,
        disagreements=text.disagreements,
        top_k=scored.top_k if scored else None,
    )
