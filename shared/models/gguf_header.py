"""Walks a GGUF file's header once, with bounds, before any other reader believes a number in it.

Knows the layout (the GGUF specification, versions 2 and 3), no meaning of keys. Promises: memory
and time that follow the size of the file, and ModelError for what is not whole.
"""

import mmap
import struct
from pathlib import Path

from specl.shared.errors import ModelError

MAX_TEXT = 4 << 20  # bytes of one text (chat templates, licences)
MAX_NAME = 1 << 16  # bytes of a key (the specification's limit) or of a tensor's name
MAX_PIECE = 1024  # bytes of a text in a list: tokens, merges, tags (the longest known token has 256)
MAX_MEMBERS = 1 << 21  # of all lists together; a vocabulary of 262,144 has 1.3 million with its merges
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of numbers by their type
HINT = "if it was downloaded, download it again: its end may be missing"


def check_header(path: Path) -> None:
    """Raises ModelError for a header that does not fit into the file or exceeds a bound, OSError
    where the file cannot be read.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).walk()
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path} is not a whole GGUF file", HINT) from error


class _Walk:
    """A position in the header. Everything raises ValueError or struct.error at the first thing
    that is wrong.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.order, self.members = data, 0, "<", 0

    def walk(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("no GGUF file")
        self.position = 4
        (version,) = struct.unpack("<I", self.take(4))
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
        tensors, keys = self.number("Q"), self.number("Q")
        for _ in range(keys):
            self.skip_text(MAX_NAME)
            self.skip_value(self.number("I"))
        for _ in range(tensors):
            self.skip_tensor()

    def take(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        return self.data[start : self.position]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise ValueError("it ends too early")
        self.position += size

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(self.order + kind, self.take(struct.calcsize(kind)))
        return int(value)

    def skip_text(self, limit: int) -> None:
        size = self.number("Q")
        if size > limit:
            raise ValueError(f"a text of {size} bytes")
        self.skip(size)

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self.skip_text(MAX_TEXT)
        elif kind == ARRAY:
            self.skip_list()
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value of type {kind}")

    def skip_list(self) -> None:
        """Lists of lists are refused: no known key has one."""
        kind, count = self.number("I"), self.number("Q")
        self.members += count
        if self.members > MAX_MEMBERS:
            raise ValueError(f"{self.members} members in lists")
        if kind == STRING:
            for _ in range(count):
                self.skip_text(MAX_PIECE)
        elif kind in SIZES:
            self.skip(count * SIZES[kind])
        else:
            raise ValueError(f"a list of type {kind}")

    def skip_tensor(self) -> None:
        self.skip_text(MAX_NAME)
        count = self.number("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {count} dimensions")
        sides = [self.number("Q") for _ in range(count)]
        size = 1
        for side in sides:
            size *= side
        if not 0 < size <= 32 * len(self.data):  # no known type has less than a bit for each two weights
            raise ValueError(f"a tensor of {sides}")
        self.skip(4 + 8)  # type and place
