"""The spool of hidden states: within its limit, private, and never outside its folder."""

import os
import stat

import numpy as np
import pytest

from specl.shared.retention.hidden_states import HiddenSpool

STATES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hidden").mkdir()
    return tmp_path / "hidden"


def test_spool_is_fp16_and_private(folder):
    spool = HiddenSpool(folder, 1 << 20)
    spool.write("a1b2", STATES)
    found = spool.read("a1b2")
    assert found.dtype == np.float16 and (found == STATES).all()
    assert stat.S_IMODE((folder / "a1b2.npy").stat().st_mode) == 0o600
    assert spool.read("missing") is None


def test_oldest_go_first_and_oversized_is_dropped(folder):
    size = 128 + STATES.size * 2  # numpy's header and fp16
    spool = HiddenSpool(folder, 5 * size)
    for number in range(8):
        spool.write(f"g{number}", STATES)
        os.utime(folder / f"g{number}.npy", (number, number))
    kept = sorted(path.stem for path in folder.iterdir())
    assert kept == [f"g{n}" for n in range(8 - len(kept), 8)] and 3 <= len(kept) <= 5
    spool.write("big", np.zeros((1000, 4)))
    assert spool.read("big") is None


def test_purging_forgets_these_and_no_others(folder):
    spool = HiddenSpool(folder, 1 << 20)
    for id in ("a", "b", "c"):
        spool.write(id, STATES)
    spool.purge(["a", "c", "never-there"])
    assert [path.name for path in folder.iterdir()] == ["b.npy"]
    assert HiddenSpool(folder, 1 << 20)._size == spool._size


ODD = [
    "../victim",
    "../hidden/../victim",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\..\\b",
    "a\0b",
    "x" * 300,
    ".hidden",
    "ä\n",
]


@pytest.mark.parametrize("id", ODD)
def test_an_id_that_points_elsewhere_reaches_nothing(folder, tmp_path, id):
    victim = tmp_path / "victim.npy"
    np.save(victim, STATES)
    (folder / "a").mkdir()
    np.save(folder / "a" / "b.npy", STATES)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    spool = HiddenSpool(folder, 1 << 20)
    spool.purge([id])
    spool.write(id, STATES * 2)
    assert spool.read(id) is None
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (np.load(victim) == STATES).all()


def test_an_absolute_id_reaches_nothing(folder, tmp_path):
    victim = tmp_path / "victim.npy"
    np.save(victim, STATES)
    HiddenSpool(folder, 1 << 20).purge([str(tmp_path / "victim")])
    assert victim.exists()


def test_link_in_the_spool_is_removed(folder, tmp_path):
    victim = tmp_path / "victim.npy"
    np.save(victim, STATES)
    (folder / "a.npy").symlink_to(victim)
    HiddenSpool(folder, 1 << 20).purge(["a"])
    assert victim.exists() and not (folder / "a.npy").is_symlink()


def test_truncated_file_is_no_states(folder):
    spool = HiddenSpool(folder, 1 << 20)
    spool.write("a1", STATES)
    whole = (folder / "a1.npy").read_bytes()
    for size in range(len(whole)):
        (folder / "a1.npy").write_bytes(whole[:size])
        assert spool.read("a1") is None
