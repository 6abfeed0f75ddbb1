"""What is left of a generation when its text must not be kept: statistics alone, or the text with parts blotted out.

Token ids, laws and rejected drafts spell the text out as well as the text does, so both drop them, and the draft cannot
learn from such a record. Knows records, nothing of files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specl.shared.conversations import is_hash_shaped
from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode
from specl.shared.messaging.messages import Envelope, Evaluation, Generation, Purge

if TYPE_CHECKING:
    from specl.shared.settings.schema import Records

REDACTED = "[redacted]"


class Redactor:
    """What the settings want kept. Patterns are compiled once."""

    def __init__(self, records: "Records") -> None:
        self.statistics_only = records.keep == "statistics"
        self._patterns = [re.compile(pattern) for pattern in records.redact]

    def apply(self, record: Generation) -> Generation:
        """`record` as it may be kept; the same object where nothing needs to go."""
        if self.statistics_only:
            return _without_text(record)
        if any(pattern.search(text) for pattern in self._patterns for text in _texts(record)):
            return self._redacted(record)
        return record

    def _redacted(self, record: Generation) -> Generation:
        bare = _without_tokens(record)
        return replace(
            bare,
            conversation_id=record.id,
            messages=[self._blot(message) for message in record.messages],
            prompt=self._blot(record.prompt),
            output=self._blot(record.output),
        )

    def _blot(self, value: Any) -> Any:
        if isinstance(value, str):
            for pattern in self._patterns:
                value = pattern.sub(REDACTED, value)
            return value
        if isinstance(value, dict):
            return {key: self._blot(item) for key, item in value.items()}
        return [self._blot(item) for item in value] if isinstance(value, list) else value


def _texts(record: Generation) -> Sequence[str]:
    found = [record.prompt, record.output, *strings(record.messages)]
    if record.conversation_id != record.id and not is_hash_shaped(record.conversation_id):  # a client's own name for it
        found.append(record.conversation_id)
    return found


def strings(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item


def typed_in(messages: Any) -> list[str]:
    """What users said in a conversation, message by message."""
    spoken = messages if isinstance(messages, list) else []
    return [
        text
        for message in spoken
        if isinstance(message, dict) and message.get("role") == "user"
        for text in strings(message.get("content"))
    ]


def _without_tokens(record: Generation) -> Generation:
    return replace(record, prompt_tokens=b"", output_tokens=b"", sources=b"", disagreements=[], top_k=None)


def _without_text(record: Generation) -> Generation:
    return replace(_without_tokens(record), conversation_id=record.id, messages=[], prompt="", output="")


def purge_matches(wish: Purge, row: Envelope) -> bool:
    """Whether a purge means this undelivered record: a generation by id, age or text, or what was found out about one."""
    if row.id in wish.ids:
        return True
    try:
        record = decode(row.body)
    except WireError:  # nobody can read it, so its bytes are all there is to go by
        return bool(wish.pattern) and wish.pattern.lower() in row.body.decode("utf-8", "replace").lower()
    if isinstance(record, Evaluation):
        return record.generation_id in wish.ids
    if not isinstance(record, Generation):
        return False
    old = wish.before is not None and record.created_at < wish.before
    # as the store compares: upper and lower case alike
    pattern = wish.pattern.lower()
    named = bool(pattern) and record.conversation_id.lower() == pattern
    return old or named or (bool(pattern) and any(pattern in text.lower() for text in _texts(record)))


def texts_of(row: Envelope) -> tuple[Sequence[str], Sequence[str]]:
    """Every text in an undelivered generation, and those of them that a user typed; none for other records."""
    try:
        record = decode(row.body)
    except WireError:
        return [], []
    return (_texts(record), typed_in(record.messages)) if isinstance(record, Generation) else ([], [])
