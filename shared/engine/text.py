"""Tokens to text as they come: never half a UTF-8 character, never part of a stop string. Knows nothing of models."""

from typing import Any

HOLD = "\ufffd"  # what decoders write for an incomplete character


class TextStream:
    """Text of a growing token list. `add` and `finish` return what became certain; `stopped` tells a stop string was met.

    The text is what decoding all tokens at once gives (the sliding window is that of HF's text-generation-inference).
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._context = self._read = self._ahead = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def _new_text(self, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        after = self._tokenizer.decode(self._tokens[self._context :])
        # only the last replacement character can still become another one
        incomplete = after.endswith(HOLD) and not final
        new = after[len(before) + self._ahead : len(after) - incomplete]
        if incomplete:
            self._ahead += len(new)
        elif new:
            self._context, self._read, self._ahead = self._read, len(self._tokens), 0
        return new

    def add(self, token: int) -> str:
        """Text that is certain after one more token; nothing once a stop string was met."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The rest: a character left incomplete becomes U+FFFD."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        self._held += new
        for stop in self._stop:
            if (place := self._held.find(stop)) >= 0:
                self._held, self.stopped = self._held[:place], True
        keep = 0 if final or self.stopped else self._partial_stop()
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        self.text += out
        return out

    def _partial_stop(self) -> int:
        """Characters at the end that may yet become a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
