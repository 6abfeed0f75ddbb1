"""The engine: target, draft, adapter, costs and prefix cache. Makes sessions, switches adapters.

One thread owns it. The inference daemon, `bench`, `eval` and the Python API use the same one. Knows
nothing of queues, sockets, records, settings or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from specl.shared.engine.acceptance_history import HistoryBySampling
from specl.shared.engine.answer_history import AnswerHistory
from specl.shared.engine.costs import Costs
from specl.shared.engine.custom_drafter import CustomDrafter, DrafterFactory, OnError, raise_error
from specl.shared.engine.decode import NGRAM_DEPTH, Session
from specl.shared.engine.draft_length import DraftLengthPolicy
from specl.shared.engine.drafters import Drafter, HeadDrafter, ModelDrafter
from specl.shared.engine.prefix_cache import Entry, PrefixCache
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sequence_state import SequenceState
from specl.shared.engine.text_output import INCOMPLETE
from specl.shared.errors import ConfigError, ContextExceeded, RequestRejected
from specl.shared.models import chat_prompt
from specl.shared.models.cpu_kernels import on_cpu, use_cpu_kernels
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.lora import LoraShape, Pristine, Weights, fuse_steps
from specl.shared.runtime.incremental import Steps, run_all

MAX_PREFIX_TOKENS = 4  # that a tokenizer writes before a text: mostly one


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A verified adapter in memory; `hot` is a refreshed hot vocabulary where it has one."""

    id: str
    shape: LoraShape
    weights: Weights
    hot: np.ndarray | None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is set up.

    `max_draft_tokens` bounds the model drafter's k, `max_kv_cache_tokens` the tokens that the
    prefix cache may hold; `precision` (auto, native, fp32) is how the models were loaded.
    """

    max_draft_tokens: int = 7
    max_kv_cache_tokens: int = 8192
    precision: str = "auto"


DEFAULT_OPTIONS = EngineOptions()


class EngineCore:
    """One target and at most one draft.

    `drafter_factory` puts a custom drafter in place of the draft's (see custom_drafter.py);
    `on_error` receives its errors, which otherwise reach the caller. Raises ConfigError where it
    makes none. `costs` are measured or read by loading/costs.py; without them four tokens are
    drafted a round.
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
        # made once now, so that a factory that does not work is reported before the first request
        custom = self._custom_drafter(drafter_factory) if drafter_factory is not None else None
        self._keeps_states = self.reads_states or (custom is not None and custom.reads_states)
        self.costs: Costs | None = None
        self.adapter_id = ""
        self.adapter_form = "none"
        self.request_history = HistoryBySampling()
        self.prefixes = PrefixCache(options.max_kv_cache_tokens)
        self.answer_history = AnswerHistory(limit=0)
        module = self.draft_module
        self._pristine = Pristine(module) if module is not None else None
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

    @property
    def has_drafter(self) -> bool:
        """Whether there is a model drafter or a custom one."""
        return self.draft is not None or self.drafter_factory is not None

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens that a drafter may propose in a round: what calibration measures."""
        return max(self.options.max_draft_tokens, NGRAM_DEPTH)

    # ------------------------------------------------------------------------------------------------ prompts
    def encode_chat(
        self, messages: Sequence[dict[str, Any]], reuse_tokens: bool = True, owner: str = ""
    ) -> tuple[str, list[int]]:
        """The rendered prompt and its tokens. Raises RequestRejected where the template refuses.

        With `reuse_tokens` earlier answers of the chat get the ids that were generated, while the
        caches of its `owner` live: less to read again. Without, the tokens depend on the text only, as a seed
        promises.
        """
        tokenizer = self.target.tokenizer
        prompt = chat_prompt.render(tokenizer, messages, self.target.content_form)
        if not reuse_tokens or prompt.marked is not None:  # an earlier prompt of the same text may mean control tokens
            return prompt.text, chat_prompt.encode(tokenizer, prompt)
        special = [token for token in tokenizer.all_special_tokens if token]
        return prompt.text, self.prefixes.reuse_tokens(prompt.text, self.encode, special, owner)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text. `special` adds what the model expects before any text (BOS), unless
        the text begins with it. What some tokenizers add behind a text (EOS) is left out: it would
        end an answer before it began.
        """
        tokenizer = self.target.tokenizer
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
        if not special or not tokens:
            return tokens
        full = list(tokenizer.encode(text, add_special_tokens=True))
        if full[0] == tokens[0]:
            return tokens
        sizes = range(1, MAX_PREFIX_TOKENS + 1)
        size = next((size for size in sizes if full[size : size + len(tokens)] == tokens), 0)
        return full[:size] + tokens

    # ------------------------------------------------------------------------------------------------ requests
    def validate(self, prompt: Sequence[int], options: RequestOptions) -> None:
        """Every check of a request. Raises RequestRejected."""
        if not prompt:
            raise RequestRejected("the prompt is empty")
        context = self.target.context_length
        if len(prompt) >= context:
            raise ContextExceeded(
                f"the prompt has {len(prompt)} tokens; the context of {self.target.name} holds {context}"
            )
        size = self.target.vocabulary_size
        if min(prompt) < 0 or max(prompt) >= size:
            raise RequestRejected(
                f"the prompt has a token that is not below {size}, the vocabulary of {self.target.name}"
            )
        options.validate()

    def session(self, prompt: Sequence[int], options: RequestOptions) -> Session:
        """Start a request. Raises RequestRejected (see `validate`)."""
        prompt = [int(token) for token in prompt]
        self.validate(prompt, options)
        state = self.prefixes.take(prompt, self.adapter_id, options.cache_owner)
        if state is None:
            state = SequenceState([], self.target.new_cache(), None, [] if self._keeps_states else None)
        if options.num_draft_tokens == 0:
            state.drafter = None
        elif state.drafter is None:
            state.drafter = self._new_drafter()
        history = self.request_history.of(options.sampling)
        draft_length = DraftLengthPolicy(
            self.costs, self.options.max_draft_tokens, options.num_draft_tokens, history.model, history.timing
        )
        client_answers = self.answer_history.of(options.client_id)
        return Session(self.target, state, prompt, options, draft_length, history.ngram, client_answers)

    def generate(self, prompt: Sequence[int], options: RequestOptions) -> Iterator[list[int]]:
        """Tokens round by round, for programs that serve one request at a time."""
        session = self.session(prompt, options)
        while not session.prefill():
            pass
        while session.finish_reason is None:
            yield session.round()

    def _new_drafter(self) -> Drafter | None:
        if self.drafter_factory is not None:
            try:
                return self._custom_drafter(self.drafter_factory)
            except ConfigError as error:
                self._on_error(error)
                return None
        if isinstance(self.draft, HeadDraft):
            return HeadDrafter(self.draft)
        return ModelDrafter(self.draft, self.target.vocabulary_size) if self.draft is not None else None

    def _custom_drafter(self, factory: DrafterFactory) -> CustomDrafter:
        try:
            drafter = factory(self.target, self.draft)
        except Exception as error:  # a user's code raises whatever it likes
            raise ConfigError(f"the drafter cannot be made ({type(error).__name__}: {error})") from error
        return CustomDrafter(drafter, self.target.vocabulary_size, self._on_error)

    def save_to_prefix_cache(self, session: Session, adapter_id: str, text: str = "", reserved: int = 0) -> None:
        """Keep a finished session's caches for the next turn, beside `reserved` running tokens.

        `text` is that of its prompt and answer: a later prompt that begins with it gets the same
        tokens, however a tokenizer would split it.
        """
        state = session.state
        if not session.output:  # ended during prefill: what was read is kept
            del state.tokens[state.cached + 1 :]
        if state.cached != len(state.tokens) - 1:
            return
        if isinstance(state.drafter, CustomDrafter):  # a failure of it ends with its request
            state.drafter = None
        entry, origin = Entry(state, adapter_id, owner=session.options.cache_owner), state.origin
        if not session.output and origin is not None and origin.text_tokens <= len(state.tokens):
            entry.text, entry.text_tokens = origin.text, origin.text_tokens
        ended = state.tokens[-1] in self.target.stop_tokens
        # a stop string cuts the text, not the tokens; broken bytes are no text that could come
        # again
        if (ended or session.finish_reason == "length") and INCOMPLETE not in text:
            size = len(state.tokens) - ended
            if self._names_its_control_tokens(text, state.tokens[:size]):
                entry.text, entry.text_tokens = text, size
        self.prefixes.put(entry, reserved)

    def _names_its_control_tokens(self, text: str, tokens: Sequence[int]) -> bool:
        """Whether every control token that the text names is one: a message may quote them."""
        tokenizer = self.target.tokenizer
        named = chat_prompt.count_control(tokenizer)(text)
        if not named:
            return True
        ids = {tokenizer.encode(name, add_special_tokens=False)[0] for name in chat_prompt.control_texts(tokenizer)}
        return named == sum(token in ids for token in tokens)

    def return_to_prefix_cache(self, session: Session, reserved: int = 0) -> None:
        """Put back the entry that a request came from, and keep nothing of the request."""
        self.prefixes.put_back(session.state, session.stats.reused_tokens, reserved)

    # ------------------------------------------------------------------------------------------------ adapters
    def use_adapter(self, adapter: LoadedAdapter | None) -> None:
        """Draft with `adapter`, or with the pristine draft (None). Call it between two rounds."""
        run_all(self.switch_adapter(adapter))

    def switch_adapter(self, adapter: LoadedAdapter | None) -> Steps[None]:
        """`use_adapter` in steps shorter than a round, between which rounds may run.

        New layers are made beside those that draft; only the last step replaces them.
        """
        draft, module, pristine = self.draft, self.draft_module, self._pristine
        if draft is None or module is None or pristine is None:
            return
        scorer = None
        if isinstance(draft, HeadDraft):
            hot = adapter.hot if adapter is not None and adapter.hot is not None else self._pristine_hot
            if hot is not None and hot is not draft.hot:
                scorer = yield from draft.scorer_steps(hot)
                yield
        form, layers = "none", dict[str, nn.Module]()
        if adapter is not None:
            form, layers = yield from fuse_steps(pristine.layers, adapter.shape, adapter.weights)
            if isinstance(draft, HeadDraft):
                for layer in layers.values():
                    draft.use_cpu_kernels_in_layer(layer)
                    yield
        pristine.restore()
        module.update_modules(tree_unflatten(list(layers.items())))
        if isinstance(draft, HeadDraft) and scorer is not None:
            draft.hot, draft.output = scorer
        # together: `status` reads them from another thread
        self.adapter_id, self.adapter_form = adapter.id if adapter is not None else "", form
        if isinstance(draft, HeadDraft):
            draft.use_cpu_kernels()
        elif on_cpu():
            use_cpu_kernels(draft.model, draft.blocks)
        self.request_history = self.request_history.for_new_draft()

    def clear_caches(self) -> None:
        """Return MLX's free memory to the system."""
        mx.clear_cache()
