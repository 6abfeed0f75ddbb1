"""What a run works with: general texts that came with a draft, and stored answers, with what that kind of draft reads (a head:
states, others: none). A torn file is made again, a long text keeps its end.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from specl.daemons.trainer import data_loader
from specl.daemons.trainer.data_loader import DataLoader
from specl.shared.errors import ModelError
from specl.shared.learning.recapture import recapture
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings
from tests.stored import write_target


def loader_of(tmp_path, reads_states):
    target = write_target(tmp_path / "target", tied=True, quantised=False)
    tokens = np.array([5, 9, 40, 8, 22, 31, 7, 50, 12], np.uint32)
    np.savez(tmp_path / "replay.npz", tokens=tokens, lengths=[5, 4], prompt_lengths=[2, 2])
    draft = SimpleNamespace(path=tmp_path)
    engine = SimpleNamespace(target=target, draft=draft, draft_fingerprint="d", reads_states=reads_states)
    return DataLoader(None, engine, load_settings(), None, lambda: None)


@pytest.mark.parametrize("reads_states", [True, False])
def test_replayed_texts_have_the_targets_distribution(tmp_path, reads_states):
    loader = loader_of(tmp_path, reads_states)
    for _ in range(2):  # captured, then read back
        first, second = loader.replay(tmp_path)
        assert first.tokens.tolist() == [5, 9, 40, 8, 22] and second.rows == 2
        assert (first.states is not None) == reads_states
        assert np.exp(first.logprobs.astype(float)).sum(axis=1).max() <= 1.001


def test_stopped_capture_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loader, "REPLAY_PART", 1)
    loader = loader_of(tmp_path, reads_states=True)
    assert loader.capture_replay(tmp_path) is True  # a quiet moment
    captured = []

    def stop():
        captured.append(len(list(tmp_path.glob("replay-d-*.npz"))))
        if len(captured) == 1:
            raise InterruptedError

    loader._pause = stop
    with pytest.raises(InterruptedError):
        loader.replay(tmp_path)
    assert len(loader.replay(tmp_path)) == 2 and captured == [1, 1]  # the first part was made once
    assert loader.capture_replay(tmp_path) is False


def test_torn_part_is_captured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loader, "REPLAY_PART", 1)
    loader = loader_of(tmp_path, reads_states=True)
    first = loader.replay(tmp_path)
    torn, other = sorted(tmp_path.glob("replay-d-*.npz"))
    torn.write_bytes(b"")
    made_at = other.stat().st_mtime_ns
    damaged = []
    monkeypatch.setattr(data_loader, "_damaged", damaged.append)
    again = loader.replay(tmp_path)
    assert [e.id for e in again] == [e.id for e in first] and (again[0].states == first[0].states).all()
    assert len(damaged) == 1 and torn.name in damaged[0] and other.stat().st_mtime_ns == made_at


def test_new_k_captures_again_and_drops_the_old(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loader, "REPLAY_PART", 1)
    loader = loader_of(tmp_path, reads_states=True)
    for name in ("replay-d-0000.npz", "replay-another-0000.npz"):  # of an older version, and of another draft
        (tmp_path / name).write_bytes(b"")
    assert {e.ids.shape[1] for e in loader.replay(tmp_path)} == {32}
    loader.settings = Settings(training={"loss": {"top_k_logits": 16}})
    assert {e.ids.shape[1] for e in loader.replay(tmp_path)} == {16}
    left = sorted(path.name for path in tmp_path.glob("replay-*.npz"))
    target = loader.engine.target.fingerprint
    assert left == ["replay-another-0000.npz", f"replay-d-{target}-k16-0000.npz", f"replay-d-{target}-k16-0001.npz"]


# ---------------------------------------------------------------------------------------------------- long texts
def stored_row(tokens, prompt_length):
    """An answered request as the store gives it, wrong at its first and third token."""
    output = tokens[prompt_length:]
    values = {
        "id": "g1", "prompt_tokens": tokens[:prompt_length].astype("<u4").tobytes(), "top_k": 2, "temperature": 0,
        "output_tokens": output.astype("<u4").tobytes(), "top_logprobs": np.zeros((len(output), 2), "<f2").tobytes(),
        "top_ids": np.column_stack([output, output]).astype("<u4").tobytes(),
    }  # fmt: skip
    return SimpleNamespace(**values, disagreements=[SimpleNamespace(position=0), SimpleNamespace(position=2)])


@pytest.mark.parametrize("spooled", [True, False])
def test_long_prompt_is_cut_with_its_states(tmp_path, spooled):
    (tmp_path / "hidden").mkdir()
    spool = HiddenSpool(tmp_path / "hidden", 1 << 24)
    loader = loader_of(tmp_path, reads_states=True)
    loader.spool = spool
    tokens = np.random.default_rng(0).integers(4, 290, 640).astype(np.uint32)
    states, _, _ = recapture(loader.engine.target, tokens, 600, 1, with_top_k=False)
    if spooled:
        spool.write("g1", states)
    result = loader.example(stored_row(tokens, 600))
    assert result.tokens.tolist() == tokens[-512:].tolist() and result.rows == 40
    assert (result.ids[:, 0] == tokens[600:]).all() and result.weights[:4].tolist() == [2.0, 1.0, 2.0, 1.0]
    # what the target had with all of the prompt, not what it would make of the end alone
    assert (result.states == states[-511:]).all()


def test_very_long_text_is_read_from_its_end(tmp_path, monkeypatch):
    loader = loader_of(tmp_path, reads_states=True)
    (tmp_path / "hidden").mkdir()
    loader.spool = HiddenSpool(tmp_path / "hidden", 1 << 24)
    read = []

    def recaptured(target, tokens, *more, **named):
        read.append(len(tokens))
        return np.zeros((len(tokens) - 1, 64), np.float16), None, None

    monkeypatch.setattr(data_loader, "recapture", recaptured)
    result = loader.example(stored_row(np.arange(3000), 2950))
    assert (
        read == [data_loader.MAX_RECAPTURED_TOKENS]
        and len(result.tokens) == 512
        and len(result.states) == 511
        and result.rows == 50
    )


@pytest.mark.parametrize("change", [{"lengths": [5]}, {"tokens": None}, {}])
def test_damaged_replay_file_costs_the_replay_only(tmp_path, change, monkeypatch):
    loader = loader_of(tmp_path, reads_states=True)
    if change:
        arrays = {"tokens": np.array([5, 9, 40], np.uint32), "lengths": [2, 1], "prompt_lengths": [1, 1]} | change
        np.savez(tmp_path / "replay.npz", **{name: value for name, value in arrays.items() if value is not None})
    else:
        (tmp_path / "replay.npz").write_bytes(b"PK")
    assert loader.replay(tmp_path) == []


def test_text_beyond_the_embedding_is_not_read(tmp_path):
    target = write_target(tmp_path / "target", tied=True, quantised=False)
    for token in (target.vocabulary_size, 10**9):
        with pytest.raises(ModelError, match="a token that is not below"):
            recapture(target, np.array([5, token, 7, 8], np.uint32), 2, 4)
