"""Reads texts to import from JSON lines in the documented shape: id, prompt, target_output,
acceptance_rate, timestamp, disagreements.

A file with any bad line is refused as a whole, and the bad lines are named. Knows nothing of models
and of the store.
"""

import hashlib
import re
import time
from datetime import UTC, datetime
from typing import Any

from specl.cli.files.prompts import raise_problems
from specl.cli.files.text import parse_json, read_lines
from specl.shared.learning.imported_texts import ImportedText
from specl.shared.messaging.messages import Disagreement

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # ids become file names


def read_texts(file: str) -> list[ImportedText]:
    """Every line of `file` (`-`: standard input). Raises ConfigError that names the bad lines; then
    nothing is imported.
    """
    texts: dict[str, ImportedText] = {}
    problems: list[str] = []
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            parsed = parse(line)
            texts[parsed.id] = parsed
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    raise_problems(problems, "nothing was imported")
    return list(texts.values())


def parse(line: str) -> ImportedText:
    """One line. Raises ValueError with what is wrong with it."""
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    prompt, output = _text(value, "prompt"), _text(value, "target_output")
    rate = value.get("acceptance_rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1):
        raise ValueError(f"acceptance_rate is a share from 0 to 1, not {rate!r}")
    id = value.get("id") or hashlib.sha256(f"{prompt}\0{output}".encode()).hexdigest()[:32]
    if not _ID.fullmatch(str(id)):
        raise ValueError(f"an id has letters, digits, _ and -, at most 128 of them, not {str(id)[:40]!r}")
    lines = value.get("disagreements") or []
    if not isinstance(lines, list):
        raise ValueError("disagreements is a list")
    disagreements = [_disagreement(item) for item in lines]
    return ImportedText(
        str(id), prompt, output, float(rate) if rate is not None else None, _time(value.get("timestamp")), disagreements
    )


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} is missing or no text")
    return text


def _time(value: Any) -> float:
    if value is None:
        return time.time()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 250_000_000_000:
        return float(value)
    try:
        parsed = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"timestamp is a time like 2026-01-31T12:00:00Z, not {value!r}") from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _disagreement(value: Any) -> Disagreement:
    try:
        return Disagreement(
            position=int(value["position"]),
            draft_token=int(value["draft_token"]),
            target_token=int(value["target_token"]),
            draft_text="",
            target_text="",
            draft_confidence=float(value["draft_confidence"]),
            target_confidence=float(value["target_confidence"]),
            drafter="imported",
            depth=0,
            context_tokens=[int(token) for token in value.get("context_tokens", [])],
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"a disagreement cannot be read: {error!r}") from None
