"""A conversation as `chat` keeps it: the message list that is sent whole each turn, and what the answers cost. No terminal here."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.messages import Done


@dataclass(slots=True)
class Totals:
    """Over the answers of one conversation. Acceptance is the model drafter's alone."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    reused: int = 0
    prompt: int = 0

    def add(self, done: Done) -> None:
        """Count one answer."""
        stats = done.stats
        self.answers += 1
        self.tokens += done.tokens
        if stats.tokens_per_second:
            self.seconds += done.tokens / stats.tokens_per_second
        self.drafted += stats.model_drafted
        self.accepted += stats.model_accepted
        self.reused += stats.reused_prompt_tokens
        self.prompt += stats.prompt_tokens

    def line(self) -> str:
        """One line for a person."""
        if not self.answers:
            return "no answer yet"
        speed = f", {self.tokens / self.seconds:.1f} tok/s" if self.seconds else ""
        accepted = f"{self.accepted} of {self.drafted} drafted accepted"
        share = f" ({self.accepted / self.drafted:.2f})" if self.drafted else ""
        return (
            f"{self.answers} answers, {self.tokens} tokens{speed}; by the draft model {accepted}{share}; "
            f"{self.reused} of {self.prompt} prompt tokens reused from turns before"
        )


@dataclass(slots=True)
class Conversation:
    """Turns of one conversation, and its id."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    totals: Totals = field(default_factory=Totals)

    def messages(self) -> list[dict[str, Any]]:
        """What is sent: the system message, if any, and every turn."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(self, text: str) -> None:
        """The user's turn."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The assistant's turn; without any text the question is taken back, so that turns keep alternating."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.take_back()

    def take_back(self) -> None:
        """Forget a question that has no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.turns.clear()
        self.id, self.totals = uuid.uuid4().hex, Totals()

    def save(self, path: Path) -> None:
        """Write to `path`: `.json` and `.jsonl` get the messages (one prompt of `collect`), anything else Markdown.

        Raises SpecLoraError where that cannot be.
        """
        messages = self.messages()
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        elif path.suffix == ".jsonl":
            text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in messages)
        try:
            path.expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise SpecLoraError(f"{path} cannot be written: {error.strerror}") from error
