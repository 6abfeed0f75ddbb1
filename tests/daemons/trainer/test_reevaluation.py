"""Two adapters on the same answers: the better one is active afterwards, whichever of them was, and only if that is proven."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from specl.daemons.trainer import reevaluation, service
from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.jobs import ReevaluateJob, TrainJob
from specl.daemons.trainer.reevaluation import MIN_ANSWERS, Reevaluation
from specl.daemons.trainer.run_context import RunContext
from specl.daemons.trainer.throttle import Superseded
from specl.daemons.trainer.training_loop import RunProgress
from specl.daemons.trainer.training_run import AdapterTraining
from specl.shared.adapters import marks, registry
from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected
from specl.shared.learning.recapture import recapture
from specl.shared.messaging.codec import encode
from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import Envelope, TopK
from specl.shared.paths import Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from tests.fakes import make_generation, make_training_run, tokens_blob
from tests.harness.fake_models import fake_engine, make_adapter

# scale of random factors: one hardly changes the draft, which is near its target; the other ruins it
GOOD, BAD = 0.02, 2.0


def publish(adapters, id, scale, parent):
    scratch, manifest = make_adapter(adapters.folder, id, scale=scale)
    adapters.publish(scratch, replace(manifest, parent_id=parent))


def answers(engine, count, created_at, first=0):
    """Greedy answers of the target, as records."""
    records = []
    for number in range(first, first + count):
        prompt = np.random.default_rng(number).integers(40, 120, 6).tolist()
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(recapture(engine.target, np.array([*tokens, 0]), len(tokens), 1)[1][-1, 0]))
        _, ids, logprobs = recapture(engine.target, np.array(tokens), len(prompt), 4)
        sampling = TopK(
            4, ids.astype("<u4").tobytes(), logprobs.astype("<f2").tobytes(), bytes(2 * len(ids)), bytes(2 * len(ids))
        )
        changes = {"created_at": created_at, "target_fingerprint": engine.target.fingerprint, "disagreements": []}
        ids_of = {"prompt_tokens": tokens_blob(prompt), "output_ids": tokens[6:]}
        records.append(make_generation(f"g{number}", **changes, **ids_of, top_k=sampling))
    return records


class Stage:
    """A run directory with two adapters and a store. The second was rolled back, or is active."""

    def __init__(self, root, scales, count=MIN_ANSWERS, parent="000001", rolled_back=True):
        self.engine = fake_engine(load_settings(), root)
        self.paths = Paths(root, root).create()
        self.adapters = Adapters(self.paths.adapters)
        before = time.time() - 100
        for id, scale, its_parent in zip(("000001", "000002"), scales, ("", parent), strict=True):
            publish(self.adapters, id, scale, its_parent)
        if rolled_back:
            self.adapters.marks.set("000002", MarkState.ROLLBACK_PENDING, "it collapsed")
            self.adapters.set_current("000001")
        self.store = Store(self.paths.store)
        self.store.set_threshold(0.5)
        self.add(answers(self.engine, 6, before, first=100))  # from before it was published: these say nothing
        self.add(answers(self.engine, count, time.time() + 1))

    def add(self, records):
        self.store.add_rows([Envelope(record.id, "Generation", encode(record)) for record in records])

    def context(self, pause=lambda: 0.0):
        settings = load_settings()
        data_loader = DataLoader(self.store, self.engine, settings, HiddenSpool(self.paths.hidden, 0), pause)
        return RunContext(self.engine, data_loader, self.adapters, self.paths, settings, RunProgress(), pause)

    def reevaluate(self):
        return Reevaluation(self.context(), ReevaluateJob("000002")).run()

    @property
    def state(self):
        return self.adapters.marks.all()["000002"].state


def test_better_adapter_that_was_rolled_back_comes_back(tmp_path):
    stage = Stage(tmp_path, (BAD, GOOD))
    outcome = stage.reevaluate()
    assert outcome.verdict == RunVerdict.REINSTATED and outcome.path.name == "000002"
    assert stage.adapters.current() == "000002" and stage.adapters.rolled_back() == {}
    assert stage.state == MarkState.REINSTATED and reevaluation.due(stage.adapters) is None
    run = outcome.records[-1]
    assert (run.trigger, run.cause) == (RunTrigger.REEVALUATION, "re-evaluation of 000002")
    assert run.adapter_id == "" and run.last_generation == "" and run.parent_id == "000001"
    by = {record.adapter_id: record for record in outcome.records[:-1]}
    assert by["000002"].agreement > by["000001"].agreement + 0.3 and by["000002"].generations == MIN_ANSWERS
    assert by["000002"].details["low"] > 0


@pytest.mark.parametrize("scales", [(GOOD, BAD), (GOOD, GOOD)])
def test_rollback_without_proof_against_it_is_confirmed(tmp_path, scales):
    stage = Stage(tmp_path, scales)
    assert stage.reevaluate().verdict == RunVerdict.CONFIRMED
    assert stage.adapters.current() == "000001" and list(stage.adapters.rolled_back()) == ["000002"]
    assert stage.state == MarkState.ROLLED_BACK_FINAL and reevaluation.due(stage.adapters).id == "000001"  # in its turn


def test_worse_active_adapter_is_rolled_back(tmp_path):
    stage = Stage(tmp_path, (GOOD, BAD), rolled_back=False)
    assert reevaluation.due(stage.adapters).id == "000002"
    outcome = stage.reevaluate()
    assert outcome.verdict == RunVerdict.ROLLED_BACK and outcome.path.name == "000001"
    assert stage.adapters.current() == "000001" and "interval" in stage.adapters.rolled_back()["000002"]
    assert outcome.records[-1].verdict == RunVerdict.ROLLED_BACK


@pytest.mark.parametrize("scales", [(BAD, GOOD), (GOOD, GOOD)])
def test_promotion_without_proof_against_it_is_kept(tmp_path, scales):
    stage = Stage(tmp_path, scales, rolled_back=False)
    outcome = stage.reevaluate()
    assert outcome.verdict == RunVerdict.KEPT and outcome.path is None
    assert stage.adapters.current() == "000002" and stage.state == MarkState.KEPT
    assert reevaluation.due(stage.adapters) is None


@pytest.mark.parametrize(
    ("torn", "rolled_back", "verdict", "current"),
    [
        ("000002", True, RunVerdict.CONFIRMED, "000001"),
        ("000002", False, RunVerdict.NO_VERDICT, "000002"),  # inference refuses it, and says why
        ("000001", False, RunVerdict.KEPT, "000002"),
    ],
)
def test_rolled_back_or_former_adapter_must_load(tmp_path, torn, rolled_back, verdict, current):
    stage = Stage(tmp_path, (GOOD, GOOD), rolled_back=rolled_back)
    (stage.adapters.folder / torn / "adapters.safetensors").write_bytes(b"torn")
    assert stage.reevaluate().verdict == verdict and stage.adapters.current() == current


def test_too_few_answers_decide_nothing(tmp_path):
    stage = Stage(tmp_path, (BAD, GOOD), count=MIN_ANSWERS - 1)
    adapter = reevaluation.due(stage.adapters)
    assert adapter.id == "000002" and not reevaluation.answers_ready(adapter, stage.store)
    assert stage.reevaluate().verdict == RunVerdict.NO_VERDICT and reevaluation.due(stage.adapters) is not None
    stage.add(answers(stage.engine, 1, time.time() + 1, first=50))
    assert reevaluation.answers_ready(adapter, stage.store)


def test_only_neighbours_of_current_are_due(tmp_path):
    stage = Stage(tmp_path, (BAD, GOOD), parent="")
    assert reevaluation.due(stage.adapters).id == "000001"  # active, and never reevaluated
    stage.adapters.marks.set("000001", MarkState.KEPT)
    assert reevaluation.due(stage.adapters) is None
    stage.adapters.set_current("")
    assert reevaluation.due(stage.adapters).id == "000002"


def test_imported_adapter_is_compared_with_what_it_replaced(tmp_path):
    stage = Stage(tmp_path, (GOOD, GOOD), parent="")
    manifest = stage.adapters.manifest("000002")
    assert reevaluation.predecessor_of(manifest) == ""
    assert reevaluation.predecessor_of(replace(manifest, training={"predecessor": "000001"})) == "000001"


@pytest.mark.parametrize("fails", [1, 2])
def test_interrupted_reinstatement_is_decided_again(tmp_path, monkeypatch, fails):
    """A full disk stands for a kill: before CURRENT has moved, and after."""
    stage = Stage(tmp_path, (BAD, GOOD))
    write, written = registry.write_file, []

    def full(path, text, **named):
        written.append(path.name)
        if len(written) > fails:
            raise OSError(28, "No space left on device")
        write(path, text, **named)

    with monkeypatch.context() as patch:
        for module in (registry, marks):
            patch.setattr(module, "write_file", full)
        with pytest.raises(OSError):
            stage.reevaluate()
    assert written == ["MARKS.json", "CURRENT", "MARKS.json"][: fails + 1]
    moved = fails == 2
    assert stage.adapters.current() == ("000002" if moved else "000001") and stage.adapters.rolled_back() == {}
    if not moved:
        assert reevaluation.due(stage.adapters).id == "000002"
        assert stage.reevaluate().verdict == RunVerdict.REINSTATED and stage.adapters.current() == "000002"


def test_disk_that_fails_for_a_moment_decides_nothing(tmp_path, monkeypatch):
    stage = Stage(tmp_path, (BAD, GOOD))
    with monkeypatch.context() as patch:
        patch.setattr(reevaluation, "load_adapter", unreadable)
        assert stage.reevaluate().verdict == RunVerdict.NO_VERDICT
    assert stage.reevaluate().verdict == RunVerdict.REINSTATED


def unreadable(*arguments):
    raise AdapterRejected("it cannot be read") from OSError(5, "Input/output error")


def test_trained_text_does_not_judge_when_repeated(tmp_path):
    stage = Stage(tmp_path, (BAD, GOOD))
    moment = stage.adapters.manifest("000002").created_at
    data_loader = stage.context().data_loader
    assert len(data_loader.since(moment, 40, [])) == MIN_ANSWERS
    again = replace(answers(stage.engine, 1, moment - 50)[0], id="learned")  # what g0 says, said before
    stage.add([again])
    ids = {example.id for example in data_loader.since(moment, 40, ["learned"])}
    assert len(ids) == MIN_ANSWERS - 1 and "g0" not in ids


def test_run_ends_when_its_parent_is_replaced(tmp_path):
    stage = Stage(tmp_path, (GOOD, GOOD))
    training = AdapterTraining(stage.context(), TrainJob(RunTrigger.FAILURES, "50 failures"))
    training.use_active_as_parent()
    assert training.pause_while_active() == 0.0
    stage.adapters.set_current("")
    with pytest.raises(Superseded, match="000001"):
        training.pause_while_active()


@pytest.fixture
def trainer(tmp_path):
    """A trainer whose store has failures enough and one answer too few, and the stage around it."""
    stage = Stage(tmp_path, (BAD, GOOD), count=MIN_ANSWERS - 1)
    settings = load_settings()
    training = settings.training.model_copy(update={"min_failure_cases": 3})
    server = SimpleNamespace(subscribe=lambda *_: None, wake=lambda: None, malformed=0)
    trainer = service.Trainer(stage.paths, settings.model_copy(update={"training": training}), server)
    yield trainer, stage
    trainer.outbox.close()


def test_run_waits_for_the_reevaluation_of_a_rollback(trainer):
    trainer, stage = trainer
    trainer.check()
    assert trainer.schedule.running is None
    stage.add(answers(stage.engine, 1, time.time() + 1, first=50))
    trainer.check()
    assert trainer.schedule.running == ReevaluateJob("000002")


def test_run_does_not_wait_for_ever(trainer, monkeypatch):
    monkeypatch.setattr(reevaluation, "WAIT_S", 0.0)
    trainer, _ = trainer
    trainer.check()
    assert isinstance(trainer.schedule.running, TrainJob)


def test_reevaluation_is_not_the_last_verdict(tmp_path):
    store = Store(tmp_path / "store.db")
    runs = [
        make_training_run("a"),
        make_training_run("b", trigger="reevaluation", cause="re-evaluation of 000002", verdict="reinstated"),
    ]
    store.add_rows([Envelope(run.id, "TrainingRun", encode(run)) for run in runs])
    assert store.summary().last_verdict.verdict == "promoted"
    store.close()
