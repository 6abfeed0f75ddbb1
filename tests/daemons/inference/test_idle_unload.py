"""`memory.idle_unload_minutes`: the models go when nobody asks and come back with the next request, the adapter too."""

import gc
import sqlite3
import time
import weakref

import pytest

from specl.daemons.inference.worker import Worker
from specl.shared.errors import ModelError
from specl.shared.settings.load import parse_settings
from specl.shared.settings.schema import Settings
from tests.harness.fake_models import fake_engine, publish_adapter
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until

IDLE = SETTINGS + "memory: {idle_unload_minutes: 0.01}\n"  # 0.6 s


def let_go(instance):
    return lambda: instance.status("inference").get("models", {}).get("loaded") is False


def test_they_go_come_back_and_answer_the_same_with_the_same_adapter(instance):
    instance.set(IDLE)
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    before = instance.ask("hello")
    wait_until(let_go(instance), 10, "the models are let go")
    seen = instance.status("inference")
    assert seen["state"] == "ready" and seen["adapter"]["active"] == "000001"
    places = []
    with instance.client() as client:
        text = "".join(client.stream("hello", on_position=places.append))
        after = client.last
    assert text == before.text and before.adapter_id == after.adapter_id == "000001"
    assert places[0] == 0, "who asks is told to wait"
    instance.acked.append(after.generation_id)
    wait_until(let_go(instance), 10, "the models are let go again")
    publish_adapter(instance.paths.adapters, "000002")  # announced to nobody who could load it
    changed = instance.ask("hello")
    assert changed.adapter_id == "000002"
    instance.settle()
    wait_until(lambda: len(instance.stored("activations")) == 2, 10, "both activations are stored")
    with sqlite3.connect(f"file:{instance.paths.store}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT event, adapter_id, previous_id FROM activations ORDER BY n").fetchall()
    db.close()
    assert rows == [("activated", "000001", ""), ("activated", "000002", "000001")]


def test_a_command_for_the_adapter_brings_them_back(instance):
    instance.set(IDLE)
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("inference")
    instance.ready("inference")
    wait_until(let_go(instance), 10, "the models are let go")
    with instance.client() as client:
        reply = client.set_adapter("")
    assert reply.ok and instance.status("inference")["adapter"]["active"] == ""


@pytest.fixture
def worker(instance, monkeypatch):
    """A worker in this thread, with an idle time that is up at once."""
    import specl.daemons.inference.worker as module

    monkeypatch.setattr(module, "load_engine", fake_engine)
    said = []
    made = Worker(
        instance.paths,
        parse_settings(IDLE, instance.file),
        None,
        lambda peer, message: said.append(message),
        lambda: None,
    )
    made.said = said
    made._load()
    return made


def test_nothing_holds_the_weights_once_they_are_let_go(worker):
    weights = weakref.ref(worker.engine.target.model)
    worker._unload_if_idle()
    assert worker.engine is not None, "not before its time"
    worker._idle_since = time.monotonic() - 1
    worker._unload_if_idle()
    gc.collect()
    assert worker.unloaded and weights() is None


def test_models_that_cannot_come_back_are_a_refusal_and_the_next_request_tries_again(worker, monkeypatch):
    import specl.daemons.inference.worker as module
    from specl.daemons.inference.job import Job
    from specl.shared.messaging.messages import Ask
    from specl.shared.sampling_params import SamplingParams

    def job(id):
        ask = Ask(request_id=id, messages=[{"role": "user", "content": "hi"}], prompt="", max_tokens=4, sampling=SamplingParams(),
                  mode="detailed", client_id="me")  # fmt: skip
        return Job(b"peer", ask, time.monotonic())

    def no_room(*arguments, **more):
        raise ModelError("the models need 9 GB; 2 GB are free")

    worker._idle_since = time.monotonic() - 1
    worker._unload_if_idle()
    monkeypatch.setattr(module, "load_engine", no_room)
    worker._enqueue(job("a"))
    assert worker.said[-1].request_id == "a" and "9 GB" in worker.said[-1].message and worker.unloaded
    monkeypatch.setattr(module, "load_engine", fake_engine)
    worker._enqueue(job("b"))
    assert not worker.unloaded and [waiting.ask.request_id for waiting in worker.waiting] == ["b"]


def test_by_default_they_stay():
    assert Settings().memory.idle_unload_minutes == 0
