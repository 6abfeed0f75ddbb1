"""A draft's folder appears whole or not at all: files go to a scratch folder beside it, which then takes its name.

Knows folders, nothing of what is in them. A process that dies leaves the old folder, or none, never half of one.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """The scratch folder to write into; it replaces `folder` at the end of the block, and is gone where that raises."""
    scratch, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
