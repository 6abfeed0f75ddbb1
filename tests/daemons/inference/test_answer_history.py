"""Which answers are kept to draft a client's later ones: those whose record redaction leaves whole, until a purge."""

import threading
import time

import pytest

from specl.shared.messaging.messages import Purge
from specl.shared.retention.answer_files import AnswerFiles
from tests.harness.decoding import CLIENT, request
from tests.harness.waiting import wait_until

EVERYTHING = Purge([], time.time() + 1e6, "")


def kept(decoding):
    return decoding.engine.answer_history.of("me").texts


@pytest.mark.parametrize("records, count", [("{}", 1), ("{keep: statistics}", 0), ("{redact: ['secret']}", 0), ("{redact: ['other']}", 1)])  # fmt: skip
def test_only_whole_records_leave_answers_for_drafting(new_decoding, records, count):
    decoding = new_decoding(f"records: {records}")
    decoding.serve("a", "the secret is", max_tokens=12)
    assert decoding.wait_for_done("a").recorded
    decoding.turn()
    decoding.recorder.stop()
    assert len(kept(decoding)) == count
    assert len(list(decoding.paths.answers.glob("*"))) == count


def test_answer_drafts_the_clients_very_next_request(decoding):
    decoding.serve("a", "hello", max_tokens=12)
    decoding.wait_for_done("a")  # only now may the client ask again
    decoding.thread.submit(CLIENT, request("b", "hello"))
    decoding.turn()
    assert len(kept(decoding)) == 1


def test_purge_takes_answers_that_finished_before_it(decoding):
    decoding.serve("a", "hello", max_tokens=12)
    decoding.thread.purge(CLIENT, EVERYTHING, lambda row: True)
    decoding.wait_for_done("a")
    decoding.turn(2)
    decoding.recorder.stop()
    assert not kept(decoding) and not list(decoding.paths.answers.glob("*"))


def test_purged_answers_do_not_come_back(decoding, monkeypatch):
    decoding.serve("a", "hello", max_tokens=12)
    decoding.wait_for_done("a")
    decoding.turn()
    wait_until(lambda: list(decoding.paths.answers.glob("*.u32")), what="the answer is on disk")
    recorder_may_go, purge = threading.Event(), AnswerFiles.purge
    monkeypatch.setattr(AnswerFiles, "purge", lambda files: recorder_may_go.wait(60) and purge(files))
    decoding.thread.purge(CLIENT, EVERYTHING, lambda row: True)
    decoding.turn()
    decoding.serve("b", "hello", max_tokens=12)  # while the files are still there
    before = list(kept(decoding))
    recorder_may_go.set()
    decoding.wait_for_done("b")
    decoding.turn()
    decoding.recorder.stop()
    files = AnswerFiles(decoding.paths.answers, decoding.engine.target.tokenizer_fingerprint)
    assert before == [] and len(files.read("me")) <= 1


def test_files_are_read_again_after_a_purge(decoding):
    decoding.thread.purge(CLIENT, EVERYTHING, lambda row: True)
    decoding.turn()
    decoding.recorder.stop()
    files = AnswerFiles(decoding.paths.answers, decoding.engine.target.tokenizer_fingerprint)
    files.write("me", [(time.time(), [1, 2, 3, 4])])
    assert kept(decoding) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("now", [-1e9, 5e9, 1e300])
def test_wrong_clock_does_not_stop_writing(tmp_path, now):
    files = AnswerFiles(tmp_path)
    files.write("me", [(now, [1, 2, 3, 4])])
    assert [tokens for _, tokens in files.read("me")] == [[1, 2, 3, 4]]


def test_clock_set_back_delays_no_expiry(new_decoding, monkeypatch):
    decoding, day = new_decoding("records: {retention_days: 2}"), 86400
    ahead = time.time() + 365 * day
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)
        decoding.turn()
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    decoding.engine.answer_history.add("me", [1, 2, 3, 4], time.time() - 3 * day)
    decoding.turn()
    assert kept(decoding) == []


def test_answers_older_than_the_retention_go(new_decoding):
    decoding, day = new_decoding("records: {retention_days: 2}"), 86400
    past = decoding.engine.answer_history
    files = AnswerFiles(decoding.paths.answers, decoding.engine.target.tokenizer_fingerprint)
    past.add("me", [1, 2, 3, 4], time.time() - 3 * day)
    past.add("me", [5, 6, 7, 8], time.time() - day)
    files.write("me", past.answers("me"))
    decoding.turn()
    decoding.recorder.stop()
    assert kept(decoding) == [[5, 6, 7, 8]]
    assert [tokens for _, tokens in files.read("me")] == [[5, 6, 7, 8]]
