"""A run whose adapter spoils general text is judged again with less of the change; one that learned nothing is not."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from specl.daemons.trainer import training_run
from specl.daemons.trainer.training_run import SHARES, Scores, TrainingJob
from specl.shared.learning.gate import Agreement, judge
from specl.shared.models.lora import LoraShape, attach, lora_weights


def agreement(value, generations=40):
    return Agreement(np.full(generations, 1000 * value), np.full(generations, 1000))


class Job(TrainingJob):
    """The weighing alone: scores that follow from how large B is."""

    def __init__(self, gain, fall, alone=0.5):
        self._start, self.gain, self.fall, self.alone = None, gain, fall, alone
        self.material, self.general = SimpleNamespace(held_out=HELD_OUT), GENERAL
        self.pristine, self.scored, self.judged = alone, [], 0

    def _while_in_force(self):
        return 0.0

    def at(self, b, examples):
        return agreement(0.3 + self.gain * b if examples is HELD_OUT else self.alone - self.fall * b**2)

    def _verdict(self, before, after):
        return judge(before.held_out, after.held_out, 30, (before.general, after.general), self.pristine)


HELD_OUT, GENERAL = [], []


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    def score(learner, examples, depths=1, pause=None):
        pause()
        b, job = float(lora_weights(learner.module)["layer.lora_b"][0, 0].item()), learner.job
        if examples is GENERAL:
            job.scored.append(round(b, 3))
        else:
            job.judged += 1
        return job.at(b, examples)

    monkeypatch.setattr(training_run, "agreement", score)


def weighed(job, parent=0.0):
    """Learned is a B of ones, from an adapter whose B is `parent` (0: from none)."""
    module = nn.Module()
    module.layer = nn.Linear(4, 4)
    attach(module, LoraShape(2, 4, 0.0, ("layer",)), {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": mx.ones((2, 4))})
    if parent:
        job._start = {"layer.lora_a": mx.ones((4, 2)), "layer.lora_b": mx.full((2, 4), parent)}
    before = Scores(job.at(parent, HELD_OUT), job.at(parent, GENERAL))
    after, verdict = job._weighed(SimpleNamespace(module=module, job=job), before)
    return verdict, float(lora_weights(module)["layer.lora_b"][0, 0].item())


def test_all_of_the_way_where_nothing_is_spoiled():
    job = Job(gain=0.3, fall=0.002)
    verdict, share = weighed(job)
    assert (verdict.verdict, verdict.share, share, job.scored) == ("promoted", 1.0, 1.0, [1.0])


def test_largest_harmless_alpha_is_published():
    job = Job(gain=0.3, fall=0.0075)
    verdict, share = weighed(job)
    assert verdict.verdict == "promoted" and "0.8 of the way" in verdict.reason
    assert verdict.share == pytest.approx(0.8) and share == pytest.approx(0.8)
    assert verdict.after == pytest.approx(0.3 + 0.8 * 0.3) and job.scored == [1.0, 0.9, 0.8]
    assert job.judged == 2  # what spoils general text is not scored on anything else


def test_verdict_is_about_the_full_update_otherwise():
    job = Job(gain=0.3, fall=0.4)
    verdict, _ = weighed(job)
    assert (verdict.verdict, verdict.share, job.scored) == ("rejected", 1.0, [1.0, *SHARES])


def test_what_learned_nothing_gets_no_second_chance():
    job = Job(gain=-0.1, fall=0.4)
    verdict, _ = weighed(job)
    assert (verdict.verdict, job.scored) == ("rejected", [1.0])


def test_interpolation_starts_at_the_base_if_costly():
    """From a B of 0.8 general text falls by 0.008 more, to 0.0225 below what the draft has alone; by 0.0182 at nine tenths of it all."""
    job = Job(gain=0.3, fall=0.0225, alone=0.52)
    verdict, share = weighed(job, parent=0.8)
    assert verdict.verdict == "promoted" and "0.9 of the way" in verdict.reason
    assert share == pytest.approx(0.9) and job.scored == [
        1.0,
        0.9,
    ]  # not 0.98, which is nine tenths of the way from 0.8
