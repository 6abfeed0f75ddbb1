"""The trainer's own loop and threads around a machine that is unplugged and plugged in again."""

import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from specl.daemons.trainer import power_policy, service, throttle, worker
from specl.daemons.trainer.jobs import Outcome
from specl.daemons.trainer.power_policy import PowerPolicy
from specl.daemons.trainer.service import Trainer
from specl.shared.messaging.codes import RunVerdict
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


class Bus:
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
    """In the place of a run: so many pieces, a pause before each."""

    done = 0

    def __init__(self, context, job):
        self.progress, self._pause = context.progress, context.pause

    def run(self):
        self.progress.state, self.progress.total = "training", PIECES
        for step in range(PIECES):
            self._pause()
            time.sleep(0.005)
            Work.done, self.progress.step = Work.done + 1, step + 1
        return Outcome(RunVerdict.REJECTED, "for the test")


class Instance:
    """A trainer with failures in its store, on a machine whose power is `machine`."""

    def __init__(self, machine, **training):
        self.machine, self.reads, self.stopping = machine, 0, False
        settings = load_settings()
        changed = settings.training.model_copy(update={"idle_seconds": 0.0, "min_failure_cases": 3} | training)
        paths = find_paths().create()
        store = Store(paths.store)
        store.set_threshold(0.5)
        store.add_rows([to_row(make_generation(f"g{n}", acceptance_rate=0.1)) for n in range(5)])
        store.close()
        self.bus = Bus()
        self.trainer = Trainer(paths, settings.model_copy(update={"training": changed}), self.bus, self._read)
        self.trainer.worker._loaded = lambda: SimpleNamespace()
        self._thread = threading.Thread(target=lambda: self.trainer.run(self))
        self._thread.start()

    def __bool__(self):
        """The stop flag."""
        return self.stopping

    def _read(self):
        self.reads += 1
        return self.machine

    def status(self):
        return asdict(self.bus.ask(GetStatus()).training)

    def pending(self):
        return self.bus.ask(GetStatus()).pending

    def close(self):
        self.stopping = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def instance(monkeypatch):
    monkeypatch.setattr(service, "STORE_CHECK_S", 0.02)
    monkeypatch.setattr(worker, "AdapterTraining", Work)
    monkeypatch.setattr(power_policy, "CHECK_S", 0.02)
    monkeypatch.setattr(throttle, "POWER_POLL_S", 0.02)
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
def test_status_says_why_no_run_starts(instance, machine, why):
    trainer = instance(machine)
    wait_until(lambda: trainer.status()["waits"] == why, 10, "the reason")
    assert rests() and Work.done == 0 and trainer.status()["state"] == "idle"
    trainer.machine = MAINS
    wait_until(lambda: Work.done >= PIECES, 10, "the run")


def test_run_under_way_pauses_and_goes_on(instance):
    trainer = instance(MAINS)
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    trainer.machine = BATTERY
    waiting = wait_until(lambda: (status := trainer.status())["waits"] and status, 10, "the reason")
    assert waiting["waits"] == "on battery" and waiting["state"] == "training"
    assert rests() and Work.done < PIECES
    trainer.machine = MAINS
    wait_until(lambda: Work.done >= PIECES, 10, "the rest")
    assert trainer.status()["waits"] == ""


def test_machine_is_not_read_where_all_is_allowed(instance):
    trainer = instance(Power(True, True), on_battery=True, when_hot=True)
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    assert trainer.reads == 0


def test_one_of_the_two_may_be_allowed(instance):
    trainer = instance(BATTERY, on_battery=True)
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    trainer.machine = HOT
    wait_until(lambda: trainer.trainer.power_policy.reason_to_wait == "the machine is hot", 10, "the reason")


def test_train_now_overrides_and_says_so(instance):
    trainer = instance(BATTERY, enabled=False)
    wait_until(lambda: trainer.trainer.power_policy.reason_to_wait, 10, "the reason")
    reply = trainer.bus.ask(Train(True))
    assert reply.ok and "on battery, trains all the same" in reply.message
    wait_until(lambda: Work.done >= PIECES, 10, "the run")
    wait_until(lambda: trainer.trainer.power_policy.reason_to_wait == "on battery", 10, "the reason after it")


def test_run_asked_for_on_mains_pauses_on_battery(instance):
    trainer = instance(MAINS, enabled=False)
    reply = trainer.bus.ask(Train(True))
    assert reply.ok and "all the same" not in reply.message
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    trainer.machine = BATTERY
    wait_until(lambda: trainer.status()["waits"] == "on battery", 10, "the reason")
    assert rests()
    assert "goes on all the same" in trainer.bus.ask(Train(True)).message
    wait_until(lambda: Work.done == PIECES, 10, "the rest")


def test_now_lets_a_waiting_run_go_on(instance):
    trainer = instance(BATTERY, enabled=False)
    wait_until(lambda: trainer.pending() and trainer.trainer.power_policy.reason_to_wait, 10, "it waits")
    reply = trainer.bus.ask(Train(False))
    assert reply.ok and "training waits: on battery (--now trains all the same)" in reply.message
    wait_until(lambda: trainer.status()["waits"] == "on battery", 10, "the reason")
    assert rests() and Work.done == 0
    assert not trainer.bus.ask(Train(False)).ok
    reply = trainer.bus.ask(Train(True))
    assert reply.ok and "goes on all the same" in reply.message
    wait_until(lambda: Work.done == PIECES, 10, "the run")
    wait_until(lambda: trainer.trainer.power_policy.reason_to_wait == "on battery", 10, "the reason after it")


def test_stop_does_not_wait_for_mains_power(instance):
    trainer = instance(MAINS)
    wait_until(lambda: Work.done > 2, 10, "its first pieces")
    trainer.machine = BATTERY
    wait_until(lambda: trainer.status()["waits"], 10, "the reason")
    trainer.close()
    assert Work.done < PIECES


def test_machine_is_read_once_a_minute():
    now, reads = [0.0], []

    def machine():
        reads.append(now[0])
        return BATTERY if len(reads) == 1 else MAINS

    policy = PowerPolicy(Training(), machine, lambda: now[0])
    assert policy.reason_to_wait == ""
    for second in range(150):
        now[0] = float(second)
        policy.check()
        assert policy.reason_to_wait == ("on battery" if second < 60 else "")
    assert reads == [0.0, 60.0, 120.0]


def test_override_lasts_until_the_last_work_ended():
    policy = PowerPolicy(Training(), lambda: BATTERY, lambda: 0.0)
    policy.check()
    for work in ("by hand, now", "by hand, now", "import"):
        policy.override(work)
    policy.end_override("something else")
    for work in ("by hand, now", "import", "by hand, now"):
        assert policy.reason_to_wait == ""
        policy.end_override(work)
    assert policy.reason_to_wait == "on battery"
