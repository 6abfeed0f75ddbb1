"""One request as its client sees it, without I/O: what to send, how long to wait, what came, and when to give up.

`Client` (threads) and the gateway (asyncio) drive it: they send what `outgoing` returns, wait for messages for `wait_s` and
hand them to `feed` with the time. It reads no clock and knows no socket.
"""

from collections.abc import Callable, Sequence
from typing import Any

from specl.shared.errors import (
    START_HINT,
    ContextExceeded,
    DaemonUnreachable,
    RequestRejected,
    ServerBusy,
    SpecLoraError,
)
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.messages import (
    Ask,
    Cancel,
    Delta,
    Done,
    Failed,
    GetStatus,
    Heartbeat,
    PrefillProgress,
    Queued,
)

FIRST_ANSWER_S = 1.5  # a daemon that runs answers GetStatus at once, whatever it is doing
HEARTBEAT_S = 1.0
SILENCE_S = 20.0  # a daemon that runs answers GetStatus at once; one that died is back well before

Piece = Queued | PrefillProgress | Delta | Done


class AnswerStream:
    """`ask` from sending it at `now` to its end. `may_live` says whether the daemon's lock is held, or unknown.

    `ended` is true after Done or Failed; `error` then says why there is no answer, or no whole one.
    """

    def __init__(self, ask: Ask, now: float, may_live: Callable[[], bool]) -> None:
        self._request_id, self._may_live = ask.request_id, may_live
        self._heard_at = self._sent_at = self._fed_at = now
        self._heard = False
        # GetStatus is answered even while the models load: one deadline tells whether a daemon is there
        self._outgoing: list[Any] = [ask, GetStatus()]
        self.ended = False
        self.error: SpecLoraError | None = None

    @property
    def wait_s(self) -> float:
        """How long to wait for messages before `feed` is called with none."""
        return HEARTBEAT_S if self._heard else FIRST_ANSWER_S

    def outgoing(self) -> list[Any]:
        """What is to be sent now; each message once."""
        messages, self._outgoing = self._outgoing, []
        return messages

    def feed(self, messages: Sequence[Any], now: float) -> list[Piece]:
        """What `messages` say of this request, up to its end. Raises DaemonUnreachable once the daemon was silent too long."""
        # a reader that paused (Ctrl-Z, a slow consumer) did not listen meanwhile: that is no silence of the daemon
        paused, self._fed_at = now - self._fed_at - self.wait_s, now
        if paused > HEARTBEAT_S:
            self._heard_at += paused
        if messages:
            self._heard, self._heard_at = True, now
        else:
            self._check_silence(now)
            self._outgoing.append(GetStatus())
        pieces = self._pieces(messages)
        if not self.ended and now - self._sent_at >= HEARTBEAT_S:
            self._outgoing.append(Heartbeat(self._request_id))
            self._sent_at = now
        return pieces

    def leave(self) -> list[Any]:
        """What is to be sent by a client that waits no longer."""
        return [] if self.ended else [Cancel(self._request_id)]

    def _check_silence(self, now: float) -> None:
        if not self._heard or now - self._heard_at > SILENCE_S or not self._may_live():
            raise DaemonUnreachable("the inference daemon does not answer", START_HINT)

    def _pieces(self, messages: Sequence[Any]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            if (
                not isinstance(message, (Queued, PrefillProgress, Delta, Done, Failed))
                or message.request_id != self._request_id
            ):
                continue
            if isinstance(message, Failed):
                self.ended, self.error = True, error_of(message)
                break
            if isinstance(message, Done):
                self.ended = True
                if message.finish_reason == FailureCode.CANCELLED:  # this client would have left the stream
                    self.error = SpecLoraError(f"the answer was cut off after {message.tokens} tokens", "ask again")
                    break
            pieces.append(message)
            if self.ended:
                break
        return pieces


def error_of(failed: Failed) -> SpecLoraError:
    """The error that a client raises for a request without an answer."""
    match failed.code:
        case FailureCode.LOST | FailureCode.STOPPED:
            return DaemonUnreachable(failed.message, failed.hint or START_HINT)
        case FailureCode.BUSY:
            return ServerBusy(failed.message, failed.hint)
        case FailureCode.CONTEXT_LENGTH:
            return ContextExceeded(failed.message, failed.hint)
        case FailureCode.REJECTED:
            return RequestRejected(failed.message, failed.hint)
        case _:
            return SpecLoraError(failed.message, failed.hint)
