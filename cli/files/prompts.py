"""Prompts in a file: text (one a line), JSON lines, a JSON list, or CSV with a header. Used by
`collect`, `eval` and `draft build`.

Knows the forms of prompts, nothing of what becomes of them. All problems of a file are collected
and raised together.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specl.cli.files.text import parse_json, read_lines, read_text
from specl.shared.conversations import read_messages
from specl.shared.errors import ConfigError

COLUMNS = ("prompt", "text", "question", "instruction", "input")
MORE_ROLES = ("tool",)  # beside those that a request may have: a file may hold what an agent did
OTHER_DELIMITERS = (";", "\t", "|")  # of a .csv file whose head has no comma
MOST_PROBLEMS = 5  # named in an error; more are counted


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """One prompt: its number in the file (of a line, or in a list) and its chat messages."""

    line: int
    messages: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """A hash of the messages, equal in every run."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(
    file: str, column: str | None = None, limit: int | None = None, *, json_in_text: bool = False
) -> list[FilePrompt]:
    """The prompts in `file` (`-`: text from standard input), the first `limit` of them. The suffix
    of its name decides the form.

    `column` is the column (CSV) or key (JSON) that holds the prompt. With `json_in_text` a line of
    a text file that begins with `{` is JSON. Raises ConfigError, which names file and line, for
    what is no prompt, and for a file without any.
    """
    suffix = Path(file).suffix.lower()
    if suffix in (".csv", ".tsv"):
        prompts = _from_csv(file, read_text(file), column, "\t" if suffix == ".tsv" else ",")
    else:
        prompts = _from_values(file, _values(file, suffix, json_in_text), column)
    if not prompts:
        raise ConfigError(f"{file} has no prompts")
    return prompts[:limit]


def raise_problems(problems: Sequence[str], hint: str = "") -> None:
    """Raise ConfigError that names the first few problems and counts the rest, if there are any."""
    if problems:
        more = f"\nand {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError("\n".join(problems[:MOST_PROBLEMS]) + more, hint)


def _user_message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------- CSV
def _from_csv(file: str, text: str, column: str | None, delimiter: str) -> list[FilePrompt]:
    delimiter = _delimiter(text, delimiter)
    limit = csv.field_size_limit(max(len(text), 1))  # the default of 128 KB a field is less than a long document
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        return list(_rows(file, reader, column))
    except csv.Error as error:
        raise ConfigError(f"{file}:{reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _delimiter(text: str, usual: str) -> str:
    """What divides the columns. Spreadsheets write semicolons where a comma is the decimal sign,
    and tabs; the head tells.
    """
    head = next((line for line in text.split("\n") if line.strip()), "")
    if usual != "," or usual in head:
        return usual
    return next((sign for sign in OTHER_DELIMITERS if sign in head), usual)


def _rows(file: str, reader: "csv.DictReader[str]", column: str | None) -> Iterator[FilePrompt]:
    names = reader.fieldnames or []
    chosen = column or next((name for name in COLUMNS if name in names), names[0] if len(names) == 1 else None)
    if chosen not in names:
        hint = "name one with --column" if column is None else f"it has {', '.join(names) or 'no columns'}"
        raise ConfigError(f"{file} has no column {column or ' or '.join(COLUMNS[:3])}", hint)
    for row in reader:
        if (row[chosen] or "").strip():
            yield FilePrompt(reader.line_num, _user_message(row[chosen].strip()))


# ------------------------------------------------------------------------------------ text and JSON
@dataclass(frozen=True, slots=True)
class _Value:
    """A prompt before it is checked: `json` is a JSON text still to be parsed, or `value` is the
    parsed value.
    """

    line: int
    value: Any = None
    json: str | None = None


def _values(file: str, suffix: str, json_in_text: bool) -> Iterator[_Value]:
    """The lines of a text file or of JSON lines, or the elements of a JSON list."""
    if suffix == ".json":
        yield from (_Value(number, item) for number, item in enumerate(_json_list(file), 1))
        return
    for number, line in read_lines(file):
        if line.strip():
            is_json = suffix in (".jsonl", ".ndjson") or (json_in_text and line.lstrip().startswith("{"))
            yield _Value(number, json=line) if is_json else _Value(number, line.strip())


def _json_list(file: str) -> list[Any]:
    try:
        items = parse_json(read_text(file))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(items, list):
        raise ConfigError(f"{file} holds no list of prompts")
    return items


def _from_values(file: str, values: Iterator[_Value], column: str | None) -> list[FilePrompt]:
    prompts, problems = [], []
    for item in values:
        try:
            value = parse_json(item.json) if item.json is not None else item.value
            prompts.append(FilePrompt(item.line, to_messages(value, column)))
        except ValueError as error:
            problems.append(f"{file}:{item.line}: {error}")
    raise_problems(problems)
    return prompts


def to_messages(value: Any, column: str | None = None) -> list[dict[str, Any]]:
    """The chat messages of a JSON value: a text, or an object with `messages` or with one of the
    known keys.

    Assistant messages at the end are left out, because the model is to write them. Raises
    ValueError.
    """
    if isinstance(value, str) and value.strip():
        return _user_message(value)
    if not isinstance(value, dict):
        raise ValueError("not a prompt: a string or an object is wanted")
    if column is None and "messages" in value:
        return _check_messages(value["messages"])
    name = column or next((name for name in COLUMNS if name in value), None)
    text = value.get(name) if name else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text under {column or 'prompt'!r}" if name else "no messages and no prompt in it")
    if name == "instruction" and isinstance(value.get("input"), str) and value["input"].strip():
        text = f"{text}\n\n{value['input']}"
    system = value.get("system")
    return ([{"role": "system", "content": system}] if isinstance(system, str) and system else []) + _user_message(text)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    prompt = read_messages(messages, MORE_ROLES)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not any(message["role"] == "user" for message in prompt):
        raise ValueError("messages without a user's message")
    return prompt
