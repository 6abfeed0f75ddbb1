"""The watch at work in the inference daemon's own parts, on a fake engine: forced rounds, a rollback, a restart."""

import json

import pytest

from specl.daemons.inference import swap as swapping
from specl.daemons.inference.adapter_monitor import AdapterMonitor, held_out_before
from specl.daemons.inference.decode_thread import WATCHED
from specl.daemons.inference.swap import AdapterSwap
from specl.shared.adapters.registry import Adapters
from specl.shared.paths import Paths
from tests.shared.learning.test_adapter_marks import publish


class FakeEngine:
    adapter_id, adapter_form = "", "none"

    def taking(self, adapter):
        yield
        self.adapter_id = adapter or ""


def load_adapter_steps(adapters, path, engine):
    yield
    return path.name, None


@pytest.fixture
def made(tmp_path, monkeypatch):
    paths = Paths(tmp_path, tmp_path).create()
    monkeypatch.setattr(swapping, "load_adapter_steps", load_adapter_steps)
    adapters = Adapters(paths.adapters)
    return paths, adapters, publish(adapters, 0.5), publish(adapters, 0.6)


def start(paths):
    """A daemon's swap as after a (re)start, with its lookout and the events it told."""
    events, lookout = [], AdapterMonitor(paths.root / "watch.json")

    def activated(change):
        id = change.adapter_id
        events.append((change.event, id))
        if change.event in ("activated", "unloaded") and change.reason != "restart":
            lookout.changed(
                id, id if change.reason in WATCHED else "", change.previous_id, held_out_before(swap.adapters, id)
            )

    swap = AdapterSwap(paths, FakeEngine(), activated)
    swap.start(lookout.load("draft", "target"))
    lookout.settle(swap.engine.adapter_id)
    return swap, lookout, events


def promoted(made):
    """A daemon whose first adapter stood at 0.7, and that has just taken the second."""
    paths, adapters, first, second = made
    adapters.set_current(first)
    swap, lookout, _ = start(paths)
    for _ in range(20):
        lookout.saw([20], [14])
    adapters.set_current(second)
    swap.follow_current()
    return swap, lookout


def test_disappointing_adapter_rolls_back_within_twenty_requests(made):
    paths, adapters, first, second = made
    adapters.set_current(first)
    swap, lookout, events = start(paths)
    for _ in range(20):
        assert lookout.saw([20], [14]) == ""
    adapters.set_current(second)
    swap.follow_current()
    assert swap.engine.adapter_id == second and lookout.status()["state"] == "watching"
    requests, why = 0, ""
    while not why:
        requests += 1
        why = lookout.saw([20], [5])
    swap.roll_back(why)
    assert requests <= 20 and swap.engine.adapter_id == first == adapters.current()
    assert events[-1] == ("rolled_back", second) and lookout.watch is None
    swap.follow_current()
    again, _, _ = start(paths)
    assert again.engine.adapter_id == first and second in adapters.rolled_back()


def test_kill_between_mark_and_current_bars_the_adapter(made):
    paths, adapters, first, second = made
    adapters.set_previous(first)
    adapters.set_current(second)
    adapters.mark_rolled_back(second, "it disappointed")
    before = AdapterMonitor(paths.root / "watch.json")
    before.load("draft", "target")
    before.changed(second, "", first)
    swap, _, _ = start(paths)
    assert swap.engine.adapter_id == first == adapters.current()
    assert adapters.resolve("previous") == "" == swap.previous


def test_rolled_back_adapter_may_be_activated_by_hand(made):
    paths, adapters, first, second = made
    adapters.mark_rolled_back(second, "it disappointed")
    swap, _, _ = start(paths)
    assert swap.by_hand(second).ok and adapters.rolled_back() == {}
    assert swap.by_hand(first).ok and swap.by_hand("previous").ok and swap.engine.adapter_id == second


def test_drafts_are_forced_only_during_a_canary():
    lookout = AdapterMonitor()
    lookout.changed("000001", "000001", "")
    assert lookout.watch is None and not any(lookout.forces() for _ in range(16))
    lookout.saw([20], [10])
    lookout.changed("000002", "000002", "000001")
    assert sum(lookout.forces() for _ in range(16)) == 2


def test_restart_resumes_canary_and_rollback(made):
    paths, adapters, first, second = made
    swap, lookout = promoted(made)
    for _ in range(2):
        assert lookout.saw([15], [8]) == ""
    swap, lookout, events = start(paths)
    assert lookout.status() | {"requests": 2, "drafted": 30} == lookout.status() and swap.previous == first
    assert lookout.watch.baseline.tested == [400] and events == [("activated", second)]
    requests, why = 2, ""
    while not why:
        requests += 1
        why = lookout.saw([15], [3])
    swap.roll_back(why)
    assert requests <= 20 and swap.engine.adapter_id == first == adapters.current()


def test_baseline_survives_a_restart(made):
    paths, adapters, first, second = made
    adapters.set_current(first)
    _, lookout, _ = start(paths)
    for _ in range(10):
        lookout.saw([20], [14])
    adapters.set_current(second)  # by a trainer, while no daemon runs
    swap, lookout, _ = start(paths)
    assert lookout.watch.adapter_id == second and lookout.watch.baseline.accepted == [140] and swap.previous == first


def test_counts_of_another_pair_are_ignored(tmp_path):
    path = tmp_path / "watch.json"
    lookout = AdapterMonitor(path)
    assert lookout.load("draft", "target") is None
    lookout.saw([20], [14])
    assert AdapterMonitor(path).load("draft", "target") == "" and AdapterMonitor(path).load("other", "target") is None
    path.write_text(path.read_text()[:40])
    again = AdapterMonitor(path)
    assert again.load("draft", "target") is None and not any(again.seen.tested)


def test_untrafficked_promotion_is_held_to_the_gate(made):
    paths, adapters, first, _ = made
    document = json.loads((adapters.folder / first / "manifest.json").read_text())
    document["metrics"] |= {"heldout_before_by_depth": [0.5, 0.25], "heldout_positions": 1000}
    (adapters.folder / first / "manifest.json").write_text(json.dumps(document))
    swap, lookout, _ = start(paths)
    adapters.set_current(first)
    swap.follow_current()
    assert lookout.status()["state"] == "watching"
    assert lookout.watch.baseline.accepted[0] / lookout.watch.baseline.tested[0] == 0.5
    why, requests = "", 0
    while not why:
        requests += 1
        why = lookout.saw([10, 2], [1, 0])
    assert requests <= 20 and "0.4" in why


def test_work_while_parked_is_not_blamed_on_successor(made):
    """Seen in a stream: 0.64 live on one kind of record, then another kind, parked, and three better adapters rolled back."""
    paths, adapters, first, second = made
    adapters.set_current(first)
    swap, lookout, _ = start(paths)
    lookout.saw([400, 200], [256, 140])
    document = json.loads((adapters.folder / second / "manifest.json").read_text())
    document["metrics"] |= {
        "heldout_before_by_depth": [0.6, 0.6], "heldout_positions": 4000, "heldout_before_newest": [240, 800]
    }  # fmt: skip
    (adapters.folder / second / "manifest.json").write_text(json.dumps(document))
    adapters.set_current(second)
    swap.follow_current()
    baseline = lookout.watch.baseline
    assert baseline.accepted[0] / baseline.tested[0] == pytest.approx(0.3)
    assert baseline.accepted[1] / baseline.tested[1] == pytest.approx(0.6)
    whys = [lookout.saw([6], [2]) for _ in range(20)]  # forced drafts of the new kind: a little better than before
    assert not any(whys) and lookout.last["state"] == "kept"


def test_bad_adapter_fails_the_lower_measure_too(made):
    paths, adapters, first, second = made
    adapters.set_current(first)
    swap, lookout, _ = start(paths)
    lookout.saw([400], [256])
    document = json.loads((adapters.folder / second / "manifest.json").read_text())
    document["metrics"] |= {
        "heldout_before_by_depth": [0.6], "heldout_positions": 4000, "heldout_before_newest": [240, 800]
    }  # fmt: skip
    (adapters.folder / second / "manifest.json").write_text(json.dumps(document))
    adapters.set_current(second)
    swap.follow_current()
    requests, why = 0, ""
    while not why:
        requests += 1
        why = lookout.saw([6], [int(requests % 6 == 0)])
    assert requests <= 20 and "0.300" in why


@pytest.mark.parametrize("odd", [None, [1], [3, 2], ["1", 2], [0, 0], [True, 5], [float("nan"), 5]])
def test_unusable_newest_texts_leave_the_rest(made, odd):
    _, adapters, first, _ = made
    document = json.loads((adapters.folder / first / "manifest.json").read_text())
    document["metrics"] |= {"heldout_before_by_depth": [0.5], "heldout_positions": 1000, "heldout_before_newest": odd}
    (adapters.folder / first / "manifest.json").write_text(json.dumps(document))
    assert held_out_before(adapters, first).accepted == [500]


@pytest.mark.parametrize("odd", [None, [], "0.5", [1.5], [True], [float("nan")]])
def test_manifest_without_expectation_starts_no_canary(made, odd):
    _, adapters, first, _ = made
    document = json.loads((adapters.folder / first / "manifest.json").read_text())
    document["metrics"] |= {"heldout_before_by_depth": odd, "heldout_positions": 1000}
    (adapters.folder / first / "manifest.json").write_text(json.dumps(document))
    assert held_out_before(adapters, first) is None


def test_activation_by_hand_is_watched_once(made):
    paths, adapters, first, second = made
    adapters.set_current("")
    swap, lookout, _ = start(paths)
    lookout.saw([400], [240])
    assert swap.by_hand(second).ok and lookout.watch.adapter_id == second
    why = ""
    while not why:
        why = lookout.saw([20], [0])
    swap.roll_back(why)
    assert swap.engine.adapter_id == "" and second in adapters.rolled_back()
    assert swap.by_hand(second).ok and lookout.watch is None and not adapters.rolled_back()
    assert swap.by_hand("previous").ok and lookout.watch is None


def test_successive_bad_adapters_share_the_good_baseline(made):
    paths, adapters, first, second = made
    adapters.set_current("")
    swap, lookout, _ = start(paths)
    lookout.saw([400], [240])
    assert swap.by_hand(first).ok and lookout.saw([20], [0]) == ""
    assert swap.by_hand(second).ok  # while the first is still watched: its own counts are no measure
    assert lookout.watch.baseline.accepted == [240]
    for bad, back in ((second, first), (first, "")):
        assert lookout.watch.adapter_id == swap.engine.adapter_id == bad
        requests, why = 0, ""
        while not why:
            requests, why = requests + 1, lookout.saw([20], [0])
        assert requests <= 20
        swap.roll_back(why)
        assert swap.engine.adapter_id == back
    assert lookout.watch is None and lookout.seen.accepted == [240]  # what was known of it counts again


def test_adapter_after_a_rollback_is_watched(made):
    paths, adapters, first, second = made
    adapters.set_current("")
    swap, lookout, _ = start(paths)
    lookout.saw([400], [240])
    for id in (first, second):
        assert swap.by_hand(id).ok and lookout.watch.adapter_id == id
        why = ""
        while not why:
            why = lookout.saw([20], [0])
        swap.roll_back(why)
        swap, lookout, _ = start(paths)
        assert lookout.seen.accepted == [240]


def test_answers_with_few_drafts_keep_the_canary_open():
    lookout = AdapterMonitor()
    lookout.saw([400], [240])
    lookout.changed("000001", "000001", "")
    assert not any(lookout.saw([], []) or lookout.saw([0, 0], [0, 0]) for _ in range(40))
    assert lookout.status()["state"] == "watching" and not lookout.status()["drafted"]
    lookout.changed("000002", "000002", "000001")
    said = [lookout.saw([1], [0]) for _ in range(20)]
    assert not any(said[:19]) and "20 requests" in said[19]


def test_reinstated_adapter_is_not_watched(made):
    paths, adapters, first, second = made
    swap, lookout = promoted(made)
    while not (why := lookout.saw([20], [5])):
        pass
    swap.roll_back(why)
    adapters.reinstate(second)
    swap.follow_current()
    assert swap.engine.adapter_id == second and lookout.watch is None and swap.previous == first
    lookout.reinstated(second)
    assert lookout.status()["state"] == "reinstated"
    assert not any(lookout.saw([20], [5]) for _ in range(30))
    again, later, _ = start(paths)
    assert again.engine.adapter_id == second and later.watch is None and later.status()["state"] == "reinstated"


def test_reinstated_adapter_by_hand_is_not_watched(made):
    paths, adapters, first, second = made
    adapters.mark_rolled_back(second, "it disappointed")
    adapters.reinstate(second)
    adapters.set_current(first)
    swap, lookout, _ = start(paths)
    for _ in range(20):
        lookout.saw([20], [14])
    assert swap.by_hand(second).ok and lookout.watch is None
