"""Foreign text on a terminal: control characters become visible escapes, so that nobody's text
moves the cursor, sets the clipboard or prints a faked line.

Knows characters, no terminal and no command.
"""

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

Shown = TypeVar("Shown")
# C0, DEL and C1 but newline and tab; and what turns the direction of the text behind it
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: object) -> str:
    """The text with every control character but newline and tab as an escape: `\\x1b`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(text).replace("\r\n", "\n"))


def all_visible(value: Shown) -> Shown:
    """A value with every text in it made `visible`: texts, lists, tuples, dicts and dataclasses."""
    return _all_visible(value)  # type: ignore[no-any-return]  # each branch keeps the type


def _all_visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_all_visible(item) for item in value)
    if isinstance(value, dict):
        return {_all_visible(name): _all_visible(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _all_visible(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **changed)
    return value
