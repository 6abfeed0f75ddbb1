"""The engine in one's own process, for notebooks and scripts: `from specl import Engine`. No daemons, no sockets, no records.

with Engine.load() as engine:
    print(engine.generate("Why is the sky blue?", max_tokens=64, temperature=0).text)

One thread: MLX's arrays belong to the thread that made them.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specl.shared.answer_stats import AnswerStats
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

WISHES = (*SAMPLING_FIELDS, "max_tokens", "stop", "system", "num_draft_tokens", "ngram")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `finish_reason` is stop, length or cancelled; `stats` are those that the daemon gives."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: AnswerStats


class Engine:
    """A target with at most one draft, loaded here. `last` is the answer that was given last."""

    def __init__(self, core: "EngineCore", settings: Settings | None = None, paths: Paths | None = None) -> None:
        """From an engine that is loaded already; people call `Engine.load`."""
        self._core: EngineCore | None = core
        self._settings, self._paths = settings or load_settings(), paths
        self._thread = threading.get_ident()
        self.last: Answer | None = None
        self._totals = dict.fromkeys(("answers", "tokens", "rounds", "model_drafted", "model_accepted"), 0)
        self._seconds = 0.0

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
        """Load models by the names that the settings know (a folder, a hub name, a GGUF file, the built-in model).

        Without `target` the settings' own pair. `draft` "auto" is the settings' draft for the settings' target and none for
        another; None is none. `adapter`: an id, `current`, `best` or `latest` of the run directory. `drafter`: your own (see
        docs/api.md). Without `calibrate` four tokens are drafted a round, whatever that costs. Raises ModelError, AdapterRejected.
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

    # ------------------------------------------------------------------------------------------------ answers
    def generate(self, prompt: str | Messages, **wish: Any) -> Answer:
        """The whole answer. A text is a user's message; messages are taken as they are; the chat template is applied.

        wish: system, max_tokens, temperature, top_p, top_k, min_p, seed, stop (a text or several), num_draft_tokens, ngram.
        Raises RequestRejected for one that cannot be.
        """
        for _ in self.stream(prompt, **wish):
            pass
        assert self.last is not None
        return self.last

    def stream(self, prompt: str | Messages, **wish: Any) -> Iterator[str]:
        """Text as it is made; `last` is set at the end, also where the caller stops early."""
        core = self._ready()  # refused now, not at the first piece
        if unknown := sorted(set(wish) - set(WISHES)):
            raise RequestRejected(f"unknown: {', '.join(unknown)}", f"known are {', '.join(WISHES)}")
        rendered, tokens = core.encode_chat(
            to_messages(prompt, wish.get("system")), reuse_tokens=wish.get("seed") is None
        )
        session = core.session(tokens, self._options(wish))
        stop = wish.get("stop") or ()
        return self._answer(core, session, rendered, (stop,) if isinstance(stop, str) else tuple(stop))

    def _options(self, wish: dict[str, Any]) -> Any:
        from specl.shared.engine.request_options import RequestOptions

        defaults = self._settings.speculative
        given = {name: value for name, value in wish.items() if value is not None}
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

        began, first = time.perf_counter(), 0.0
        text = TextOutput(session, stop)
        try:
            while not session.prefill():
                pass
            while session.finish_reason is None:
                session.round()
                first = first or time.perf_counter()
                if piece := text.read().text:
                    yield piece
        except GeneratorExit:  # between two rounds: all that was made still stands
            session.finish_reason = session.finish_reason or "cancelled"
        self._finished(core, session, text.text, 1000 * (first - began) if first else 0.0)
        core.save_to_prefix_cache(session, core.adapter_id, rendered + text.text)

    def _finished(self, core: "EngineCore", session: "Session", text: str, ttft_ms: float) -> None:
        from specl.shared.engine.statistics import answer_stats

        stats = answer_stats(session, core.costs, ttft_ms)
        self.last = Answer(text, list(session.output), session.finish_reason or "", stats)
        self._totals["answers"] += 1
        self._totals["tokens"] += len(session.output)
        for name in ("rounds", "model_drafted", "model_accepted"):
            self._totals[name] += getattr(stats, name)
        self._seconds += session.stats.decode_s

    def stats(self) -> dict[str, Any]:
        """Of all answers so far: how many, tokens, rounds, acceptance (null before anything was drafted), tokens per second."""
        core, totals = self._ready(), self._totals
        drafted, seconds = totals["model_drafted"], self._seconds
        return {
            **totals,
            "acceptance_rate": round(totals["model_accepted"] / drafted, 4) if drafted else None,
            "tokens_per_second": round(totals["tokens"] / seconds, 2) if seconds else None,
            "target": core.target.name,
            "draft": core.draft.name if core.draft is not None else None,
            "adapter_id": core.adapter_id,
        }

    # ------------------------------------------------------------------------------------------------ adapters, the end
    def use_adapter(self, name: str) -> None:
        """Draft with an adapter of the run directory (an id, `current`, `best`, `latest`), or with none where `name` is empty.

        Raises AdapterRejected for one that is not there or does not fit.
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
        """Let the models go. Closing twice does no harm."""
        if self._core is not None:
            from specl.shared.models.free_memory import free_memory

            self._core = None
            free_memory()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _with_models(settings: Settings, target: str | None, draft: str | None) -> Settings:
    """Settings with these models in place of their own."""
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
