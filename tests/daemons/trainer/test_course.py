"""The steps of a run: as many as the settings ask for, no longer than they allow, and on again where it was interrupted."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from specl.daemons.trainer.data_loader import TrainingData
from specl.daemons.trainer.throttle import Abandoned, Superseded
from specl.daemons.trainer.training_loop import Live, TrainingLoop
from specl.shared.errors import Interrupted
from specl.shared.learning.learner import Learner
from specl.shared.models.lora import LoraShape, attach, choose_layers, detach, lora_weights
from specl.shared.retention import checkpoints
from specl.shared.settings.load import load_settings
from tests.conftest import tiny_model
from tests.shared.learning.test_learning import example

FAILURES, REPLAYED = 8, 6
TRAINING = {"batch_size": 4, "replay_ratio": 0.5, "num_epochs": 3, "max_minutes": 1.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def texts():
    target = tiny_model(seed=1)
    made = [example(target, seed, id=f"f{seed}") for seed in range(FAILURES + REPLAYED)]
    return made[:FAILURES], made[FAILURES:]


@pytest.fixture
def learner():
    mx.random.seed(0)
    draft = tiny_model(seed=7, layers=1)
    made = Learner(draft)
    made.module.freeze()
    attach(made.module, LoraShape(2, 4, 0.0, choose_layers(made.module, "all")))
    yield made
    detach(made.module)


class Pause:
    """Passes `so_often`, then raises."""

    def __init__(self, so_often=10**9, error=None, waits=0.0):
        self.left, self.error, self.waits = so_often, error, waits

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.waits


def course(folder, texts, pause=None, missing=(), known=(), **changes):
    failures, replay = texts
    settings = load_settings()
    training = settings.training.model_copy(update=TRAINING | changes)
    data_loader = SimpleNamespace(store=SimpleNamespace(missing=lambda ids: [id for id in ids if id in missing]))
    return TrainingLoop(
        TrainingData(failures, [], [], ""), replay, settings.model_copy(update={"training": training}), folder, data_loader,
        {"parent": "", "draft": "d"}, known, Live(), pause or Pause(),
    )  # fmt: skip


def test_every_text_is_seen_num_epochs_times(tmp_path, texts, learner):
    made = course(tmp_path, texts)
    made.run(learner)
    assert len(made.losses) == made.live.total == FAILURES * 3 / (4 * 0.5)
    assert made.shown == set(made.learned) == {f"f{n}" for n in range(FAILURES)}
    assert made.tokens == len(made.losses) * 4 * 9


def test_accumulated_step_takes_that_many_batches(tmp_path, texts, learner):
    made = course(tmp_path, texts, gradient_accumulation_steps=3)
    made.run(learner)
    assert len(made.losses) == 4 and made.tokens == 4 * 3 * 4 * 9


def test_time_limit_excludes_time_spent_waiting(tmp_path, texts, learner):
    made = course(tmp_path, texts, max_minutes=1e-9)
    made.run(learner)
    assert made.losses == [] and made.live.total == 12
    patient = course(tmp_path / "other", texts, Pause(waits=1000.0))
    patient.run(learner)
    assert len(patient.losses) == 12


@pytest.mark.parametrize("error", [Interrupted, Superseded])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, texts, learner, error):
    first = course(tmp_path, texts, Pause(7, error("now")))
    with pytest.raises(error):
        first.run(learner)
    weights = {name: np.array(value) for name, value in lora_weights(learner.module).items()}
    assert 0 < len(first.losses) < 12
    second = course(tmp_path, texts)
    second.run(learner)
    assert second.losses[: len(first.losses)] == first.losses and len(second.losses) == 12
    assert second.shown == {f"f{n}" for n in range(FAILURES)} and second.tokens == 12 * 4 * 9
    assert any(not np.array_equal(weights[name], np.array(v)) for name, v in lora_weights(learner.module).items())
    third = course(tmp_path, texts)  # interrupted while it was scored: nothing is left to do
    third.run(learner)
    assert third.losses == second.losses


def test_an_abandoned_run_leaves_nothing_behind(tmp_path, texts, learner):
    with pytest.raises(Abandoned):
        course(tmp_path, texts, Pause(7, Abandoned("forget"))).run(learner)
    assert not checkpoints.checkpoint_folder(tmp_path).exists()


@pytest.mark.parametrize("other", [{"learning_rate": 2e-3}, {"missing": ("f1",)}])
def test_a_checkpoint_of_other_work_is_dropped(tmp_path, texts, learner, other):
    with pytest.raises(Interrupted):
        course(tmp_path, texts, Pause(7, Interrupted("now"))).run(learner)
    made = course(tmp_path, texts, max_minutes=1e-9, **other)
    made.run(learner)
    assert made.losses == []
