"""A client's own past answers, for the n-gram drafter: people ask for the same kind of thing again.

One memory an owner, so that one client's text never drafts another's (who measures times could otherwise read it).
Bounded in tokens and owners, kept as one file an owner so that it survives a restart, and forgotten whole by a purge: it
would cost more to look for one answer's words than to gather new ones. An answer's age is kept with it, so that retention
reaches it here, too.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from specl.shared.runtime.atomic_files import write_file

MATCH = 3  # tokens that must be the same before anything is proposed
MOST_TRIED = 32  # places looked at for one match
FORMAT = 0xA25E7502  # first number of a file: its second format
Answer = tuple[float, list[int]]  # when it was made (seconds since 1970), and its tokens


class ClientAnswers:
    """Answers of one owner, at most `limit` tokens; beyond it the older half is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.texts: list[list[int]] = []
        self.times: list[float] = []  # when each was made
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(map(len, self.texts))

    def add(self, tokens: Sequence[int], made_at: float) -> None:
        """Remember one answer."""
        text = [int(token) for token in tokens[: self.limit // 2]]
        if len(text) <= MATCH or text in self.texts[-8:]:
            return
        self.texts.append(text)
        self.times.append(made_at)
        self._index(len(self.texts) - 1)
        if self.tokens > self.limit:
            gone, tokens = 0, self.tokens
            while tokens > self.limit // 2:
                tokens -= len(self.texts[gone])
                gone += 1
            self._drop(gone)

    def expire(self, before: float) -> None:
        """Forget what was made before a moment."""
        # in order, but for a clock that was set back
        if old := [number for number, made_at in enumerate(self.times) if made_at < before]:
            self._drop(old[-1] + 1)

    def _drop(self, count: int) -> None:
        """Forget the first `count`."""
        del self.texts[:count], self.times[:count]
        self._places = {}
        for number in range(len(self.texts)):
            self._index(number)

    def _index(self, number: int) -> None:
        text = self.texts[number]
        for end in range(MATCH, len(text)):
            self._places.setdefault(tuple(text[end - MATCH : end]), []).append((number, end))

    def match(self, text: Sequence[int], most: int) -> tuple[list[int], int, int]:
        """The past answer that goes on from the longest end of `text`, where in it, and how many tokens are the same, at most
        `most`; the latest among equals. Length 0 where there is none.
        """
        best: tuple[list[int], int, int] = ([], 0, 0)
        for number, end in reversed(self._places.get(tuple(text[-MATCH:]), [])[-MOST_TRIED:]):
            past, length = self.texts[number], MATCH
            while length < min(most, end, len(text)) and past[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best[2]:
                best = past, end, length
            if length >= most:
                break
        return best


class AnswerHistory:
    """Every owner's memory. `folder` None keeps nothing beyond the process; `tokenizer` names what the ids mean."""

    def __init__(self, folder: Path | None = None, tokenizer: str = "", limit: int = 32_768, owners: int = 64) -> None:
        self.folder, self.tokenizer, self.limit, self.owners = folder, tokenizer, limit, owners
        self._own: OrderedDict[str, ClientAnswers] = OrderedDict()

    def of(self, client_id: str) -> ClientAnswers | None:
        """The memory of one owner; None for nobody in particular."""
        if not client_id or not self.limit:
            return None
        if client_id not in self._own:
            self._own[client_id] = self._load(client_id)
            while len(self._own) > self.owners:
                self._own.popitem(last=False)
        self._own.move_to_end(client_id)
        return self._own[client_id]

    def add(self, client_id: str, tokens: Sequence[int], made_at: float | None = None) -> None:
        """Remember an answer of now or then. Call `save` from where a disk may be waited for."""
        if (own := self.of(client_id)) is not None:
            own.add(tokens, time.time() if made_at is None else made_at)

    def texts(self, client_id: str) -> list[Answer]:
        """What is remembered of an owner, for `save`."""
        own = self.of(client_id)
        return list(zip(own.times, own.texts, strict=True)) if own is not None else []

    def expire(self, before: float) -> None:
        """Forget, in memory, every answer made before a moment."""
        for own in self._own.values():
            own.expire(before)

    def expire_files(self, before: float) -> None:
        """The same on the disk, whatever tokenizer a file is of. Raises OSError."""
        for path in self._files():
            answers = _read(path)
            kept = [answer for answer in answers if answer[0] >= before]
            if not kept or path.suffix != ".u32":
                path.unlink(missing_ok=True)
            elif len(kept) < len(answers):
                _write(path, kept)

    def forget(self) -> None:
        """Forget everything that is in memory."""
        self._own.clear()

    def purge(self) -> None:
        """Remove everything from the disk. With `forget` the purge hook of this room. Raises OSError."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def save(self, client_id: str, answers: Sequence[Answer]) -> None:
        """Write an owner's memory whole, by rename; least recently written owners beyond the limit go. Raises OSError."""
        if self.folder is None or not client_id:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._path(client_id), answers)
        for old in sorted(self._files(), key=lambda file: file.stat().st_mtime)[: -self.owners]:
            old.unlink(missing_ok=True)

    def _path(self, client_id: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{self.tokenizer} {client_id}'.encode()).hexdigest()[:24]}.u32"

    def _files(self) -> list[Path]:
        return list(self.folder.glob("*.u32")) + list(self.folder.glob("*.partial")) if self.folder is not None else []

    def _load(self, client_id: str) -> ClientAnswers:
        own = ClientAnswers(self.limit)
        if self.folder is None:
            return own
        for made_at, text in _read(self._path(client_id)):
            own.add(text, made_at)
        return own


def _write(path: Path, answers: Sequence[Answer]) -> None:
    """[FORMAT, how many, when each was made, how long each is, all tokens], by rename."""
    head = [FORMAT, len(answers), *(int(made_at) for made_at, _ in answers), *(len(text) for _, text in answers)]
    data = np.array([*head, *(token for _, text in answers for token in text)], "<u4")
    write_file(path, data.tobytes(), sync=False)


def _read(path: Path) -> list[Answer]:
    """A file's answers. A convenience: one that is damaged or of another format is an empty memory."""
    with suppress(OSError, ValueError, IndexError):
        data = np.frombuffer(path.read_bytes(), "<u4").astype(np.int64)
        count = int(data[1]) if data[0] == FORMAT else 0
        times, lengths, tokens = np.split(data[2:], [count, 2 * count])
        ends = np.cumsum(lengths)
        if len(ends) == count and count and ends[-1] == len(tokens):
            texts = np.split(tokens, ends[:-1])
            return [(float(made_at), text.tolist()) for made_at, text in zip(times, texts, strict=True)]
    return []
