"""Full disks (F7, F8): answers go on, new records are refused and counted, accepted ones stay, nothing needs a restart.

Each room stands on a small file system of its own (tmpfs; needs root) that a ballast file fills to the last byte.
"""

import os
import sqlite3
import subprocess
import time

import pytest

from specl.shared import status
from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.messaging.codec import encode
from specl.shared.messaging.outbox import Outbox
from tests.harness.fake_models import make_adapter, publish_adapter
from tests.harness.instance import SETTINGS, ready_for_training
from tests.harness.records import generation
from tests.harness.waiting import wait_until


class SmallDisk:
    """A tmpfs at `path`."""

    def __init__(self, path, megabytes):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "none", str(path)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting a tmpfs needs root")

    def fill(self):
        with open(self.path / "ballast", "ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def free(self):
        (self.path / "ballast").unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.path)], capture_output=True)


@pytest.fixture
def disk():
    made = []

    def make(path, megabytes=8):
        made.append(SmallDisk(path, megabytes))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def test_f7_a_full_store_acknowledges_nothing_and_recovers(instance, figures, disk):
    store = disk(instance.folder)  # before anything else lies there
    instance.paths.create()
    instance.set(SETTINGS)
    outbox = disk(instance.folder / "outbox")
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    instance.ready("collector")
    for n in range(5):
        instance.ask(f"before {n}")
    instance.settle()
    store.fill()
    before = len(instance.stored())
    for n in range(30):
        done = instance.ask(f"while it is full {n} " + "x" * 100)
        assert done.recorded and done.tokens
    trouble = wait_until(lambda: instance.status("collector").get("trouble"), 15, "status says that the store is full")
    kept = len(instance.waiting())
    store.free()
    start = time.monotonic()
    instance.settle(timeout_s=45)
    instance.check()
    wait_until(lambda: not instance.status("collector")["trouble"], 5, "status is calm again")
    figures(F7_accepted=len(instance.acknowledged), waited_in_outbox=kept, lost=0, recovered_s=time.monotonic() - start)
    assert "full" in trouble
    assert kept + len(instance.stored()) >= before and kept > 0
    assert outbox


def test_f7_collector_waits_for_space_at_start(instance, disk):
    store = disk(instance.folder)
    instance.paths.create()
    instance.set(SETTINGS)
    disk(instance.folder / "outbox")
    instance.start("inference")
    instance.ready("inference")
    instance.ask("first")
    store.fill()
    collector = instance.start("collector")
    wait_until(lambda: instance.status("collector").get("trouble"), 10, "it answers, and says what is wrong")
    store.free()
    instance.settle(timeout_s=45)
    instance.check()
    assert collector.code is None


def test_f8_full_outbox_refuses_records_not_answers(instance, figures, disk):
    outbox = disk(instance.folder / "outbox", megabytes=4)
    instance.start("inference")
    instance.ready("inference")
    for n in range(3):
        assert instance.ask(f"before {n}").recorded
    outbox.fill()
    refused = []
    for n in range(25):
        done = instance.ask(f"while it is full {n} " + "x" * 100)
        assert done.tokens == 8 and done.text
        if not done.recorded:
            refused.append(done.record_note)
    said = instance.status("inference")["outbox"]
    assert len(refused) > 0 and said["refused"] == len(refused)
    assert "full" in said["trouble"] and "full" in refused[0]
    # a collector that comes now must not turn in circles over records that cannot be let go of
    instance.start("collector")
    wait_until(lambda: set(instance.acknowledged) <= set(instance.stored()), 10, "what was accepted is stored")
    outbox.free()
    start = time.monotonic()
    wait_until(lambda: instance.ask("afterwards").recorded, 10, "records are accepted again")
    recovered = time.monotonic() - start
    instance.settle()
    instance.check()
    wait_until(lambda: not instance.status("inference")["outbox"]["trouble"], 5, "status is calm again")
    figures(
        F8_answers=len(instance.latencies),
        refused=len(refused),
        accepted=len(instance.acknowledged),
        lost=0,
        recovered_s=recovered,
    )


def test_f8_unopenable_outbox_stops_no_answer(instance, disk):
    outbox = disk(instance.folder / "outbox", megabytes=1)
    outbox.fill()
    instance.start("inference")
    instance.ready("inference")
    done = instance.ask("nowhere to write")
    assert done.tokens == 8 and not done.recorded and done.record_note
    assert instance.status("inference")["outbox"]["trouble"]
    outbox.free()
    wait_until(lambda: instance.ask("room again").recorded, 10, "records are accepted again")
    instance.settle()
    instance.check()


def test_a_daemon_starts_with_every_disk_full(instance, disk):
    everything = disk(instance.folder)
    instance.paths.create()
    instance.set(SETTINGS)
    everything.fill()
    instance.daemons.clear()
    inference = instance.start("inference")
    body = instance.ready("inference")
    assert body["outbox"]["trouble"]
    assert instance.ask("hello").tokens == 8
    everything.free()
    wait_until(lambda: instance.ask("room again").recorded, 10, "records are accepted again")
    instance.settle()
    instance.check()
    assert inference.code is None


def test_full_adapters_folder_keeps_the_old_adapter(instance, disk):
    adapters = disk(instance.paths.adapters, megabytes=2)
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("inference")
    assert instance.ready("inference")["adapter"]["active"] == "000001"
    scratch, manifest = make_adapter(instance.paths.adapters, "000002")
    adapters.fill()
    with pytest.raises(OSError):
        Adapters(instance.paths.adapters).publish(scratch, manifest)
    assert Adapters(instance.paths.adapters).current() == "000001" and Adapters(instance.paths.adapters).ids() == [
        "000001"
    ]
    assert instance.status("inference")["adapter"]["active"] == "000001"
    assert instance.ask("hello").tokens == 8
    adapters.free()
    Adapters(instance.paths.adapters).sweep()
    publish_adapter(instance.paths.adapters, "000003")
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000003", 15, "the next one is active")
    assert os.listdir(instance.paths.adapters).count("CURRENT") == 1


def problems(instance):
    """What `specl-ctl status` says is wrong, less what this machine and an empty run directory add."""
    with instance.client() as client:
        return [
            text for text in status.system_status(client).problems if "does not run" not in text and "BLAS" not in text
        ]


def calm(instance, timeout_s=15):
    """Wait until `specl-ctl status` has nothing to say."""
    try:
        wait_until(lambda: not problems(instance), timeout_s, "status is calm again")
    except AssertionError as error:
        raise AssertionError(f"{error}: {problems(instance)}") from None


def test_f8_full_trainer_outbox_keeps_its_records(instance, figures, disk):
    outbox = disk(instance.folder / "outbox", megabytes=2)
    for number in (1, 2, 3):
        publish_adapter(instance.paths.adapters, f"{number:06d}")
    outbox.fill()
    trainer = instance.start("trainer")
    instance.ready("trainer")  # it tells of the three, and cannot
    said = instance.status("trainer")["outbox"]
    assert said["waiting"] == said["refused"] == 3 and "full" in said["trouble"]
    assert any("trainer's records wait (3)" in text for text in problems(instance))
    with instance.client() as client:
        reply = client.train(now=True)
    assert not reply.ok and "could not be recorded" in reply.message
    outbox.free()
    start = time.monotonic()
    instance.start("collector")
    wait_until(lambda: instance.stored("adapters") == ["000001", "000002", "000003"], 30, "all three are in the store")
    seconds = time.monotonic() - start
    calm(instance)
    assert trainer.code is None and instance.status("trainer")["outbox"]["waiting"] == 0
    figures(F8_trainer_refused=said["refused"], lost=0, recovered_s=seconds)


def test_f8_outbox_accepts_again_after_draining(instance, figures):
    instance.set(SETTINGS + "records: {outbox_limit_mb: 1}\n")
    outbox = Outbox(instance.paths.outbox("inference"))
    before = [f"{number:032x}" for number in range(60)]
    for id in before:
        outbox.append(id, "Generation", encode(generation(id, "z" * 8000)))
    outbox.close()
    instance.start("inference")
    instance.ready("inference")
    answers = [instance.ask(f"beyond the limit {number}") for number in range(10)]
    refused = [answer for answer in answers if not answer.recorded]
    assert refused and all(answer.tokens == 8 and "its limit is 1 MiB" in answer.record_note for answer in refused)
    assert instance.status("inference")["outbox"]["refused"] == len(refused)
    assert any(f"records refused ({len(refused)})" in text for text in problems(instance))
    instance.acknowledged += before
    instance.start("collector")
    wait_until(lambda: instance.ask("after draining").recorded, 10, "records are taken again")
    calm(instance)
    instance.settle()
    instance.check()
    figures(F8_limit_refused=len(refused), accepted=len(instance.acknowledged), lost=0)


def test_run_without_space_resumes_later(instance, figures, disk):
    adapters = disk(instance.paths.adapters, megabytes=2)
    publish_adapter(instance.paths.adapters, "000001")
    ready_for_training(instance)
    adapters.fill()
    trainer = instance.start("trainer", SPECL_TEST_CHECKPOINT_S="0", SPECL_TEST_RISING="1", SPECL_TEST_DISK_RETRY_S="1")
    instance.ready("trainer")
    with instance.client() as client:
        assert client.train(now=True).ok
    wait_until(lambda: "the disk refuses" in instance.status("trainer").get("trouble", ""), 60, "it says what it lacks")
    assert any("training: the disk refuses" in text for text in problems(instance))
    assert Adapters(instance.paths.adapters).ids() == ["000001"] and instance.ask("hello").tokens == 8
    assert instance.status("inference")["adapter"]["active"] == "000001"
    adapters.free()
    start = time.monotonic()
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000002", 60, "the new adapter drafts")
    seconds = time.monotonic() - start
    calm(instance)
    assert "training.resumed" in instance.output("trainer") and trainer.code is None
    wait_until(lambda: len(instance.stored("training_runs")) == 1, 15, "the run is a row")
    figures(adapters_full_recovered_s=seconds)


def test_a_rollback_on_a_full_disk_ends_nothing(instance, disk):
    adapters = disk(instance.paths.adapters, megabytes=2)
    publish_adapter(instance.paths.adapters, "000001")
    publish_adapter(instance.paths.adapters, "000002")
    marks = Adapters(instance.paths.adapters).marks
    marks.set("000002", MarkState.ROLLBACK_PENDING, "it collapsed")  # killed between the mark and CURRENT
    adapters.fill()
    inference = instance.start("inference", SPECL_TEST_LOOK_S="0.2")
    instance.ready("inference")
    time.sleep(1)
    assert inference.code is None and instance.ask("hello").tokens == 8
    assert instance.status("inference")["adapter"]["active"] != "000002"
    adapters.free()
    wait_until(lambda: Adapters(instance.paths.adapters).current() != "000002", 15, "CURRENT follows")


def test_a_store_that_was_full_is_whole(instance, disk):
    """What a reader sees while the disk is full is the last commit, not half of one."""
    store = disk(instance.folder)
    instance.paths.create()
    instance.set(SETTINGS)
    disk(instance.folder / "outbox")
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    instance.ask("one that fits")
    instance.settle()
    store.fill()
    for number in range(5):
        instance.ask(f"one that does not {number} " + "x" * 2000)
    wait_until(lambda: instance.status("collector").get("trouble"), 15, "status says so")
    db = sqlite3.connect(f"file:{instance.paths.store}?mode=ro", uri=True)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        db.close()
    store.free()
    instance.settle(45)
    instance.check()
