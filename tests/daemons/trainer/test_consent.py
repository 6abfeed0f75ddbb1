"""The trainer's own loop and threads around a machine that is unplugged and plugged in again."""

import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from specl.daemons.trainer import power_policy, service, throttle, worker
from specl.daemons.trainer.power_policy import PowerPolicy
from specl.daemons.trainer.service import Trainer
from specl.daemons.trainer.throttle import DEFER_S, Throttle
from specl.daemons.trainer.training_run import Outcome
from specl.shared.messaging.messages import GetStatus, Train
from specl.shared.paths import find_paths
from specl.shared.runtime.power import Power
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Training
from specl.shared.store import Store
from tests.fakes import make_generation, to_row
from tests.harness.waiting import wait_until

BATTERY, MAINS, HOT = Power(on_battery=True), Power(), Power(hot=True)
PIECES = 40


class Wire:
    """In the place of the bus: `ask` from the test's thread is answered on the trainer's loop."""

    malformed = 0

    def __init__(self):
        self._asked, self._answers = [], {}
        self.published = []

    def subscribe(self, endpoint, handle):
        pass

    def poll(self, timeout, handle):
        while self._asked:
            handle(*self._asked.pop(0))
        time.sleep(0.005)

    def ask(self, message):
        peer = object()
        self._asked.append((peer, message))
        return wait_until(lambda: self._answers.pop(peer, None), 10, "an answer")

    def send(self, peer, message):
        self._answers[peer] = message

    def publish(self, message):
        self.published.append(message)

    def wake(self):
        pass


class Work:
    """In the place of a run: so many pieces, one at each passing."""

    done = 0

    def __init__(self, *parts):
        *_, self.live, self._pause, self.trigger, _ = parts

    def run(self):
        self.live.state, self.live.total = "training", PIECES
        for step in range(PIECES):
            self._pause()
            time.sleep(0.005)
            Work.done, self.live.step = Work.done + 1, step + 1
        return Outcome("rejected", "for the test")


class Instance:
    """A trainer with failures in its store, on a machine whose power is `machine`."""

    def __init__(self, machine, **training):
        self.machine, self.looks, self.stopping = machine, 0, False
        settings = load_settings()
        changed = settings.training.model_copy(update={"idle_seconds": 0.0, "min_failure_cases": 3} | training)
        paths = find_paths().create()
        store = Store(paths.store)
        store.set_threshold(0.5)
        store.add_rows([to_row(make_generation(f"g{n}", acceptance_rate=0.1)) for n in range(5)])
        store.close()
        self.wire = Wire()
        self.trainer = Trainer(paths, settings.model_copy(update={"training": changed}), self.wire, self._look)
        self.trainer.worker._loaded = lambda: SimpleNamespace()
        self._thread = threading.Thread(target=lambda: self.trainer.run(self))
        self._thread.start()

    def __bool__(self):
        """The stop flag."""
        return self.stopping

    def _look(self):
        self.looks += 1
        return self.machine

    def status(self):
        return asdict(self.wire.ask(GetStatus()).training)

    def close(self):
        self.stopping = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def instance(monkeypatch):
    monkeypatch.setattr(service, "LOOK_S", 0.02)
    monkeypatch.setattr(worker, "TrainingJob", Work)
    monkeypatch.setattr(power_policy, "LOOK_S", 0.02)
    monkeypatch.setattr(throttle, "HELD_NAP_S", 0.02)
    monkeypatch.setattr(Work, "done", 0)
    made = []

    def make(machine, **training):
        made.append(Instance(machine, **training))
        return made[-1]

    yield make
    for one in made:
        one.close()


def rests(seconds=0.3):
    """Whether nothing is done for a while."""
    before = Work.done
    time.sleep(seconds)
    return Work.done == before


@pytest.mark.parametrize(("machine", "why"), [(BATTERY, "on battery"), (HOT, "the machine is hot")])
def test_no_run_starts_on_battery(instance, machine, why):
    made = instance(machine)
    wait_until(lambda: made.status()["waits"] == why, 10, "the reason")
    assert rests() and Work.done == 0 and made.status()["state"] == "idle"
    made.machine = MAINS
    wait_until(lambda: Work.done >= PIECES, 10, "the run")


def test_a_run_under_way_pauses_and_goes_on(instance):
    made = instance(MAINS)
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    made.machine = BATTERY
    waiting = wait_until(lambda: (found := made.status())["waits"] and found, 10, "the reason")
    assert waiting["waits"] == "on battery" and waiting["state"] == "training"
    assert rests() and Work.done < PIECES
    made.machine = MAINS
    wait_until(lambda: Work.done >= PIECES, 10, "the rest")
    assert made.status()["waits"] == ""


def test_settings_that_allow_it_do_not_even_look(instance):
    made = instance(Power(True, True), on_battery=True, when_hot=True)
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    assert made.looks == 0


def test_one_of_the_two_may_be_allowed(instance):
    made = instance(BATTERY, on_battery=True)
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    made.machine = HOT
    wait_until(lambda: made.trainer.power_policy.objection == "the machine is hot", 10, "the objection")


def test_train_now_warns_and_trains(instance):
    made = instance(BATTERY, enabled=False)
    wait_until(lambda: made.trainer.power_policy.objection, 10, "the objection")
    reply = made.wire.ask(Train(True))
    assert reply.ok and "on battery, trains all the same" in reply.message
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    wait_until(lambda: made.trainer.power_policy.objection == "on battery", 10, "the objection after it")


def test_requested_run_pauses_when_mains_power_goes(instance):
    made = instance(MAINS, enabled=False)
    reply = made.wire.ask(Train(True))
    assert reply.ok and "all the same" not in reply.message
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    made.machine = BATTERY
    wait_until(lambda: made.status()["waits"] == "on battery", 10, "the reason")
    assert rests()
    assert "goes on all the same" in made.wire.ask(Train(True)).message
    wait_until(lambda: Work.done == PIECES, 10, "the rest")


def test_train_now_resumes_the_paused_run(instance):
    made = instance(BATTERY, enabled=False)
    wait_until(lambda: made.trainer.power_policy.objection and made.trainer.pending, 10, "the objection")
    reply = made.wire.ask(Train(False))
    assert reply.ok and "training waits: on battery (--now trains all the same)" in reply.message
    wait_until(lambda: made.status()["waits"] == "on battery", 10, "the reason")
    assert rests() and Work.done == 0
    assert not made.wire.ask(Train(False)).ok
    reply = made.wire.ask(Train(True))
    assert reply.ok and "goes on all the same" in reply.message
    wait_until(lambda: Work.done == PIECES, 10, "the run")
    wait_until(lambda: made.trainer.power_policy.objection == "on battery", 10, "the objection after it")


def test_a_stop_need_not_wait_for_mains_power(instance):
    made = instance(MAINS)
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    made.machine = BATTERY
    wait_until(lambda: made.status()["waits"], 10, "the reason")
    made.close()
    assert Work.done < PIECES


def test_the_machine_is_looked_at_once_a_minute():
    now, looks = [0.0], []

    def machine():
        looks.append(now[0])
        return BATTERY if len(looks) == 1 else MAINS

    asked = PowerPolicy(Training(), machine, lambda: now[0])
    assert asked.objection == ""
    for second in range(150):
        now[0] = float(second)
        asked.look()
        assert asked.objection == ("on battery" if second < 60 else "")
    assert looks == [0.0, 60.0, 120.0]


def test_override_lasts_until_the_run_has_ended():
    asked = PowerPolicy(Training(), lambda: BATTERY, lambda: 0.0)
    asked.look()
    for work in ("by hand, now", "by hand, now", "import"):
        asked.insist(work)
    asked.relent("something else")
    for work in ("by hand, now", "import", "by hand, now"):
        assert asked.objection == ""
        asked.relent(work)
    assert asked.objection == "on battery"


def test_night_on_battery_does_not_count_as_waiting():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
        throttle.heard(True)  # inference says so every few seconds

    throttle = Throttle(2.0, lambda: now[0], sleep, lambda: "on battery" if now[0] < 8 * 3600 else "")
    throttle.heard(True)
    waited = throttle.wait_for_turn()
    assert waited == pytest.approx(8 * 3600 + DEFER_S, abs=2)
