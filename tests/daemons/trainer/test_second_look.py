"""An adapter that the watch has rolled back comes back where it does better on the same answers, and only there."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from specl.daemons.trainer import reevaluation, service
from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.reevaluation import LEAST, Reevaluation, ReevaluationJob
from specl.daemons.trainer.throttle import Superseded
from specl.daemons.trainer.training_loop import Live
from specl.daemons.trainer.training_run import TrainingJob
from specl.shared.adapters.registry import CONFIRMED, REINSTATED, Adapters
from specl.shared.errors import AdapterRejected
from specl.shared.learning.recapture import recapture
from specl.shared.messaging.codec import encode
from specl.shared.messaging.codes import RunTrigger
from specl.shared.messaging.messages import Envelope, TopK
from specl.shared.paths import Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from tests.fakes import make_generation, make_training_run, tokens_blob
from tests.harness.fake_models import fake_engine, make_adapter

GOOD, BAD = (
    0.02,
    2.0,
)  # scale of random factors: one hardly changes the draft, which is near its target; the other ruins it


def publish(adapters, id, scale, parent):
    scratch, manifest = make_adapter(adapters.folder, id, scale=scale)
    adapters.publish(scratch, replace(manifest, parent_id=parent))


def answers(engine, count, created_at, first=0):
    """Greedy answers of the target, as records."""
    made = []
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
        made.append(make_generation(f"g{number}", **changes, **ids_of, top_k=sampling))
    return made


class Place:
    """A run directory with two adapters, the second of which was rolled back, and a store."""

    def __init__(self, root, scales, count=LEAST, parent="000001"):
        self.engine = fake_engine(load_settings(), root)
        self.paths = Paths(root, root).create()
        self.adapters = Adapters(self.paths.adapters)
        before = time.time() - 100
        for id, scale, its in zip(("000001", "000002"), scales, ("", parent), strict=True):
            publish(self.adapters, id, scale, its)
        self.adapters.mark_rolled_back("000002", "it disappointed")
        self.adapters.set_current("000001")
        self.store = Store(self.paths.store)
        self.store.set_threshold(0.5)
        self.add(answers(self.engine, 6, before, first=100))  # from before it was published: these say nothing
        self.add(answers(self.engine, count, time.time() + 1))

    def add(self, records):
        self.store.add_rows([Envelope(record.id, "Generation", encode(record)) for record in records])

    def parts(self, pause=lambda: 0.0):
        settings = load_settings()
        data_loader = DataLoader(self.store, self.engine, settings, HiddenSpool(self.paths.hidden, 0), pause)
        return self.engine, data_loader, self.adapters, self.paths, settings, Live(), pause

    def look(self):
        return ReevaluationJob(Reevaluation("000002"), *self.parts()).run()


def test_better_on_the_same_answers_is_reinstated(tmp_path):
    place = Place(tmp_path, (BAD, GOOD))
    outcome = place.look()
    assert outcome.verdict == "reinstated" and (outcome.adapter_id, outcome.path.name) == ("000002", "000002")
    assert place.adapters.current() == "000002" and place.adapters.rolled_back() == {}
    assert place.adapters.second_looks() == {"000002": REINSTATED} and reevaluation.due(place.adapters) is None
    run = outcome.records[-1]
    assert (
        (run.trigger, run.cause) == ("reevaluation", "second look at 000002")
        and run.adapter_id == ""
        and run.last_generation == ""
    )
    by = {record.adapter_id: record for record in outcome.records[:-1]}
    assert by["000002"].agreement > by["000001"].agreement + 0.3 and by["000002"].generations == LEAST


@pytest.mark.parametrize("scales", [(GOOD, BAD), (GOOD, GOOD)])
def test_worse_or_equal_stays_rolled_back(tmp_path, scales):
    place = Place(tmp_path, scales)
    assert place.look().verdict == "confirmed"
    assert place.adapters.current() == "000001" and list(place.adapters.rolled_back()) == ["000002"]
    assert place.adapters.second_looks() == {"000002": CONFIRMED} and reevaluation.due(place.adapters) is None


def test_files_that_no_longer_load_confirm_the_rollback(tmp_path):
    place = Place(tmp_path, (BAD, GOOD))
    (place.adapters.folder / "000002" / "adapters.safetensors").write_bytes(b"torn")
    assert place.look().verdict == "confirmed" and place.adapters.current() == "000001"


def test_too_few_answers_decide_nothing(tmp_path):
    place = Place(tmp_path, (BAD, GOOD), count=LEAST - 1)
    doubted = reevaluation.due(place.adapters)
    assert doubted.id == "000002" and not reevaluation.ready(doubted, place.store)
    assert place.look().verdict == "no_verdict" and reevaluation.due(place.adapters) is not None
    place.add(answers(place.engine, 1, time.time() + 1, first=50))
    assert reevaluation.ready(doubted, place.store)


def test_adapter_with_another_parent_is_not_due(tmp_path):
    place = Place(tmp_path, (BAD, GOOD), parent="")
    assert reevaluation.due(place.adapters) is None
    place.adapters.set_current("")
    assert reevaluation.due(place.adapters).id == "000002"


@pytest.mark.parametrize("fails", [1, 2])
def test_whoever_is_stopped_half_way_looks_once_more(tmp_path, monkeypatch, fails):
    """A full disk stands for a kill: before CURRENT has moved, and after."""
    place = Place(tmp_path, (BAD, GOOD))
    write, written = place.adapters._replace, []

    def full(name, text):
        written.append(name)
        if len(written) > fails:
            raise OSError(28, "No space left on device")
        write(name, text)

    with monkeypatch.context() as patch:
        patch.setattr(place.adapters, "_replace", full)
        with pytest.raises(OSError):
            place.look()
    assert written == ["SECOND_LOOKS.json", "CURRENT", "SECOND_LOOKS.json"][: fails + 1]
    moved = fails == 2
    assert place.adapters.current() == ("000002" if moved else "000001") and place.adapters.rolled_back() == {}
    assert (reevaluation.due(place.adapters) is None) == moved
    if not moved:
        assert place.look().verdict == "reinstated" and place.adapters.current() == "000002"


def test_transient_disk_error_decides_nothing(tmp_path, monkeypatch):
    place = Place(tmp_path, (BAD, GOOD))
    with monkeypatch.context() as patch:
        patch.setattr(reevaluation, "load_adapter", unreadable)
        assert place.look().verdict == "no_verdict"
    assert place.look().verdict == "reinstated"


def unreadable(*arguments):
    raise AdapterRejected("it cannot be read") from OSError(5, "Input/output error")


def test_repeated_training_text_does_not_judge(tmp_path):
    place = Place(tmp_path, (BAD, GOOD))
    moment = place.adapters.manifest("000002").created_at
    data_loader = place.parts()[1]
    assert len(data_loader.since(moment, 40, [])) == LEAST
    again = replace(answers(place.engine, 1, moment - 50)[0], id="learned")  # what g0 says, said before
    place.add([again])
    found = {example.id for example in data_loader.since(moment, 40, ["learned"])}
    assert len(found) == LEAST - 1 and "g0" not in found


def test_run_ends_when_its_parent_is_withdrawn(tmp_path):
    place = Place(tmp_path, (GOOD, GOOD))
    job = TrainingJob(*place.parts(), RunTrigger.FAILURES, "50 failures")
    job._parent()
    assert job._while_in_force() == 0.0
    place.adapters.set_current("")
    with pytest.raises(Superseded, match="000001"):
        job._while_in_force()


@pytest.fixture
def trainer(tmp_path):
    place = Place(tmp_path, (BAD, GOOD), count=LEAST - 1)
    settings = load_settings()
    training = settings.training.model_copy(update={"min_failure_cases": 3})
    server = SimpleNamespace(subscribe=lambda *_: None, wake=lambda: None, malformed=0)
    made = service.Trainer(place.paths, settings.model_copy(update={"training": training}), server)
    made.place = place
    yield made
    made.outbox.close()


def test_run_waits_a_limited_time_for_reevaluation(trainer, monkeypatch):
    trainer._look()
    assert trainer.worker.jobs.empty() and trainer._wants  # failures enough, answers to look at too few
    trainer.place.add(answers(trainer.place.engine, 1, time.time() + 1, first=50))
    trainer._look()
    assert trainer.worker.jobs.get_nowait() == Reevaluation("000002")
    trainer.worker.no_look_before = float("inf")  # a look that failed
    trainer._look()
    assert trainer.worker.jobs.get_nowait().endswith("failures")
    trainer.worker.no_look_before = 0.0
    monkeypatch.setattr(reevaluation, "LEAST", 100)
    monkeypatch.setattr(reevaluation, "PATIENCE_S", 0.0)
    trainer.worker.run_waits.clear()
    trainer._look()
    assert trainer.worker.jobs.get_nowait().endswith("failures")


def test_superseded_run_is_repeated(trainer, monkeypatch):
    def overtaken(what):
        raise Superseded("gone")

    monkeypatch.setattr(trainer.worker, "_one_run", overtaken)
    for job in ("3 failures", "stop"):
        trainer.worker.jobs.put(job)
    trainer.worker.run()
    assert trainer.worker.again == "3 failures" and not trainer.worker.troubles
    assert not trainer.worker.running.is_set()


def test_reevaluation_is_no_answer_to_train_requests(tmp_path):
    store = Store(tmp_path / "store.db")
    runs = [
        make_training_run("a"),
        make_training_run("b", trigger="reevaluation", cause="second look at 000002", verdict="reinstated"),
    ]
    store.add_rows([Envelope(run.id, "TrainingRun", encode(run)) for run in runs])
    assert store.summary().last_verdict.verdict == "promoted"
    store.close()
