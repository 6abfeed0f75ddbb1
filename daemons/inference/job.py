"""A request inside the daemon: `Job` while it waits, `RunningJob` while it is decoded. Values with
no behaviour of their own.
"""

import time
import uuid
from dataclasses import dataclass, field

from specl.shared.engine.decode import Session
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.text_output import TextOutput
from specl.shared.messaging.messages import Ask


@dataclass(slots=True)
class Job:
    """An admitted request. `reserved`: cache tokens that it may come to need; `arrived` is
    monotonic seconds.
    """

    peer: bytes
    ask: Ask
    arrived: float
    prompt_text: str
    prompt: list[int]
    options: RequestOptions
    reserved: int
    generation_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_at: float = field(default_factory=time.time)

    @property
    def request_id(self) -> str:
        """The id that the client gave the request."""
        return self.ask.request_id

    @property
    def expired(self) -> bool:
        """Whether the request's deadline has passed."""
        deadline = self.ask.deadline_s
        return deadline is not None and time.monotonic() - self.arrived > deadline


@dataclass(slots=True)
class RunningJob:
    """A request that is being decoded. `first_adapter_id` drafted its first round, `adapter_id` its
    latest.
    """

    job: Job
    session: Session
    text: TextOutput
    first_adapter_id: str
    adapter_id: str
    prefilled: bool = False
    first_token_at: float | None = None

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from arrival to the first token; 0 before it."""
        return 1000 * (self.first_token_at - self.job.arrived) if self.first_token_at else 0.0
