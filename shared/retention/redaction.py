"""What is kept of a generation when its text must not be stored: statistics alone, or the text with
parts replaced.

Token ids, the target's top-k and rejected drafts spell the text out as well as the text does. A
redacted record therefore loses them, and no draft can learn from it. Knows records and the settings
of `records`, nothing of files.

A pattern may need time that grows with the square of a text, or worse. So a search is cut off, and
what could not be searched to its end is kept as statistics alone. The `regex` package lets other
threads run meanwhile; `re` would hold the interpreter's lock to the end.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specl.shared.conversations import is_hash_shaped, strings
from specl.shared.messaging.messages import Generation

if TYPE_CHECKING:
    from specl.shared.settings.schema import Records

REDACTED = "[redacted]"
SEARCH_S = 2.0  # for all patterns and texts of a record: an ordinary pattern needs some milliseconds


@dataclass(frozen=True, slots=True)
class Redaction:
    """A record as it may be stored. `whole`: nothing was taken out, so its tokens and hidden states
    may be kept as well. `timed_out`: the patterns took too long, so only statistics are left.
    """

    record: Generation
    whole: bool
    timed_out: bool = False


class _Deadline:
    """What is left of the time that one record's searches may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """In seconds. Raises TimeoutError where none is."""
        if (left := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        return left


class Redactor:
    """Applies the settings `records.keep` and `records.redact`. The patterns are compiled once."""

    def __init__(self, records: "Records") -> None:
        self.statistics_only = records.keep == "statistics"
        self._patterns = _compiled(records.redact) if records.redact else []

    @property
    def keeps_everything(self) -> bool:
        """Whether every record is whole, which is then known without `apply`."""
        return not self.statistics_only and not self._patterns

    def apply(self, record: Generation) -> Redaction:
        """What may be stored of `record`. It searches all texts for all patterns: never call it on
        the MLX thread.
        """
        if self.statistics_only:
            return Redaction(_without_text(record), False)
        deadline = _Deadline(SEARCH_S)
        try:
            if self._matches(record, deadline):
                return Redaction(self._redacted(record, deadline), False)
        except (TimeoutError, MemoryError):
            return Redaction(_without_text(record), False, timed_out=True)
        return Redaction(record, True)

    def _matches(self, record: Generation, deadline: _Deadline) -> bool:
        return any(
            pattern.search(text, timeout=deadline.left()) for pattern in self._patterns for text in texts_of(record)
        )

    def _redacted(self, record: Generation, deadline: _Deadline) -> Generation:
        return replace(
            _without_tokens(record),
            conversation_id=record.id,
            messages=[self._replaced(message, deadline) for message in record.messages],
            prompt=self._replaced(record.prompt, deadline),
            output=self._replaced(record.output, deadline),
        )

    def _replaced(self, value: Any, deadline: _Deadline) -> Any:
        if isinstance(value, str):
            for pattern in self._patterns:
                value = pattern.sub(REDACTED, value, timeout=deadline.left())
            return value
        if isinstance(value, dict):
            return {key: self._replaced(item, deadline) for key, item in value.items()}
        return [self._replaced(item, deadline) for item in value] if isinstance(value, list) else value


def _compiled(patterns: Sequence[str]) -> list[Any]:
    import regex  # only here: it takes longer to load than a command to run

    return [regex.compile(pattern) for pattern in patterns]


def texts_of(record: Generation) -> Sequence[str]:
    """Every text in a generation. A conversation id counts where a client chose it; a derived hash
    is no text.
    """
    texts = [record.prompt, record.output, *strings(record.messages)]
    if record.conversation_id != record.id and not is_hash_shaped(record.conversation_id):
        texts.append(record.conversation_id)
    return texts


def _without_tokens(record: Generation) -> Generation:
    return replace(record, prompt_tokens=b"", output_tokens=b"", sources=b"", disagreements=[], top_k=None)


def _without_text(record: Generation) -> Generation:
    return replace(_without_tokens(record), conversation_id=record.id, messages=[], prompt="", output="")
