"""The MLX thread's own rules, turn by turn in this thread: who is dropped, what is kept, what a switch may hold up."""

import time

import numpy as np
import pytest

import specl.daemons.inference.worker as module
from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.daemons.inference.job import Job
from specl.daemons.inference.recorder import Recorder
from specl.daemons.inference.worker import Worker
from specl.shared.learning.live_check import Depths, Watch
from specl.shared.messaging.messages import Ask, Done
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.redaction import Redactor
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.load import parse_settings
from tests.harness.fake_models import fake_engine, publish_adapter

LONG = "x" * 600  # more than one piece of prefill


class Bench:
    """A worker whose turns the test takes, its recorder, and what it said."""

    def __init__(self, root, settings):
        self.said = []
        self.paths = Paths(root, root / "models")
        for folder in (root, self.paths.run, self.paths.adapters):
            folder.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(self.paths.outbox("inference"), 1 << 20)
        spool = HiddenSpool(self.paths.hidden, 0)
        self.recorder = Recorder(self.outbox, spool, Redactor(settings.records), lambda id: None, self.hear)
        self.worker = Worker(self.paths, settings, self.recorder, self.hear, lambda: None)
        self.worker._load()
        self.recorder.start()

    def hear(self, peer, message):
        self.said.append(message)

    def ask(self, id, prompt, max_tokens=4, **more):
        ask = Ask(request_id=id, messages=[], prompt=prompt, max_tokens=max_tokens, sampling=SamplingParams(**more.pop("law", {})),
                  mode="detailed", client_id="me", **more)  # fmt: skip
        job = Job(b"peer", ask, time.monotonic())
        self.worker._enqueue(job)
        return job

    def turn(self, count=1):
        for _ in range(count):
            self.worker._turn()

    def serve(self, id, prompt, **more):
        job = self.ask(id, prompt, **more)
        while self.worker.busy:
            self.turn()
        return job

    def kinds(self):
        return [(type(message).__name__, message.request_id, getattr(message, "code", "")) for message in self.said]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Makes one for settings given as YAML; no waiting for requests that do not come."""
    monkeypatch.setattr(module, "load_engine", fake_engine)
    monkeypatch.setattr(module, "IDLE_TICK_S", 0.0)
    monkeypatch.setattr(module, "load_or_calibrate", lambda engine, folder: None)
    made = []

    def make(settings="{}"):
        made.append(Bench(tmp_path / "run", parse_settings(settings, tmp_path / "settings.yaml")))
        return made[-1]

    yield make
    for bench in made:
        bench.recorder.stop()


def test_a_cancel_and_a_deadline_in_one_turn_end_a_request_once(bench):
    bench = bench()
    first, second = bench.ask("a", LONG), bench.ask("b", LONG, deadline_s=60)
    bench.worker._admit()
    read = first.session.prefill

    def slow():
        second.arrived -= 61
        bench.worker.cancel("b", "no longer wanted", b"peer")
        return read()

    first.session.prefill = slow
    bench.turn()
    assert bench.kinds() == [("Failed", "b", "cancelled")]
    assert bench.worker.active == [first]


def test_who_still_waits_at_the_deadline_is_not_started(bench):
    bench = bench("serving: {max_active: 1}")
    bench.ask("a", LONG)
    late = bench.ask("b", "hello", deadline_s=60)
    bench.turn()
    late.arrived -= 61
    bench.turn()
    assert [kind for kind in bench.kinds() if kind[1] == "b" and kind[0] == "Failed"] == [("Failed", "b", "deadline")]
    assert late.session is None and not bench.worker.waiting


@pytest.mark.parametrize("records, kept", [("{}", 1), ("{keep: statistics}", 0), ("{redact: ['secret']}", 0), ("{redact: ['other']}", 1)])  # fmt: skip
def test_an_answer_is_kept_for_drafting_only_where_all_of_its_record_is(bench, records, kept):
    bench = bench(f"records: {records}")
    bench.serve("a", "the secret is", max_tokens=12)
    bench.recorder.stop()
    assert [type(message) for message in bench.said][-1] is Done
    assert len(bench.worker.engine.past.of("me").texts) == kept
    assert len(list(bench.paths.answers.glob("*"))) == kept


def test_past_answers_older_than_the_retention_go(bench):
    bench = bench("records: {retention_days: 2}")
    engine, day = bench.worker.engine, 86400
    past, files = engine.past, AnswerFiles(bench.paths.answers, engine.target.tokenizer_fingerprint)
    past.add("me", [1, 2, 3, 4], time.time() - 3 * day)
    past.add("me", [5, 6, 7, 8], time.time() - day)
    files.write("me", past.answers("me"))
    bench.turn()
    bench.recorder.stop()
    assert past.of("me").texts == [[5, 6, 7, 8]]
    assert [tokens for _, tokens in files.read("me")] == [[5, 6, 7, 8]]


def test_a_long_chat_goes_on_from_its_own_caches_however_much_it_may_yet_say(bench):
    bench = bench("memory: {max_kv_cache_tokens: 1024}")
    first = bench.serve("a", LONG)
    again = bench.ask("b", LONG + "".join(map(chr, first.session.output)) + "and then?", max_tokens=500)
    bench.worker._admit()
    assert again.session.tally.reused_tokens >= 600
    assert bench.worker.engine.prefixes.tokens == 0


def test_a_request_reserves_no_more_than_the_context_holds(bench):
    bench = bench()
    job = bench.ask("a", "hello", max_tokens=100_000)
    assert job.reserved == bench.worker.engine.target.context_length


def test_an_answer_ends_where_its_cache_would_outgrow_the_budget(bench):
    made = bench("{memory: {max_kv_cache_tokens: 64}}")
    job = made.serve("long", "abc" * 18, max_tokens=1000)
    assert job.reserved == 64 and len(job.session.output) == 64 - len(job.prompt)
    assert job.session.finish_reason == "length"


def test_a_request_cancelled_while_its_prompt_is_read_leaves_what_was_read(bench):
    bench = bench()
    bench.ask("a", LONG + LONG)
    bench.turn()
    bench.worker.cancel("a", "no longer wanted", b"peer")
    bench.turn()
    assert bench.kinds()[-1] == ("Failed", "a", "cancelled")
    again = bench.serve("b", LONG + LONG)
    assert again.session.tally.reused_tokens == 512


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_request_that_is_not_kept_gives_a_conversation_its_caches_back_and_nothing_of_itself(bench, cancelled):
    bench = bench()
    first = bench.serve("a", LONG)
    known = list(first.session.state.text)
    prompt = LONG + "".join(map(chr, first.session.output)) + "my private words"
    job = bench.ask("b", prompt, record=False)
    bench.worker._admit()
    lent = job.session.tally.reused_tokens
    assert lent > 500
    if cancelled:
        bench.worker._cancel("b", "no longer wanted", b"peer")
    while bench.worker.busy:
        bench.turn()
    (entry,) = bench.worker.engine.prefixes._entries
    state = entry.state
    assert state.text == known[: lent + 1] and state.cached == lent and state.drafter is None
    for layer, used in zip(state.cache, job.session.state.cache, strict=True):
        assert not np.shares_memory(np.array(layer.keys, copy=False), np.array(used.keys, copy=False))
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.offset == lent, "no room where more could stand"
    assert bench.serve("c", prompt).session.tally.reused_tokens == lent


def test_an_adapter_whose_announcement_was_lost_is_found_under_load_and_taken_in_pieces(bench, monkeypatch):
    bench = bench()
    publish_adapter(bench.paths.adapters, "000001")
    monkeypatch.setattr(bench.worker.swap, "finish", lambda: pytest.fail("a switch was done whole"))
    turns = 0
    while not bench.worker.engine.adapter_id:
        if not bench.worker.busy:
            bench.ask(f"r{turns}", LONG)
        bench.turn()
        turns += 1
        assert turns < 200
    assert turns > 2


def test_an_idle_worker_switches_in_pieces_too(bench, monkeypatch):
    bench = bench()
    publish_adapter(bench.paths.adapters, "000001")
    monkeypatch.setattr(bench.worker.swap, "finish", lambda: pytest.fail("a switch was done whole"))
    bench.turn(3)
    assert bench.worker.swap.under_way
    bench.ask("a", "hello")
    bench.turn(2)
    assert bench.worker.active or bench.said


def test_a_refused_adapter_is_tried_again_when_its_files_change_and_only_then(bench, monkeypatch):
    bench = bench()
    folder = publish_adapter(bench.paths.adapters, "000001")
    weights = folder / "adapters.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"\x00\x01")
    swap, tried = bench.worker.swap, []
    load = swap._load
    monkeypatch.setattr(swap, "_load", lambda id: tried.append(id) or load(id))
    for _ in range(3):
        swap.follow_current()
    assert "000001" in swap.rejected and len(tried) == 1
    weights.write_bytes(good)
    swap.follow_current()
    assert bench.worker.engine.adapter_id == "000001" and not swap.rejected


def test_a_disk_that_failed_for_a_moment_bars_no_adapter(bench, monkeypatch):
    bench = bench()
    publish_adapter(bench.paths.adapters, "000001")
    swap = bench.worker.swap

    def fails(*arguments):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(swap.adapters, "verify", fails)
        swap.follow_current()
        assert "Input/output error" in swap.rejected["000001"]
    swap.follow_current()
    assert bench.worker.engine.adapter_id == "000001" and not swap.rejected


def test_a_seeded_request_has_the_tokens_of_its_text(bench):
    bench = bench()
    spliced = []
    encode = bench.worker.engine.encode_chat
    bench.worker.engine.encode_chat = lambda messages, splice: spliced.append(splice) or encode(messages, splice)
    for sampling in ({}, {"seed": 4}):
        ask = Ask(request_id="a", messages=[{"role": "user", "content": "hi"}], prompt="", max_tokens=4,
                  sampling=SamplingParams(**sampling), mode="detailed", client_id="me")  # fmt: skip
        bench.worker._enqueue(Job(b"peer", ask, time.monotonic()))
    assert spliced == [True, False]


def test_status_is_told_though_the_watch_ends_meanwhile():
    class Ending(AdapterMonitor):
        """Its watch is gone when it is looked at a second time, as when the MLX thread ends it."""

        looks = 0

        @property
        def watch(self):
            self.looks += 1
            return Watch("000001", "", Depths([4] * 16, [2] * 16)) if self.looks == 1 else None

        @watch.setter
        def watch(self, value):
            pass

    assert Ending().status()["state"] == "watching"
