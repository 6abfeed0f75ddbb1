"""The supervisor on each Procfile line: what ends it, and what it waits for."""

import signal

import pytest

from specl.shared.errors import AlreadyRunning
from specl.shared.runtime import supervisor
from specl.shared.runtime.locks import Lock
from specl.shared.runtime.supervisor import EX_CONFIG, EX_TEMPFAIL, supervise


@pytest.fixture
def children(monkeypatch):
    """`children(1, 75, 78)`: the exit codes of the processes that the supervisor starts. Returns
    those not used yet.
    """

    def arrange(*codes):
        left = list(codes)

        class Child:
            def __init__(self, command, env):
                self.code = left.pop(0)

            def wait(self, timeout=None):
                return self.code

        monkeypatch.setattr(supervisor.subprocess, "Popen", Child)
        return left

    monkeypatch.setattr(supervisor, "BACKOFF_S", (0,))
    monkeypatch.setattr(supervisor, "OCCUPIED_S", 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield arrange
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("command", "codes", "left"),
    [
        ("", (EX_TEMPFAIL, 0), [0]),  # a second instance ends at once, and honcho ends all of it
        ("specl-ctl store import", (EX_TEMPFAIL, EX_TEMPFAIL, EX_CONFIG), []),  # a command gives the role back soon
        ("", (1, EX_TEMPFAIL, EX_TEMPFAIL, EX_CONFIG), []),  # it has served: it must not stop the others
        ("", (EX_CONFIG, 0), [0]),
    ],
)
def test_a_supervisor_ends_where_restarting_cannot_help(tmp_path, children, command, codes, left):
    lock = Lock(tmp_path, "collector", command)
    try:
        remaining = children(*codes)
        assert supervise("collector", tmp_path) == EX_CONFIG
        assert remaining == left
    finally:
        lock.release()


def test_a_refused_lock_names_its_holder(tmp_path):
    for command, words in (("", "another collector daemon"), ("specl-ctl store purge", "`specl-ctl store purge`")):
        lock = Lock(tmp_path, "collector", command)
        with pytest.raises(AlreadyRunning, match=words):
            Lock(tmp_path, "collector")
        lock.release()
