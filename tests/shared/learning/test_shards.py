"""A shard is whole or it is made again: whatever a power cut has left of one, nobody stumbles over it twice."""

import errno
import os

import numpy as np
import pytest

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import Prompt
from specl.shared.learning.build_draft import BuildSettings
from specl.shared.learning.examples import Example
from specl.shared.learning.recapture import WrittenText, recapture
from specl.shared.training_files import captured_texts, draft_build, shards
from specl.shared.training_files.captured_texts import capture_texts
from specl.shared.training_files.shards import load_or_discard, read_arrays, save_shard
from specl.shared.training_files.target_texts import load_target_texts


def text(n, rows=3):
    rng = np.random.default_rng(n)
    tokens = rng.integers(4, 97, 4 + rows).astype(np.uint32)
    return Example(
        f"e{n}", tokens, 4, rng.integers(0, 97, (rows, 2)).astype(np.uint32), rng.normal(size=(rows, 2)).astype("f2"),
        np.ones(rows, np.float32), rng.normal(size=(3 + rows, 8)).astype("f2"), n % 2 == 0,
    )  # fmt: skip


def same(found, wanted):
    fields = ("tokens", "ids", "logprobs", "weights", "states")
    return [e.id for e in found] == [e.id for e in wanted] and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(found, wanted, strict=True)
        for name in fields
    )


def test_damaged_shard_is_removed_and_reported_once(tmp_path, capfd):
    path, texts = tmp_path / "a.npz", [text(0), text(1, 5)]
    save_shard(path, texts)
    assert same(load_or_discard(path), texts) and os.listdir(tmp_path) == ["a.npz"]
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        torn = (whole[:place], whole[:place] + bytes(len(whole) - place), whole[: place // 2] + whole[place // 2 + 1 :])
        for data in torn:
            path.write_bytes(data)
            said = []
            assert load_or_discard(path, said.append) is None and not path.exists()
            assert len(said) == 1 and "a.npz was damaged" in said[0] and "made again" in said[0]
    np.save(tmp_path / "a", np.zeros(3))
    os.rename(tmp_path / "a.npy", path)
    assert load_or_discard(path) is None and "a.npz was damaged" in capfd.readouterr().err
    assert load_or_discard(path) is None and capfd.readouterr().err == ""  # there is none: nothing to tell


def test_unreadable_shard_is_not_deleted(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_shard(path, [text(0)])
    for number in (errno.EMFILE, errno.EACCES):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(shards, "load_shard", refuse)
        with pytest.raises(OSError):
            load_or_discard(path)
    assert path.exists()


# ---------------------------------------------------------------------------------------------------- who reads them
def empty(path):
    path.write_bytes(b"")


def test_a_build_makes_its_torn_shards_again(stored, tmp_path, capfd):
    target, settings = stored(), BuildSettings(kind="layers", tokens=30, answer_tokens=5, top_k=4)
    prompts = [Prompt(f"p{n}", [5, 9, 40 + n]) for n in range(3)]
    groups = [lambda: prompts[:2], lambda: prompts[2:]]
    make = lambda: draft_build.generate(target, groups, tmp_path, "training", settings, np.inf, lambda progress: None)  # noqa: E731
    first = [shards.load_shard(path) for path in make()]
    paths = sorted(tmp_path.glob("training-*.npz"))
    empty(paths[0])
    made_at = paths[1].stat().st_mtime_ns
    assert all(same(shards.load_shard(path), texts) for path, texts in zip(make(), first, strict=True))
    assert "training-00000.npz was damaged" in capfd.readouterr().err and paths[1].stat().st_mtime_ns == made_at


def test_own_text_that_was_torn_is_captured_again(stored, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(captured_texts, "SHARD_TEXTS", 2)
    texts = [WrittenText(f"o{n}", np.arange(5, 20 + n).astype(np.uint32), 6, True) for n in range(4)]
    read = lambda: capture_texts(stored(), texts, tmp_path, 4, True, np.inf, lambda progress: None)  # noqa: E731
    first = read()
    paths = sorted(tmp_path.glob("own-*.npz"))
    empty(paths[0])
    assert same(read(), first) and "was damaged" in capfd.readouterr().err
    assert sorted(tmp_path.glob("own-*.npz")) == paths


@pytest.mark.parametrize("prompt, rows, left", [(600, 20, 20), (9, 700, 511), (2000, 30, 30), (4, 1300, 511)])
def test_long_user_text_captures_the_answers_end(stored, tmp_path, prompt, rows, left):
    tokens = np.random.default_rng(1).integers(4, 290, prompt + rows).astype(np.uint32)
    texts = [WrittenText("o", tokens, prompt, True), WrittenText("bare", tokens[:6], 5, True)]
    (found,) = capture_texts(stored(), texts, tmp_path, 4, True, np.inf, lambda progress: None)
    assert found.tokens.tolist() == tokens[-512:].tolist()
    assert found.rows == len(found.ids) == len(found.logprobs) == len(found.weights) == left
    states, ids, _ = recapture(stored(), tokens[-1024:], max(1, len(tokens[-1024:]) - left), 4)
    assert np.array_equal(found.states, states[-511:]) and np.array_equal(found.ids, ids)


def test_archive_that_unpacks_to_too_much_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, tokens=np.zeros(1 << 20, np.uint32))
    assert len(read_arrays(path)["tokens"]) == 1 << 20
    monkeypatch.setattr(shards, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(ValueError, match="it would unpack to 41"):
        read_arrays(path)
    with pytest.raises(ModelError, match="does not hold answers: it would unpack"):
        load_target_texts(path, "t0")
    assert load_or_discard(path, lambda message: None) is None
