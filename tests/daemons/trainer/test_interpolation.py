"""A run whose adapter fails on general text alone is judged again with less of the change; one that learned nothing is not."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from specl.daemons.trainer.scoring import Scores
from specl.daemons.trainer.training_run import ALPHAS, CandidateJudge, TrainedDraft
from specl.shared.learning.judge import Agreement, Regression, judge
from specl.shared.messaging.codes import RunVerdict
from specl.shared.models.lora import LoraShape, attach, lora_weights

SHAPE = LoraShape(2, 4, 0.0, ("layer",))


def agreement(value, generations=40):
    return Agreement(np.full(generations, 1000 * value), np.full(generations, 1000))


class Stage:
    """Scores that follow from how large B is, and the judge of a context."""

    def __init__(self, gain, fall, alone=0.5):
        self.gain, self.fall, self.pristine = gain, fall, alone
        self.general_at, self.held_out_scored = [], 0

    def on_held_out(self, learner):
        self.held_out_scored += 1
        return self.held_out(size_of_b(learner))

    def on_general(self, learner):
        b = size_of_b(learner)
        self.general_at.append(round(b, 3))
        return self.general(b)

    def held_out(self, b):
        return agreement(0.3 + self.gain * b)

    def general(self, b):
        return agreement(self.pristine - self.fall * b**2)

    def judge(self, before, after, pristine, parent):
        return judge(
            before.held_out, after.held_out, 30, Regression(before.general.value, after.general.value, pristine)
        )


def size_of_b(learner):
    return float(lora_weights(learner.module)["layer.lora_b"][0, 0].item())


def judged(stage, parent=0.0):
    """Trained is a B of ones, from an adapter whose B is `parent` (0: from none). The verdict, and B afterwards."""
    module = nn.Module()
    module.layer = nn.Linear(4, 4)
    attach(module, SHAPE, {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": mx.ones((2, 4))})
    start = {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": mx.full((2, 4), parent)} if parent else None
    learner = SimpleNamespace(module=module)
    before = Scores(stage.held_out(parent), stage.general(parent))
    _, verdict = CandidateJudge(stage, stage, "", before, stage.pristine).verdict(TrainedDraft(learner, SHAPE, start))
    return verdict, size_of_b(learner)


def test_whole_change_passes_where_nothing_regresses():
    stage = Stage(gain=0.3, fall=0.002)
    verdict, b = judged(stage)
    assert (verdict.verdict, verdict.interpolation_alpha, b) == (RunVerdict.PROMOTED, 1.0, 1.0)
    assert stage.general_at == [1.0]


def test_largest_alpha_without_regression_is_published():
    stage = Stage(gain=0.3, fall=0.0075)
    verdict, b = judged(stage)
    assert verdict.verdict == RunVerdict.PROMOTED and "interpolation alpha 0.8" in verdict.reason
    assert verdict.interpolation_alpha == pytest.approx(0.8) and b == pytest.approx(0.8)
    assert verdict.comparison.after == pytest.approx(0.3 + 0.8 * 0.3) and stage.general_at == [1.0, 0.9, 0.8]
    assert stage.held_out_scored == 2  # what fails on general text is not scored on anything else


def test_without_a_passing_alpha_the_whole_is_judged():
    stage = Stage(gain=0.3, fall=0.4)
    verdict, _ = judged(stage)
    assert (verdict.verdict, verdict.interpolation_alpha) == (RunVerdict.REJECTED, 1.0)
    assert stage.general_at == [1.0, *ALPHAS]


def test_without_a_gain_nothing_is_interpolated():
    stage = Stage(gain=-0.1, fall=0.4)
    verdict, _ = judged(stage)
    assert (verdict.verdict, stage.general_at) == (RunVerdict.REJECTED, [1.0])


def test_after_drift_the_pristine_draft_is_the_start():
    """From a B of 0.8 general text falls by 0.008 more, to 0.0225 below what the draft has alone; by 0.0182 at alpha 0.9 from none."""
    stage = Stage(gain=0.3, fall=0.0225, alone=0.52)
    verdict, b = judged(stage, parent=0.8)
    assert verdict.verdict == RunVerdict.PROMOTED and "alpha 0.9" in verdict.reason
    assert b == pytest.approx(0.9)  # not 0.98, which is alpha 0.9 from 0.8
    assert stage.general_at == [1.0, 0.9]
