"""`memory.idle_unload_minutes`: idle models are unloaded and loaded again for the next request, with their adapter."""

import gc
import sqlite3
import weakref

import pytest

from specl.daemons.inference import decode_thread
from specl.shared.errors import ModelError
from specl.shared.settings.schema import Settings
from tests.harness.decoding import CLIENT, request
from tests.harness.fake_models import publish_adapter
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until

IDLE = SETTINGS + "memory: {idle_unload_minutes: 0.01}\n"  # 0.6 s


def unloaded(instance):
    return lambda: instance.status("inference").get("models", {}).get("loaded") is False


def test_reloaded_models_answer_alike_with_their_adapter(instance):
    instance.set(IDLE)
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    before = instance.ask("hello")
    wait_until(unloaded(instance), 10, "the models are unloaded")
    seen = instance.status("inference")
    assert seen["state"] == "ready" and seen["adapter"]["active"] == "000001"
    positions = []
    with instance.client() as client:
        text = "".join(client.stream("hello", on_position=positions.append))
        after = client.last
    assert text == before.text and before.adapter_id == after.adapter_id == "000001"
    assert positions[0] == 0, "the client hears that it waits"
    instance.acknowledged.append(after.generation_id)
    wait_until(unloaded(instance), 10, "the models are unloaded again")
    publish_adapter(instance.paths.adapters, "000002")  # announced to nobody who could load it
    changed = instance.ask("hello")
    assert changed.adapter_id == "000002"
    instance.settle()
    wait_until(lambda: len(instance.stored("activations")) == 2, 10, "both activations are stored")
    with sqlite3.connect(f"file:{instance.paths.store}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT event, adapter_id, previous_id FROM activations ORDER BY n").fetchall()
    db.close()
    assert rows == [("activated", "000001", ""), ("activated", "000002", "000001")]


def test_setting_an_adapter_reloads_the_models(instance):
    instance.set(IDLE)
    publish_adapter(instance.paths.adapters, "000001")
    instance.start("inference")
    instance.ready("inference")
    wait_until(unloaded(instance), 10, "the models are unloaded")
    with instance.client() as client:
        reply = client.set_adapter("")
    assert reply.ok and instance.status("inference")["adapter"]["active"] == ""


@pytest.fixture
def idle(new_decoding):
    """A decode thread that may unload after 0.6 s."""
    return new_decoding(IDLE)


def make_idle(decoding):
    wait_until(lambda: decoding.thread.unload_if_idle() or decoding.thread.unloaded, what="the models are unloaded")


def test_unloading_leaves_nothing_that_holds_weights(idle):
    weights = weakref.ref(idle.engine.target.model)
    idle.thread.unload_if_idle()
    assert idle.thread.engine is not None, "not before its time"
    del idle.engine, idle.scheduler
    make_idle(idle)
    gc.collect()
    assert idle.thread.unloaded and weights() is None


def test_failed_reload_refuses_and_the_next_retries(idle, monkeypatch):
    def no_memory(*arguments, **more):
        raise ModelError("the models need 9 GB; 2 GB are free")

    make_idle(idle)
    with monkeypatch.context() as patch:
        patch.setattr(decode_thread, "load_engine", no_memory)
        idle.thread.submit(CLIENT, request("a", "hi"))
        idle.turn()
    assert idle.sent[-1].request_id == "a" and "9 GB" in idle.sent[-1].message and idle.thread.unloaded
    idle.thread.submit(CLIENT, request("b", "hi"))
    idle.turn()
    assert not idle.thread.unloaded and idle.thread.busy


def test_by_default_models_stay_loaded():
    assert Settings().memory.idle_unload_minutes == 0
