"""What a run learns and what it replays: failures that are new to the parent come first, where there are enough of them."""

from types import SimpleNamespace

from specl.daemons.trainer.data_loader import TrainingData
from specl.daemons.trainer.training_loop import ENOUGH_NEW, TrainingLoop


def pools(failures, known, successes=2, replay=3, kept=None):
    def texts(kind, count):
        return [SimpleNamespace(id=f"{kind}{n}") for n in range(count)]

    material = TrainingData(texts("f", failures), texts("s", successes), [], "")
    replayed = texts("r", replay)
    loop = TrainingLoop(material, replayed, None, None, None, {}, {f"f{n}" for n in range(known)}, None, None)
    ids = {example.id for example in [*material.failures, *material.successes]}
    return tuple([example.id for example in part] for part in loop._pools(ids if kept is None else kept))


def test_what_the_parent_has_learned_from_is_replayed():
    fresh, again = pools(failures=ENOUGH_NEW + 5, known=5)
    assert fresh == [f"f{n}" for n in range(5, 5 + ENOUGH_NEW)]
    assert again == ["f0", "f1", "f2", "f3", "f4", "s0", "s1", "r0", "r1", "r2"]


def test_few_new_texts_are_trained_with_old_ones():
    fresh, again = pools(failures=ENOUGH_NEW + 4, known=5)
    assert len(fresh) == ENOUGH_NEW + 4 and again == ["s0", "s1", "r0", "r1", "r2"]


def test_without_failures_the_successes_are_learned():
    assert pools(failures=0, known=0) == (["s0", "s1"], ["r0", "r1", "r2"])


def test_what_was_set_aside_is_in_neither():
    fresh, again = pools(failures=ENOUGH_NEW + 2, known=1, kept={f"f{n}" for n in range(ENOUGH_NEW + 1)})
    assert fresh == [f"f{n}" for n in range(1, ENOUGH_NEW + 1)] and again == ["f0", "r0", "r1", "r2"]
