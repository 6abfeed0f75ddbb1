"""Models, drafts, adapters and costs put together: makes sessions, measures costs, swaps adapters. One thread owns it.

Used alike by the inference daemon, `bench`, `eval` and the Python API. Knows nothing of queues, sockets, records or where
adapters lie on disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from specl.shared.engine.answer_history import AnswerHistory
from specl.shared.engine.costs import (
    GREEDY_PRIOR,
    SAMPLED_PRIOR,
    AcceptanceEstimate,
    Costs,
    DraftLengthPolicy,
    Known,
)
from specl.shared.engine.custom_drafter import CustomDrafter, DrafterFactory, OnError, raise_error
from specl.shared.engine.decode import NGRAM_DEPTH, Options, Session, State
from specl.shared.engine.drafters import NGRAM_PRIOR, Drafter, HeadDrafter, ModelDrafter
from specl.shared.engine.prefix_cache import Entry, PrefixCache
from specl.shared.engine.text import HOLD
from specl.shared.errors import ConfigError, RequestRejected
from specl.shared.models.cpu_kernels import on_cpu, use_cpu_kernels
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.lora import LoraShape, Pristine, Weights, fuse_steps
from specl.shared.runtime.incremental import Steps, run_all

MOST_LOGPROBS = 20  # alternatives of a token that a client may ask for, as with OpenAI
LONGEST_LEAD = 4  # tokens that a tokenizer writes before a text: mostly one


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter read and verified: its id, what it changes, and a refreshed hot vocabulary where it has one."""

    id: str
    shape: LoraShape
    weights: Weights
    hot: np.ndarray | None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is set to. `max_draft_tokens` bounds the model drafter's k, `max_kv_cache_tokens` the tokens that
    the prefix cache may hold; `precision` (auto, native, fp32) is how the models were loaded.
    """

    max_draft_tokens: int = 7
    max_kv_cache_tokens: int = 8192
    precision: str = "auto"


DEFAULT_OPTIONS = EngineOptions()


class EngineCore:
    """One target and at most one draft.

    `drafter_factory` puts a custom drafter in place of the draft's (see custom_drafter.py); `on_error` receives its
    errors, which otherwise reach the caller.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: HeadDraft | LanguageModel | None,
        options: EngineOptions = DEFAULT_OPTIONS,
        drafter_factory: DrafterFactory | None = None,
        on_error: OnError | None = None,
    ) -> None:
        self.target, self.draft, self.options = target, draft, options
        self.drafter_factory, self._on_error = drafter_factory, on_error or raise_error
        own = self._own_drafter() if drafter_factory is not None else None  # a wrong one is told of now
        self._keeps_states = self.reads_states or (own is not None and own.reads_states)
        self.costs: Costs | None = None
        self.adapter_id = ""
        self.adapter_form = "none"
        self.known = new_request_history()
        self.prefixes = PrefixCache(options.max_kv_cache_tokens)
        self.past = AnswerHistory(limit=0)
        self._pristine = Pristine(self.draft_module) if draft is not None else None
        self._pristine_hot = draft.hot if isinstance(draft, HeadDraft) else None

    @property
    def draft_module(self) -> nn.Module | None:
        """What an adapter may change: modules that the draft owns, never the target's."""
        if isinstance(self.draft, HeadDraft):
            return self.draft.head
        return self.draft.model if self.draft is not None else None

    @property
    def reads_states(self) -> bool:
        """Whether the draft needs the target's hidden states (to draft, and to learn)."""
        return isinstance(self.draft, HeadDraft)

    @property
    def draft_fingerprint(self) -> str:
        """A name for the draft's pristine weights; empty without a draft."""
        return self.draft.fingerprint if self.draft is not None else ""

    # ------------------------------------------------------------------------------------------------ requests
    def encode_chat(self, messages: Sequence[dict[str, Any]], splice: bool = True) -> tuple[str, list[int]]:
        """The rendered prompt and its tokens. Raises RequestRejected where the template refuses the messages.

        With `splice` what was said in this chat has the tokens that were generated, where their caches still live: less to
        read again. Without, the tokens depend on the text alone, which is what a seed promises.
        """
        try:
            text = self.target.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja templates raise whatever their authors chose
            raise RequestRejected(f"the chat template refuses these messages: {error}") from error
        if not splice:
            return text, self.encode(text)
        special = [token for token in self.target.tokenizer.all_special_tokens if token]
        return text, self.prefixes.splice(text, self.encode, special)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text as it stands; with `special` after what the model is used to before any text (BOS), unless the text
        begins with that itself. What some tokenizers put behind a text (EOS) would end an answer before it began.
        """
        tokenizer = self.target.tokenizer
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
        if not special or not tokens:
            return tokens
        led = list(tokenizer.encode(text, add_special_tokens=True))
        if led[0] == tokens[0]:
            return tokens
        places = range(1, LONGEST_LEAD + 1)
        lead = next((place for place in places if led[place : place + len(tokens)] == tokens), 0)
        return led[:lead] + tokens

    def session(self, prompt: Sequence[int], options: Options) -> Session:
        """Start a request. Raises RequestRejected for a prompt that is empty or leaves no room in the context."""
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if options.max_tokens < 1:
            raise RequestRejected(f"max_tokens must be at least 1, not {options.max_tokens}")
        if len(prompt) >= self.target.context_length:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens; the context of {self.target.name} holds {self.target.context_length}"
            )
        if options.logprobs is not None and not 0 <= options.logprobs <= MOST_LOGPROBS:
            raise RequestRejected(f"logprobs must be from 0 to {MOST_LOGPROBS}, not {options.logprobs}")
        options.sampling.validate()
        state = self.prefixes.take(prompt, self.adapter_id)
        if state is None:
            state = State([], self.target.new_cache(), None, [] if self._keeps_states else None)
        if options.num_draft_tokens == 0:
            state.drafter = None
        elif state.drafter is None:
            state.drafter = self._new_drafter()
        most = self.options.max_draft_tokens
        fixed = options.num_draft_tokens
        known = self.known[options.sampling.greedy]
        chooser = DraftLengthPolicy(self.costs, most, fixed, known.model, known.pace)
        past = self.past.of(options.client_id)
        return Session(self.target, state, prompt, options, chooser, known.ngram, past)

    @property
    def drafts(self) -> bool:
        """Whether there is a model drafter, or somebody's own."""
        return self.draft is not None or self.drafter_factory is not None

    def _new_drafter(self) -> Drafter | None:
        if self.drafter_factory is not None:
            try:
                return self._own_drafter()
            except ConfigError as error:
                self._on_error(error)
                return None
        if isinstance(self.draft, HeadDraft):
            return HeadDrafter(self.draft)
        return ModelDrafter(self.draft, int(self.target.config["vocab_size"])) if self.draft is not None else None

    def _own_drafter(self) -> CustomDrafter:
        try:
            made = self.drafter_factory(self.target, self.draft)
        except Exception as error:  # somebody else's code
            raise ConfigError(f"the drafter cannot be made ({type(error).__name__}: {error})") from error
        return CustomDrafter(made, int(self.target.config["vocab_size"]), self._on_error)

    def save_to_prefix_cache(self, session: Session, adapter_id: str, rendered: str = "", reserved: int = 0) -> None:
        """Keep a finished session's caches for the next turn. `rendered` is the text of its prompt and answer: a later prompt
        that begins with it gets the same tokens, however its text would be cut anew.
        """
        state = session.state
        if not session.output:  # ended while its prompt was read: what has been read stands
            del state.text[state.cached + 1 :]
        if state.cached != len(state.text) - 1:
            return
        if isinstance(state.drafter, CustomDrafter):  # somebody else's: a failure of it ends with its request
            state.drafter = None
        entry, lent = Entry(state, adapter_id), state.lent
        if not session.output and lent is not None and lent.said <= len(state.text):
            entry.rendered, entry.said = lent.rendered, lent.said
        ended = state.text[-1] in self.target.stop_tokens
        # a stop string cuts the text, not the tokens; broken bytes are no text that could come again
        if (ended or session.finish_reason == "length") and HOLD not in rendered:
            entry.rendered, entry.said = rendered, len(state.text) - ended
        self.prefixes.put(entry, reserved)

    def return_to_prefix_cache(self, session: Session, reserved: int = 0) -> None:
        """A request ended of which nothing may be kept: the prefix cache has back what it had lent for it, and no more."""
        self.prefixes.restore(session.state, session.tally.reused_tokens, reserved)

    def generate(self, prompt: Sequence[int], options: Options) -> Iterator[list[int]]:
        """Tokens round by round, for programs that serve one request at a time."""
        session = self.session(prompt, options)
        while not session.prefill():
            pass
        while session.finish_reason is None:
            yield session.round()

    # ------------------------------------------------------------------------------------------------ adapters
    def use_adapter(self, adapter: LoadedAdapter | None) -> None:
        """Draft with `adapter`, or with the pristine draft. Between two rounds; the target is never touched."""
        run_all(self.taking(adapter))

    def taking(self, adapter: LoadedAdapter | None) -> Steps[None]:
        """`use_adapter` in pieces shorter than a round, between which rounds may run: all is made beside what drafts, and
        only the end exchanges it.
        """
        if self._pristine is None:
            return
        form, layers, scorer = "none", {}, None
        if isinstance(self.draft, HeadDraft):
            hot = adapter.hot if adapter is not None and adapter.hot is not None else self._pristine_hot
            if hot is not self.draft.hot:
                scorer = yield from self.draft.scorer_steps(hot)
                yield
        if adapter is not None:
            form, layers = yield from fuse_steps(self._pristine.layers, adapter.shape, adapter.weights)
            for layer in layers.values():
                if isinstance(self.draft, HeadDraft):
                    self.draft.use_cpu_kernels_in_layer(layer)
                    yield
        self._pristine.restore()
        self.draft_module.update_modules(tree_unflatten(list(layers.items())))
        if scorer is not None:
            self.draft.hot, self.draft.output = scorer
        # together and last: `status` reads them from another thread
        self.adapter_id, self.adapter_form = adapter.id if adapter is not None else "", form
        if isinstance(self.draft, HeadDraft):
            self.draft.use_cpu_kernels()
        elif on_cpu():
            use_cpu_kernels(self.draft.model, self.draft.blocks)
        fresh = new_request_history()
        self.known = {
            greedy: Known(fresh[greedy].model, known.ngram, known.pace) for greedy, known in self.known.items()
        }

    # ------------------------------------------------------------------------------------------------ costs
    @property
    def max_drafts(self) -> int:
        """The most tokens that any drafter may propose in a round: what calibration has to measure."""
        return max(self.options.max_draft_tokens, NGRAM_DEPTH)

    def clear_caches(self) -> None:
        """Give MLX's free memory back to the system."""
        mx.clear_cache()


def new_request_history() -> dict[bool, Known]:
    """Of greedy requests (True) and of sampled ones (False)."""
    return {
        greedy: Known(AcceptanceEstimate(by_confidence=prior), AcceptanceEstimate(prior=NGRAM_PRIOR))
        for greedy, prior in ((True, GREEDY_PRIOR), (False, SAMPLED_PRIOR))
    }
