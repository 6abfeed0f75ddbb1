"""The engine in the caller's process, for notebooks and scripts: `from specl import Engine`. No
daemons, no sockets, no records.

with Engine.load() as engine:
    print(engine.generate("Why is the sky blue?", max_tokens=64, temperature=0).text)

An Engine is used by the thread that loaded it, because an MLX array belongs to the thread
that made it.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specl.shared.answer_stats import AnswerStats, AnswerTotals
from specl.shared.conversations import Messages, to_messages
from specl.shared.errors import AdapterRejected, RequestRejected, SpecLoraError
from specl.shared.paths import Paths, find_paths
from specl.shared.sampling_params import SAMPLING_FIELDS, merge_sampling
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings

if TYPE_CHECKING:
    from specl.shared.engine.core import EngineCore
    from specl.shared.engine.custom_drafter import DrafterFactory
    from specl.shared.engine.decode import Session
    from specl.shared.engine.request_options import RequestOptions

OPTIONS = (*SAMPLING_FIELDS, "max_tokens", "stop", "system", "num_draft_tokens", "ngram")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `finish_reason` is stop, length or cancelled; the daemon gives the same `stats`."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: AnswerStats


class Engine:
    """A target and at most one draft, loaded in this process. `last` is the last answer."""

    def __init__(self, core: "EngineCore", settings: Settings | None = None, paths: Paths | None = None) -> None:
        """Wrap an engine that is already loaded; users call `Engine.load`."""
        self._core: EngineCore | None = core
        self._settings, self._paths = settings or load_settings(), paths
        self._thread = threading.get_ident()
        self.last: Answer | None = None
        self._totals = AnswerTotals()

    @classmethod
    def load(
        cls,
        target: str | None = None,
        draft: str | None = AUTO,
        *,
        adapter: str = "",
        drafter: "DrafterFactory | None" = None,
        settings: Settings | None = None,
        paths: Paths | None = None,
        calibrate: bool = True,
    ) -> "Engine":
        """Load models by the names that the settings know (a folder, a hub name, a GGUF file, the
        built-in model).

        Without `target`, the settings' pair is loaded. `draft`: "auto" is the settings' draft if
        the target is the settings' target, and no draft for any other target; None is no draft.
        `adapter`: an id, `current`, `best` or `latest` of the run directory. `drafter` makes a
        custom drafter (docs/api.md). Without `calibrate`, every round drafts four tokens, whatever
        that costs. Raises ModelError and AdapterRejected.
        """
        from specl.shared.loading.costs import load_or_calibrate
        from specl.shared.loading.engine import load_engine

        settings, paths = settings or load_settings(), (paths or find_paths()).create()
        core = load_engine(_with_models(settings, target, draft), paths.models, drafter_factory=drafter)
        engine = cls(core, settings, paths)
        if calibrate:
            load_or_calibrate(core, paths.costs)
        if adapter:
            engine.use_adapter(adapter)
        return engine

    # -------------------------------------------------------------------------------------- answers
    def generate(self, prompt: str | Messages, **options: Any) -> Answer:
        """The complete answer. `prompt` is the user's message, or a list of chat messages; the chat
        template is applied.

        options: system, max_tokens, temperature, top_p, top_k, min_p, seed, stop (a text or
        several), num_draft_tokens, ngram. Raises RequestRejected for an unknown option and for a
        value that is not allowed.
        """
        for _ in self.stream(prompt, **options):
            pass
        assert self.last is not None
        return self.last

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[str]:
        """The text of the answer, piece by piece. `last` is set at the end, also if the caller
        stops early. Options: see `generate`.
        """
        core = self._ready()  # errors are raised here, not at the first piece
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise RequestRejected(f"unknown: {', '.join(unknown)}", f"known are {', '.join(OPTIONS)}")
        engine_options = self._engine_options(options)
        rendered, tokens = core.encode_chat(
            to_messages(prompt, options.get("system")), reuse_tokens=engine_options.sampling.seed is None
        )
        session = core.session(tokens, engine_options)
        stop = options.get("stop") or ()
        return self._answer(core, session, rendered, (stop,) if isinstance(stop, str) else tuple(stop))

    def _engine_options(self, options: dict[str, Any]) -> "RequestOptions":
        """Options of the engine: those of the caller, and the defaults of the settings."""
        from specl.shared.engine.request_options import RequestOptions

        defaults = self._settings.speculative
        given = {name: value for name, value in options.items() if value is not None}
        sampling = merge_sampling(defaults, {name: given[name] for name in SAMPLING_FIELDS if name in given})
        fixed = defaults.num_draft_tokens if defaults.num_draft_tokens != "auto" else None
        return RequestOptions(
            sampling=sampling,
            max_tokens=given.get("max_tokens", defaults.max_tokens),
            num_draft_tokens=given.get("num_draft_tokens", fixed),
            ngram=given.get("ngram", defaults.ngram),
        )

    def _answer(self, core: "EngineCore", session: "Session", rendered: str, stop: tuple[str, ...]) -> Iterator[str]:
        from specl.shared.engine.text_output import TextOutput

        start, first = time.perf_counter(), 0.0
        text = TextOutput(session, stop)
        try:
            while not session.prefill():
                pass
            while session.finish_reason is None:
                session.round()
                first = first or time.perf_counter()
                if piece := text.read().text:
                    yield piece
        except GeneratorExit:  # the caller left between two rounds: the tokens so far are valid
            session.finish_reason = session.finish_reason or "cancelled"
        self._finished(core, session, text.text, 1000 * (first - start) if first else 0.0)
        core.save_to_prefix_cache(session, core.adapter_id, rendered + text.text)

    def _finished(self, core: "EngineCore", session: "Session", text: str, ttft_ms: float) -> None:
        from specl.shared.engine.statistics import answer_stats

        stats = answer_stats(session, core.costs, ttft_ms)
        self.last = Answer(text, list(session.output), session.finish_reason or "", stats)
        self._totals.add(len(session.output), stats)

    def stats(self) -> dict[str, Any]:
        """Totals of all answers so far. Acceptance is None before anything was drafted, the speed
        before anything was decoded.
        """
        core, totals = self._ready(), self._totals
        return {
            "answers": totals.answers,
            "tokens": totals.tokens,
            "rounds": totals.rounds,
            "model_drafted": totals.drafted,
            "model_accepted": totals.accepted,
            "acceptance_rate": None if totals.acceptance is None else round(totals.acceptance, 4),
            "tokens_per_second": round(totals.tokens_per_second, 2) or None,
            "target": core.target.name,
            "draft": core.draft.name if core.draft is not None else None,
            "adapter_id": core.adapter_id,
        }

    # ---------------------------------------------------------------------------- adapters, the end
    def use_adapter(self, name: str) -> None:
        """Draft with an adapter of the run directory (an id, `current`, `best` or `latest`); with
        an empty name, without any.

        Raises AdapterRejected for an adapter that does not exist or does not fit the draft.
        """
        from specl.shared.adapters.registry import Adapters
        from specl.shared.adapters.tensors import load_adapter

        core = self._ready()
        if not name:
            core.use_adapter(None)
            return
        adapters = Adapters((self._paths or find_paths()).adapters)
        id = adapters.resolve(name)
        if not id:
            raise AdapterRejected(f"there is no adapter {name!r} in {adapters.folder}")
        core.use_adapter(load_adapter(adapters, adapters.folder / id, core)[0])

    def _ready(self) -> "EngineCore":
        if self._core is None:
            raise SpecLoraError("this engine is closed", "load another with Engine.load")
        if threading.get_ident() != self._thread:
            raise SpecLoraError("this engine belongs to the thread that loaded it", "load and use it in one thread")
        return self._core

    def close(self) -> None:
        """Free the models. Closing twice is allowed."""
        if self._core is not None:
            from specl.shared.models.free_memory import free_memory

            self._core = None
            free_memory()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _with_models(settings: Settings, target: str | None, draft: str | None) -> Settings:
    """The settings with these models in place of those that they name."""
    models = settings.models
    name = target or models.target.name
    if draft == AUTO:
        draft = models.draft.name if name == models.target.name else None
    changed = models.model_copy(
        update={
            "target": models.target.model_copy(update={"name": name}),
            "draft": models.draft.model_copy(update={"name": draft}),
        }
    )
    return settings.model_copy(update={"models": changed})
