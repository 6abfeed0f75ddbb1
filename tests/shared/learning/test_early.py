"""Training ends when the loss on texts that were set aside no longer falls; those are few, and never trained on."""

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.learning.early_stopping import EarlyStopping, split_validation
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import StepLoop, StepSettings
from specl.shared.models.lora import LoraShape, attach, choose_layers
from tests.conftest import tiny_model


def text(n, rows=9):
    tokens = np.random.default_rng(n).integers(4, 97, 6 + rows).astype(np.uint32)
    sampling = np.zeros((rows, 1), np.float16)
    return Example(f"g{n}", tokens, 6, tokens[6:, None], sampling, np.ones(rows, np.float32), None)


class FakeLearner:
    """A learner whose losses are given."""

    def __init__(self, losses):
        self.module, self._losses, self.asked = self, iter(losses), 0

    def eval(self):
        pass

    def weighted_loss(self, batch, settings, depths):
        self.asked += 1
        return mx.array(next(self._losses)), mx.array(2.0)


def stops_at(next_losses, **options):
    stop = EarlyStopping(FakeLearner(next_losses), [text(0)], LossSettings(), 1, **options)
    return next((n for n in range(len(next_losses)) if stop.should_stop(30.0 * n)), None)


def test_three_looks_without_a_lower_loss_end_it():
    assert stops_at([5, 4, 3, 3.1, 3.2, 3.0]) == 5
    assert stops_at([5, 4, 3, 3.1, 3.2, 2.9, 3, 3, 3]) == 8
    assert stops_at([5, 6, 7, 8, 9]) == 3  # the draft before training counts
    assert stops_at([9 - n / 10 for n in range(40)]) is None
    assert stops_at([5, 6, 7, 8], patience=1) == 1
    assert stops_at([5, float("nan"), float("nan"), 4, 5, 5, 5]) == 6


def test_resumed_run_remembers_its_losses():
    assert stops_at([3.0, 3.0], losses=[2.0, 2.5]) == 1  # the third look without a lower one than 2
    assert stops_at([1.0, 3.0, 3.0], losses=[2.0, 2.5]) is None


def test_validation_runs_every_thirty_seconds_of_work():
    learner = FakeLearner([5.0] * 9)
    stop = EarlyStopping(learner, [text(0), text(1)], LossSettings(), 1)
    paused, looked = [], []
    for second in range(70):
        before = len(stop.losses)
        stop.should_stop(float(second), lambda: paused.append(1))
        looked += [second] * (len(stop.losses) - before)
    assert looked == [0, 30, 60] and learner.asked == len(paused) == 6  # two texts each
    none = EarlyStopping(FakeLearner([]), [], LossSettings(), 1)
    assert not any(none.should_stop(100.0 * n) for n in range(10)) and not none.is_over


def test_one_in_sixteen_is_validation_by_id():
    texts = [text(n) for n in range(160)]
    train, aside = split_validation(texts)
    assert len(aside) == 10 and len(train) == 150 and not {e.id for e in train} & {e.id for e in aside}
    again = split_validation(list(reversed(texts)) + [text(n) for n in range(160, 170)])[1]
    assert len({e.id for e in again} & {e.id for e in aside}) >= 8  # a run that goes on with a few more
    assert split_validation(texts[:63]) == (texts[:63], [])
    assert len(split_validation([text(n) for n in range(1000)])[1]) == 16


def test_overfitting_draft_stops_and_a_learning_one_continues():
    """Random texts hold nothing in common: what is learned of some makes others no likelier."""
    outcomes = []
    for shared in (False, True):
        draft = tiny_model(seed=2)
        learner = Learner(draft)
        draft.model.freeze()
        attach(draft.model, LoraShape(8, 16.0, 0.0, choose_layers(draft.model, "all")))
        train, aside = [text(n) for n in range(8)], [text(n) for n in (range(4) if shared else range(50, 54))]
        loop = StepLoop(learner, LossSettings("ce"), StepSettings(4e-3, 24, depths=1))
        stop = EarlyStopping(learner, aside, LossSettings("ce"), 1, every_s=1.0)
        stopped = stop.should_stop(0.0)
        while loop.step_number < 24 and not stopped:
            loop.step([train])
            stopped = stop.should_stop(float(loop.step_number))
        outcomes.append((stopped, stop.losses))
    (by_heart, rising), (learned, falling) = outcomes
    assert by_heart and rising[-1] >= min(rising)
    assert not learned and falling[-1] < 0.5 * falling[0]


def test_dropout_is_off_while_it_looks():
    draft = tiny_model(seed=2)
    learner = Learner(draft)
    attach(draft.model, LoraShape(4, 8.0, 0.5, choose_layers(draft.model, "all")))
    for _, child in draft.model.named_modules():
        if "lora_b" in child:
            child.lora_b = mx.ones_like(child.lora_b) * 0.1
    draft.model.train()
    stop = EarlyStopping(learner, [text(0)], LossSettings("ce"), 1, every_s=0.0)
    stop.should_stop(0.0), stop.should_stop(1.0)
    assert stop.losses[0] == pytest.approx(stop.losses[1], rel=1e-6)
