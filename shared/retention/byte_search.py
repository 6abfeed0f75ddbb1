"""A search for the bytes of many texts in many files at once. Knows texts and files, nothing of purges.

Every text is cut into pieces, as UTF-8 and as JSON writes it; the first eight bytes of all pieces are looked up at every offset
of a file at once. A remnant of 47 bytes holds at least one whole piece.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PIECE = 24  # bytes of text that are looked for as one: a remnant of twice that holds at least one
SHORTEST = 12  # shorter texts (`Yes.`) stand everywhere; they are removed like all, but their bytes prove nothing
MOST_PIECES = 500_000  # looked for at once: some 150 MiB
CHUNK = 1 << 20
ZEROS = bytes(CHUNK)

Pieces = dict[int, list[bytes]]  # by their first eight bytes


def portions_of(texts: Iterable[str], most: int = MOST_PIECES) -> Iterator[Pieces]:
    """What to look for: every text in pieces, about `most` at a time (a text is not divided)."""
    found: Pieces = {}
    seen: set[str] = set()
    total = 0
    for text in texts:
        if text in seen:
            continue
        seen.add(text)
        total += _cut(text, found)
        if total >= most:
            yield _once(found)
            found, total = {}, 0
            seen.clear()
    if found:
        yield _once(found)


def _cut(text: str, found: Pieces) -> int:
    """Put the pieces of a text into `found`; how many they are."""
    total = 0
    for form in _forms(text):
        data = form.encode()
        if len(data) < SHORTEST:
            continue
        for start in range(0, max(1, len(data) - PIECE + 1), PIECE):
            piece = data[start : start + PIECE]
            found.setdefault(int.from_bytes(piece[:8], "little"), []).append(piece)
            total += 1
    return total


def _once(found: Pieces) -> Pieces:
    return {head: list(dict.fromkeys(group)) for head, group in found.items()}


def _forms(text: str) -> set[str]:
    """A text as files hold it: as it is, in JSON, and as prompt-toolkit's history writes a message of several lines."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], text.replace("\n", "\n+")}


def count(pieces: Pieces) -> int:
    """How many there are to look for."""
    return sum(len(group) for group in pieces.values())


def leave_out(texts: Iterable[bytes], pieces: Pieces) -> None:
    """Forget the pieces that stand in any of `texts`."""
    first = heads(pieces)
    waiting, size = [], 0
    for item in texts:
        waiting.append(item)
        size += len(item)
        if size >= CHUNK:  # many at once: a look costs the same for little as for much
            left = count(pieces)
            leave_out_of(b"\0".join(waiting), first, pieces)
            first = first if count(pieces) == left else heads(pieces)
            waiting, size = [], 0
    leave_out_of(b"\0".join(waiting), first, pieces)


def leave_out_of(data: bytes, first: np.ndarray, pieces: Pieces) -> bool:
    """Forget those that stand in `data`; `first` are the `heads` of all. Always false: it chooses no record."""
    for head, piece in list(_hits(data, first, pieces)):
        pieces[head] = [other for other in pieces[head] if other != piece]
    return False


def files_with(files: Iterable[Path], pieces: Pieces) -> list[Path]:
    """Those of `files` that hold any piece."""
    first = heads(pieces)
    return [path for path in files if len(first) and _holds(path, first, pieces)]


def heads(pieces: Pieces) -> np.ndarray:
    """The first eight bytes of all pieces, in order."""
    return np.array(sorted(head for head, group in pieces.items() if group), np.uint64)


def _holds(path: Path, first: np.ndarray, pieces: Pieces) -> bool:
    try:
        with open(path, "rb") as file:
            tail = b""
            while chunk := file.read(CHUNK):
                # what a store has overwritten is most of it after a large purge
                data = tail + (chunk[:PIECE] if chunk == ZEROS else chunk)
                if next(_hits(data, first, pieces), None) is not None:
                    return True
                tail = data[-PIECE:]
    except FileNotFoundError:
        pass
    return False


def _hits(data: bytes, first: np.ndarray, pieces: Pieces) -> Iterator[tuple[int, bytes]]:
    """The pieces that stand in `data`: their first eight bytes are looked up at every offset at once."""
    if len(data) < 8 or not len(first):
        return
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    values = np.ascontiguousarray(windows).view("<u8").ravel()
    places = np.searchsorted(first, values)
    places[places == len(first)] = 0
    for offset in np.flatnonzero(first[places] == values).tolist():
        head = int(values[offset])
        for piece in pieces[head]:
            if data.startswith(piece, offset):
                yield head, piece


def holds(data: bytes, pieces: Pieces) -> bool:
    """Whether any piece stands in `data`."""
    return next(_hits(data, heads(pieces), pieces), None) is not None
