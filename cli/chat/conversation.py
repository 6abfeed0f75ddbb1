"""A conversation of `chat`: its messages, all of which are sent each turn, and the totals of its
answers. Knows no terminal.
"""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specl.shared.answer_stats import AnswerTotals
from specl.shared.errors import SpecLoraError
from specl.shared.runtime.atomic_files import output_file


def totals_line(totals: AnswerTotals) -> str:
    """The totals of a conversation in one line, for people."""
    if not totals.answers:
        return "no answer yet"
    speed = f", {totals.tokens_per_second:.1f} tok/s" if totals.seconds else ""
    acceptance = "" if totals.acceptance is None else f" ({totals.acceptance:.2f})"
    return (
        f"{totals.answers} answers, {totals.tokens} tokens{speed}; by the draft model "
        f"{totals.accepted} of {totals.drafted} drafted accepted{acceptance}; "
        f"{totals.reused_prompt_tokens} of {totals.prompt_tokens} prompt tokens reused from turns before"
    )


@dataclass(slots=True)
class Conversation:
    """The messages of one conversation, and its id."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    totals: AnswerTotals = field(default_factory=AnswerTotals)

    def messages(self) -> list[dict[str, Any]]:
        """The messages to send: the system message, if there is one, and every turn."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def add_question(self, text: str) -> None:
        """Add the user's turn."""
        self.turns.append({"role": "user", "content": text})

    def add_answer(self, text: str) -> None:
        """Add the assistant's turn. Without text the question is removed instead, so that the roles
        keep alternating.
        """
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.remove_question()

    def remove_question(self) -> None:
        """Remove a question that has no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def reset(self) -> None:
        """Begin a new conversation with the same system message."""
        self.turns.clear()
        self.id, self.totals = uuid.uuid4().hex, AnswerTotals()

    def save(self, path: Path) -> None:
        """Write the conversation to `path`: `.json` and `.jsonl` as messages (one prompt of
        `collect`), others as Markdown.

        Raises SpecLoraError if the file cannot be written.
        """
        messages = self.messages()
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        elif path.suffix == ".jsonl":
            text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in messages)
        try:
            with output_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise SpecLoraError(f"{path} cannot be written: {error.strerror}") from error
