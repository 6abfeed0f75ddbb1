"""Prompts out of a file, for `collect` and `eval`: text (one a line), JSON lines, a JSON list, or CSV with a header."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specl.cli.files import text_file
from specl.shared.errors import ConfigError

COLUMNS = ("prompt", "text", "question", "instruction", "input")
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # any other name is text
ROLES = ("system", "user", "assistant", "tool")
MOST_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """One prompt: where it stands (a line, or a place in a list) and what is sent."""

    line: int
    messages: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """A name for its content, the same in every run."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def read(file: str, column: str | None = None, limit: int | None = None) -> list[FilePrompt]:
    """The prompts in `file` (`-`: text from standard input), the first `limit` of them.

    Raises ConfigError that names file and line for what is no prompt, and for a file without any.
    """
    suffix = Path(file).suffix.lower()
    if suffix in (".csv", ".tsv"):
        found = _from_csv(file, text_file.text(file), column, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".ndjson", ".json"):
        found = _from_json(file, suffix == ".json", column)
    else:
        found = [FilePrompt(number, _user(line.strip())) for number, line in text_file.lines(file) if line.strip()]
    if not found:
        raise ConfigError(f"{file} has no prompts")
    return found[:limit]


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _from_csv(file: str, text: str, column: str | None, delimiter: str) -> list[FilePrompt]:
    before = csv.field_size_limit(max(len(text), 1))  # the default, 128 KB a field, is less than a long document
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        return list(_rows(file, reader, column))
    except csv.Error as error:
        raise ConfigError(f"{file}:{reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _rows(file: str, reader: csv.DictReader, column: str | None) -> Iterator[FilePrompt]:
    names = reader.fieldnames or []
    chosen = column or next((name for name in COLUMNS if name in names), names[0] if len(names) == 1 else None)
    if chosen not in names:
        hint = "name one with --column" if column is None else f"it has {', '.join(names) or 'no columns'}"
        raise ConfigError(f"{file} has no column {column or ' or '.join(COLUMNS[:3])}", hint)
    for row in reader:
        if (row[chosen] or "").strip():
            yield FilePrompt(reader.line_num, _user(row[chosen].strip()))


def _from_json(file: str, is_list: bool, column: str | None) -> list[FilePrompt]:
    found, problems = [], []
    for number, value in _values(file, is_list):
        try:
            found.append(
                FilePrompt(
                    number, to_messages(text_file.parse_json(value) if isinstance(value, str) else value[0], column)
                )
            )
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    refuse(problems)
    return found


def refuse(problems: list[str]) -> None:
    """Raises ConfigError that names the first few, if there are any."""
    if problems:
        more = f"\nand {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError("\n".join(problems[:MOST_PROBLEMS]) + more)


def _values(file: str, is_list: bool) -> Iterator[tuple[int, Any]]:
    """Lines as text, elements of a list as themselves in a tuple."""
    if not is_list:
        yield from ((number, line) for number, line in text_file.lines(file) if line.strip())
        return
    try:
        items = text_file.parse_json(text_file.text(file))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(items, list):
        raise ConfigError(f"{file} holds no list of prompts")
    yield from ((place, (item,)) for place, item in enumerate(items, 1))


def to_messages(value: Any, column: str | None = None) -> list[dict[str, Any]]:
    """The messages that a JSON value means: a string, or an object with messages or one of the known keys.

    Raises ValueError. Trailing answers are left out: the model is to write them.
    """
    if isinstance(value, str) and value.strip():
        return _user(value)
    if not isinstance(value, dict):
        raise ValueError("not a prompt: a string or an object is wanted")
    if column is None and "messages" in value:
        return _checked(value["messages"])
    name = column or next((name for name in COLUMNS if name in value), None)
    text = value.get(name) if name else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text under {column or 'prompt'!r}" if name else "no messages and no prompt in it")
    if name == "instruction" and isinstance(value.get("input"), str) and value["input"].strip():
        text = f"{text}\n\n{value['input']}"
    system = value.get("system")
    return ([{"role": "system", "content": system}] if isinstance(system, str) and system else []) + _user(text)


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is a list with at least one message")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"a message has a role ({', '.join(ROLES)}) and content that is text")
    kept = list(messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not any(message["role"] == "user" for message in kept):
        raise ValueError("messages without a user's message")
    return kept
