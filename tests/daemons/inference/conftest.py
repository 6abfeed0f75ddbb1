"""A decode thread with fake models, turn by turn in the test's thread."""

import pytest

from specl.daemons.inference import decode_thread
from specl.shared.settings.load import parse_settings
from tests.harness.decoding import Decoding
from tests.harness.fake_models import fake_engine


@pytest.fixture
def new_decoding(tmp_path, monkeypatch):
    """`new_decoding(yaml)`: it reads CURRENT in every turn and waits for no request."""
    monkeypatch.setattr(decode_thread, "load_engine", fake_engine)
    monkeypatch.setattr(decode_thread, "IDLE_TICK_S", 0.0)
    monkeypatch.setattr(decode_thread, "load_or_calibrate", lambda engine, folder: None)
    opened = []

    def new(settings="{}"):
        opened.append(Decoding(tmp_path / "run", parse_settings(settings, tmp_path / "settings.yaml")))
        return opened[-1]

    yield new
    for decoding in opened:
        decoding.recorder.stop()


@pytest.fixture
def decoding(new_decoding):
    """A decode thread with settings of their own defaults."""
    return new_decoding()
