"""Measures what target steps and drafts cost on this machine, in seconds by rows and by depth.

Takes a few seconds. Knows the engine, no files: loading/costs.py keeps what was measured.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import mlx.core as mx

from specl.shared.engine.core import EngineCore
from specl.shared.engine.costs import Costs
from specl.shared.engine.custom_drafter import CustomDrafter
from specl.shared.engine.decode import verify
from specl.shared.engine.drafters import DraftSampler
from specl.shared.engine.request_options import RequestOptions
from specl.shared.sampling_params import SamplingParams

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # rows of a target step that are measured
DEPTHS = (1, 2, 4, 8)  # drafted tokens that are measured
WARM_CONTEXT = 128  # tokens in the caches while costs are measured


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured costs. `complete` is False where a custom drafter failed meanwhile: what it cost is
    then unknown.
    """

    costs: Costs
    complete: bool


class Measurable(Protocol):
    """The two operations that calibration measures."""

    def verify_once(self, rows: int) -> None:
        """One target step of `rows` rows on a warm cache, evaluated."""
        ...

    def draft_once(self, k: int) -> None:
        """One draft of k tokens, evaluated; does nothing where there is no model drafter."""
        ...


def calibrate(engine: EngineCore) -> Calibration:
    """Measure the engine's target and draft; `engine.costs` stays as it is."""
    subject = _WarmSession(engine)
    costs = measure(subject, engine.max_draft_tokens, engine.has_drafter)
    return Calibration(costs, subject.complete)


def measure(subject: Measurable, most: int, has_drafter: bool, repeats: int = 3) -> Costs:
    """Costs of `subject`. Widths beyond `most` + 1 rows are not needed and not measured."""
    widths = [width for width in WIDTHS if width <= most + 1] or [1]
    depths = [k for k in DEPTHS if k <= max(most, 2)] if has_drafter else []
    for rows in widths[:2]:  # warm-up: kernels are compiled, pages are mapped
        subject.verify_once(rows)
    verify = _least_seconds({rows: partial(subject.verify_once, rows) for rows in widths}, repeats)
    if has_drafter:
        subject.draft_once(2)
    draft_runs = {k: partial(subject.draft_once, k) for k in depths}
    return Costs(verify, _least_seconds(draft_runs, repeats, before=partial(subject.verify_once, 2)))


def _least_seconds(
    runs: Mapping[int, Callable[[], None]], repeats: int, before: Callable[[], None] = lambda: None
) -> dict[int, float]:
    """The least seconds of each run. All take turns, `repeats` times (more within a second).

    The least, because whatever disturbs a run only adds to it. `before` runs untimed ahead of each,
    so that a draft finds the processor's caches full of the target, as in a round.
    """
    least = dict.fromkeys(runs, float("inf"))
    began, turn = time.perf_counter(), 0
    while turn < repeats or (turn < 4 * repeats and time.perf_counter() - began < 1.0):
        turn += 1
        for size, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            least[size] = min(least[size], time.perf_counter() - start)
    return least


class _WarmSession:
    """A request on a warm context; its caches are rewound after each measured step."""

    def __init__(self, engine: EngineCore) -> None:
        different = min(97, engine.target.vocabulary_size - 1)  # tokens; 0 may be special
        prompt = [1 + i % different for i in range(WARM_CONTEXT)]
        self._session = engine.session(prompt, RequestOptions(num_draft_tokens=1 if engine.has_drafter else 0))
        while not self._session.prefill():
            pass
        self._drafter = self._session.state.drafter
        self._sampler = DraftSampler(SamplingParams(), lambda: 0.5, None)

    @property
    def complete(self) -> bool:
        return not (isinstance(self._drafter, CustomDrafter) and self._drafter.broken)

    def verify_once(self, rows: int) -> None:
        state = self._session.state
        cached = state.cached
        verify([self._session], [[5] * (rows - 1)])
        state.trim_cache(cached)

    def draft_once(self, k: int) -> None:
        if self._drafter is None:
            return
        tokens = self._session.state.tokens
        states = None
        if self._drafter.reads_states:  # a round's usual catch-up: two accepted tokens
            states = mx.zeros((2, self._session.target.hidden_size))
        self._drafter.extend([tokens[-1], tokens[-1]], states)
        self._drafter.propose(k, self._sampler)
        self._drafter.rewind(len(tokens))
