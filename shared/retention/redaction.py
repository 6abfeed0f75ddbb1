"""What is kept of a generation when its text must not be stored: statistics alone, or the text with
parts replaced.

Token ids, the target's top-k and rejected drafts spell the text out as well as the text does. A
redacted record therefore loses them, and no draft can learn from it. Knows records and the settings
of `records`, nothing of files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specl.shared.conversations import is_hash_shaped, strings
from specl.shared.messaging.messages import Generation

if TYPE_CHECKING:
    from specl.shared.settings.schema import Records

REDACTED = "[redacted]"


@dataclass(frozen=True, slots=True)
class Redaction:
    """A record as it may be stored. `whole`: nothing was taken out, so its tokens and hidden states
    may be kept as well.
    """

    record: Generation
    whole: bool


class Redactor:
    """Applies the settings `records.keep` and `records.redact`. The patterns are compiled once."""

    def __init__(self, records: "Records") -> None:
        self.statistics_only = records.keep == "statistics"
        self._patterns = [re.compile(pattern) for pattern in records.redact]

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
        if any(pattern.search(text) for pattern in self._patterns for text in texts_of(record)):
            return Redaction(self._redacted(record), False)
        return Redaction(record, True)

    def _redacted(self, record: Generation) -> Generation:
        return replace(
            _without_tokens(record),
            conversation_id=record.id,
            messages=[self._replaced(message) for message in record.messages],
            prompt=self._replaced(record.prompt),
            output=self._replaced(record.output),
        )

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            for pattern in self._patterns:
                value = pattern.sub(REDACTED, value)
            return value
        if isinstance(value, dict):
            return {key: self._replaced(item) for key, item in value.items()}
        return [self._replaced(item) for item in value] if isinstance(value, list) else value


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
