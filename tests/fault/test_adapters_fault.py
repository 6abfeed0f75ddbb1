"""Adapters under faults (F12 to F14): CURRENT always names a whole one, a bad one is refused with its reason while the old one
serves, and whoever was not there learns of the newest.
"""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import zmq

from specl.shared.adapters.registry import Adapters
from specl.shared.messaging.codec import encode
from specl.shared.messaging.messages import AdapterReady, SetAdapter
from tests.fakes import ROOT
from tests.harness.fake_models import make_adapter, publish_adapter
from tests.harness.instance import ready_for_training
from tests.harness.waiting import wait_until

slow = pytest.mark.slow

PUBLISH_POINTS = (
    "adapter.files_written", "adapter.before_rename", "adapter.after_rename", "adapter.before_current", "adapter.after_current",
)  # fmt: skip


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=slow)])
def test_f12_kill_while_publishing_leaves_a_whole_adapter(instance, figures, times):
    adapters = Adapters(instance.paths.adapters)
    publish_adapter(instance.paths.adapters, "000001")
    inference = instance.start("inference")
    instance.ready("inference")
    kills = 0
    for point in PUBLISH_POINTS * times:
        id = adapters.next_id()
        environment = os.environ | {"SPECL_CRASH_AT": point, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(
            [sys.executable, "-m", "tests.harness.fake_models", str(instance.paths.adapters), id], env=environment
        ).returncode
        assert code == 137, point
        kills += 1
        current = adapters.current()
        assert current in adapters.ids()
        adapters.verify(adapters.folder / current, "fake-draft", "characters")
        adapters.sweep()
        assert not list(adapters.folder.glob(".new-*"))
    wait_until(
        lambda: instance.status("inference")["adapter"]["active"] == adapters.current(), 15, "inference has the newest"
    )
    assert not instance.status("inference")["adapter"]["rejected"] and inference.code is None
    figures(F12_kills=kills, points=len(PUBLISH_POINTS), current_always_whole="yes")


@pytest.mark.parametrize("point", ["training.after_checkpoint", "adapter.before_publish"])
def test_f12_the_trainer_itself_dies_and_goes_on(instance, point):
    ready_for_training(instance)
    trainer = instance.start("trainer", SPECL_CRASH_AT=point, SPECL_TEST_CHECKPOINT_S="0", SPECL_TEST_RISING="1")
    instance.ready("trainer")
    with instance.client() as client:
        assert client.train(now=True).ok
    wait_until(lambda: trainer.code is not None, 60, "it dies at the point")
    assert trainer.code == 137
    trainer = instance.start("trainer", SPECL_TEST_CHECKPOINT_S="0")
    instance.ready("trainer")
    adapters = Adapters(instance.paths.adapters)
    if point == "adapter.before_publish":  # it stands, though nothing was announced
        assert adapters.current() == "000001"
        wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000001", 15, "the slow tick finds it")
        wait_until(lambda: instance.stored("adapters") == ["000001"], 15, "its record is in the store")
        return
    with instance.client() as client:
        assert client.train(now=True).ok
    wait_until(lambda: _verdict(instance), 60, "the run goes on from its checkpoint and ends")
    assert "training.resumed" in instance.output("trainer")


def _verdict(instance):
    return instance.stored("training_runs")


def test_f12_missing_adapter_record_is_written_at_start(instance):
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("collector")
    instance.start("trainer")
    wait_until(lambda: instance.stored("adapters") == ["000001"], 15, "the trainer tells of it")


BAD = {
    "a link": "a link, not a folder",
    "a linked file": "not a regular file",
    "npz": "does not belong in an adapter",
    "pickle": "does not belong in an adapter",
    "sha": "sha256",
    "shape": "has shape",
    "base": "trained on draft",
    "nan": "not finite",
    "giant header": "not a whole safetensors file",
    "truncated": "truncated",
    "zero": "changes nothing",
    "missing": "is missing",
    "manifest": "manifest",
    "mistyped": "files: Input should be",
    "nested": "recursion limit",
}


def spoil(instance, kind, id):
    """Publish an adapter and break it in one way."""
    folder = instance.paths.adapters
    more = {"shape": {"cut": 1}, "base": {"base": "another"}, "nan": {"nan": True}, "zero": {"scale": 0.0}}.get(
        kind, {}
    )
    scratch, manifest = make_adapter(folder, id, **more)
    path = Adapters(folder).publish(scratch, manifest, make_current=False)
    weights = path / "adapters.safetensors"
    match kind:
        case "a link":
            path.rename(folder / "elsewhere")
            path.symlink_to(folder / "elsewhere")
        case "a linked file":
            weights.rename(instance.folder / "outside.safetensors")
            weights.symlink_to(instance.folder / "outside.safetensors")
        case "npz":
            (path / "adapters.npz").write_bytes(b"PK")
        case "pickle":
            (path / "adapters.pkl").write_bytes(b"\x80\x04.")
        case "sha":
            config = path / "adapter_config.json"
            config.write_text(config.read_text() + " ")
        case "giant header":
            weights.write_bytes((10 << 30).to_bytes(8, "little") + b"{}")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            (path / "adapter_config.json").unlink()
        case "manifest":
            (path / "manifest.json").write_text("{}")
        case "mistyped":
            document = json.loads((path / "manifest.json").read_text())
            (path / "manifest.json").write_text(json.dumps(document | {"files": []}))
        case "nested":
            (path / "manifest.json").write_text("[" * 100_000)
    Adapters(folder).set_current(id)


def test_f13_bad_adapters_are_refused_with_reasons(instance, figures):
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("collector")
    instance.start("inference", SPECL_TEST_LOOK_S="0.5")
    assert instance.ready("inference")["adapter"]["active"] == "000001"
    before = instance.ask("hello").text
    for number, (kind, reason) in enumerate(BAD.items(), 2):
        id = f"{number:06d}"
        spoil(instance, kind, id)
        said = _refusal(instance, id)
        assert reason in said, (kind, said)
        body = instance.status("inference")["adapter"]
        assert body["active"] == "000001"
        assert instance.ask("hello").text == before
    for name, text in (("outside", "../../../etc"), ("long", "0" * 70), ("bytes", "\x00\xff")):
        (instance.paths.adapters / "CURRENT").write_text(text)
        assert "not an adapter id" in _refusal(instance, "CURRENT"), name
        assert instance.status("inference")["adapter"]["active"] == "000001"
    instance.settle()
    figures(F13_kinds=len(BAD) + 3, refused=len(BAD) + 3, greedy_text_unchanged="yes")
    assert len(instance.stored("activations")) >= len(BAD)


def _refusal(instance, id):
    """Why inference refused; asking by hand saves waiting for the slow tick."""
    with instance.client() as client:
        if id == "CURRENT":
            return wait_until(lambda: instance.status("inference")["adapter"]["rejected"].get(id), 12, "it is refused")
        reply = client.command("inference", SetAdapter(id))
        listed = instance.status("inference")["adapter"]["rejected"]
    assert not reply.ok
    return listed.get(id, reply.message)


def test_f13_an_announced_path_outside_is_refused(instance):
    publish_adapter(instance.paths.adapters, "000001")
    publisher = zmq.Context.instance().socket(zmq.XPUB)
    publisher.setsockopt(zmq.LINGER, 0)
    publisher.bind(instance.paths.socket("trainer-pub"))
    instance.start("inference")
    instance.ready("inference")
    assert publisher.poll(5000)
    outside = ("/etc", str(instance.paths.adapters / ".." / "000002"), "https://example.org/000002")
    for number, path in enumerate(outside, 2):  # an id keeps its first reason
        id = f"{number:06d}"
        publisher.send(encode(AdapterReady(id, path)))
        said = wait_until(
            lambda id=id: instance.status("inference")["adapter"]["rejected"].get(id), 5, f"{path} is refused"
        )
        assert "lies outside" in said or "not an adapter id" in said, path
    assert instance.status("inference")["adapter"]["active"] == "000001"
    publisher.close()


def test_f13_random_weights_cost_speed_and_no_word(instance):
    instance.start("inference")
    instance.ready("inference")
    plain = instance.ask("say something", max_tokens=24, num_draft_tokens=0).text
    publish_adapter(instance.paths.adapters, "000001", scale=3.0)
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000001", 12, "it is active")
    answer = instance.ask("say something", max_tokens=24, num_draft_tokens=3)
    assert answer.text == plain and answer.adapter_id == "000001"


def test_f14_late_joiner_and_burst_end_with_newest(instance, figures):
    publish_adapter(instance.paths.adapters, "000001")  # nobody is there to hear of it
    instance.start("inference")
    assert instance.ready("inference")["adapter"]["active"] == "000001"
    prepared = [make_adapter(instance.paths.adapters, f"{n:06d}") for n in (2, 3, 4)]
    publisher = zmq.Context.instance().socket(zmq.XPUB)
    publisher.setsockopt(zmq.LINGER, 0)
    publisher.bind(instance.paths.socket("trainer-pub"))
    publisher.poll(5000)
    stop, active = threading.Event(), []

    def watch():
        while not stop.is_set():
            if body := instance.status("inference"):
                active.append(body["adapter"]["active"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    for scratch, manifest in prepared:
        path = Adapters(instance.paths.adapters).publish(scratch, manifest)
        publisher.send(encode(AdapterReady(manifest.id, str(path))))
    burst = time.monotonic() - start
    wait_until(lambda: active and active[-1] == "000004", 10, "the newest is active")
    seconds = time.monotonic() - start
    stop.set()
    watcher.join()
    publisher.close()
    assert active == sorted(active), "never an older one after a newer"
    publish_adapter(instance.paths.adapters, "000005")  # no publication at all
    start = time.monotonic()
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000005", 10, "the slow tick finds it")
    figures(F14_burst_ms=1000 * burst, newest_after_s=seconds, without_publication_s=time.monotonic() - start)


def test_the_manifest_and_nothing_else_is_json(tmp_path):
    path = publish_adapter(tmp_path, "000001")
    assert json.loads((path / "manifest.json").read_text())["id"] == "000001"
