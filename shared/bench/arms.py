"""The contestants. Each answers a prompt under the same clock: seconds to the first piece, seconds from there to the last.

mlx-lm's two loops run on the very same model object as ours, so that ratios tell what speculation does, not what kernels
do; `STOCK` is mlx-lm as it comes, on a dense copy without our kernels. An arm of the engine keeps its own acceptance
history, so that what one arm learns does not help another.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_sampler

from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.bench.text_equality import TopTwo
from specl.shared.engine.acceptance_history import RequestHistory
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.engine.decoding_stats import DecodingStats
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sampling import top_indices
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.load import load
from specl.shared.sampling_params import SamplingParams

PLAIN = "mlx-lm plain"
STOCK = "mlx-lm stock"


@dataclass(slots=True)
class Answer:
    """`first` tokens came at once after `ttft_s` seconds; the rest took `decode_s`. Counts as in the engine's tally."""

    tokens: list[int] = field(default_factory=list)
    first: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    model_drafted: int = 0
    model_accepted: int = 0
    drafting_rounds: int = 0
    tested_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    k_histogram: dict[int, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: prompt and first piece left out."""
        return (len(self.tokens) - self.first) / self.decode_s if self.decode_s > 0 else 0.0

    def count(self, tally: DecodingStats) -> None:
        """Take the engine's counts."""
        self.rounds = tally.rounds
        self.drafted, self.accepted = sum(tally.drafted.values()), sum(tally.accepted.values())
        self.rejected = tally.rejected
        self.model_drafted, self.model_accepted = tally.drafted["model"], tally.accepted["model"]
        self.k_histogram = dict(tally.k_histogram)
        self.drafting_rounds = tally.rounds - tally.k_histogram.get(0, 0)
        self.tested_by_depth, self.accepted_by_depth = list(tally.tested_by_depth), list(tally.accepted_by_depth)


def timed(pieces: Iterable[Sequence[int]]) -> Answer:
    """Run through the pieces under the clock."""
    answer = Answer()
    start = time.perf_counter()
    for piece in pieces:
        now = time.perf_counter()
        if not answer.tokens:
            answer.ttft_s, answer.first, start = now - start, len(piece), now
        answer.tokens.extend(piece)
        answer.decode_s = now - start
    return answer


class Arm(Protocol):
    """What a contestant is."""

    name: str

    def answer(self, item: BenchPrompt, prompt: list[int], limit: int) -> Answer:
        """At most `limit` tokens, ending with a stop token where there is one."""
        ...

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """What it writes after these tokens, or None where it cannot be asked that."""
        ...


class PlainArm:
    """mlx-lm's generate_step on a model object: ours, native kernels and all, is what everything is measured against."""

    def __init__(self, target: LanguageModel, sampling: SamplingParams, name: str = PLAIN) -> None:
        self.target, self.sampling, self.name = target, sampling, name

    def answer(self, item: BenchPrompt, prompt: list[int], limit: int) -> Answer:
        """See Arm."""
        return timed(self._pieces(prompt, limit))

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """See Arm."""
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        sampler = make_sampler(
            self.sampling.temperature, self.sampling.top_p, self.sampling.min_p, top_k=self.sampling.top_k
        )
        for token, _ in generate_step(mx.array(prompt), self.target.model, max_tokens=limit, sampler=sampler):
            yield [token]
            if token in self.target.stop_tokens:
                return


class MlxSpeculativeArm:
    """mlx-lm's speculative_generate_step with a draft model of its own."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, k: int, sampling: SamplingParams) -> None:
        self.name = f"mlx-lm speculative K={k}"
        self.target, self.draft, self.k, self.sampling = target, draft, k, sampling

    def answer(self, item: BenchPrompt, prompt: list[int], limit: int) -> Answer:
        """See Arm. Its loop does not tell rejections from rounds; accepted drafts are counted, drafted ones are not."""
        self._accepted = 0
        answer = timed(self._pieces(prompt, limit))
        answer.accepted = answer.model_accepted = self._accepted
        return answer

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """See Arm."""
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        sampler = make_sampler(
            self.sampling.temperature, self.sampling.top_p, self.sampling.min_p, top_k=self.sampling.top_k
        )
        steps = speculative_generate_step(
            mx.array(prompt),
            self.target.model,
            self.draft.model,
            num_draft_tokens=self.k,
            max_tokens=limit,
            sampler=sampler,
        )
        for token, _, drafted in steps:
            self._accepted += drafted
            yield [int(token)]
            if int(token) in self.target.stop_tokens:
                return


class EngineArm:
    """Ours: `k` None is auto; `capture_k` above 0 is the detailed mode."""

    def __init__(
        self,
        name: str,
        engine: EngineCore,
        sampling: SamplingParams,
        k: int | None,
        ngram: bool,
        capture_k: int = 0,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.name, self.engine, self.adapter = name, engine, adapter
        self.options: dict[str, Any] = {
            "sampling": sampling,
            "num_draft_tokens": k,
            "ngram": ngram,
            "capture_k": capture_k,
        }
        self._history = RequestHistory()

    def answer(self, item: BenchPrompt, prompt: list[int], limit: int) -> Answer:
        """See Arm. No prefix is reused: every arm reads the whole prompt."""
        engine = self.engine
        engine.prefixes.purge()
        if engine.adapter_id != (self.adapter.id if self.adapter else ""):
            engine.use_adapter(self.adapter)
        engine.request_history = self._history
        answer = timed(self._pieces(prompt, limit))
        answer.count(self._session.stats)
        return answer

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """See Arm."""
        self.engine.prefixes.purge()
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        self._session = session = self.engine.session(prompt, RequestOptions(max_tokens=limit, **self.options))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            yield session.round()


def stock_copy(target: LanguageModel, models: Path) -> LanguageModel:
    """The same weights, dense, as mlx-lm alone would compute them."""
    from specl.shared.native import accelerate

    copy = load(target.name, models, "fp32")
    accelerate(copy.model, check=False).release()
    return copy


def top_two(target: LanguageModel, prompt: Sequence[int], output: Sequence[int]) -> TopTwo:
    """The target's two best tokens after prompt and output, computed afresh in one pass."""
    states = target.hidden_states(mx.array([[*prompt, *output]]), target.new_cache())
    row = target.logits(states[0, -1]).astype(mx.float32)
    mx.eval(row)
    logits = np.array(row)
    first, second = (int(token) for token in top_indices(logits, 2))
    return TopTwo(first, second, float(logits[first] - logits[second]))
