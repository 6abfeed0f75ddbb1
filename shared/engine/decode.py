"""The round loop of one request: draft, verify at once, keep what stands. Two caches exactly in step with the text.

After every round the target's cache holds the text less its last token, which is the first row of the next verification;
drafters are told how the text grew and the states it was predicted from. Knows nothing of queues, sockets or records.

Sources: Leviathan et al. 2023 (arXiv 2211.17192); the sync rules that mlx-lm's loop leaves to its caller are in FACTS.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import trim_prompt_cache

from specl.shared.engine.acceptance import Verdict, block, coupled, greedy, rejection
from specl.shared.engine.answer_history import ClientAnswers
from specl.shared.engine.capture import Capture, RejectedDraft, TokenLogprobs, told
from specl.shared.engine.costs import AcceptanceEstimate, DraftLengthPolicy, DraftStopPolicy
from specl.shared.engine.drafters import NOTHING, Draft, Drafter, DraftSampler, NgramDrafter
from specl.shared.engine.sampling import distribution, position_noise
from specl.shared.models.language_model import FEW_ROWS, LanguageModel
from specl.shared.sampling_params import SamplingParams

PREFILL_ROWS = 512
SOURCES = {"target": 0, "model": 1, "ngram": 2}
NGRAM_DEPTH = 15  # 16 rows: a long copy is worth a wide check, and the costs say when


@dataclass(frozen=True, slots=True)
class Options:
    """What one request wants. `num_draft_tokens` None lets costs decide; `capture_k` 0 keeps aggregates only;
    `client_id` is whose past answers may draft this one. `logprobs` tells the client each token's and so many alternatives'.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 512
    num_draft_tokens: int | None = None
    ngram: bool = True
    capture_k: int = 0
    client_id: str = ""
    logprobs: int | None = None


@dataclass(slots=True)
class Tally:
    """What happened, for the statistics. Lists by depth count from the first drafted token; model drafter only.

    `drafted` counts every token that was proposed. Lists by depth and `rejected` count what the rule looked at: not what lay
    behind a refused token, nor behind the end of the answer, or short answers would speak ill of a draft that is never wrong.
    """

    rounds: int = 0
    drafted: dict[str, int] = field(default_factory=lambda: {"model": 0, "ngram": 0})
    accepted: dict[str, int] = field(default_factory=lambda: {"model": 0, "ngram": 0})
    rejected: int = 0
    tested_by_depth: list[int] = field(default_factory=lambda: [0] * 16)
    accepted_by_depth: list[int] = field(default_factory=lambda: [0] * 16)
    k_histogram: dict[int, int] = field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reused_tokens: int = 0

    def count(self, drafter: str, drafted: int, judged: int, accepted: int) -> None:
        """One round; of its drafts the rule could look at the first `judged`."""
        self.rounds += 1
        self.k_histogram[drafted] = self.k_histogram.get(drafted, 0) + 1
        if not drafted:
            return
        self.drafted[drafter] += drafted
        self.accepted[drafter] += accepted
        self.rejected += accepted < judged
        if drafter == "model":
            for depth in range(min(judged, accepted + 1)):
                self.tested_by_depth[depth] += 1
                self.accepted_by_depth[depth] += depth < accepted


@dataclass(frozen=True, slots=True)
class PrefixOrigin:
    """Whose text a state held before a request took it: see prefix.Entry."""

    adapter_id: str
    rendered: str
    said: int


@dataclass(slots=True)
class State:
    """What a request holds between rounds, and what outlives it in the prefix cache.

    `cached` counts the tokens of `text` that are in the target's cache; `states` has the target's normed hidden state of
    each of them, [n, hidden] pieces in order, where the draft reads states (else None). `lent`: what the prefix cache knew
    it as, where it was moved out of there.
    """

    text: list[int]
    cache: list[Any]
    drafter: Drafter | None
    states: list[mx.array] | None = None
    cached: int = 0
    lent: PrefixOrigin | None = None

    def keep_states(self, count: int) -> None:
        """Only the first `count` states still stand."""
        if self.states:
            self.states = [mx.concatenate(self.states)[:count]] if count else []


class Session:
    """One request. Call `prefill` until it returns True, then `round` until `finish_reason` is set."""

    def __init__(
        self,
        target: LanguageModel,
        state: State,
        prompt: Sequence[int],
        options: Options,
        chooser: DraftLengthPolicy,
        ngram_estimate: AcceptanceEstimate,
        past: ClientAnswers | None = None,
    ) -> None:
        self.target, self.state, self.options = target, state, options
        self.chooser, self.ngram_estimate = chooser, ngram_estimate
        self.prompt_length = len(prompt)
        self.output: list[int] = []
        self.sources = bytearray()
        self.finish_reason: str | None = None
        self.tally = Tally(reused_tokens=state.cached)
        self.capture = Capture(options.capture_k) if options.capture_k else None
        self.told: list[TokenLogprobs] = []  # one an output token, where they were asked for
        self._limit = min(options.max_tokens, target.context_length - len(prompt))
        self._ngram = NgramDrafter(past) if options.ngram else None
        rng = np.random.default_rng()
        seed = options.sampling.seed
        noise = None
        if seed is not None and not options.sampling.greedy:
            noise = lambda i: position_noise(seed, len(self.output) + i, self._vocabulary)  # noqa: E731
        self._draw = DraftSampler(options.sampling, rng.random, noise)
        self._stopper: DraftStopPolicy | None = None
        self._match = 0  # tokens of this round's n-gram match
        self._ngram_here = ngram_estimate.copy()  # requests differ: one copies, the next only resembles
        self._vocabulary = int(target.config["vocab_size"])
        state.text.extend(prompt[len(state.text) :])
        if self._ngram is not None:
            self._ngram.extend(state.text, None)

    # ------------------------------------------------------------------------------------------------ prompt
    def prefill(self) -> bool:
        """Feed one chunk of the prompt; True once all but its last token are in the caches."""
        start = time.perf_counter()
        state = self.state
        end = min(len(state.text) - 1, state.cached + PREFILL_ROWS)
        if end > state.cached:
            rows = self.target.prefill(state.text[state.cached : end], state.cache)
            state.cached = end
            self._take_states(rows)
        done = state.cached >= len(state.text) - 1
        if done:
            self._tell_drafter()
        self.tally.prefill_s += time.perf_counter() - start
        return done

    def _take_states(self, rows: mx.array) -> None:
        if self.state.states is not None:
            self.state.states.append(rows)

    def _tell_drafter(self) -> None:
        """The drafter learns all of the text that it does not know yet, with the states it was predicted from."""
        state, drafter = self.state, self.state.drafter
        if drafter is None:
            return
        known = drafter.length
        tokens = state.text[known:]
        if not drafter.reads_states:
            drafter.extend(tokens, None)
            return
        # state i predicts token i+1; the very first token has none
        missing = len(tokens) - (known == 0)
        pieces: list[mx.array] = []
        for piece in reversed(state.states):
            if missing <= 0:
                break
            pieces.insert(0, piece[-missing:] if missing < piece.shape[0] else piece)
            missing -= piece.shape[0]
        width = self.target.hidden_size
        drafter.extend(tokens, mx.concatenate(pieces) if pieces else mx.zeros((0, width)))

    # ------------------------------------------------------------------------------------------------ rounds
    @property
    def rows_at_least(self) -> int:
        """Rows that this session's next step has whatever is chosen: its last token, and a fixed number of drafts."""
        return 1 + (self.chooser.fixed or 0)

    def round(self) -> list[int]:
        """Emit at least one token; sets `finish_reason` (stop, length) when the answer is complete."""
        start = time.perf_counter()
        draft = self._propose(0)
        emitted = self._conclude(draft, *self._verify(draft.tokens))
        seconds = time.perf_counter() - start
        self.tally.decode_s += seconds
        if draft.drafter != "ngram":
            looked_at = len(self._stopper.confidences) if self._stopper is not None else len(draft.tokens)
            self.chooser.took(1 + len(draft.tokens), looked_at, seconds)
        return emitted

    def _conclude(self, draft: Draft, rows: mx.array, logits: np.ndarray) -> list[int]:
        """What stands of the draft, and the target's own token after it."""
        verdict = self._judge(draft, logits)
        emitted = self._until_stop([*draft.tokens[: verdict.accepted], verdict.token])
        self._settle(draft, verdict, emitted, rows, logits)
        return emitted

    def _propose(self, others: int) -> Draft:
        """The draft with the larger expected rate, where the step holds so many rows of `others`."""
        room = self._limit - len(self.output) - 1
        if others:
            room = min(room, FEW_ROWS - 1 - others)
        self.chooser.beside(others)
        drafter, self._stopper = self.state.drafter, None
        k = min(self.chooser.choose(), room) if drafter is not None else 0
        k_ngram = self._ngram_depth(k, room)
        if k_ngram:
            return self._ngram.propose(k_ngram, self._draw)
        if k <= 0:
            return NOTHING
        self._stopper = self.chooser.stopper() if drafter.stops else None
        if self._stopper is None:
            return drafter.propose(k, self._draw)
        return drafter.propose(min(self.chooser.most, room), replace(self._draw, stopper=self._stopper))

    def _ngram_depth(self, k_model: int, room: int) -> int:
        """How many tokens the n-gram drafter should guess instead; 0 leaves the round to the model drafter."""
        if self._ngram is None or room < 1:
            return 0
        self._match = self._ngram.match().length
        costs = self.chooser.costs
        if self._match < self._ngram.MIN:
            return 0
        fixed = self.chooser.fixed
        if costs is None or fixed is not None:
            return 0 if self.state.drafter is not None else min(fixed if fixed is not None else 4, room)
        trust = self._ngram_here.shifted(self._match - self._ngram.MIN)
        best, rate = costs.best_k(trust, min(NGRAM_DEPTH, room), costs.ngram)
        return (
            best
            if best and rate > costs.rate(k_model, self.chooser.estimate, surcharge=self.chooser.pace.surcharge)
            else 0
        )

    def _verify(self, drafts: Sequence[int]) -> tuple[mx.array, np.ndarray]:
        """States [k+1, hidden] and logits [k+1, vocabulary] (float32, host) after the last token and each draft."""
        ids = mx.array([[self.state.text[-1], *drafts]])
        states = self.target.hidden_states(ids, self.state.cache)
        logits = self.target.logits(states)[0].astype(mx.float32)
        mx.eval(states, logits)
        self._took(1 + len(drafts))
        return states[0], np.array(logits, copy=False)

    def _took(self, rows: int) -> None:
        """A step has fed the last token and its drafts, `rows` in all."""
        self.state.cached += rows

    def _judge(self, draft: Draft, logits: np.ndarray) -> Verdict:
        sampling = self.options.sampling
        if sampling.greedy:
            return greedy([int(row.argmax()) for row in logits], draft.tokens)

        def row(i: int) -> Any:
            return distribution(logits[i], sampling)

        if self._draw.noise is not None:
            return coupled(row, draft.tokens, self._draw.noise)
        rule = block if draft.drafter == "model" and len(draft.tokens) > 1 else rejection
        return rule(cache(row), draft.tokens, draft.draft_probs, self._draw.uniform)

    def _until_stop(self, emitted: list[int]) -> list[int]:
        """Cut after an end-of-answer token or at the length limit, and say so."""
        for i, token in enumerate(emitted):
            if token in self.target.stop_tokens:
                self.finish_reason = "stop"
                return emitted[: i + 1]
        if len(self.output) + len(emitted) >= self._limit:
            self.finish_reason = "length"
        return emitted[: self._limit - len(self.output)]

    def _settle(self, draft: Draft, verdict: Verdict, emitted: list[int], rows: mx.array, logits: np.ndarray) -> None:
        """Bring text, caches, drafters, statistics and capture to the state after this round."""
        state, count = self.state, len(emitted)
        trim_prompt_cache(state.cache, len(draft.tokens) + 1 - count)
        state.cached -= len(draft.tokens) + 1 - count
        position = len(self.output)
        state.text.extend(emitted)
        self.output.extend(emitted)
        self._take_states(rows[:count])
        self._tell_drafter()
        if self._ngram is not None:
            self._ngram.extend(emitted, None)
        accepted = min(verdict.accepted, count)
        source = SOURCES.get(draft.drafter, 0)
        self.sources.extend([source] * accepted + [0] * (count - accepted))
        # drafts behind the end of the answer were not refused
        judged = len(draft.tokens) if count > verdict.accepted else accepted
        self.tally.count(draft.drafter, len(draft.tokens), judged, accepted)
        if draft.drafter == "model":
            self.chooser.learn(self._stopper, judged, accepted)
        elif judged:
            for estimate in (self.ngram_estimate, self._ngram_here):
                estimate.update(judged, accepted, self._match - self._ngram.MIN)
        if self.options.logprobs is not None:
            self.told += told(logits[:count], emitted, self.options.logprobs)
        if self.capture is not None:
            self.capture.rows(logits[:count])
            if accepted < len(draft.tokens) and count == accepted + 1:
                self._capture_rejection(draft, accepted, position + accepted, verdict.token)

    def _capture_rejection(self, draft: Draft, depth: int, position: int, token: int) -> None:
        self.capture.rejected.append(
            RejectedDraft(
                position=position,
                draft_token=draft.tokens[depth],
                target_token=token,
                draft_confidence=draft.confidences[depth],
                target_confidence=self.capture.confidence(position, token),
                drafter=draft.drafter,
                depth=depth + 1,
            )
        )

    # ------------------------------------------------------------------------------------------------ ends
    def cut(self, length: int, reason: str) -> None:
        """End the answer after its first `length` tokens (a stop string stood there)."""
        self.finish_reason = reason
        surplus = len(self.output) - length
        if surplus <= 0:
            return
        del self.output[length:], self.sources[length:], self.told[length:]
        self._rewind(len(self.state.text) - surplus)
        if self.capture is not None:
            self.capture.cut(length)

    def _rewind(self, length: int) -> None:
        state = self.state
        del state.text[length:]
        trim_prompt_cache(state.cache, state.cached - (length - 1))
        state.cached = length - 1
        state.keep_states(length - 1)
        if state.drafter is not None:
            state.drafter.rewind(length)

    def all_states(self) -> np.ndarray | None:
        """States of every fed position, prompt first, fp16 [text - 1, hidden]; None where the draft reads none."""
        if not self.state.states:
            return None
        rows = mx.concatenate(self.state.states).astype(mx.float16)
        mx.eval(rows)
        return np.array(rows)

    def check_in_step(self) -> None:
        """Raises RuntimeError unless caches, text and drafters agree: the invariant of every round."""
        state = self.state
        offsets = {layer.offset for layer in state.cache}
        if offsets != {state.cached} or state.cached != len(state.text) - 1:
            raise RuntimeError(f"target cache holds {offsets}, text has {len(state.text)} tokens")
        if state.states is not None and sum(piece.shape[0] for piece in state.states) != state.cached:
            raise RuntimeError("kept states and cache differ")
        if state.drafter is not None and state.drafter.length != len(state.text):
            raise RuntimeError(f"drafter knows {state.drafter.length} of {len(state.text)} tokens")
        if state.text[self.prompt_length :] != self.output:
            raise RuntimeError("text and output differ")


def decode_rounds(sessions: Sequence[Session]) -> None:
    """One round of each. Where few rows are native, as few steps as hold them all: the weights are read once for everybody
    in a step, and rows do not change each other's results. What each emitted is the end of its `output`.
    """
    if len(sessions) < 2 or not sessions[0].target.few_rows_native:
        for session in sessions:
            session.round()
        return
    group: list[Session] = []
    for session in sessions:
        if group and sum(other.rows_at_least for other in [*group, session]) > FEW_ROWS:
            _step_of_many(group)
            group = []
        group.append(session)
    _step_of_many(group)


def _step_of_many(sessions: Sequence[Session]) -> None:
    """Every session has the rows it must have; drafts share what is left of the step, first come first served."""
    start = time.perf_counter()
    drafts: list[Draft] = []
    for place, session in enumerate(sessions):
        taken = sum(1 + len(draft.tokens) for draft in drafts)
        drafts.append(session._propose(taken + sum(other.rows_at_least for other in sessions[place + 1 :])))
    ids = [[session.state.text[-1], *draft.tokens] for session, draft in zip(sessions, drafts, strict=True)]
    target = sessions[0].target
    states = target.batch_hidden_states(ids, [session.state.cache for session in sessions])
    logits = target.logits(states).astype(mx.float32)
    mx.eval(states, logits)
    host, at = np.array(logits, copy=False), 0
    for session, draft, part in zip(sessions, drafts, ids, strict=True):
        rows = slice(at, at + len(part))
        at += len(part)
        session._took(len(part))
        session._conclude(draft, states[rows], host[rows])
    elapsed = time.perf_counter() - start
    for session in sessions:
        session.tally.decode_s += elapsed
