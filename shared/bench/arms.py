"""The arms of a bench: mlx-lm's loops, this engine, and this engine behind its daemon, each timed
by the same clock.

mlx-lm's two loops run on the same model object as the engine, so that ratios show what
speculation does, not what kernels do; `STOCK` is mlx-lm as it comes, on a dense copy without our
kernels. Every arm of the engine has an acceptance history of its own, so that what one arm learns
does not help another.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_sampler

from specl.shared.answer_stats import AnswerTotals
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.bench.text_equality import TopTwo
from specl.shared.engine.acceptance_history import HistoryBySampling
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.engine.decoding_stats import DecodingStats
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sampling import top_indices
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Purge
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.load import load
from specl.shared.sampling_params import SamplingParams

PLAIN = "mlx-lm plain"
STOCK = "mlx-lm stock"


@dataclass(slots=True)
class ArmResult:
    """One arm's output for one prompt. The first `first` tokens came together after `ttft_s`
    seconds, the rest took `decode_s`. The counts are those of DecodingStats.
    """

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
        """Tokens a second of decoding, without the prompt and the first tokens."""
        return (len(self.tokens) - self.first) / self.decode_s if self.decode_s > 0 else 0.0

    def add_to(self, totals: AnswerTotals) -> None:
        """Count this answer; its first tokens, which took no decoding time, are left out."""
        totals.add_counts(
            len(self.tokens) - self.first, self.decode_s, self.model_drafted, self.model_accepted, self.rounds
        )

    def take_stats(self, tally: DecodingStats) -> None:
        """Copy the engine's counts."""
        self.rounds = tally.rounds
        self.drafted, self.accepted = sum(tally.drafted.values()), sum(tally.accepted.values())
        self.rejected = tally.rejected
        self.model_drafted, self.model_accepted = tally.drafted["model"], tally.accepted["model"]
        self.k_histogram = dict(tally.k_histogram)
        self.drafting_rounds = tally.rounds - tally.k_histogram.get(0, 0)
        self.tested_by_depth, self.accepted_by_depth = list(tally.tested_by_depth), list(tally.accepted_by_depth)


def timed(pieces: Iterable[Sequence[int]]) -> ArmResult:
    """Time the pieces of an output as they come."""
    result = ArmResult()
    start = time.perf_counter()
    for piece in pieces:
        now = time.perf_counter()
        if not result.tokens:
            result.ttft_s, result.first, start = now - start, len(piece), now
        result.tokens.extend(piece)
        result.decode_s = now - start
    return result


class Arm(Protocol):
    """One way to answer prompts."""

    name: str

    def run(self, item: BenchPrompt, prompt: list[int], limit: int) -> ArmResult:
        """Answer `prompt` with at most `limit` tokens, ending with a stop token where there is one."""
        ...

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """The text that it writes after these tokens; None where it cannot continue from tokens."""
        ...


class PlainArm:
    """mlx-lm's generate_step on a model object. On ours, with its native kernels, it is the
    reference of all ratios.
    """

    def __init__(self, target: LanguageModel, sampling: SamplingParams, name: str = PLAIN) -> None:
        self.target, self.sampling, self.name = target, sampling, name

    def run(self, item: BenchPrompt, prompt: list[int], limit: int) -> ArmResult:
        """Answer one prompt."""
        return timed(self._pieces(prompt, limit))

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """The text that it writes after these tokens."""
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        sampler = _sampler(self.sampling)
        for token, _ in generate_step(mx.array(prompt), self.target.model, max_tokens=limit, sampler=sampler):
            yield [int(token)]
            if int(token) in self.target.stop_tokens:
                return


class MlxSpeculativeArm:
    """mlx-lm's speculative_generate_step with a draft model of its own."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, k: int, sampling: SamplingParams) -> None:
        self.name = f"mlx-lm speculative K={k}"
        self.target, self.draft, self.k, self.sampling = target, draft, k, sampling

    def run(self, item: BenchPrompt, prompt: list[int], limit: int) -> ArmResult:
        """Answer one prompt. mlx-lm's loop reports accepted drafts only, so that drafted and
        rejected stay 0.
        """
        self._accepted = 0
        result = timed(self._pieces(prompt, limit))
        result.accepted = result.model_accepted = self._accepted
        return result

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """The text that it writes after these tokens."""
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        sampler = _sampler(self.sampling)
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
    """This engine: `k` None is automatic; `capture_k` above 0 is the detailed mode."""

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
        self._history = HistoryBySampling()

    def run(self, item: BenchPrompt, prompt: list[int], limit: int) -> ArmResult:
        """Answer one prompt. No prefix is reused: every arm reads the whole prompt."""
        engine = self.engine
        engine.prefixes.purge()
        if engine.adapter_id != (self.adapter.id if self.adapter else ""):
            engine.use_adapter(self.adapter)
        engine.request_history = self._history
        result = timed(self._pieces(prompt, limit))
        result.take_stats(self._session.stats)
        return result

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """The text that it writes after these tokens."""
        self.engine.prefixes.purge()
        return timed(self._pieces(tokens, limit)).tokens

    def _pieces(self, prompt: list[int], limit: int) -> Iterable[list[int]]:
        self._session = session = self.engine.session(prompt, RequestOptions(max_tokens=limit, **self.options))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            yield session.round()


class DaemonArm:
    """This engine behind its daemon, with sockets, records and store. The clock is the client's.

    The daemon does not report rejections; drafting rounds that were not accepted whole are an upper
    bound.
    """

    def __init__(self, client: Client, sampling: SamplingParams, mode: str = "detailed") -> None:
        self.name = f"daemon {mode}"
        self.client = client
        self.options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "mode": mode}

    def run(self, item: BenchPrompt, prompt: list[int], limit: int) -> ArmResult:
        """Answer one prompt. The daemon's prefix cache is emptied first, so that it reads the whole
        prompt too.
        """
        self.client.command("inference", Purge([], None, ""))
        request = self.client.request(item.messages, max_tokens=limit, **self.options)
        result = timed(delta.tokens for delta in self.client.deltas(request))
        if self.client.last is None:
            raise SpecLoraError("the answer ended without its statistics")
        stats = self.client.last.stats
        result.rounds, result.drafted, result.accepted = stats.rounds, stats.drafted, stats.accepted
        result.model_drafted, result.model_accepted = stats.model_drafted, stats.model_accepted
        result.k_histogram = {int(k): count for k, count in stats.k_histogram.items()}
        result.drafting_rounds = result.rounds - result.k_histogram.get(0, 0)
        result.rejected = min(result.drafted - result.accepted, result.drafting_rounds)
        return result

    def resume(self, tokens: list[int], limit: int) -> list[int] | None:
        """None: the daemon takes text, not tokens."""
        return None


def _sampler(sampling: SamplingParams) -> Callable[[mx.array], mx.array]:
    sampler: Callable[[mx.array], mx.array] = make_sampler(
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k
    )
    return sampler


def stock_copy(target: LanguageModel, models: Path) -> LanguageModel:
    """A dense copy of the target's weights, as mlx-lm alone would compute them."""
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
