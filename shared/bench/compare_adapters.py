"""Two states of one draft on the same prompts: acceptance at a fixed length, agreement, and speed as it would be served.

The n-gram drafter is off, so that every figure is the draft's own. Prompt by prompt both are measured in turn and the order
changes, so that a machine's moods hit both alike. Agreement is teacher-forced on the target's own text, made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specl.shared.bench.arms import Answer, EngineArm
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.recapture import recapture
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress
from specl.shared.sampling_params import SamplingParams

FIXED_K = 4  # acceptance as a result is reported at this length
DEPTHS = 3
RESAMPLES = 2000
TOP_K = 32


@dataclass(slots=True)
class Side:
    """One state of the draft, and what was measured of it. `adapter` None is the bare draft."""

    name: str
    adapter: LoadedAdapter | None
    fixed: list[Answer] = field(default_factory=list)
    served: list[Answer] = field(default_factory=list)
    agreement: float = 0.0
    by_depth: tuple[float, ...] = ()
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def acceptance(self) -> float | None:
        """Accepted of drafted at the fixed length."""
        drafted = sum(answer.model_drafted for answer in self.fixed)
        return sum(answer.model_accepted for answer in self.fixed) / drafted if drafted else None

    @property
    def tokens_per_second(self) -> float:
        """Over all answers, as served."""
        seconds = sum(answer.decode_s for answer in self.served)
        tokens = sum(len(answer.tokens) - answer.first for answer in self.served)
        return tokens / seconds if seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """For a report."""
        return {
            "adapter": self.name,
            "acceptance": self.acceptance,
            "agreement": self.agreement,
            "agreement_by_depth": list(self.by_depth),
            "tokens_per_second": self.tokens_per_second,
            "drafted": sum(answer.model_drafted for answer in self.fixed),
            "accepted": sum(answer.model_accepted for answer in self.fixed),
            "positions": int(self.positions.sum()),
            "tokens": sum(len(answer.tokens) for answer in self.served),
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more the first side agrees than the second, with a 95% interval over prompts (bootstrap)."""

    value: float
    low: float
    high: float


def duel(
    engine: EngineCore,
    items: Sequence[BenchPrompt],
    limit: int,
    sampling: SamplingParams,
    sides: Sequence[Side],
    report: OnProgress = ignore_progress,
) -> float:
    """Measure every side on every prompt; results stand in `sides` afterwards. Tokens a second without any draft.

    The engine keeps its last adapter.
    """
    fixed = [EngineArm(side.name, engine, sampling, FIXED_K, ngram=False, adapter=side.adapter) for side in sides]
    served = [EngineArm(side.name, engine, sampling, None, ngram=False, adapter=side.adapter) for side in sides]
    plain = Side("no draft", None)
    plain_arm = EngineArm(plain.name, engine, sampling, 0, ngram=False)
    prompts = [engine.encode_chat(item.messages)[1] for item in items]
    for arm in (*served, plain_arm):  # once uncounted: caches and pages are warm
        arm.answer(items[0], prompts[0], min(8, limit))
    examples = []
    meter = ProgressMeter("prompts", len(items), report)
    for place, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        order = range(len(sides)) if place % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            sides[i].served.append(served[i].answer(item, prompt, limit))
            sides[i].fixed.append(fixed[i].answer(item, prompt, limit))
        plain.served.append(plain_arm.answer(item, prompt, limit))
        # greedy answers are the same whoever drafts; sampled ones are the target's all the same
        examples.append(example_of(engine, item.id, prompt, sides[0].fixed[-1].tokens, sampling))
        meter.advance()
    for side in sides:
        engine.use_adapter(side.adapter)
        found = agreement(Learner(engine.draft), examples, DEPTHS)
        side.agreement, side.by_depth = found.value, found.by_depth
        side.hits, side.positions = found.hits, found.positions
    return plain.tokens_per_second


def example_of(engine: EngineCore, id: str, prompt: list[int], output: list[int], sampling: SamplingParams) -> Example:
    """A finished text with the law and states of the target, for scoring drafts on it."""
    tokens = np.array([*prompt, *output], np.uint32)
    states, ids, logprobs = recapture(engine.target, tokens, len(prompt), TOP_K)
    weights = np.ones(len(output), np.float32)
    return Example(
        id, tokens, len(prompt), ids, logprobs, weights, states if engine.reads_states else None, sampling.greedy
    )


def difference(first: Side, second: Side, seed: int = 0) -> Difference:
    """The difference in agreement, prompts resampled in pairs."""
    if not len(first.hits):
        return Difference(0.0, 0.0, 0.0)
    picks = np.random.default_rng(seed).integers(0, len(first.hits), (RESAMPLES, len(first.hits)))
    rates = [side.hits[picks].sum(1) / np.maximum(side.positions[picks].sum(1), 1) for side in (first, second)]
    low, high = np.quantile(rates[0] - rates[1], [0.025, 0.975])
    return Difference(first.agreement - second.agreement, float(low), float(high))
