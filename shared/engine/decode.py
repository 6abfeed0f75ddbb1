"""The decoding round: sessions draft, one target step verifies, sessions keep what is accepted.

After every round a session's target cache holds its tokens but the last, which is the first row of
the next verification; the drafter knows all of them and the states they were predicted from. Knows
nothing of queues, sockets or records. Promises: the output has exactly the target's distribution,
whatever drafts, and a session's tokens do not depend on the other sessions in its batch.

Speculative decoding: Leviathan et al. 2023 (arXiv 2211.17192).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx
import numpy as np

from specl.shared.engine.acceptance import VerifyResult, block, greedy, gumbel_coupled, rejection
from specl.shared.engine.acceptance_estimate import AcceptanceEstimate
from specl.shared.engine.answer_history import ClientAnswers
from specl.shared.engine.capture import Capture, RejectedDraft, TokenLogprobs, token_logprobs
from specl.shared.engine.decoding_stats import SOURCES, DecodingStats
from specl.shared.engine.draft_length import DEFAULT_K, DraftLengthPolicy, DraftStopPolicy
from specl.shared.engine.drafters import NO_DRAFT, Draft, DraftSampler, NgramDrafter
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sampling import Distribution, distribution, position_noise
from specl.shared.engine.sequence_state import SequenceState
from specl.shared.models.cpu_kernels import FEW_ROWS
from specl.shared.models.language_model import LanguageModel

PREFILL_ROWS = 512
NGRAM_DEPTH = 15  # 16 rows: a long copy is worth a wide check, and the costs say when


def decode_rounds(sessions: Sequence["Session"]) -> None:
    """One round of each session. What a session emitted is the end of its `output`."""
    for batch in batches(sessions):
        decode_round(batch)


def decode_round(batch: Sequence["Session"]) -> None:
    """One round: every session gets at least one token, from one step of the target."""
    start = time.perf_counter()
    # 1) Draft: each session decides by expected tokens a second whether to draft; while a model
    #    drafts, its confidence decides after each token whether to go on (draft_length.py; after
    #    DISCO, arXiv 2405.04304, and SpecDec++, arXiv 2405.19715)
    proposals = propose(batch)
    # 2) Verify: one target step over the last token and the drafts of every session
    states, logits = verify(batch, [proposal.draft.tokens for proposal in proposals])
    row = 0
    for session, proposal in zip(batch, proposals, strict=True):
        rows = slice(row, row + 1 + len(proposal.draft.tokens))
        row = rows.stop
        # 3) Accept: how many drafts stand, and the target's own token after them (acceptance.py).
        #    Greedy: argmax. Sampled: rejection (arXiv 2211.17192, algorithm 1) or block
        #    verification (arXiv 2403.10444, algorithm 2). Seeded: the Gumbel-max trick.
        result = session.accept(proposal.draft, logits[rows])
        # 4) Commit: text, caches, drafters, statistics and capture go on from what was accepted
        session.commit(proposal, result, states[rows], logits[rows])
    # 5) Time: what rounds really take corrects the measured costs (timing_correction.py)
    seconds = time.perf_counter() - start
    for session, proposal in zip(batch, proposals, strict=True):
        session.add_time(proposal, seconds)


def batches(sessions: Sequence["Session"]) -> Iterator[Sequence["Session"]]:
    """Sessions that share a target step.

    Where few rows are computed natively, as few steps as hold all: the target's weights are read
    once for everybody in a step. Elsewhere each session has a step of its own.
    """
    batch: list[Session] = []
    for session in sessions:
        rows = sum(other.least_rows for other in batch) + session.least_rows
        if batch and (rows > FEW_ROWS or not session.target.few_rows_native):
            yield batch
            batch = []
        batch.append(session)
    if batch:
        yield batch


def propose(batch: Sequence["Session"]) -> list["Proposal"]:
    """A proposal of each session.

    Every session has its least rows; drafts share what is left of the step, first come first
    served.
    """
    proposals: list[Proposal] = []
    used_rows = 0  # rows of the sessions that have proposed
    reserved_rows = sum(session.least_rows for session in batch)  # least rows of the sessions still to propose
    for session in batch:
        reserved_rows -= session.least_rows
        proposals.append(session.propose(used_rows + reserved_rows))
        used_rows += 1 + len(proposals[-1].draft.tokens)
    return proposals


def verify(batch: Sequence["Session"], drafts: Sequence[Sequence[int]]) -> tuple[mx.array, np.ndarray]:
    """One target step over the last token and the drafts of each session, in order.

    States [rows, hidden] and logits [rows, vocabulary] (float32, host) after each of these tokens.
    """
    target = batch[0].target
    ids = [[session.state.tokens[-1], *draft] for session, draft in zip(batch, drafts, strict=True)]
    states = target.batch_hidden_states(ids, [session.state.cache for session in batch])
    logits = target.logits(states).astype(mx.float32)
    mx.eval(states, logits)
    for session, fed in zip(batch, ids, strict=True):
        session.state.cached += len(fed)
    return states, np.array(logits, copy=False)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A session's draft of one round.

    `stop_policy`: the policy that ended the model drafter's draft, None where its length was exact.
    `match_length`: tokens of the match that an n-gram draft continues.
    """

    draft: Draft
    stop_policy: DraftStopPolicy | None = None
    match_length: int = 0

    @property
    def computed(self) -> int:
        """Tokens that the drafter computed. One of too low confidence is computed, not drafted."""
        return len(self.draft.tokens) if self.stop_policy is None else len(self.stop_policy.confidences)


NO_PROPOSAL = Proposal(NO_DRAFT)


class Session:
    """One request. Call `prefill` until it returns True, then `round` until `finish_reason` is set.

    `sources` has a byte an output token: who proposed it. `logprobs` has one entry an output token
    where the client asked for them; `capture` is None where nothing is captured.
    """

    def __init__(
        self,
        target: LanguageModel,
        state: SequenceState,
        prompt: Sequence[int],
        options: RequestOptions,
        draft_length: DraftLengthPolicy,
        ngram_estimate: AcceptanceEstimate,
        client_answers: ClientAnswers | None = None,
    ) -> None:
        self.target, self.state, self.options = target, state, options
        self.draft_length = draft_length
        self.prompt_length = len(prompt)
        self.output: list[int] = []
        self.sources = bytearray()
        self.finish_reason: str | None = None
        self.stats = DecodingStats(reused_tokens=state.cached)
        self.capture = Capture(options.capture_k) if options.capture_k else None
        self.logprobs: list[TokenLogprobs] = []
        self._max_tokens = min(options.max_tokens, target.context_length - len(prompt))
        self._sampler = self._new_sampler()
        self._ngram = NgramDrafter(client_answers) if options.ngram else None
        # per-request copy: n-gram acceptance varies a lot between requests
        self._ngram_estimates = (ngram_estimate, ngram_estimate.copy())
        state.tokens.extend(prompt[len(state.tokens) :])
        if self._ngram is not None:
            self._ngram.extend(state.tokens, None)

    def _new_sampler(self) -> DraftSampler:
        """The randomness of drafts and of acceptance; seeded, it depends on positions only."""
        sampling, vocabulary = self.options.sampling, self.target.vocabulary_size
        uniform = np.random.default_rng().random
        seed = sampling.seed
        if seed is None or sampling.greedy:
            return DraftSampler(sampling, uniform, None)
        return DraftSampler(sampling, uniform, lambda i: position_noise(seed, len(self.output) + i, vocabulary))

    # ------------------------------------------------------------------------------------------------ prompt
    def prefill(self) -> bool:
        """Feed one chunk of the prompt; True once all but its last token are in the caches."""
        start = time.perf_counter()
        state = self.state
        end = min(len(state.tokens) - 1, state.cached + PREFILL_ROWS)
        if end > state.cached:
            rows = self.target.prefill(state.tokens[state.cached : end], state.cache)
            state.cached = end
            state.append_states(rows)
        done = state.cached >= len(state.tokens) - 1
        if done:
            self._extend_drafter()
        self.stats.prefill_s += time.perf_counter() - start
        return done

    def _extend_drafter(self) -> None:
        """Give the drafter the tokens it does not know yet, with the states that predicted them."""
        state, drafter = self.state, self.state.drafter
        if drafter is None:
            return
        known = drafter.length
        tokens = state.tokens[known:]
        if not drafter.reads_states:
            drafter.extend(tokens, None)
            return
        # state i predicts token i + 1: the very first token has none
        pieces = state.last_states(len(tokens) - (known == 0))
        drafter.extend(tokens, mx.concatenate(pieces) if pieces else mx.zeros((0, self.target.hidden_size)))

    # ------------------------------------------------------------------------------------------------ rounds
    def round(self) -> list[int]:
        """A round of this session alone: the tokens it emitted, at least one."""
        before = len(self.output)
        decode_round([self])
        return self.output[before:]

    @property
    def least_rows(self) -> int:
        """Rows that the next step needs: the last token, and the drafts of a fixed k."""
        return 1 + (self.draft_length.fixed or 0)

    def force_draft(self) -> None:
        """Have the model drafter draft in the next round even if it is parked, to measure it."""
        self.draft_length.force_probe()

    def propose(self, batch_rows: int = 0) -> Proposal:
        """The draft with the best expected rate, beside `batch_rows` rows of other sessions."""
        most = self._max_tokens - len(self.output) - 1  # the target adds a token to the drafts
        if batch_rows:
            most = min(most, FEW_ROWS - 1 - batch_rows)
        policy, drafter = self.draft_length, self.state.drafter
        policy.set_batch_rows(batch_rows)
        # the k of the best expected rate: it decides whether the model drafts, and its rate is the
        # one that n-grams must beat
        best_k = min(policy.choose(), most) if drafter is not None else 0
        if self._ngram is not None and most >= 1:
            match_length = self._ngram.match().length
            k_ngram = self._ngram_k(match_length, best_k, most)
            if k_ngram:
                return Proposal(self._ngram.propose(k_ngram, self._sampler), None, match_length)
        should_draft = best_k > 0
        if drafter is None or not should_draft:
            return NO_PROPOSAL
        stop_policy = policy.stop_policy() if drafter.stops else None
        if stop_policy is None:
            return Proposal(drafter.propose(best_k, self._sampler))
        # the stop policy alone ends the draft, before or behind best_k
        sampler = replace(self._sampler, stop_policy=stop_policy)
        return Proposal(drafter.propose(min(policy.most, most), sampler), stop_policy)

    def _ngram_k(self, match_length: int, k_model: int, most: int) -> int:
        """The k of the n-gram drafter; 0 where the model drafter should draft in this round, or none."""
        if match_length < NgramDrafter.MIN:
            return 0
        policy = self.draft_length
        costs = policy.costs
        if costs is None or policy.fixed is not None:  # no rates to compare
            fixed = policy.fixed if policy.fixed is not None else DEFAULT_K
            return 0 if self.state.drafter is not None else min(fixed, most)
        estimate = self._ngram_estimates[1].shifted(match_length - NgramDrafter.MIN)
        k, rate = costs.best_k(estimate, min(NGRAM_DEPTH, most), costs.ngram)
        slowdown = policy.timing.draft_slowdown
        return k if k and rate > costs.rate(k_model, policy.estimate, draft_slowdown=slowdown) else 0

    def accept(self, draft: Draft, logits: np.ndarray) -> VerifyResult:
        """How many drafts stand, by the request's rule. `logits` are [k + 1, vocabulary]."""
        sampling = self.options.sampling
        if sampling.greedy:
            return greedy([int(row.argmax()) for row in logits], draft.tokens)

        def target_p(i: int) -> Distribution:
            return distribution(logits[i], sampling)

        if self._sampler.noise is not None:
            return gumbel_coupled(target_p, draft.tokens, self._sampler.noise)
        rule = block if draft.drafter == "model" and len(draft.tokens) > 1 else rejection
        return rule(cache(target_p), draft.tokens, draft.draft_probs, self._sampler.uniform)

    def commit(self, proposal: Proposal, result: VerifyResult, states: mx.array, logits: np.ndarray) -> None:
        """Take over the accepted drafts and the target's token: text, caches, drafters, statistics.

        `states` and `logits` are this session's rows of the step. Sets `finish_reason` where the
        answer is complete.
        """
        draft, state = proposal.draft, self.state
        emitted = self._until_stop([*draft.tokens[: result.accepted], result.token])
        count = len(emitted)
        accepted = min(result.accepted, count)
        state.trim_cache(state.cached - (len(draft.tokens) + 1 - count))
        state.tokens.extend(emitted)
        self.output.extend(emitted)
        if state.states is not None:
            state.append_states(states[:count])
        self._extend_drafter()
        if self._ngram is not None:
            self._ngram.extend(emitted, None)
        self.sources.extend([SOURCES.get(draft.drafter, 0)] * accepted + [0] * (count - accepted))
        # drafts behind the end of the answer were not rejected
        self._learn(proposal, len(draft.tokens) if count > result.accepted else accepted, accepted)
        if self.options.logprobs is not None:
            self.logprobs += token_logprobs(logits[:count], emitted, self.options.logprobs)
        if self.capture is not None:
            self.capture.add_rows(logits[:count])
            if accepted < len(draft.tokens) and count == accepted + 1:
                self._capture_rejection(self.capture, draft, accepted, result.token)

    def _until_stop(self, emitted: list[int]) -> list[int]:
        """Cut after an end-of-answer token or at the length limit, and set `finish_reason`."""
        stop_tokens = self.target.stop_tokens
        for i, token in enumerate(emitted):
            if token in stop_tokens:
                self.finish_reason = "stop"
                return emitted[: i + 1]
        if len(self.output) + len(emitted) >= self._max_tokens:
            self.finish_reason = "length"
        return emitted[: self._max_tokens - len(self.output)]

    def _learn(self, proposal: Proposal, tested: int, accepted: int) -> None:
        """Count a round: the acceptance rule tested the first `tested` drafts."""
        draft = proposal.draft
        self.stats.add_round(draft.drafter, len(draft.tokens), tested, accepted)
        if draft.drafter == "model":
            self.draft_length.update(proposal.stop_policy, tested, accepted)
        elif tested:
            for estimate in self._ngram_estimates:
                estimate.update(tested, accepted, proposal.match_length - NgramDrafter.MIN)

    def _capture_rejection(self, capture: Capture, draft: Draft, index: int, token: int) -> None:
        """Capture that the target put `token`, the last of the output, in place of draft `index`."""
        position = len(self.output) - 1
        capture.rejected.append(
            RejectedDraft(
                position=position,
                draft_token=draft.tokens[index],
                target_token=token,
                draft_confidence=draft.confidences[index],
                target_confidence=capture.confidence(position, token),
                drafter=draft.drafter,
                depth=index + 1,
            )
        )

    def add_time(self, proposal: Proposal, seconds: float) -> None:
        """The last round, which drafted `proposal`, took `seconds`."""
        self.stats.decode_s += seconds
        if proposal.draft.drafter != "ngram":
            self.draft_length.add_time(1 + len(proposal.draft.tokens), proposal.computed, seconds)

    # ------------------------------------------------------------------------------------------------ ends
    def cut(self, length: int, reason: str) -> None:
        """End the answer after its first `length` tokens, for example before a stop string."""
        self.finish_reason = reason
        surplus = len(self.output) - length
        if surplus <= 0:
            return
        del self.output[length:], self.sources[length:], self.logprobs[length:]
        self.state.rewind(len(self.state.tokens) - surplus)
        if self.capture is not None:
            self.capture.cut(length)

    def all_states(self) -> np.ndarray | None:
        """States of every fed position, fp16 [tokens - 1, hidden]; None where none are kept."""
        if not self.state.states:
            return None
        rows = mx.concatenate(self.state.states).astype(mx.float16)
        mx.eval(rows)
        return np.array(rows)

    def check_in_step(self) -> None:
        """Raises RuntimeError unless tokens, caches and drafter agree: a round's invariant."""
        state = self.state
        offsets = {layer.offset for layer in state.cache}
        if offsets != {state.cached} or state.cached != len(state.tokens) - 1:
            raise RuntimeError(f"the target cache holds {offsets} of {len(state.tokens)} tokens")
        if state.states is not None and sum(piece.shape[0] for piece in state.states) != state.cached:
            raise RuntimeError("kept states and cache differ")
        if state.drafter is not None and state.drafter.length != len(state.tokens):
            raise RuntimeError(f"the drafter knows {state.drafter.length} of {len(state.tokens)} tokens")
        if state.tokens[self.prompt_length :] != self.output:
            raise RuntimeError("tokens and output differ")
