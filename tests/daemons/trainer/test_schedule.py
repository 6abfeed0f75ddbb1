"""When the trainer begins what: a table of what it sees, and what follows from how a job ended."""

import uuid
from dataclasses import replace

import numpy as np
import pytest

from specl.daemons.trainer.jobs import (
    Ending,
    EvaluateAdapterJob,
    JobEnded,
    JobKind,
    Outcome,
    PrepareRegressionJob,
    ReevaluateJob,
    ScoreJob,
    TrainJob,
)
from specl.daemons.trainer.records import scored
from specl.daemons.trainer.schedule import Schedule, TrainerInputs, next_job
from specl.shared.learning.judge import Agreement
from specl.shared.messaging.codes import RunTrigger, RunVerdict

NOW = 1000.0
AUTOMATIC = TrainJob(RunTrigger.FAILURES, "3 failures")
BY_HAND = TrainJob(RunTrigger.BY_HAND, "by hand")
BY_HAND_NOW = TrainJob(RunTrigger.BY_HAND_NOW, "by hand, now")
REEVALUATE = ReevaluateJob("000002")
ENOUGH = TrainerInputs(pending_failures=3, min_failures=3)
DUE = replace(ENOUGH, reevaluation="000002")
READY = replace(DUE, answers_ready=True)
QUIET = TrainerInputs(pending_failures=1, min_failures=3, quiet=True, unprepared=True)


@pytest.mark.parametrize(
    ("seen", "job"),
    [
        (TrainerInputs(), None),
        (ENOUGH, AUTOMATIC),
        (replace(ENOUGH, pending_failures=2), None),
        (replace(ENOUGH, enabled=False), None),
        (replace(ENOUGH, undelivered=True), None),
        (replace(ENOUGH, reason_to_wait="on battery"), None),
        (replace(ENOUGH, not_before={JobKind.TRAIN: NOW + 1}), None),
        (replace(ENOUGH, not_before={JobKind.TRAIN: NOW}), AUTOMATIC),
        (replace(ENOUGH, not_before={JobKind.SCORE: NOW + 1}), AUTOMATIC),
        # a run that could not be finished
        (replace(ENOUGH, repeat=BY_HAND), BY_HAND),
        (TrainerInputs(repeat=BY_HAND, enabled=False), BY_HAND),
        (TrainerInputs(repeat=BY_HAND, reason_to_wait="on battery"), None),
        (TrainerInputs(repeat=BY_HAND_NOW, reason_to_wait="on battery"), BY_HAND_NOW),
        # a reevaluation, and a run that waits for it
        (READY, REEVALUATE),
        (replace(READY, enabled=False), REEVALUATE),
        (replace(READY, not_before={JobKind.REEVALUATE: NOW + 1}), AUTOMATIC),
        (replace(READY, reason_to_wait="on battery"), None),
        (DUE, AUTOMATIC),
        (replace(DUE, rollback_is_recent=True), None),
        (replace(DUE, rollback_is_recent=True, repeat=BY_HAND_NOW), BY_HAND_NOW),
        (replace(READY, rollback_is_recent=True), REEVALUATE),
        # what is done when no run is due
        (TrainerInputs(unscored=True), ScoreJob()),
        (TrainerInputs(unscored=True, not_before={JobKind.SCORE: NOW + 1}), None),
        (replace(ENOUGH, unscored=True), AUTOMATIC),
        (replace(DUE, rollback_is_recent=True, unscored=True), ScoreJob()),
        (QUIET, PrepareRegressionJob()),
        (replace(QUIET, quiet=False), None),
        (replace(QUIET, unprepared=False), None),
        (replace(QUIET, pending_failures=0), None),
        (replace(QUIET, enabled=False), None),
        (replace(QUIET, unscored=True), ScoreJob()),
    ],
)
def test_next_job_follows_from_what_is_seen(seen, job):
    assert next_job(seen, NOW) == job


def done(job, verdict, **more):
    return JobEnded(job, Ending.DONE, outcome=Outcome(verdict, "because"), **more)


def test_failing_run_is_tried_ever_less_often():
    schedule, waits = Schedule(), []
    for verdict in ("failed", "failed", "failed", "rejected", "failed"):
        schedule.ended(done(AUTOMATIC, RunVerdict(verdict)), NOW)
        waits.append(schedule.not_before.get(JobKind.TRAIN, NOW) - NOW)
    assert waits == [300, 600, 1200, 0, 300]


@pytest.mark.parametrize(
    ("ended", "kind", "seconds"),
    [
        (done(AUTOMATIC, RunVerdict.NO_DATA), JobKind.TRAIN, 60),
        (done(AUTOMATIC, RunVerdict.NO_VERDICT), JobKind.TRAIN, 60),
        (done(AUTOMATIC, RunVerdict.PROMOTED), JobKind.TRAIN, 0),
        (done(REEVALUATE, RunVerdict.NO_VERDICT), JobKind.REEVALUATE, 20),
        (done(REEVALUATE, RunVerdict.KEPT), JobKind.REEVALUATE, 0),
        (JobEnded(ScoreJob(), Ending.DONE), JobKind.SCORE, 300),
        (JobEnded(ScoreJob(), Ending.DONE, more=True), JobKind.SCORE, 0),
        (JobEnded(ScoreJob(), Ending.FAILED, "broken"), JobKind.SCORE, 300),
        (JobEnded(REEVALUATE, Ending.FAILED, "broken"), JobKind.REEVALUATE, 20),
        (JobEnded(AUTOMATIC, Ending.DISK_FULL, "no room"), JobKind.TRAIN, 15),
        (JobEnded(AUTOMATIC, Ending.INTERRUPTED), JobKind.TRAIN, 0),
        (JobEnded(AUTOMATIC, Ending.ABANDONED), JobKind.TRAIN, 0),
    ],
)
def test_retry_follows_from_how_a_job_ended(ended, kind, seconds):
    schedule = Schedule()
    schedule.ended(ended, NOW)
    assert schedule.not_before.get(kind, NOW) - NOW == seconds


@pytest.mark.parametrize(("ending", "repeats"), [("superseded", True), ("disk_full", True), ("failed", False)])
def test_unfinished_run_is_repeated(ending, repeats):
    schedule = Schedule()
    schedule.started(BY_HAND)
    schedule.ended(JobEnded(BY_HAND, Ending(ending), "why"), NOW)
    assert (schedule.repeat == BY_HAND) == repeats
    schedule.started(BY_HAND)
    assert schedule.repeat is None and schedule.running == BY_HAND


def test_troubles_are_of_one_kind_of_work():
    schedule = Schedule()
    schedule.ended(JobEnded(AUTOMATIC, Ending.DISK_FULL, "no room"), NOW)
    schedule.ended(JobEnded(ScoreJob(), Ending.DONE, more=True), NOW)
    assert schedule.problems == {JobKind.TRAIN: "the disk refuses, the run is tried again every 15 s: no room"}
    schedule.ended(done(AUTOMATIC, RunVerdict.REJECTED), NOW)
    assert not schedule.problems


def test_preparation_is_tried_once_and_in_parts():
    schedule = Schedule()
    for more in (True, False):
        schedule.started(PrepareRegressionJob())
        assert not schedule.unprepared
        schedule.ended(JobEnded(PrepareRegressionJob(), Ending.DONE, more=more), NOW)
        assert schedule.unprepared == more


def test_waiting_for_data_is_recorded_once():
    schedule = Schedule()

    def news(verdict, job=AUTOMATIC):
        return schedule.is_news(job, Outcome(RunVerdict(verdict), "because"))

    assert [news("no_data") for _ in range(3)] == [True, False, False]
    assert news("no_data", BY_HAND)
    assert news("no_verdict", EvaluateAdapterJob("folder", "name")) and not news("no_data")
    assert [news(verdict) for verdict in ("no_verdict", "rejected", "no_verdict")] == [True, True, True]
    assert not news("no_verdict", REEVALUATE) and news("kept", REEVALUATE)


def test_repeated_score_is_the_same_record():
    score = Agreement(np.array([3.0]), np.array([4.0]))
    generation = uuid.uuid4().hex
    first, again = scored(generation, "000001", score), scored(generation, "000001", score)
    assert first.id == again.id != scored(generation, "", score).id and first.agreement == 0.75
