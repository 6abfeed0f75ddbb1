"""Files and folders that appear complete or not at all: content goes to a scratch name beside the
target, which is then renamed.

Knows names and the disk, nothing of contents. A process that is killed leaves the previous file or
folder, or none, never half of one; its scratch file may stay (`leftovers`).

Syncing has one rule. What another process or a restart relies on is synced (`sync=True`): first the
content, then the rename in its folder, so that it survives a power cut. What can be measured or
made again is not synced: a power cut may leave it empty, and its reader must take an unreadable
file for a missing one.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

ERASED_AT_ONCE = 1 << 20  # bytes


@contextmanager
def atomic_file(path: Path, *, sync: bool, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A scratch file to write into (its path is `.name`). It replaces `path` at the end of the
    block and is removed if that raises.

    `mode` passes through the umask. Raises OSError where the disk refuses.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    file = open(scratch, "wb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 - closed below
    try:
        with file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


def write_file(path: Path, data: bytes | str, *, sync: bool, mode: int = 0o600) -> None:
    """Replace `path` by a file with this content (text as UTF-8). Raises OSError; then `path` is as
    it was.

    Syncing: what another process or a restart relies on is synced with its folder; what can be
    measured or made again is not.
    """
    with atomic_file(path, sync=sync, mode=mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """A file that a user named for a command's output, readable by nobody else (0600).

    A regular file, or what a link leads to, appears complete or not at all. A device or a pipe is
    written to, never replaced. Raises OSError.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
    else:
        with atomic_file(path, sync=True) as file:
            yield file


def private_opener(name: str, flags: int) -> int:
    """For `open(..., opener=)`: a file that is made is readable by nobody else (0600)."""
    return os.open(name, flags, 0o600)


def erase_file(path: Path) -> None:
    """Overwrite a file's bytes on the disk, then remove it; a missing one is fine. A link is
    removed and what it points to is left alone. Raises OSError where it cannot be removed.
    """
    with suppress(OSError):  # what cannot be overwritten (a full or read-only disk) is still removed
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
                for start in range(0, status.st_size, ERASED_AT_ONCE):
                    file.write(bytes(min(ERASED_AT_ONCE, status.st_size - start)))
                file.flush()
                os.fsync(file.fileno())  # else the removal would overtake the zeros
    path.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """Scratch files for `path` whose writer was killed, or is still writing."""
    return list(path.parent.glob(f".{path.name}.*.partial"))


@contextmanager
def atomic_dir(folder: Path, *, sync: bool) -> Iterator[Path]:
    """A scratch folder to write into. It replaces `folder` at the end of the block and is removed
    if that raises.

    One writer at a time. Raises OSError where the disk refuses.
    """
    _, scratch, old = copies_of(folder)
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if sync:
            sync_tree(scratch)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if sync:
        sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copies_of(folder: Path) -> tuple[Path, Path, Path]:
    """`folder`, and the scratch folder and the previous folder that a kill inside `atomic_dir` can
    leave beside it.
    """
    return folder, folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


def sync_to_disk(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, as they are now. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync_to_disk` for everything below a folder, then for the folder. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        sync_to_disk(path)
