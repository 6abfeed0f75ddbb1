"""Interleaved measuring: prompt by prompt every arm in turn, in rotating order, so that the load of
the machine affects all alike.

Greedy texts are compared with mlx-lm plain's for the same prompt in the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from specl.shared.bench.arms import PLAIN, Arm, ArmResult, top_two
from specl.shared.bench.prompt_sets import BenchPrompt
from specl.shared.bench.text_equality import TIE_FP32, TIE_HALF, Comparison, compare, copied_share, repeated_share
from specl.shared.engine.core import EngineCore
from specl.shared.runtime.progress import OnProgress, ProgressMeter, ignore_progress

ENOUGH_DRAFTED, ENOUGH_REJECTED = 100, 20  # below these a run says nothing about equality


@dataclass(frozen=True, slots=True)
class Run:
    """One arm's result for one prompt: `repeated` and `copied` are shares of the output,
    `comparison` is with mlx-lm plain's text.
    """

    set: str
    prompt: str
    iteration: int
    arm: str
    prompt_tokens: int
    result: ArmResult
    repeated: float
    copied: float
    comparison: Comparison | None


@dataclass(slots=True)
class Plan:
    """What to measure: `limit` tokens an answer, every prompt `iterations` times."""

    prompts: Sequence[BenchPrompt]
    limit: int
    iterations: int = 1
    arms: list[Arm] = field(default_factory=list)


def tolerance(engine: EngineCore) -> float:
    """The logit gap below which rounding decides, for the target's precision."""
    return TIE_FP32 if engine.target.embed(mx.array([0])).dtype == mx.float32 else TIE_HALF


def measure(engine: EngineCore, plan: Plan, greedy: bool, report: OnProgress = ignore_progress) -> list[Run]:
    """Run everything. The first prompt is answered once by every arm beforehand, uncounted: caches
    and pages are warm.
    """
    arms = plan.arms
    runs: list[Run] = []
    turns = [(iteration, item) for iteration in range(plan.iterations) for item in plan.prompts]
    if turns:
        _, prompt = engine.encode_chat(turns[0][1].messages)
        for arm in arms:
            arm.run(turns[0][1], prompt, min(8, plan.limit))
    meter = ProgressMeter("answers", len(turns) * len(arms), report)
    for index, (iteration, item) in enumerate(turns):
        turn = index % len(arms)
        runs.extend(_interleaved(engine, item, iteration, [*arms[turn:], *arms[:turn]], plan.limit, greedy))
        meter.advance(len(arms), f"{item.set} {item.id}")
    return runs


def _interleaved(
    engine: EngineCore, item: BenchPrompt, iteration: int, arms: list[Arm], limit: int, greedy: bool
) -> list[Run]:
    _, prompt = engine.encode_chat(item.messages)
    results = {arm.name: arm.run(item, prompt, limit) for arm in arms}
    expected = results[PLAIN].tokens if PLAIN in results else None
    runs = []
    for arm in arms:
        result = results[arm.name]
        comparison = None
        if greedy and expected is not None and arm.name != PLAIN:
            comparison = check(engine, arm, prompt, expected, result.tokens)
        repeated, copied = repeated_share(result.tokens), copied_share(prompt, result.tokens)
        runs.append(Run(item.set, item.id, iteration, arm.name, len(prompt), result, repeated, copied, comparison))
    return runs


def check(engine: EngineCore, arm: Arm, prompt: list[int], expected: list[int], got: list[int]) -> Comparison:
    """Whether an arm's greedy text is the reference, ties analysed on the target itself."""
    return compare(
        expected,
        got,
        lambda position: top_two(engine.target, prompt, expected[:position]),
        lambda start, left: arm.resume([*prompt, *start], left),
        tolerance(engine),
    )
