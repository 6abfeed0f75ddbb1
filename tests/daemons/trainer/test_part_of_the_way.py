"""A run whose adapter spoils general text is judged again with less of the change; one that learned nothing is not."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from specl.daemons.trainer.run import SHARES, Scores, TrainingJob
from specl.shared.learning.gate import Agreement, judge
from specl.shared.models.lora import LoraShape, attach, lora_weights


def agreement(value, generations=40):
    return Agreement(np.full(generations, 1000 * value), np.full(generations, 1000))


class Job(TrainingJob):
    """The weighing alone: scores that follow from how large B is."""

    def __init__(self, gain, fall):
        self._start, self.gain, self.fall, self.scored = None, gain, fall, []

    def _score(self, learner):
        share = float(lora_weights(learner.module)["layer.lora_b"][0, 0].item())
        self.scored.append(round(share, 3))
        return Scores(agreement(0.3 + self.gain * share), agreement(0.5 - self.fall * share**2))

    def _verdict(self, before, after):
        return judge(before.held_out, after.held_out, 30, (before.general, after.general))


def weighed(gain, fall):
    module = nn.Module()
    module.layer = nn.Linear(4, 4)
    shape = LoraShape(2, 4, 0.0, ("layer",))
    attach(module, shape, {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": mx.ones((2, 4))})
    job = Job(gain, fall)
    before = Scores(agreement(0.3), agreement(0.5))
    after, verdict = job._weighed(SimpleNamespace(module=module), before)
    return job, verdict, float(lora_weights(module)["layer.lora_b"][0, 0].item())


def test_all_of_the_way_where_nothing_is_spoiled():
    job, verdict, share = weighed(gain=0.3, fall=0.002)
    assert (verdict.verdict, verdict.share, share, job.scored) == ("promoted", 1.0, 1.0, [1.0])


def test_the_largest_share_that_leaves_general_text_alone_is_what_is_published():
    job, verdict, share = weighed(gain=0.3, fall=0.0075)
    assert verdict.verdict == "promoted" and "0.8 of the way" in verdict.reason
    assert verdict.share == pytest.approx(0.8) and share == pytest.approx(0.8)
    assert verdict.after == pytest.approx(0.3 + 0.8 * 0.3) and job.scored == [1.0, 0.9, 0.8]


def test_where_no_share_does_the_verdict_is_about_all_of_it():
    job, verdict, _ = weighed(gain=0.3, fall=0.4)
    assert (verdict.verdict, verdict.share, len(job.scored)) == ("rejected", 1.0, len(SHARES))


def test_what_learned_nothing_gets_no_second_chance():
    job, verdict, _ = weighed(gain=-0.1, fall=0.4)
    assert (verdict.verdict, job.scored) == ("rejected", [1.0])


def test_where_all_adapters_together_cost_too_much_the_way_begins_without_any():
    """The parent's B is 0.8, what was learned 1; the draft alone has 0.52 on general text, which falls with the square of B."""
    module = nn.Module()
    module.layer = nn.Linear(4, 4)
    parent = {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": 0.8 * mx.ones((2, 4))}
    attach(module, LoraShape(2, 4, 0.0, ("layer",)), {**parent, "layer.lora_b": mx.ones((2, 4))})
    job = Job(gain=0.3, fall=0.0)
    job._start = parent

    def score(learner):
        share = float(lora_weights(learner.module)["layer.lora_b"][0, 0].item())
        job.scored.append(round(share, 3))
        return Scores(agreement(0.3 + 0.3 * share), agreement(0.52 - 0.0225 * share**2))

    job._score = score
    job._verdict = lambda before, after: judge(
        before.held_out, after.held_out, 30, (before.general, after.general), 0.52
    )
    before = Scores(agreement(0.3 + 0.3 * 0.8), agreement(0.52 - 0.0225 * 0.64))
    after, verdict = job._weighed(SimpleNamespace(module=module), before)
    assert job.scored == [1.0, 0.9] and verdict.verdict == "promoted" and "0.9 of the way" in verdict.reason
