"""What the adapters folder remembers of a rollback, and what it never removes."""

from specl.shared.adapters.registry import KEEP_LAST, Adapters, Manifest


def publish(adapters, after, parent=""):
    id = adapters.next_id()
    folder = adapters.scratch(id)
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(b"x")
    metrics = {"heldout_after": after}
    adapters.publish(folder, Manifest(id, "lora", 0.0, "m", "b", "t", "k", parent, "r", 1, 1.0, [], 0.1, metrics, {}))
    return id


def test_rolled_back_adapter_is_marked_and_may_return(tmp_path):
    adapters = Adapters(tmp_path)
    first, second = publish(adapters, 0.5), publish(adapters, 0.6)
    assert adapters.resolve("best") == second
    adapters.mark_rolled_back(second, "it disappointed")
    again = Adapters(tmp_path)
    assert again.rolled_back() == {second: "it disappointed"} and again.resolve("best") == first
    again.mark_rolled_back(second, "")
    assert again.rolled_back() == {} and again.resolve("best") == second


def test_pruning_keeps_current_previous_best_and_five(tmp_path):
    adapters = Adapters(tmp_path)
    ids = [publish(adapters, 0.9 if i == 1 else 0.5) for i in range(12)]
    adapters.set_current(ids[2])
    adapters.set_previous(ids[3])
    adapters.prune(())
    assert adapters.ids() == [*ids[1:4], *ids[-KEEP_LAST:]]
    assert adapters.resolve("previous") == ids[3]


def test_a_damaged_mark_file_marks_nothing(tmp_path):
    (tmp_path / "ROLLED_BACK.json").write_text("[1")
    assert Adapters(tmp_path).rolled_back() == {}
