"""A waiting client as a state machine: no socket, no clock, no thread."""

from dataclasses import replace

import pytest

from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import DaemonUnreachable, RequestRejected, ServerBusy, SpecLoraError
from specl.shared.messaging.answer_stream import FIRST_ANSWER_S, HEARTBEAT_S, SILENCE_S, AnswerStream
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.messages import Ask, Cancel, Delta, Done, Failed, GetStatus, Heartbeat, Queued
from specl.shared.sampling_params import SamplingParams

ASK = Ask("r", [], "hello", 8, SamplingParams(), "detailed")
DELTA = Delta("r", "a", [1], b"\0")
DONE = Done("r", "g", "a", 1, "stop", "", True, "", AnswerStats())
SOMETHING = GetStatus()  # any message at all shows that a daemon is there


def stream(alive=True):
    made = AnswerStream(ASK, 0.0, lambda: alive)
    made.outgoing()
    return made


def test_the_request_and_a_status_request_go_first():
    made = AnswerStream(ASK, 0.0, lambda: True)
    assert made.outgoing() == [ASK, GetStatus()] and made.outgoing() == []
    assert made.wait_s == FIRST_ANSWER_S


def test_pieces_come_through_until_done():
    made = stream()
    assert made.feed([Queued("r", 1), DELTA], 0.1) == [Queued("r", 1), DELTA] and made.wait_s == HEARTBEAT_S
    assert made.feed([DELTA, DONE, DELTA], 0.2) == [DELTA, DONE]
    assert made.ended and made.error is None and made.leave() == [] and made.outgoing() == []


def test_what_concerns_another_request_is_left_out():
    made = stream()
    others = [Delta("x", "a", [1], b"\0"), Failed("x", FailureCode.INTERNAL, "no"), SOMETHING]
    assert made.feed([*others, DELTA], 0.1) == [DELTA] and not made.ended


def test_missing_first_answer_ends_the_stream():
    with pytest.raises(DaemonUnreachable, match="does not answer"):
        stream().feed([], FIRST_ANSWER_S)


def test_silence_ends_it_only_after_long():
    made = stream()
    made.feed([SOMETHING], 0.1)
    now = 0.1
    while now + HEARTBEAT_S <= 0.1 + SILENCE_S:
        now += HEARTBEAT_S
        assert made.feed([], now) == []
    with pytest.raises(DaemonUnreachable):
        made.feed([], now + HEARTBEAT_S)


def test_daemon_without_its_lock_is_gone():
    made = stream(alive=False)
    made.feed([SOMETHING], 0.1)
    with pytest.raises(DaemonUnreachable):
        made.feed([], 1.1)


def test_a_waiting_client_sends_heartbeats():
    made = stream()
    made.feed([SOMETHING], 0.1)
    assert made.outgoing() == []
    made.feed([], HEARTBEAT_S)
    assert made.outgoing() == [GetStatus(), Heartbeat("r")]
    made.feed([DELTA], HEARTBEAT_S + 0.5)
    assert made.outgoing() == []
    made.feed([DELTA], 2 * HEARTBEAT_S)
    assert made.outgoing() == [Heartbeat("r")]


def test_leaving_early_cancels():
    assert stream().leave() == [Cancel("r")]


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        ("lost", DaemonUnreachable, 3),
        ("stopped", DaemonUnreachable, 3),
        ("busy", ServerBusy, 1),
        ("rejected", RequestRejected, 2),
        ("deadline", SpecLoraError, 1),
        ("internal", SpecLoraError, 1),
    ],
)
def test_a_failure_becomes_its_error(code, kind, exit_code):
    made = stream()
    assert made.feed([DELTA, Failed("r", FailureCode(code), "because", "do this")], 0.1) == [DELTA]
    assert made.ended and made.leave() == []
    assert (type(made.error), str(made.error), made.error.exit_code) == (kind, "because", exit_code)


def test_answer_that_was_cut_is_an_error():
    made = stream()
    assert made.feed([DELTA, replace(DONE, finish_reason="cancelled")], 0.1) == [DELTA]
    assert made.ended and "cut off after 1 tokens" in str(made.error)


def test_pause_of_the_reader_is_no_silence():
    made = stream()
    made.feed([SOMETHING], 0.1)
    assert made.feed([], 3600.0) == [] and made.outgoing()
    assert made.feed([], 3600.0 + HEARTBEAT_S) == []
