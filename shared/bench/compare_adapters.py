"""Adapters of one draft on the same prompts: acceptance at a fixed draft length, agreement, and speed as served.

The n-gram drafter is off, so that every figure is that of the draft. Prompt by prompt all are measured in turn and the order
alternates, so that the load of the machine affects all alike. Agreement is teacher-forced on the target's text, generated once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specl.shared.answer_stats import AnswerTotals
from specl.shared.bench.arms import EngineArm
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.recapture import recapture
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.sampling_params import SamplingParams

FIXED_K = 4  # acceptance as a result is reported at this length
DEPTHS = 3
RESAMPLES = 2000
TOP_K = 32


@dataclass(slots=True)
class AdapterResults:
    """One adapter, None for the bare draft, and what was measured of it. `fixed` sums answers with the fixed draft length,
    `served` those with the length chosen by costs.
    """

    name: str
    adapter: LoadedAdapter | None
    fixed: AnswerTotals = field(default_factory=AnswerTotals)
    served: AnswerTotals = field(default_factory=AnswerTotals)
    tokens: int = 0  # of all served answers
    agreement: float = 0.0
    by_depth: tuple[float, ...] = ()
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def acceptance(self) -> float | None:
        """Accepted of drafted at the fixed length."""
        return self.fixed.acceptance

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second as a client gets them."""
        return self.served.tokens_per_second

    def figures(self) -> dict[str, Any]:
        """For a report."""
        return {
            "adapter": self.name,
            "acceptance": self.acceptance,
            "agreement": self.agreement,
            "agreement_by_depth": list(self.by_depth),
            "tokens_per_second": self.tokens_per_second,
            "drafted": self.fixed.drafted,
            "accepted": self.fixed.accepted,
            "positions": int(self.positions.sum()),
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more the first adapter agrees than the second, with a 95% interval over prompts (bootstrap)."""

    value: float
    low: float
    high: float


def measure_adapters(
    engine: EngineCore,
    items: Sequence[BenchPrompt],
    limit: int,
    sampling: SamplingParams,
    results: Sequence[AdapterResults],
    report: OnProgress = ignore_progress,
) -> float:
    """Measure every adapter on every prompt, filling in `results`; the tokens a second without any draft are returned.

    The engine is left with the last adapter.
    """
    fixed = [EngineArm(one.name, engine, sampling, FIXED_K, ngram=False, adapter=one.adapter) for one in results]
    served = [EngineArm(one.name, engine, sampling, None, ngram=False, adapter=one.adapter) for one in results]
    plain_arm, plain = EngineArm("no draft", engine, sampling, 0, ngram=False), AnswerTotals()
    prompts = [engine.encode_chat(item.messages)[1] for item in items]
    for arm in (*served, plain_arm):  # once uncounted: caches and pages are warm
        arm.run(items[0], prompts[0], min(8, limit))
    examples = []
    meter = ProgressMeter("prompts", len(items), report)
    for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        order = list(range(len(results)))
        for i in order if index % 2 == 0 else reversed(order):
            answer = served[i].run(item, prompt, limit)
            answer.add_to(results[i].served)
            results[i].tokens += len(answer.tokens)
            output = fixed[i].run(item, prompt, limit)
            output.add_to(results[i].fixed)
            if i == 0:
                # greedy answers do not depend on the adapter, and sampled ones are the target's as well
                examples.append(capture_example(engine, item.id, prompt, output.tokens, sampling))
        plain_arm.run(item, prompt, limit).add_to(plain)
        meter.advance()
    for one in results:
        engine.use_adapter(one.adapter)
        score = agreement(Learner(_draft(engine)), examples, DEPTHS)
        one.agreement, one.by_depth = score.value, score.by_depth
        one.hits, one.positions = score.hits, score.positions
    return plain.tokens_per_second


def _draft(engine: EngineCore) -> HeadDraft | LanguageModel:
    if engine.draft is None:
        raise ValueError("there is no draft to compare adapters of")
    return engine.draft


def capture_example(
    engine: EngineCore, id: str, prompt: list[int], output: list[int], sampling: SamplingParams
) -> Example:
    """A finished text with the target's distributions and states, for scoring drafts on it."""
    tokens = np.array([*prompt, *output], np.uint32)
    states, ids, logprobs = recapture(engine.target, tokens, len(prompt), TOP_K)
    weights = np.ones(len(output), np.float32)
    return Example(
        id, tokens, len(prompt), ids, logprobs, weights, states if engine.reads_states else None, sampling.greedy
    )


def difference(first: AdapterResults, second: AdapterResults, seed: int = 0) -> Difference:
    """The difference in agreement; prompts are resampled in pairs."""
    if not len(first.hits):
        return Difference(0.0, 0.0, 0.0)
    picks = np.random.default_rng(seed).integers(0, len(first.hits), (RESAMPLES, len(first.hits)))
    rates = [one.hits[picks].sum(1) / np.maximum(one.positions[picks].sum(1), 1) for one in (first, second)]
    low, high = np.quantile(rates[0] - rates[1], [0.025, 0.975])
    return Difference(first.agreement - second.agreement, float(low), float(high))
