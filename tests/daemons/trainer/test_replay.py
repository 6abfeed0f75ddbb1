"""General texts that came with a draft are replayed with what that kind of draft reads: a head with states, others without."""

from types import SimpleNamespace

import numpy as np
import pytest

from specl.daemons.trainer import data
from specl.daemons.trainer.data import Gatherer
from specl.shared import config
from tests.stored import write_target


def gatherer_of(tmp_path, reads_states):
    target = write_target(tmp_path / "target", tied=True, quantised=False)
    tokens = np.array([5, 9, 40, 8, 22, 31, 7, 50, 12], np.uint32)
    np.savez(tmp_path / "replay.npz", tokens=tokens, lengths=[5, 4], prompt_lengths=[2, 2])
    draft = SimpleNamespace(path=tmp_path)
    engine = SimpleNamespace(target=target, draft=draft, draft_fingerprint="d", reads_states=reads_states)
    return Gatherer(None, engine, config.load(), None, lambda: None)


@pytest.mark.parametrize("reads_states", [True, False])
def test_a_drafts_texts_are_replayed_with_the_targets_law(tmp_path, reads_states):
    gatherer = gatherer_of(tmp_path, reads_states)
    for _ in range(2):  # captured, then read back
        first, second = gatherer.replay(tmp_path)
        assert first.tokens.tolist() == [5, 9, 40, 8, 22] and second.rows == 2
        assert (first.states is not None) == reads_states
        assert np.exp(first.logprobs.astype(float)).sum(axis=1).max() <= 1.001


def test_a_run_captures_what_no_quiet_moment_has_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REPLAY_PART", 1)
    gatherer = gatherer_of(tmp_path, reads_states=True)
    assert gatherer.capture_replay(tmp_path) is True  # a quiet moment
    captured = []

    def stop():
        captured.append(len(list(tmp_path.glob("replay-d-*.npz"))))
        if len(captured) == 1:
            raise InterruptedError

    gatherer._pause = stop
    with pytest.raises(InterruptedError):
        gatherer.replay(tmp_path)
    assert len(gatherer.replay(tmp_path)) == 2 and captured == [1, 1]  # the first part was made once
    assert gatherer.capture_replay(tmp_path) is False
