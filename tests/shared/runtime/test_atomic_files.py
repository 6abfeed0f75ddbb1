"""Files and folders that appear complete or not at all."""

import os
import stat
from pathlib import Path

import pytest

from specl.shared.runtime.atomic_files import atomic_dir, atomic_file, leftovers, output_file, write_file


@pytest.fixture
def disk_calls(monkeypatch):
    """The fsyncs (by name of the file) and renames that happen, in order."""
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def synced(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *names: calls.append("rename") or rename(*names))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    return calls


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "state.json"
    write_file(path, "old", sync=False)
    with atomic_file(path, sync=False) as file:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "half"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "state.json"
    write_file(path, "old", sync=False)
    with pytest.raises(OSError, match="disk"), atomic_file(path, sync=True) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_leftovers_are_the_scratch_files_of_one_path(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    with atomic_file(path, sync=False) as file, atomic_file(other, sync=False):
        assert [str(left) for left in leftovers(path)] == [file.name]
    assert leftovers(path) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_synced_file_reaches_disk_before_its_name(tmp_path, disk_calls):
    write_file(tmp_path / "measured", b"1", sync=False)
    assert disk_calls == ["rename"]
    disk_calls.clear()
    write_file(tmp_path / "state", b"1", sync=True)
    assert disk_calls == [f".state.{os.getpid()}.partial", "rename", tmp_path.name]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_synced_folder_reaches_disk_before_its_name(tmp_path, disk_calls):
    with atomic_dir(tmp_path / "model", sync=True) as scratch:
        (scratch / "deep").mkdir()
        for name in ("weights", "deep/config"):
            (scratch / name).write_text("x")
    assert set(disk_calls[:-2]) == {"weights", "config", "deep", ".model.partial"}
    assert disk_calls[-2:] == ["rename", tmp_path.name]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "draft"
    for content in ("old", "new"):
        with atomic_dir(folder, sync=False) as scratch:
            (scratch / "weights").write_text(content)
    with pytest.raises(RuntimeError), atomic_dir(folder, sync=False) as scratch:
        (scratch / "weights").write_text("half")
        raise RuntimeError
    assert (folder / "weights").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


# ---------------------------------------------------------------------------------------------------- a user's output
def test_output_is_private_and_complete(tmp_path):
    path = tmp_path / "a"
    with output_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_output_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    with output_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"


def test_output_to_a_pipe_or_device_replaces_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with output_file(path) as file:
            file.write(b"text")
        assert not path.is_file() and path.exists()
    assert os.read(reader, 9) == b"text"
    os.close(reader)
