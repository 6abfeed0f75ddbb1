"""Text from a file or standard input: UTF-8 whatever the locale, with or without a byte order mark;
and JSON in such text.

A line ends at a newline and nowhere else. A form feed, U+0085 and U+2028 are characters of a
prompt, although `str.splitlines` ends lines at them. Text that cannot be read is an error of one
sentence, which names file and line.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from specl.shared.errors import ConfigError

STDIN = "-"


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line of `file` (`-`: standard input), as they arrive.
    Raises ConfigError.
    """
    for number, line in _decode(file):
        yield number, line.rstrip("\r\n")


def read_text(file: str) -> str:
    """All of `file` (`-`: standard input) with plain newlines. Raises ConfigError."""
    return "".join(line for _, line in _decode(file)).replace("\r\n", "\n").replace("\r", "\n")


def _decode(file: str) -> Iterator[tuple[int, str]]:
    name = "standard input" if file == STDIN else file
    number = 0
    try:
        with nullcontext(sys.stdin.buffer) if file == STDIN else open(Path(file).expanduser(), "rb") as source:
            for number, line in enumerate(source, 1):
                yield number, line.decode("utf-8" if number > 1 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}:{number}: not UTF-8 text (byte {error.start + 1} of the line)") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for deep nesting and for half a surrogate
    pair.

    Python's own reader lets the latter pass, and it raises RecursionError for the former.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value
