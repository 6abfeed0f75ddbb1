"""The trainer's loop around jobs that are never done, or done by hand: what it begins, records and answers."""

import queue
from types import SimpleNamespace

import pytest

from specl.daemons.trainer import service, worker
from specl.daemons.trainer.jobs import Ending, JobEnded, Outcome, TrainJob
from specl.daemons.trainer.throttle import Superseded
from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import EvaluateAdapter, Purge, Train
from specl.shared.paths import Paths
from specl.shared.retention import checkpoints
from specl.shared.settings.load import load_settings
from specl.shared.store import Store
from tests.fakes import make_generation, make_training_run, to_row

FAILURES = 3
PURGE = Purge(["g0"], None, "")


@pytest.fixture
def trainer(tmp_path):
    settings = load_settings()
    training = settings.training.model_copy(update={"min_failure_cases": FAILURES, "idle_seconds": 0.0})
    paths = Paths(tmp_path, tmp_path / "models").create()
    store = Store(paths.store)
    store.set_threshold(0.5)
    store.add_rows([to_row(make_generation(f"g{n}", acceptance_rate=0.05)) for n in range(FAILURES)])
    store.close()
    server = SimpleNamespace(subscribe=lambda *_: None, wake=lambda: None, publish=lambda message: None, malformed=0)
    trainer = service.Trainer(paths, settings.model_copy(update={"training": training}), server)
    yield trainer
    trainer.outbox.close()


@pytest.fixture
def end(trainer):
    """`end(ending, verdict)`: the job under way has ended so."""

    def end(ending=Ending.DONE, verdict=RunVerdict.PROMOTED):
        run = make_training_run(f"run{trainer.outbox.pending}", verdict=verdict)
        outcome = Outcome(verdict, "because", records=(run,)) if ending == Ending.DONE else None
        trainer.job_ended(JobEnded(trainer.schedule.running, ending, "why", outcome))
        trainer.take_results()

    return end


def test_enough_failures_begin_one_run(trainer):
    trainer.check()
    job = trainer.schedule.running
    assert job == TrainJob(RunTrigger.FAILURES, "3 failures")
    trainer.check()
    assert trainer.schedule.running is job
    reply = trainer.train(Train(now=True))
    assert not reply.ok and "waits already" in reply.message


def test_nothing_is_repeated_before_its_outcome_is_stored(trainer, end):
    trainer.check()
    end()
    assert trainer.outbox.pending == 1
    trainer.check()
    assert trainer.schedule.running is None
    trainer.outbox.discard([row.id for row in trainer.outbox.oldest()])  # the collector has it
    trainer.check()
    assert trainer.schedule.running is not None


def test_superseded_run_is_repeated_without_a_record(trainer, end):
    trainer.check()
    job = trainer.schedule.running
    end(Ending.SUPERSEDED)
    assert trainer.outbox.pending == 0 and trainer.schedule.repeat == job
    trainer.check()
    assert trainer.schedule.running == job


def test_users_jobs_begin_in_their_order(trainer, end):
    trainer.check()
    folders = [trainer.adapters.folder / f".new-import-{n:032x}" for n in range(2)]
    for folder in folders:
        folder.mkdir()
        assert trainer.evaluate(EvaluateAdapter(folder.name, "theirs")).ok
    first, second = trainer.evaluations
    end()
    assert trainer.schedule.running.run_id == first
    end(verdict=RunVerdict.REJECTED)
    assert trainer.evaluations[first].verdict == RunVerdict.REJECTED and not folders[0].exists()
    assert trainer.schedule.running.run_id == second
    end(Ending.FAILED)
    assert trainer.evaluations[second].verdict == RunVerdict.FAILED and trainer.evaluations[second].reason == "why"
    assert trainer.schedule.running is None


def test_purge_abandons_the_run_and_its_checkpoint(trainer, end):
    checkpoint = checkpoints.checkpoint_folder(trainer.paths.training)
    trainer.check()
    checkpoint.mkdir(parents=True)
    assert "abandoned" in trainer.purge(PURGE).message and trainer.throttle.abandoning
    end(Ending.ABANDONED)
    assert not checkpoint.exists() and not trainer.throttle.abandoning
    checkpoint.mkdir(parents=True)
    assert "abandoned" not in trainer.purge(PURGE).message and not checkpoint.exists()


def test_purge_as_a_run_ends_abandons_no_other(trainer):
    trainer.check()
    trainer.job_ended(JobEnded(trainer.schedule.running, Ending.FAILED, "why", None))  # not taken yet
    assert "abandoned" in trainer.purge(PURGE).message
    trainer.take_results()
    assert not trainer.throttle.abandoning and trainer.schedule.running is None


@pytest.mark.parametrize(
    ("error", "ending", "problem"),
    [
        (Superseded("gone"), Ending.SUPERSEDED, "gone"),
        (OSError(28, "No space left on device"), Ending.DISK_FULL, "No space"),
        (OSError(13, "Permission denied"), Ending.FAILED, "PermissionError"),
        (RuntimeError("a bug"), Ending.FAILED, "RuntimeError: a bug"),
    ],
)
def test_error_of_a_job_ends_no_thread(trainer, monkeypatch, error, ending, problem):
    class Fails:
        def __init__(self, *parts):
            raise error

    monkeypatch.setattr(worker, "AdapterTraining", Fails)
    monkeypatch.setattr(worker, "load_engine", lambda *_, **__: SimpleNamespace(draft=SimpleNamespace()))
    monkeypatch.setattr(worker, "learner_of", lambda engine: None)
    results = queue.SimpleQueue()
    thread = worker.TrainingWorker(trainer.paths, trainer.settings, trainer.throttle, trainer.records, results.put)
    thread.start()
    thread.submit(TrainJob(RunTrigger.BY_HAND, "by hand"))
    ended = results.get(timeout=20)
    thread.stop()
    assert ended.ending == ending and problem in ended.problem and thread.progress.state == "idle"


class Panic(BaseException):
    """What native code raises that panics."""


@pytest.mark.parametrize("error", [SystemExit(78), KeyboardInterrupt(), Panic("of native code")])
def test_what_ends_the_thread_ends_the_daemon(trainer, monkeypatch, error):
    def fail(*parts):
        raise error

    turns = []

    def stopped():
        turns.append(1)
        return len(turns) > 1 and not trainer.worker.join(timeout=20) and len(turns) > 3

    trainer.server.poll = lambda timeout_s, handle: None
    monkeypatch.setattr(trainer.worker, "do", fail)
    stop = type("Stop", (), {"__bool__": lambda self: stopped()})()
    with pytest.raises(RuntimeError, match=f"a thread ended with {type(error).__name__}"):
        trainer.run(stop)
