"""Waiting for the trainer's verdict on an imported adapter."""

from types import SimpleNamespace

import pytest

from specl.cli.adapters import import_command
from specl.shared.errors import SpecLoraError


def test_trainer_that_died_is_waited_for_with_pauses(monkeypatch):
    clock, asked = [0.0], []

    def status():
        asked.append(clock[0])
        assert len(asked) < 1000, "it asks without a pause"
        return SimpleNamespace(trainer=None)

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(import_command, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with pytest.raises(SpecLoraError, match="stopped before a verdict"):
        import_command._follow(SimpleNamespace(status=status), "run")
    assert asked[-1] >= import_command.TRAINER_TIMEOUT_S
