"""The requests of one loaded engine: which wait, which run, and what each round sends
to its client.

Every step runs one round of each running request, so that none starves; where that is cheaper, all
rounds in one target step. Lives on the MLX thread. Knows no sockets and no disk: messages go out
through `emit`.
"""

import time
from collections import deque
from collections.abc import Callable

from specl.daemons.inference.admission import admit, failure_code
from specl.daemons.inference.answer_messages import position_logprobs
from specl.daemons.inference.job import Job, RunningJob
from specl.daemons.inference.outgoing import Emit
from specl.shared.engine.core import EngineCore
from specl.shared.engine.decode import decode_rounds
from specl.shared.engine.text_output import TextOutput
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.messages import Ask, Delta, Failed, PrefillProgress, Queued
from specl.shared.settings.schema import Settings

NO_TOKEN = "ended before the first token"


class Scheduler:
    """`must_draft` says whether a round has to draft at least one token; `finished` is called with
    each request that ends with at least one token, after it has left `running`.
    """

    def __init__(
        self,
        engine: EngineCore,
        settings: Settings,
        emit: Emit,
        must_draft: Callable[[], bool],
        finished: Callable[["Scheduler", RunningJob], None],
    ) -> None:
        self.engine, self.settings = engine, settings
        self.waiting: deque[Job] = deque()
        self.running: list[RunningJob] = []
        self._emit, self._must_draft, self._finished = emit, must_draft, finished

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.running or self.waiting)

    @property
    def reserved(self) -> int:
        """Cache tokens that running requests may come to need."""
        return sum(running.job.reserved for running in self.running)

    # ------------------------------------------------------------------------------------------------ requests
    def add(self, peer: bytes, ask: Ask, arrived: float) -> None:
        """Queue a request, or refuse it."""
        try:
            job = admit(peer, ask, arrived, self.engine, self.settings)
        except SpecLoraError as error:
            self._emit(peer, Failed(ask.request_id, failure_code(error), str(error), error.hint))
            return
        self.waiting.append(job)
        if self.running:  # the positions of the others stay
            self._emit(peer, Queued(job.request_id, len(self.waiting) - 1))

    def cancel(self, request_id: str, reason: str, peer: bytes | None) -> None:
        """Stop a request; where `peer` is given, only if it is that client's."""
        for job in [job for job in self.waiting if job.request_id == request_id and peer in (None, job.peer)]:
            self.waiting.remove(job)
            self._emit(job.peer, Failed(request_id, FailureCode.CANCELLED, reason))
            self._send_positions()
        for running in list(self.running):
            if running.job.request_id == request_id and peer in (None, running.job.peer):
                self._finish(running, FailureCode.CANCELLED)

    def stop(self) -> None:
        """Tell every client that the daemon is stopping."""
        for job in [*(running.job for running in self.running), *self.waiting]:
            self._emit(job.peer, Failed(job.request_id, FailureCode.STOPPED, "the inference daemon is stopping"))

    def _send_positions(self) -> None:
        for position, job in enumerate(self.waiting):
            self._emit(job.peer, Queued(job.request_id, position))

    # ------------------------------------------------------------------------------------------------ one step
    def step(self, between: Callable[[], None]) -> None:
        """Start what fits, read a part of each new prompt, then run a round of every request whose
        prompt is read.

        `between` is called after each part of a prompt: it may add and cancel requests.
        """
        self._drop_expired()
        self.start_waiting()
        for running in list(self.running):
            if running not in self.running:  # cancelled while another request's prompt was read
                continue
            if running.job.expired:
                self._finish(running, FailureCode.DEADLINE)
            elif not running.prefilled:
                self._prefill(running)
                between()
        self._decode_round([running for running in self.running if running.prefilled])

    def _drop_expired(self) -> None:
        for job in [job for job in self.waiting if job.expired]:
            self.waiting.remove(job)
            self._emit(job.peer, Failed(job.request_id, FailureCode.DEADLINE, NO_TOKEN))
            self._send_positions()

    def start_waiting(self) -> None:
        """Start waiting requests, first come first served, as far as slots and cache tokens reach."""
        budget = self.settings.memory.max_kv_cache_tokens
        started = False
        while self.waiting and len(self.running) < self.settings.serving.max_active:
            job, reserved = self.waiting[0], self.reserved
            if self.running and reserved + job.reserved > budget:
                break
            self.waiting.popleft()
            # first, because it moves the prefix that it continues out of the prefix cache, where
            # that would count twice
            if self._start(job):
                started = True
                self.engine.prefixes.shrink(min(budget, reserved + job.reserved))
        if started and self.waiting:
            self._send_positions()

    def _start(self, job: Job) -> bool:
        try:
            session = self.engine.session(job.prompt, job.options)
        except SpecLoraError as error:
            self._emit(job.peer, Failed(job.request_id, failure_code(error), str(error), error.hint))
            return False
        text = TextOutput(session, tuple(job.ask.stop))
        adapter_id = self.engine.adapter_id
        self.running.append(RunningJob(job, session, text, adapter_id, adapter_id))
        return True

    def _prefill(self, running: RunningJob) -> None:
        """Read a part of a prompt; its client hears how far that is."""
        session, job = running.session, running.job
        running.prefilled = session.prefill()
        if not running.prefilled:
            self._emit(job.peer, PrefillProgress(job.request_id, session.state.cached, len(job.prompt)))

    def _decode_round(self, batch: list[RunningJob]) -> None:
        for running in batch:
            if self._must_draft():
                running.session.force_draft()
        decode_rounds([running.session for running in batch])
        for running in batch:
            self._send_round(running)

    def _send_round(self, running: RunningJob) -> None:
        """Send what a round has added to an answer."""
        if running.first_token_at is None:
            running.first_token_at = time.monotonic()
        running.adapter_id = self.engine.adapter_id
        new = running.text.read()
        if new.tokens:
            logprobs = position_logprobs(self.engine.target, new.tokens, new.logprobs)
            delta = Delta(running.job.request_id, new.text, new.tokens, new.sources, new.lengths, logprobs)
            self._emit(running.job.peer, delta)
        if running.session.finish_reason:
            self._finish(running)

    def _finish(self, running: RunningJob, ended_by: FailureCode | None = None) -> None:
        """End a request: the answer is complete, or `ended_by` cut it short."""
        self.running.remove(running)
        session, job = running.session, running.job
        if ended_by is not None:
            session.finish_reason = str(ended_by)
            running.text.finish()
        if session.output:
            self._finished(self, running)
            return
        self.keep_caches(running)
        self._emit(job.peer, Failed(job.request_id, ended_by or FailureCode.INTERNAL, NO_TOKEN))

    def keep_caches(self, running: RunningJob) -> None:
        """Give a request's caches to the prefix cache. Where the request must not be cached, return
        only the entry that it took from there.
        """
        session, job = running.session, running.job
        if not job.ask.record:
            self.engine.return_to_prefix_cache(session, self.reserved)
            return
        rendered = job.prompt_text + running.text.text if session.output else ""
        self.engine.save_to_prefix_cache(session, running.adapter_id, rendered, self.reserved)
