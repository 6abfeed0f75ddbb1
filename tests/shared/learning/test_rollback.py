"""The watch at work in the inference daemon's own parts, on a fake engine: forced rounds, a rollback, a restart."""

import pytest

from specl.daemons.inference import swap as swapping
from specl.daemons.inference.lookout import Lookout
from specl.daemons.inference.swap import AdapterSwap
from specl.shared.adapters import Adapters
from specl.shared.paths import Paths
from tests.shared.learning.test_adapter_marks import publish


class FakeEngine:
    adapter_id, adapter_form = "", "none"

    def use_adapter(self, adapter):
        self.adapter_id = adapter or ""


@pytest.fixture
def made(tmp_path, monkeypatch):
    paths = Paths(tmp_path, tmp_path).create()
    monkeypatch.setattr(swapping, "load_adapter", lambda adapters, path, engine: (path.name, None))
    adapters = Adapters(paths.adapters)
    return paths, adapters, publish(adapters, 0.5), publish(adapters, 0.6)


def start(paths):
    """A daemon's swap as after a (re)start, with its lookout and the events it told."""
    events, lookout = [], Lookout()

    def activated(event, id, previous, reason, details):
        events.append((event, id))
        if event in ("activated", "unloaded"):
            lookout.changed(id if reason == "announced" else "", previous)

    swap = AdapterSwap(paths, FakeEngine(), activated)
    swap.follow_current()
    return swap, lookout, events


def test_a_disappointing_adapter_goes_within_twenty_requests_and_stays_gone(made):
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


def test_killed_between_the_mark_and_current_it_is_still_not_tried_again(made):
    paths, adapters, first, second = made
    adapters.set_previous(first)
    adapters.set_current(second)
    adapters.mark_rolled_back(second, "it disappointed")
    swap, _, _ = start(paths)
    assert swap.engine.adapter_id == first == adapters.current()


def test_by_hand_a_rolled_back_adapter_may_be_activated_again(made):
    paths, adapters, first, second = made
    adapters.mark_rolled_back(second, "it disappointed")
    swap, _, _ = start(paths)
    assert swap.by_hand(second).ok and adapters.rolled_back() == {}
    assert swap.by_hand(first).ok and swap.by_hand("previous").ok and swap.engine.adapter_id == second


def test_rounds_are_forced_only_during_a_watch_and_no_baseline_means_no_watch():
    lookout = Lookout()
    lookout.changed("000001", "")
    assert lookout.watch is None and not any(lookout.forces() for _ in range(16))
    lookout.saw([20], [10])
    lookout.changed("000002", "000001")
    assert sum(lookout.forces() for _ in range(16)) == 2
