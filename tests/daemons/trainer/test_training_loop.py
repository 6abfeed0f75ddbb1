"""The steps of a run: as many as the settings ask for, no longer than they allow, and on again where it was interrupted."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from specl.daemons.trainer.data_loader import TrainingData
from specl.daemons.trainer.throttle import Abandoned, Superseded
from specl.daemons.trainer.training_loop import MIN_NEW_FAILURES, RunProgress, TrainingLoop
from specl.shared.errors import Interrupted
from specl.shared.learning.learner import Learner
from specl.shared.models.lora import LoraShape, attach, choose_layers, detach, lora_weights
from specl.shared.retention import checkpoints
from specl.shared.settings.load import load_settings
from tests.conftest import tiny_model
from tests.shared.learning.test_learning import example

FAILURES, REPLAYED = 8, 6
RECIPE = {"batch_size": 4, "replay_ratio": 0.5, "num_epochs": 3, "max_minutes": 1.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def texts():
    target = tiny_model(seed=1)
    examples = [example(target, seed, id=f"f{seed}") for seed in range(FAILURES + REPLAYED)]
    return examples[:FAILURES], examples[FAILURES:]


@pytest.fixture
def learner():
    mx.random.seed(0)
    draft = tiny_model(seed=7, layers=1)
    learner = Learner(draft)
    learner.module.freeze()
    attach(learner.module, LoraShape(2, 4, 0.0, choose_layers(learner.module, "all")))
    yield learner
    detach(learner.module)


class Pause:
    """Passes `so_often`, then raises."""

    def __init__(self, so_often=10**9, error=None, waits=0.0):
        self.left, self.error, self.waits = so_often, error, waits

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.waits


def loop_of(folder, texts, pause=None, missing=(), parent_seen_ids=(), **changes):
    failures, replay = texts
    settings = load_settings()
    training = settings.training.model_copy(update=RECIPE | changes)
    return TrainingLoop(
        data=TrainingData(failures, [], [], ""),
        replay=replay,
        settings=settings.model_copy(update={"training": training}),
        folder=folder,
        store=SimpleNamespace(missing=lambda ids: [id for id in ids if id in missing]),
        base={"parent": "", "draft": "d"},
        parent_seen_ids=parent_seen_ids,
        progress=RunProgress(),
        pause=pause or Pause(),
    )


def test_all_texts_are_seen_as_often_as_asked(tmp_path, texts, learner):
    loop = loop_of(tmp_path, texts)
    loop.run(learner)
    assert len(loop.losses) == loop.progress.total == FAILURES * 3 / (4 * 0.5)
    assert loop.seen_ids == set(loop.eligible_ids) == {f"f{n}" for n in range(FAILURES)}
    assert loop.tokens == len(loop.losses) * 4 * 9


def test_accumulation_takes_as_many_texts(tmp_path, texts, learner):
    loop = loop_of(tmp_path, texts, gradient_accumulation_steps=3)
    loop.run(learner)
    assert len(loop.losses) == 4 and loop.tokens == 4 * 3 * 4 * 9


def test_time_budget_ends_it_without_time_waited(tmp_path, texts, learner):
    loop = loop_of(tmp_path, texts, max_minutes=1e-9)
    loop.run(learner)
    assert loop.losses == [] and loop.progress.total == 12
    patient = loop_of(tmp_path / "other", texts, Pause(waits=1000.0))
    patient.run(learner)
    assert len(patient.losses) == 12


@pytest.mark.parametrize("error", [Interrupted, Superseded])
def test_interrupted_run_goes_on_where_it_was(tmp_path, texts, learner, error):
    first = loop_of(tmp_path, texts, Pause(7, error("now")))
    with pytest.raises(error):
        first.run(learner)
    weights = {name: np.array(value) for name, value in lora_weights(learner.module).items()}
    assert 0 < len(first.losses) < 12
    second = loop_of(tmp_path, texts)
    second.run(learner)
    assert second.losses[: len(first.losses)] == first.losses and len(second.losses) == 12
    assert second.seen_ids == {f"f{n}" for n in range(FAILURES)} and second.tokens == 12 * 4 * 9
    assert any(not np.array_equal(weights[name], np.array(v)) for name, v in lora_weights(learner.module).items())
    third = loop_of(tmp_path, texts)  # interrupted while it was scored: nothing is left to do
    third.run(learner)
    assert third.losses == second.losses


def test_abandoned_run_leaves_nothing_behind(tmp_path, texts, learner):
    with pytest.raises(Abandoned):
        loop_of(tmp_path, texts, Pause(7, Abandoned("forget"))).run(learner)
    assert not checkpoints.checkpoint_folder(tmp_path).exists()


@pytest.mark.parametrize("other", [{"learning_rate": 2e-3}, {"missing": ("f1",)}])
def test_checkpoint_of_other_work_is_dropped(tmp_path, texts, learner, other):
    with pytest.raises(Interrupted):
        loop_of(tmp_path, texts, Pause(7, Interrupted("now"))).run(learner)
    loop = loop_of(tmp_path, texts, max_minutes=1e-9, **other)
    loop.run(learner)
    assert loop.losses == []


# ------------------------------------------------------------------------------------------------ fresh texts and replay
def pools(failures, seen, validation=()):
    """Ids of fresh and of replayed texts, with two successes and three texts to replay."""

    def texts(kind, count):
        return [SimpleNamespace(id=f"{kind}{n}") for n in range(count)]

    loop = loop_of(None, (texts("f", failures), texts("r", 3)), parent_seen_ids={f"f{n}" for n in range(seen)})
    loop.data = TrainingData(loop.data.failures, texts("s", 2), [], "")
    ids = {example.id for example in [*loop.data.failures, *loop.data.successes]}
    return tuple([example.id for example in pool] for pool in loop.pools(ids - set(validation)))


def test_failures_that_the_parent_saw_are_replayed():
    fresh, replayed = pools(failures=MIN_NEW_FAILURES + 5, seen=5)
    assert fresh == [f"f{n}" for n in range(5, 5 + MIN_NEW_FAILURES)]
    assert replayed == ["f0", "f1", "f2", "f3", "f4", "s0", "s1", "r0", "r1", "r2"]


def test_few_new_failures_are_trained_with_the_old():
    fresh, replayed = pools(failures=MIN_NEW_FAILURES + 4, seen=5)
    assert len(fresh) == MIN_NEW_FAILURES + 4 and replayed == ["s0", "s1", "r0", "r1", "r2"]


def test_without_failures_the_successes_are_trained_on():
    assert pools(failures=0, seen=0) == (["s0", "s1"], ["r0", "r1", "r2"])


def test_validation_texts_are_in_neither_pool():
    fresh, replayed = pools(MIN_NEW_FAILURES + 2, seen=1, validation=(f"f{MIN_NEW_FAILURES + 1}", "s0", "s1"))
    assert fresh == [f"f{n}" for n in range(1, MIN_NEW_FAILURES + 1)] and replayed == ["f0", "r0", "r1", "r2"]
