"""Each client's past answers in memory, for the n-gram drafter: people ask similar things again.

One index a client, so that one client's text never drafts another's (whoever measures times could
otherwise read it). Bounded in tokens and clients. Knows no files: retention/answer_files.py reads
and writes them. Each answer has its age, so that retention applies to it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

MATCH = 3  # tokens that must be equal before anything is proposed
MAX_TRIED = 32  # positions looked at for one match
MAX_CLIENTS = 64
PastAnswer = tuple[float, list[int]]  # when it was generated (seconds since 1970), and its tokens
ReadAnswers = Callable[[str], Sequence[PastAnswer]]


class ClientAnswers:
    """The answers of one client, at most `limit` tokens; beyond it the older half is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.texts: list[list[int]] = []
        self.times: list[float] = []  # when each was generated
        self._ends: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # n-gram -> (text index, end in it)

    @property
    def tokens(self) -> int:
        """Tokens of all answers together."""
        return sum(map(len, self.texts))

    def add(self, tokens: Sequence[int], created_at: float) -> None:
        """Add one answer."""
        text = [int(token) for token in tokens[: self.limit // 2]]
        if len(text) <= MATCH or text in self.texts[-8:]:
            return
        self.texts.append(text)
        self.times.append(created_at)
        self._index(len(self.texts) - 1)
        if self.tokens > self.limit:
            dropped, remaining = 0, self.tokens
            while remaining > self.limit // 2:
                remaining -= len(self.texts[dropped])
                dropped += 1
            self._drop(dropped)

    def expire(self, before: float) -> None:
        """Forget what was generated before a moment."""
        # in order of time, except where a clock was set back
        if old := [index for index, created_at in enumerate(self.times) if created_at < before]:
            self._drop(old[-1] + 1)

    def _drop(self, count: int) -> None:
        """Forget the first `count` answers."""
        del self.texts[:count], self.times[:count]
        self._ends = {}
        for index in range(len(self.texts)):
            self._index(index)

    def _index(self, index: int) -> None:
        text = self.texts[index]
        for end in range(MATCH, len(text)):
            self._ends.setdefault(tuple(text[end - MATCH : end]), []).append((index, end))

    def match(self, text: Sequence[int], most: int) -> tuple[list[int], int, int]:
        """The past answer that contains the longest suffix of `text`, of at most `most` tokens.

        Returns the answer, the position after the match in it, and the length of the match; the
        latest wins among equals. Length 0 where there is no match.
        """
        best: tuple[list[int], int, int] = ([], 0, 0)
        for index, end in reversed(self._ends.get(tuple(text[-MATCH:]), [])[-MAX_TRIED:]):
            past, length = self.texts[index], MATCH
            while length < min(most, end, len(text)) and past[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best[2]:
                best = past, end, length
            if length >= most:
                break
        return best


class AnswerHistory:
    """The past answers of all clients. `read` gives what is stored of a client that is not in
    memory yet.

    `limit` bounds the tokens of each client (0 turns the history off), `clients` how many clients
    are in memory.
    """

    def __init__(
        self, read: ReadAnswers = lambda client_id: (), limit: int = 32_768, clients: int = MAX_CLIENTS
    ) -> None:
        self.limit, self.clients = limit, clients
        self._read = read
        self._by_client: OrderedDict[str, ClientAnswers] = OrderedDict()

    def of(self, client_id: str) -> ClientAnswers | None:
        """The answers of one client; None for an anonymous one."""
        if not client_id or not self.limit:
            return None
        if client_id not in self._by_client:
            answers = self._by_client[client_id] = ClientAnswers(self.limit)
            for created_at, tokens in self._read(client_id):
                answers.add(tokens, created_at)
            while len(self._by_client) > self.clients:
                self._by_client.popitem(last=False)
        self._by_client.move_to_end(client_id)
        return self._by_client[client_id]

    def add(self, client_id: str, tokens: Sequence[int], created_at: float | None = None) -> None:
        """Add an answer, by default one of now. Its file is written by whoever may wait for a disk."""
        if (answers := self.of(client_id)) is not None:
            answers.add(tokens, time.time() if created_at is None else created_at)

    def answers(self, client_id: str) -> list[PastAnswer]:
        """A client's answers with their times, for a file."""
        answers = self.of(client_id)
        return list(zip(answers.times, answers.texts, strict=True)) if answers is not None else []

    def expire(self, before: float) -> None:
        """Forget every answer that was generated before a moment."""
        for answers in self._by_client.values():
            answers.expire(before)

    def forget(self) -> None:
        """Forget every answer of every client."""
        self._by_client.clear()
