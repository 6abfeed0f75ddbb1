"""What the adapters folder remembers of decisions, and what it never removes."""

import json

import pytest

from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.marks import Mark, MarkState
from specl.shared.adapters.registry import KEEP_LAST, Adapters


def publish(adapters, after, parent=""):
    id = adapters.next_id()
    folder = adapters.scratch(id)
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(b"x")
    metrics = {"heldout_after": after}
    adapters.publish(folder, Manifest(id, "lora", 0.0, "m", "b", "t", "k", parent, "r", 1, 1.0, [], 0.1, metrics, {}))
    return id


def test_rolled_back_adapter_is_remembered_and_not_best(tmp_path):
    adapters = Adapters(tmp_path)
    first, second = publish(adapters, 0.5), publish(adapters, 0.6)
    assert adapters.resolve("best") == second
    adapters.marks.set(second, MarkState.ROLLBACK_PENDING, "it collapsed")
    again = Adapters(tmp_path)
    assert again.rolled_back() == {second: "it collapsed"} and again.resolve("best") == first
    again.marks.set(second, MarkState.KEPT)
    assert again.rolled_back() == {} and again.resolve("best") == second


@pytest.mark.parametrize("state", MarkState)
def test_marks_are_read_as_written(tmp_path, state):
    adapters = Adapters(tmp_path)
    id = publish(adapters, 0.5)
    adapters.marks.set(id, state, "because")
    assert Adapters(tmp_path).marks.all() == {id: Mark(state, "because")}


def test_marks_of_removed_adapters_are_dropped(tmp_path):
    adapters = Adapters(tmp_path)
    first, second = publish(adapters, 0.5), publish(adapters, 0.6)
    adapters.marks.set(first, MarkState.KEPT)
    adapters.drop([first])
    adapters.marks.set(second, MarkState.KEPT)
    assert list(adapters.marks.all()) == [second]


def test_pruning_keeps_current_previous_best_and_last(tmp_path):
    adapters = Adapters(tmp_path)
    ids = [publish(adapters, 0.9 if i == 1 else 0.5) for i in range(12)]
    adapters.set_current(ids[2])
    adapters.set_previous(ids[3])
    adapters.prune(())
    assert adapters.ids() == [*ids[1:4], *ids[-KEEP_LAST:]]
    assert adapters.resolve("previous") == ids[3]


@pytest.mark.parametrize("text", ["[1", "[]", '{"000001": 3, "000002": ["new word"], "000003": []}'])
def test_damaged_marks_mark_nothing(tmp_path, text):
    (tmp_path / "MARKS.json").write_text(text)
    (tmp_path / "ROLLED_BACK.json").write_text("[1")
    assert Adapters(tmp_path).marks.all() == {}


def test_marks_of_the_first_version_are_read(tmp_path):
    adapters = Adapters(tmp_path)
    ids = [publish(adapters, 0.5) for _ in range(4)]
    (tmp_path / "ROLLED_BACK.json").write_text(json.dumps(dict.fromkeys(ids[:3], "it drafted badly")))
    (tmp_path / "SECOND_LOOKS.json").write_text(
        json.dumps({ids[1]: "reinstated", ids[2]: "confirmed", ids[3]: "confirmed"})
    )
    states = {id: mark.state for id, mark in adapters.marks.all().items()}
    assert states == {
        ids[0]: MarkState.ROLLBACK_PENDING,
        ids[1]: MarkState.REINSTATED,
        ids[2]: MarkState.ROLLED_BACK_FINAL,
        ids[3]: MarkState.KEPT,  # a user activated it since
    }
    adapters.marks.set(ids[0], MarkState.KEPT)
    assert list(adapters.rolled_back()) == [ids[2]]
