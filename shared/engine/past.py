"""A client's own past answers, for the n-gram drafter: people ask for the same kind of thing again.

One memory an owner, so that one client's text never drafts another's (who measures times could otherwise read it).
Bounded in tokens and owners, kept as one file an owner so that it survives a restart, and forgotten whole by a purge: it
would cost more to look for one answer's words than to gather new ones.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

MATCH = 3  # tokens that must be the same before anything is proposed
MOST_TRIED = 32  # places looked at for one match


class OwnAnswers:
    """Answers of one owner, at most `limit` tokens; beyond it the older half is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.texts: list[list[int]] = []
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(map(len, self.texts))

    def add(self, tokens: Sequence[int]) -> None:
        """Remember one answer."""
        text = [int(token) for token in tokens[: self.limit // 2]]
        if len(text) <= MATCH or text in self.texts[-8:]:
            return
        self.texts.append(text)
        self._index(len(self.texts) - 1)
        if self.tokens > self.limit:
            while self.tokens > self.limit // 2:
                self.texts.pop(0)
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


class PastAnswers:
    """Every owner's memory. `folder` None keeps nothing beyond the process; `tokenizer` names what the ids mean."""

    def __init__(self, folder: Path | None = None, tokenizer: str = "", limit: int = 32_768, owners: int = 64) -> None:
        self.folder, self.tokenizer, self.limit, self.owners = folder, tokenizer, limit, owners
        self._own: OrderedDict[str, OwnAnswers] = OrderedDict()

    def of(self, owner: str) -> OwnAnswers | None:
        """The memory of one owner; None for nobody in particular."""
        if not owner or not self.limit:
            return None
        if owner not in self._own:
            self._own[owner] = self._load(owner)
            while len(self._own) > self.owners:
                self._own.popitem(last=False)
        self._own.move_to_end(owner)
        return self._own[owner]

    def add(self, owner: str, tokens: Sequence[int]) -> None:
        """Remember an answer. Call `save` from where a disk may be waited for."""
        if (own := self.of(owner)) is not None:
            own.add(tokens)

    def texts(self, owner: str) -> list[list[int]]:
        """What is remembered of an owner, for `save`."""
        own = self.of(owner)
        return list(own.texts) if own is not None else []

    def forget(self) -> None:
        """Forget everything that is in memory."""
        self._own.clear()

    def purge(self) -> None:
        """Remove everything from the disk. With `forget` the purge hook of this room. Raises OSError."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def save(self, owner: str, texts: Sequence[Sequence[int]]) -> None:
        """Write an owner's memory whole, by rename; least recently written owners beyond the limit go. Raises OSError."""
        if self.folder is None or not owner:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lengths = [len(text) for text in texts]
        data = np.array([len(texts), *lengths, *(token for text in texts for token in text)], "<u4")
        path = self._path(owner)
        scratch = path.with_suffix(".partial")
        try:
            with open(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data.tobytes())
            os.rename(scratch, path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        for old in sorted(self._files(), key=lambda file: file.stat().st_mtime)[: -self.owners]:
            old.unlink(missing_ok=True)

    def _path(self, owner: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{self.tokenizer} {owner}'.encode()).hexdigest()[:24]}.u32"

    def _files(self) -> list[Path]:
        return list(self.folder.glob("*.u32")) + list(self.folder.glob("*.partial")) if self.folder is not None else []

    def _load(self, owner: str) -> OwnAnswers:
        own = OwnAnswers(self.limit)
        if self.folder is None:
            return own
        with suppress(OSError, ValueError, IndexError):  # a convenience: a damaged file is an empty memory
            data = np.frombuffer(self._path(owner).read_bytes(), "<u4").astype(np.int64)
            count = int(data[0])
            ends = np.cumsum(data[1 : 1 + count]) + 1 + count
            if len(ends) == count and count and ends[-1] == len(data):
                for text in np.split(data[1 + count :], ends[:-1] - 1 - count):
                    own.add(text.tolist())
        return own
