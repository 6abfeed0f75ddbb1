"""When the trainer begins a run: once for what the store knows, one at a time, and told of once where it only waits."""

import uuid
from types import SimpleNamespace

import numpy as np
import pytest

from specl.daemons.trainer import service, worker
from specl.daemons.trainer.adapter_evaluation import AdapterEvaluation
from specl.daemons.trainer.jobs import BY_HAND
from specl.daemons.trainer.records import scored
from specl.daemons.trainer.training_run import Outcome
from specl.shared.learning.gate import Agreement
from specl.shared.messaging.codec import encode
from specl.shared.messaging.codes import RunTrigger
from specl.shared.messaging.messages import Envelope, Generation, Train, TrainingRun
from specl.shared.paths import Paths
from specl.shared.settings.load import load_settings
from specl.shared.store import Store

FAILURES = 3


def failure():
    tokens = bytes(32)
    return Generation(
        id=uuid.uuid4().hex, conversation_id="c", created_at=1.0, mode="detailed", messages=[], prompt="p", prompt_tokens=tokens,
        output="o", output_tokens=tokens, finish_reason="stop", sampling={"temperature": 0.0}, drafted=20, accepted=1,
        model_drafted=20, model_accepted=1, rounds=9, acceptance_rate=0.05, tokens_per_second=30.0, ttft_ms=50.0,
        target_model="t", draft_model="d", target_fingerprint="tf", draft_fingerprint="df", adapter_id="", sources=bytes(8),
        stats=None, disagreements=[], top_k=None,
    )  # fmt: skip


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    settings = load_settings()
    training = settings.training.model_copy(update={"min_failure_cases": FAILURES})
    paths = Paths(tmp_path, tmp_path / "models")
    for folder in (paths.outbox("trainer").parent, paths.adapters):
        folder.mkdir(parents=True, exist_ok=True)
    store = Store(paths.store)
    store.set_threshold(0.5)
    store.add_rows(
        [Envelope(record.id, "Generation", encode(record)) for record in (failure() for _ in range(FAILURES))]
    )
    store.close()
    server = SimpleNamespace(subscribe=lambda *_: None, wake=lambda: None, malformed=0)
    made = service.Trainer(paths, settings.model_copy(update={"training": training}), server)
    yield made
    made.outbox.close()


def outcome(verdict):
    run = TrainingRun(
        id=uuid.uuid4().hex, created_at=1.0, finished_at=2.0, trigger=RunTrigger.FAILURES, cause="3 failures", verdict=verdict, reason="r", parent_id="",
        adapter_id="", examples=0, steps=0, tokens=0, loss_first=None, loss_last=None, last_generation="", settings={},
    )  # fmt: skip
    return Outcome(verdict, "r", records=[run])


def run_with(trainer, monkeypatch, verdict, what="3 failures"):
    monkeypatch.setattr(worker, "TrainingJob", lambda *_: SimpleNamespace(run=lambda: outcome(verdict)))
    monkeypatch.setattr(trainer.worker, "_loaded", lambda: None)
    monkeypatch.setattr(trainer.worker, "_gatherer", lambda store: None)
    trainer.throttle._idle_s = 0
    trainer.worker._one_run(what)


def test_enough_failures_begin_a_run_and_only_one(trainer):
    trainer._look()
    trainer._look()
    assert trainer.worker.jobs.qsize() == 1
    reply = trainer._train(Train(now=True))
    assert not reply.ok and "waits already" in reply.message


def test_nothing_repeats_while_its_outcome_is_in_flight(trainer, monkeypatch):
    run_with(trainer, monkeypatch, "promoted")
    assert trainer.outbox.pending == 1
    trainer._look()
    assert trainer.worker.jobs.empty()
    trainer.outbox.discard([row.id for row in trainer.outbox.oldest()])  # the collector has it
    trainer._look()
    assert trainer.worker.jobs.qsize() == 1


def test_waiting_for_data_is_recorded_once(trainer, monkeypatch):
    for _ in range(3):
        run_with(trainer, monkeypatch, "no_data")
    assert trainer.outbox.pending == 1
    run_with(trainer, monkeypatch, "no_data", BY_HAND)
    assert trainer.outbox.pending == 2
    run_with(trainer, monkeypatch, "no_verdict")
    run_with(trainer, monkeypatch, "rejected")
    run_with(trainer, monkeypatch, "no_verdict")
    assert trainer.outbox.pending == 5


def test_import_between_waiting_runs_is_recorded(trainer, monkeypatch):
    run_with(trainer, monkeypatch, "no_data")
    monkeypatch.setattr(worker, "AdapterEvaluationJob", lambda *_: SimpleNamespace(run=lambda: outcome("no_verdict")))
    trainer.worker._one_run(AdapterEvaluation("run", "folder", "name"))
    assert trainer.outbox.pending == 2 and trainer.worker.trials["run"]["verdict"] == "no_verdict"
    run_with(trainer, monkeypatch, "no_data")
    assert trainer.outbox.pending == 2


def test_failing_run_is_retried_with_growing_pauses(trainer, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    waits = []
    for verdict in ("failed", "failed", "failed", "rejected", "failed"):
        run_with(trainer, monkeypatch, verdict)
        waits.append(trainer.worker.not_before - now)
    assert waits == [300, 600, 1200, 1200, 300]


def test_score_record_is_deterministic():
    score = Agreement(np.array([3.0]), np.array([4.0]))
    first, again = scored("g", "000001", score), scored("g", "000001", score)
    assert first.id == again.id != scored("g", "", score).id and first.agreement == 0.75
