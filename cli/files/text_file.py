"""What people hand in as text: a file or standard input, read as UTF-8 whatever the locale, with or without a byte order mark.

A line ends at a newline and nowhere else: a form feed, U+0085 and U+2028 are characters of a prompt (`str.splitlines` ends lines
at each of them). What cannot be read is one sentence that names file and line.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from specl.shared.errors import ConfigError


def lines(file: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line of `file` (`-`: standard input), as they come. Raises ConfigError."""
    for number, line in _decoded(file):
        yield number, line.rstrip("\r\n")


def text(file: str) -> str:
    """All of `file` (`-`: standard input) with plain newlines. Raises ConfigError."""
    return "".join(line for _, line in _decoded(file)).replace("\r\n", "\n").replace("\r", "\n")


def _decoded(file: str) -> Iterator[tuple[int, str]]:
    name = "standard input" if file == "-" else file
    number = 0
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(Path(file).expanduser(), "rb") as source:
            for number, line in enumerate(source, 1):
                yield number, line.decode("utf-8" if number > 1 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}:{number}: not UTF-8 text (byte {error.start + 1} of the line)") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error


def parse_json(written: str) -> Any:
    """The value of a JSON text from outside. Raises ValueError, also for what Python's reader alone lets pass or dies of."""
    try:
        value = json.loads(written)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in written.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value
