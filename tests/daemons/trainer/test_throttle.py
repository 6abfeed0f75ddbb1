"""The throttle on a clock of its own: an hour of traffic in milliseconds."""

import pytest

from specl.daemons.trainer.throttle import DEFER_S, SILENCE_S, Abandoned, Throttle
from specl.shared.errors import Interrupted

IDLE_S = 2.0
PIECE_S = 0.15


class World:
    """A clock, and inference whose business is a function of the time. Sleeping and working move the clock."""

    def __init__(self, busy):
        self.now, self.worked, self._is_busy = 0.0, 0.0, busy
        self.throttle = Throttle(IDLE_S, clock=lambda: self.now, sleep=self.pass_time)
        self.throttle.set_busy(busy(0.0))

    def pass_time(self, seconds):
        assert self.now < 20_000, "it never may work"
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.05, end)
            self.throttle.set_busy(self._is_busy(self.now))

    def work_until(self, end, piece=PIECE_S):
        """Pieces of work from now to `end`; seconds of work done, and when the first one could begin."""
        before, first = self.worked, None
        while self.now < end:
            self.throttle.wait_for_turn()
            first = self.now if first is None else first
            self.pass_time(piece)
            self.worked += piece
        return self.worked - before, first


def test_idle_daemon_is_worked_on_all_the_time():
    world = World(lambda now: False)
    done, first = world.work_until(60)
    assert first == pytest.approx(IDLE_S, abs=0.2) and done == pytest.approx(60 - IDLE_S, abs=2 * PIECE_S)


def test_before_the_first_message_it_waits():
    now = 0.0
    throttle = Throttle(IDLE_S, clock=lambda: now)
    assert not throttle.quiet
    throttle.set_busy(True)
    now = IDLE_S + 1
    assert not throttle.quiet


def test_inference_that_died_busy_is_not_waited_for():
    now = 0.0
    throttle = Throttle(IDLE_S, clock=lambda: now)
    throttle.set_busy(True)
    now = SILENCE_S - 0.1
    assert not throttle.quiet
    throttle.set_busy(True)  # it lives
    now += SILENCE_S - 0.1
    assert not throttle.quiet
    now += 0.2
    assert throttle.quiet


def test_work_resumes_two_seconds_after_idle():
    world = World(lambda now: 10 <= now < 20)
    world.work_until(10)
    assert world.now == pytest.approx(10, abs=2 * PIECE_S)
    waited = world.throttle.wait_for_turn()
    assert world.now == pytest.approx(20 + IDLE_S, abs=0.2)
    assert waited == pytest.approx(12, abs=0.3)


def test_busy_daemon_gives_a_quarter_after_ten_minutes():
    world = World(lambda now: True)
    _, first = world.work_until(DEFER_S + 1)
    assert first == pytest.approx(DEFER_S, abs=0.2)
    start = world.now
    done, _ = world.work_until(start + 1800)
    assert done / 1800 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("piece", [0.05, 0.15, 1.0, 8.0])
def test_quarter_holds_whatever_a_piece_takes(piece):
    world = World(lambda now: True)
    world.work_until(DEFER_S + 1, piece)
    start = world.now
    done, _ = world.work_until(start + 3600, piece)
    assert done / (world.now - start) <= 0.26
    assert done / (world.now - start) == pytest.approx(0.25, abs=0.1)  # naps of 0.1 s are coarse for the shortest


def test_short_pauses_do_not_restart_the_deferral():
    # a second of quiet in every thirty is too short to work in
    world = World(lambda now: now % 30 < 29)
    _, first = world.work_until(DEFER_S + 1)
    assert first == pytest.approx(DEFER_S, abs=0.2)
    start = world.now
    done, _ = world.work_until(start + 1800)
    assert done / 1800 == pytest.approx(0.25, abs=0.03)


def test_little_quiet_does_not_lower_the_quarter():
    # three seconds of quiet a minute: one of them can be used
    world = World(lambda now: now % 60 < 57)
    world.work_until(900)
    start = world.now
    done, _ = world.work_until(start + 3600)
    assert 0.22 <= done / 3600 <= 0.28


def test_enough_quiet_pays_the_deferral_back():
    world = World(lambda now: now < 700 or now >= 1400)
    world.work_until(1400)
    start = world.now
    world.throttle.wait_for_turn()
    assert world.now - start == pytest.approx(DEFER_S, abs=1.0)


def test_time_without_work_is_no_deferral():
    world = World(lambda now: True)
    world.pass_time(3600)
    assert world.throttle.wait_for_turn() == pytest.approx(DEFER_S, abs=0.2)


def test_stopping_and_abandoning_end_a_wait():
    world = World(lambda now: True)
    world.throttle.abandon()
    with pytest.raises(Abandoned):
        world.throttle.wait_for_turn()
    world.throttle.clear_abandon()
    world.throttle.stop()
    with pytest.raises(Interrupted) as caught:
        world.throttle.wait_for_turn()
    assert not isinstance(caught.value, Abandoned)


def test_night_on_battery_is_no_deferral():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
        throttle.set_busy(True)  # inference says so every few seconds

    throttle = Throttle(IDLE_S, lambda: now[0], sleep, lambda: "on battery" if now[0] < 8 * 3600 else "")
    throttle.set_busy(True)
    assert throttle.wait_for_turn() == pytest.approx(8 * 3600 + DEFER_S, abs=2)
