"""Shards: examples (text, top-k distributions, hidden states) in one .npz file, written whole; a
damaged one is made again.
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from specl.shared.learning.examples import Example
from specl.shared.models.report import Report, to_stderr
from specl.shared.runtime.atomic_files import atomic_file

# what numpy and zipfile raise for an empty, torn or foreign file
DAMAGED = (EOFError, BadZipFile, ValueError, KeyError, RuntimeError, TypeError)
MAX_UNPACKED = 4 << 30  # of one file: a shard of 32 texts with the states of a large target has less than 1 GiB
DAMAGED_ERRNO = (errno.EINVAL, errno.EIO)  # an offset beyond the file, a bad sector


def save_shard(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to one file, which appears whole."""
    arrays: dict[str, np.ndarray] = {
        "ids": np.array([example.id for example in examples]),
        "lengths": np.array([len(example.tokens) for example in examples]),
        "prompt_lengths": np.array([example.prompt_length for example in examples]),
        "greedy": np.array([example.greedy for example in examples]),
        "tokens": np.concatenate([example.tokens for example in examples]),
        "top_ids": np.concatenate([example.ids for example in examples]),
        "top_logprobs": np.concatenate([example.logprobs for example in examples]),
    }
    states = [example.states for example in examples if example.states is not None]
    if len(states) == len(examples):
        arrays["states"] = np.concatenate(states)
    with atomic_file(path, sync=True) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a .npz file. Raises one of DAMAGED or OSError; ValueError for one that would
    unpack to more than MAX_UNPACKED bytes.
    """
    with np.load(path, mmap_mode="r", allow_pickle=False) as file:
        if not isinstance(file, NpzFile) or file.zip is None:
            raise ValueError("it is no archive of arrays")
        size = sum(int(member.file_size) for member in file.zip.infolist())
        if size > MAX_UNPACKED:
            raise ValueError(f"it would unpack to {size} bytes")
        return {name: file[name] for name in file.files}


def load_shard(path: Path) -> list[Example]:
    """The examples of a shard. Raises one of DAMAGED or OSError for anything else."""
    arrays = read_arrays(path)
    examples, token, row, state = [], 0, 0, 0  # where the next example begins in each of the joined arrays
    lengths = zip(arrays["lengths"].tolist(), arrays["prompt_lengths"].tolist(), strict=True)
    for i, (length, prompt_length) in enumerate(lengths):
        rows = length - prompt_length
        examples.append(
            Example(
                str(arrays["ids"][i]),
                arrays["tokens"][token : token + length],
                prompt_length,
                arrays["top_ids"][row : row + rows],
                arrays["top_logprobs"][row : row + rows],
                np.ones(rows, np.float32),
                arrays["states"][state : state + length - 1] if "states" in arrays else None,
                bool(arrays["greedy"][i]),
            )
        )
        token, row, state = token + length, row + rows, state + length - 1
    return examples


def load_or_discard(path: Path, report: Report = to_stderr) -> list[Example] | None:
    """The examples of a shard, or None where there is no file. A damaged file is removed and
    `report` is told: its content can be made again. Raises OSError where the disk does not let the
    file be read.
    """
    try:
        return load_shard(path)
    except FileNotFoundError:
        return None
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DAMAGED_ERRNO:
            raise
        path.unlink(missing_ok=True)
        report(f"{path} was damaged ({type(error).__name__}: {error}) and is made again")
        return None
