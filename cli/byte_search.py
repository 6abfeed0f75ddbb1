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
MOST_PIECES = 500_000
CHUNK = 1 << 20

Pieces = dict[int, list[bytes]]  # by their first eight bytes


def pieces_of(texts: Iterable[str]) -> Pieces:
    """What to look for: every text in pieces, as UTF-8 and as JSON writes it."""
    found: Pieces = {}
    total = 0
    for text in sorted(texts):
        for form in _forms(text):
            data = form.encode()
            if len(data) < SHORTEST or total >= MOST_PIECES:
                continue
            for start in range(0, max(1, len(data) - PIECE + 1), PIECE):
                piece = data[start : start + PIECE]
                found.setdefault(int.from_bytes(piece[:8], "little"), []).append(piece)
                total += 1
    return {head: list(dict.fromkeys(group)) for head, group in found.items()}


def _forms(text: str) -> set[str]:
    """A text as files hold it: as it is, in JSON, and as prompt-toolkit's history writes a message of several lines."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], text.replace("\n", "\n+")}


def count(pieces: Pieces) -> int:
    """How many there are to look for."""
    return sum(len(group) for group in pieces.values())


def leave_out(data: bytes, pieces: Pieces) -> bool:
    """Forget the pieces that stand in `data`. Always false: it chooses no record."""
    for head, piece in list(_hits(data, _heads(pieces), pieces)):
        pieces[head] = [other for other in pieces[head] if other != piece]
    return False


def files_with(files: Iterable[Path], pieces: Pieces) -> list[Path]:
    """Those of `files` that hold any piece."""
    heads = _heads(pieces)
    return [path for path in files if len(heads) and _holds(path, heads, pieces)]


def _heads(pieces: Pieces) -> np.ndarray:
    return np.array(sorted(pieces), np.uint64)


def _holds(path: Path, heads: np.ndarray, pieces: Pieces) -> bool:
    try:
        with open(path, "rb") as file:
            tail = b""
            while chunk := file.read(CHUNK):
                data = tail + chunk
                if next(_hits(data, heads, pieces), None) is not None:
                    return True
                tail = data[-PIECE:]
    except FileNotFoundError:
        pass
    return False


def _hits(data: bytes, heads: np.ndarray, pieces: Pieces) -> Iterator[tuple[int, bytes]]:
    """The pieces that stand in `data`: their first eight bytes are looked up at every offset at once."""
    if len(data) < 8 or not len(heads):
        return
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    values = np.ascontiguousarray(windows).view("<u8").ravel()
    places = np.searchsorted(heads, values)
    places[places == len(heads)] = 0
    for offset in np.flatnonzero(heads[places] == values).tolist():
        head = int(values[offset])
        for piece in pieces[head]:
            if data.startswith(piece, offset):
                yield head, piece


def holds(data: bytes, pieces: Pieces) -> bool:
    """Whether any piece stands in `data`."""
    return next(_hits(data, _heads(pieces), pieces), None) is not None
