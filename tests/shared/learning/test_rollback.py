"""The collapse check at work in the inference daemon's own parts, on a fake engine: probes, a rollback, a restart."""

import json

import pytest

from specl.daemons.inference import swap as swapping
from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.daemons.inference.swap import AdapterSwap
from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.messaging.codes import ActivationEvent, ActivationReason, CollapseCheckState
from specl.shared.paths import Paths
from tests.shared.learning.test_adapter_marks import publish

DRAFTS = 6  # first drafted tokens of a request


class FakeEngine:
    adapter_id, adapter_form = "", "none"

    def switch_adapter(self, adapter):
        yield
        self.adapter_id = adapter or ""


def load_adapter_steps(adapters, path, engine):
    yield
    return path.name, None


class Daemon:
    """What an inference daemon has of adapters, as after a (re)start. `events` are those it has reported."""

    def __init__(self, paths):
        self.events = []
        self.monitor = AdapterMonitor(paths.root / "watch.json")
        self.swap = AdapterSwap(paths, FakeEngine(), self._activated)
        self.swap.start(self.monitor.load("draft", "target"))
        self.monitor.resumed(self.swap.active)

    def _activated(self, change):
        self.events.append((change.event, change.adapter_id, change.reason))
        self.monitor.observe(change)

    def serve(self, accepted=4, tested=DRAFTS):
        """One request; whether its adapter is rolled back."""
        reason = self.monitor.add([tested], [accepted])
        if reason:
            self.swap.roll_back(reason)
        return bool(reason)

    def serve_until_rollback(self, accepted=0):
        requests = 1
        while not self.serve(accepted):
            requests += 1
            assert requests <= 20
        return requests


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Paths, the adapters folder, and two adapters in it."""
    paths = Paths(tmp_path, tmp_path).create()
    monkeypatch.setattr(swapping, "load_adapter_steps", load_adapter_steps)
    adapters = Adapters(paths.adapters)
    return paths, adapters, publish(adapters, 0.5), publish(adapters, 0.6)


def promoted(run):
    """A daemon whose first adapter has passed its check, and that has just taken the second."""
    paths, adapters, first, second = run
    adapters.set_current(first)
    daemon = Daemon(paths)
    while daemon.monitor.check is not None:
        daemon.serve()
    adapters.set_current(second)
    daemon.swap.follow_current()
    return daemon


def test_collapsed_adapter_goes_and_stays_gone(run):
    paths, adapters, first, second = run
    daemon = promoted(run)
    assert daemon.swap.active == second and daemon.monitor.status().state == CollapseCheckState.WATCHING
    daemon.serve_until_rollback()
    assert daemon.swap.active == first == adapters.current()
    assert daemon.events[-1] == (ActivationEvent.ROLLED_BACK, second, ActivationReason.LIVE_ACCEPTANCE)
    assert daemon.monitor.check is None and daemon.monitor.status().state == CollapseCheckState.ROLLED_BACK
    daemon.swap.follow_current()
    assert Daemon(paths).swap.active == first and second in adapters.rolled_back()


def test_working_adapter_is_kept(run):
    daemon = promoted(run)
    while daemon.monitor.check is not None:
        assert not daemon.serve(accepted=2)
    assert daemon.monitor.status().state == CollapseCheckState.PASSED


def test_marked_adapter_is_not_tried_after_a_kill(run):
    paths, adapters, first, second = run
    adapters.set_previous(first)
    adapters.set_current(second)
    adapters.marks.set(second, MarkState.ROLLBACK_PENDING, "it collapsed")
    before = AdapterMonitor(paths.root / "watch.json")
    before.load("draft", "target")
    before.activated(second, checked=False)
    swap = Daemon(paths).swap
    assert swap.active == first == adapters.current()
    assert adapters.resolve("previous") == "" == swap.previous


def test_trainer_rolls_back_by_moving_current(run):
    paths, adapters, first, second = run
    daemon = promoted(run)
    adapters.marks.set(second, MarkState.ROLLED_BACK_FINAL, "its predecessor did better")
    adapters.set_current(first)
    daemon.swap.follow_current()
    assert daemon.swap.active == first == adapters.current() and daemon.swap.previous == ""
    assert [event[2] for event in daemon.events[-2:]] == [ActivationReason.ROLLBACK, ActivationReason.REEVALUATION]
    assert daemon.events[-1][:2] == (ActivationEvent.ROLLED_BACK, second) and daemon.monitor.check is None


def test_trainer_killed_before_current_moved_still_rolls_back(run):
    paths, adapters, first, second = run
    daemon = promoted(run)
    adapters.marks.set(second, MarkState.ROLLED_BACK_FINAL, "its predecessor did better")
    daemon.swap.follow_current()
    assert daemon.swap.active == first == adapters.current()


def test_user_may_activate_a_rolled_back_adapter(run):
    paths, adapters, first, second = run
    adapters.marks.set(second, MarkState.ROLLBACK_PENDING, "it collapsed")
    swap = Daemon(paths).swap
    assert swap.switch(second).ok and adapters.rolled_back() == {}
    assert swap.switch(first).ok and swap.switch("previous").ok and swap.active == second


def test_restart_goes_on_with_check_and_way_back(run):
    paths, adapters, first, second = run
    daemon = promoted(run)
    for _ in range(2):
        assert not daemon.serve(accepted=1)
    daemon = Daemon(paths)
    status = daemon.monitor.status()
    assert (status.requests, status.drafted, status.state) == (2, 2 * DRAFTS, CollapseCheckState.WATCHING)
    assert daemon.swap.previous == first
    assert daemon.events == [(ActivationEvent.ACTIVATED, second, ActivationReason.RESTART)]
    daemon.serve_until_rollback()
    assert daemon.swap.active == first == adapters.current()


def test_promotion_while_the_daemon_was_down_is_checked(run):
    paths, adapters, first, second = run
    adapters.set_current(first)
    Daemon(paths)
    adapters.set_current(second)
    daemon = Daemon(paths)
    assert daemon.monitor.check.adapter_id == second and daemon.swap.previous == first


def test_damaged_file_or_another_pair_is_ignored(tmp_path):
    path = tmp_path / "watch.json"
    monitor = AdapterMonitor(path)
    assert monitor.load("draft", "target") is None
    monitor.activated("000001", checked=True)
    assert AdapterMonitor(path).load("draft", "target") == "000001"
    assert AdapterMonitor(path).load("other", "target") is None
    text = path.read_text()
    for damaged in (text[:40], "[]", "3", text.replace('"tested": 0', '"tested": "many"')):
        path.write_text(damaged)
        again = AdapterMonitor(path)
        assert again.load("draft", "target") is None


@pytest.mark.parametrize(
    ("last", "state"),
    [({}, None), ({"adapter": "000001", "requests": 4, "drafted": 240, "acceptance": 0.5, "state": "kept"}, "kept")],
)
def test_file_of_the_first_version_is_read(tmp_path, last, state):
    (tmp_path / "watch.json").write_text(
        json.dumps(
            {"draft": "d", "target": "t", "adapter": "000002", "seen": {}, "watch": {"requests": 3}, "last": last}
        )
    )
    monitor = AdapterMonitor(tmp_path / "watch.json")
    assert monitor.load("d", "t") == "000002" and monitor.check is None
    assert (monitor.status() and monitor.status().state) == state


def test_insisted_adapter_is_not_checked_again(run):
    paths, adapters, first, second = run
    daemon = Daemon(paths)
    assert daemon.swap.switch(second).ok and daemon.monitor.check.adapter_id == second
    daemon.serve_until_rollback()
    assert daemon.swap.active == "" and second in adapters.rolled_back()
    assert daemon.swap.switch(second).ok and daemon.monitor.check is None and not adapters.rolled_back()
    assert daemon.swap.switch("previous").ok and daemon.monitor.check is None


@pytest.mark.parametrize("restarts", [False, True])
def test_several_bad_adapters_in_a_row_all_go(run, restarts):
    paths, adapters, first, second = run
    daemon = Daemon(paths)
    assert daemon.swap.switch(first).ok and not daemon.serve(accepted=0)
    assert daemon.swap.switch(second).ok  # while the first is still checked
    for bad, back in ((second, first), (first, "")):
        if restarts:
            daemon = Daemon(paths)
        assert daemon.monitor.check.adapter_id == daemon.swap.active == bad
        daemon.serve_until_rollback()
        assert daemon.swap.active == back
    assert daemon.monitor.check is None


def test_reinstated_adapter_drafts_and_is_not_checked(run):
    paths, adapters, first, second = run
    daemon = promoted(run)
    daemon.serve_until_rollback()
    adapters.marks.set(second, MarkState.REINSTATED)
    adapters.set_current(second)
    daemon.swap.follow_current()
    assert daemon.swap.active == second and daemon.monitor.check is None and daemon.swap.previous == first
    assert daemon.monitor.status().state == CollapseCheckState.REINSTATED
    assert not any(daemon.serve(accepted=0) for _ in range(30))
    later = Daemon(paths)
    assert later.swap.active == second and later.monitor.check is None
    assert later.monitor.status().state == CollapseCheckState.REINSTATED


def test_reinstated_adapter_by_hand_is_not_checked_either(run):
    paths, adapters, first, second = run
    adapters.marks.set(second, MarkState.REINSTATED)
    adapters.set_current(first)
    daemon = Daemon(paths)
    assert daemon.swap.switch(second).ok and daemon.monitor.check is None
