"""From the settings' model names to a ready engine: target and draft found, checked and loaded.

Knows the settings tree, the models folder and the drafts that are shipped. Knows nothing of
requests or adapters. `load_engine` refuses before it loads anything where memory cannot
hold the models.
"""

from pathlib import Path

from specl.shared.engine.core import EngineCore, EngineOptions
from specl.shared.engine.custom_drafter import DrafterFactory, OnError
from specl.shared.errors import ModelError
from specl.shared.models import memory
from specl.shared.models.find import ensure_model
from specl.shared.models.head import HeadDraft, is_head, load_head
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.load import check_pair, load
from specl.shared.models.report import Report, no_report
from specl.shared.settings.plugins import load_plugin
from specl.shared.settings.schema import Settings

SHIPPED = Path(__file__).parents[1] / "models" / "drafts"


def draft_folder(name: str, models: Path) -> Path | None:
    """The folder of the draft `name`: a head's path, a built draft, or a shipped one."""
    built = models / "drafts" / name
    for folder in (Path(name).expanduser(), built, SHIPPED / name):
        if is_head(folder) or (folder is built and (folder / "config.json").is_file()):
            return folder
    return None


def resolve_draft(name: str | None, models: Path, report: Report) -> Path | None:
    """The folder of the draft `name`, head or language model. Raises ModelError if it is missing."""
    if name is None:
        return None
    folder = draft_folder(name, models)
    if folder is not None:
        return folder
    try:
        return ensure_model(name, models, report)
    except ModelError as error:
        raise _about_draft(error) from error


def _about_draft(error: ModelError) -> ModelError:
    return type(error)(f"the draft: {error}", error.hint or "set models.draft.name, or null to decode without a draft")


def load_draft(
    name: str | None, target: LanguageModel, models: Path, precision: str, report: Report
) -> HeadDraft | LanguageModel | None:
    """The draft for `target`. Raises ModelError if it is missing, damaged or does not fit."""
    folder = resolve_draft(name, models, report)
    if name is None or folder is None:
        return None
    if is_head(folder):
        return load_head(folder, name, target)
    try:
        draft = load(name, models, precision, report, folder)
    except ModelError as error:
        raise _about_draft(error) from error
    check_pair(target, draft)
    return draft


def estimate_pair(settings: Settings, target: Path, draft: Path | None) -> tuple[memory.Estimate, memory.Machine]:
    """The memory that the models in these folders will take on this machine."""
    machine = memory.this_machine(settings.models.precision)
    sizes = memory.size_of(target), memory.size_of(draft) if draft is not None else None
    return memory.estimate(*sizes, settings, machine), machine


def engine_options(settings: Settings) -> EngineOptions:
    """What the engine reads of the settings."""
    return EngineOptions(
        max_draft_tokens=settings.speculative.max_draft_tokens,
        max_kv_cache_tokens=settings.memory.max_kv_cache_tokens,
        precision=settings.models.precision,
    )


def load_engine(
    settings: Settings,
    models: Path,
    report: Report = no_report,
    training: bool = False,
    drafter_factory: DrafterFactory | None = None,
    on_error: OnError | None = None,
) -> EngineCore:
    """The engine with the settings' target and draft.

    `training` is for a process that trains beside the one that serves: its memory counts too, and
    it needs no custom drafter. `drafter_factory` replaces the drafter that `speculative.drafter`
    names; `on_error` receives a custom drafter's errors (see engine/custom_drafter.py). Raises
    ModelError, before anything is loaded, where memory cannot hold the models.
    """
    name, precision = settings.models.target.name, settings.models.precision
    target_folder = ensure_model(name, models, report)
    draft_path = resolve_draft(settings.models.draft.name, models, report)
    try:
        estimate, machine = estimate_pair(settings, target_folder, draft_path)
    except ModelError as error:  # an unusual config: `load` decides whether it can be served
        report(f"memory is not checked: {error}")
    else:
        memory.check(estimate, settings, machine, training)
    if drafter_factory is None and settings.speculative.drafter is not None and not training:
        drafter_factory = load_plugin(settings.speculative.drafter, "speculative.drafter")
    target = load(name, models, precision, report, target_folder)
    draft = load_draft(settings.models.draft.name, target, models, precision, report)
    return EngineCore(target, draft, engine_options(settings), drafter_factory, on_error)
