"""Records under faults (F1 to F6, F11): accepted means stored exactly once, whatever is killed; inference never waits."""

import random
import re
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
from fault_fake import publish_adapter
from fault_house import HERE, fill, generation, percentile, process_figures, ready_for_training, wait_until

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.codec import encode
from specl.shared.messaging.outbox import Outbox
from specl.shared.runtime.failpoints import POINTS

slow = pytest.mark.slow
INFERENCE_POINTS = (
    "outbox.before_commit", "outbox.after_commit", "outbox.before_delete", "outbox.after_delete", "record.before_done",
)  # fmt: skip
COLLECTOR_POINTS = ("fetch.before_request", "fetch.after_reply", "store.before_commit", "store.after_commit")
SWAP_POINTS = ("swap.before_activate", "swap.after_activate")
F12 = {  # test_adapters_fault.py
    "test_f12_a_trainer_killed_at_any_step_of_publishing_leaves_a_whole_adapter", "test_f12_the_trainer_itself_dies_and_goes_on",
}  # fmt: skip


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=slow)])
def test_f1_inference_killed_at_random_loses_no_accepted_record(house, figures, kills):
    house.start("collector")
    inference = house.start("inference")
    house.ready("inference")
    stop, back = threading.Event(), []
    threads = house.load(stop, rate=20, workers=3)
    for _ in range(kills):
        time.sleep(random.uniform(0.2, 1.2))
        inference.kill()
        began = time.monotonic()
        inference = house.start("inference")
        house.ready("inference")
        back.append(time.monotonic() - began)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a client waits past its deadline"
    settled = house.settle()
    house.check()
    figures(F1_kills=kills, accepted=len(house.acked), lost=0, back_p50_s=percentile(back, 0.5), back_max_s=max(back),
            settled_s=settled, refused=dict(house.refusals))  # fmt: skip
    assert house.acked


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=slow)])
def test_f2_collector_killed_at_random_loses_nothing_and_delays_nobody(house, figures, kills):
    house.start("inference")
    collector = house.start("collector")
    house.ready("inference")
    stop = threading.Event()
    threads = house.load(stop, rate=20)
    time.sleep(3.0)
    calm = list(house.latencies)
    house.latencies.clear()
    for _ in range(kills):
        time.sleep(random.uniform(0.1, 0.8))
        collector.kill()
        collector = house.start("collector")
    disturbed = list(house.latencies)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    settled = house.settle()
    house.check()
    figures(F2_kills=kills, accepted=len(house.acked), lost=0, calm_p50_ms=1000 * percentile(calm, 0.5),
            killed_p50_ms=1000 * percentile(disturbed, 0.5), calm_p99_ms=1000 * percentile(calm, 0.99),
            killed_p99_ms=1000 * percentile(disturbed, 0.99), settled_s=settled)  # fmt: skip
    assert not house.refusals
    # starting a process takes one of the two cores for a moment, so the bound is loose; the medians are what it is about
    assert percentile(disturbed, 0.5) < 2 * percentile(calm, 0.5) + 0.05


@pytest.mark.parametrize("point", INFERENCE_POINTS)
def test_f3_inference_dies_at_every_named_point(house, point):
    house.start("collector")
    inference = house.start("inference", SPECL_CRASH_AT=f"{point}:2")
    house.ready("inference")
    _ask_until_dead(house, inference)
    house.start("inference")
    house.ready("inference")
    house.ask("after the crash")
    house.settle()
    house.check()


@pytest.mark.parametrize("point", COLLECTOR_POINTS)
def test_f3_collector_dies_at_every_named_point(house, point):
    house.start("inference")
    house.ready("inference")
    collector = house.start("collector", SPECL_CRASH_AT=f"{point}:2")
    _ask_until_dead(house, collector)
    house.ask("while it is down")
    house.start("collector")
    house.settle()
    house.check()


@pytest.mark.parametrize("point", [point for point in INFERENCE_POINTS if point.startswith("outbox.")])
def test_f3_the_trainer_dies_at_every_point_of_its_outbox(house, point):
    """The other producer: what its outbox had accepted is in the store, and the run that follows is."""
    ready_for_training(house)
    # what it has scored may all be fetched, and let go of, at once
    trainer = house.start("trainer", SPECL_CRASH_AT=point if point.endswith("_delete") else f"{point}:2")
    wait_until(lambda: trainer.code is not None, 60, "it scores what was parked, and dies at the point")
    assert trainer.code == 137
    facts = lambda: house.stored("evaluations") + house.stored("training_runs") + house.stored("adapters")  # noqa: E731
    accepted = set(house.waiting("trainer")) | set(facts())
    assert accepted, "something was accepted"
    house.start("trainer")
    house.ready("trainer")
    with house.client() as client:
        assert client.train(now=True).ok
    wait_until(lambda: house.stored("training_runs") and not house.waiting("trainer"), 60, "the run is stored")
    assert accepted <= set(facts())
    house.settle()  # inference may just have taken up the new adapter, and recorded that
    house.check()


@pytest.mark.parametrize("point", SWAP_POINTS)
def test_f3_inference_dies_while_it_swaps_adapters(house, point):
    publish_adapter(house.paths.adapters, "000001")
    inference = house.start("inference", SPECL_CRASH_AT=point)
    wait_until(lambda: inference.code is not None, 20, "it dies at the point")
    assert inference.code == 137
    house.start("inference")
    house.start("collector")
    assert house.ready("inference")["adapter"]["active"] == "000001"
    house.ask("after the crash")
    house.settle()
    house.check()


def _ask_until_dead(house, daemon) -> None:
    end = time.monotonic() + 20
    with house.client() as client:
        while daemon.code is None and time.monotonic() < end:
            try:
                house.ask("a question", client)
            except SpecLoraError:
                break
    wait_until(lambda: daemon.code is not None, 10, "it dies at the point")
    assert daemon.code == 137


def test_f3_every_failpoint_in_the_code_has_killed_something(deaths, request):
    root = HERE.parent.parent
    sources = [path for part in ("shared", "daemons", "cli") for path in (root / part).rglob("*.py")]
    used = {name for path in sources for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())}
    assert used == set(POINTS), "shared/runtime/failpoints.py and the code name different points"
    ran = {item.originalname for item in request.session.items}
    if not {name for name in globals() if name.startswith("test_f3")} | F12 <= ran:
        pytest.skip("the tests that die at the points were not all chosen")
    assert set(deaths.read_text().split()) == used


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=slow)])
def test_f4_an_hour_without_a_collector_drains_quickly(house, figures, count):
    outbox = Outbox(house.paths.outbox("inference"))
    house.acked = [uuid.uuid4().hex for _ in range(count)]
    size = fill(outbox, house.acked, text="x" * 1500)
    outbox.close()
    inference = house.start("inference")
    house.ready("inference")
    before, _ = process_figures(inference.pid)
    house.start("collector")
    house.ready("collector")
    start = time.monotonic()
    # half a second without an answer says nothing on a machine that does much else
    pending = lambda: house.status("inference").get("outbox", {}).get("pending")  # noqa: E731
    wait_until(lambda: pending() == 0, 300, "the backlog drains")
    seconds = time.monotonic() - start
    after, _ = process_figures(inference.pid)
    house.settle()
    house.check()
    figures(F4_records=count, MB=size / 1e6, records_per_s=count / seconds, MB_per_s=size / 1e6 / seconds,
            inference_grew_MiB=after - before)  # fmt: skip
    assert after - before < 50


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=slow)])
def test_f5_a_stopped_collector_costs_inference_nothing(house, figures, seconds):
    house.start("inference")
    collector = house.start("collector")
    house.ready("inference")
    stop = threading.Event()
    threads = house.load(stop, rate=20)
    time.sleep(max(2.0, seconds / 4))
    calm = list(house.latencies)
    house.latencies.clear()
    collector.signal(signal.SIGSTOP)
    time.sleep(seconds)
    stopped = list(house.latencies)
    collector.signal(signal.SIGCONT)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    settled = house.settle()
    house.check()
    figures(F5_stopped_s=seconds, accepted=len(house.acked), calm_p50_ms=1000 * percentile(calm, 0.5),
            stopped_p50_ms=1000 * percentile(stopped, 0.5), calm_p99_ms=1000 * percentile(calm, 0.99),
            stopped_p99_ms=1000 * percentile(stopped, 0.99), settled_s=settled)  # fmt: skip
    assert not house.refusals
    assert percentile(stopped, 0.5) < 1.5 * percentile(calm, 0.5) + 0.02


@pytest.mark.parametrize("asks", [40, pytest.param(1000, marks=slow)])
def test_f6_lost_and_doubled_frames_only_cost_time(house, figures, proxied, asks):
    """The collector reaches inference through a proxy that drops 30% of the frames both ways and doubles 30%; no publication
    gets through at all.
    """
    proxy = proxied(house, drop=0.3, double=0.3)
    house.start("inference")
    house.ready("inference")
    proxy.start_collector()
    for n in range(asks):
        house.ask(f"question {n}")
    settled = house.settle(timeout_s=120)
    house.check()
    figures(F6_accepted=len(house.acked), lost=0, dropped=proxy.dropped, doubled=proxy.doubled, settled_s=settled)
    assert proxy.dropped and proxy.doubled


def test_f11_a_poison_record_goes_to_quarantine_and_blocks_nothing(house):
    outbox = Outbox(house.paths.outbox("inference"))
    good = [uuid.uuid4().hex for _ in range(20)]
    poison = {
        "bytes": b"\xc1 not msgpack",
        "label": encode(generation("another-id")),
        "year": encode(generation("year", created_at=1e300)),
        "empty": b"",
    }
    for place, id in enumerate(good):
        outbox.append(id, "Generation", encode(generation(id)))
        if place < len(poison):
            name = list(poison)[place]
            outbox.append(name, "Generation", poison[name])
    outbox.close()
    house.acked = good
    house.start("inference")
    house.start("collector")
    house.ready("inference")
    house.settle()
    house.check(quarantined=len(poison))
    assert set(house.stored("quarantine")) == set(poison)
    assert Path(house.paths.store).stat().st_mode & 0o077 == 0
