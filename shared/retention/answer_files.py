"""Clients' past answers as files, so that the n-gram drafter knows them after a restart.

A file is a convenience: a damaged one, or one of another format or tokenizer, counts as empty. A
purge removes all of them, because searching them for one answer's words would cost more than
gathering new ones.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from specl.shared.engine.answer_history import MAX_CLIENTS, PastAnswer
from specl.shared.runtime.atomic_files import erase_file, write_file

FORMAT = 0xA25E7502  # first number of a file: its second format


class AnswerFiles:
    """The files in `folder`. `tokenizer` is the fingerprint of the tokenizer whose ids they hold."""

    def __init__(self, folder: Path, tokenizer: str = "", clients: int = MAX_CLIENTS) -> None:
        self.folder, self.tokenizer, self.clients = folder, tokenizer, clients

    def read(self, client_id: str) -> list[PastAnswer]:
        """A client's answers; empty where there is no file that can be used."""
        return _read(self._path(client_id))

    def write(self, client_id: str, answers: Sequence[PastAnswer]) -> None:
        """Replace a client's file and remove the oldest beyond the limit. Raises OSError."""
        if not client_id:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._path(client_id), answers)
        for old in sorted(self._files(), key=lambda file: file.stat().st_mtime)[: -self.clients]:
            old.unlink(missing_ok=True)

    def expire(self, before: float) -> None:
        """Remove answers generated before a moment, of any tokenizer. Raises OSError."""
        for path in self._files():
            answers = _read(path)
            recent = [answer for answer in answers if answer[0] >= before]
            if not recent or path.suffix != ".u32":
                erase_file(path)
            elif len(recent) < len(answers):
                _write(path, recent)

    def purge(self) -> None:
        """Remove every file. Raises OSError."""
        for path in self._files():
            erase_file(path)

    def _path(self, client_id: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{self.tokenizer} {client_id}'.encode()).hexdigest()[:24]}.u32"

    def _files(self) -> list[Path]:
        return [*self.folder.glob("*.u32"), *self.folder.glob("*.partial")]


def _write(path: Path, answers: Sequence[PastAnswer]) -> None:
    """[FORMAT, count, when each was generated, the length of each, all tokens] as uint32, by
    rename.
    """
    head = [FORMAT, len(answers), *(_stamp(created) for created, _ in answers), *(len(text) for _, text in answers)]
    data = np.array([*head, *(token for _, text in answers for token in text)], "<u4")
    write_file(path, data.tobytes(), sync=False)


def _stamp(created: float) -> int:
    """A time as uint32, whatever a wrong clock says: 1970 at the earliest, 2106 at the latest."""
    return int(min(max(created, 0), 2**32 - 1))


def _read(path: Path) -> list[PastAnswer]:
    with suppress(OSError, ValueError, IndexError):
        data = np.frombuffer(path.read_bytes(), "<u4").astype(np.int64)
        count = int(data[1]) if data[0] == FORMAT else 0
        times, lengths, tokens = np.split(data[2:], [count, 2 * count])
        ends = np.cumsum(lengths)
        if len(ends) == count and count and ends[-1] == len(tokens):
            texts = np.split(tokens, ends[:-1])
            return [(float(created), text.tolist()) for created, text in zip(times, texts, strict=True)]
    return []
